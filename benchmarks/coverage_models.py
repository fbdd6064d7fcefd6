"""Networks of the coverage list that are neither torchvision nor timm classifiers: generators of (name, factory, input shape)."""
# ruff: noqa: D101, D102, D103

import torch
import torchvision
from torch import nn


def tvseg():
    m = torchvision.models
    for n in ("segmentation.deeplabv3_mobilenet_v3_large", "segmentation.lraspp_mobilenet_v3_large", "segmentation.fcn_resnet50"):
        name = n.split(".")[1]
        yield f"tv:{n}", (lambda name=name: m.get_model(name, weights=None, weights_backbone=None)), (3, 256, 256)
        yield f"tv:{n}[out]", (lambda name=name: OutOnly(m.get_model(name, weights=None, weights_backbone=None))), (3, 256, 256)
    for name in ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"):
        yield f"tv:detection.{name}", (lambda name=name: m.get_model(name, weights=None, weights_backbone=None)), (3, 320, 320)


class OutOnly(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)["out"]


class Logits(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).logits


class BertLogits(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(input_ids=x.long().flatten(1)).logits


def smp():
    import segmentation_models_pytorch as s

    for arch, enc in (
        ("Unet", "resnet18"),
        ("FPN", "mobilenet_v2"),
        ("DeepLabV3Plus", "timm-mobilenetv3_large_100"),
        ("Linknet", "resnet34"),
        ("Unet", "efficientnet-b0"),
        ("PSPNet", "resnet18"),
    ):
        yield (
            f"smp:{arch}-{enc}",
            (lambda arch=arch, enc=enc: getattr(s, arch)(encoder_name=enc, encoder_weights=None, classes=5)),
            (3, 128, 128),
        )


def hf():
    import transformers as T

    cfg = {
        "vit": lambda: T.ViTForImageClassification(
            T.ViTConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=64,
                patch_size=16,
                num_labels=10,
            )
        ),
        "deit": lambda: T.DeiTForImageClassification(
            T.DeiTConfig(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=128,
                image_size=64,
                patch_size=16,
                num_labels=10,
            )
        ),
        "mobilevit": lambda: T.MobileViTForImageClassification(
            T.MobileViTConfig(
                hidden_sizes=[48, 64, 80], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96], image_size=64, num_labels=10
            )
        ),
        "resnet": lambda: T.ResNetForImageClassification(
            T.ResNetConfig(
                embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
            )
        ),
        "swin": lambda: T.SwinForImageClassification(
            T.SwinConfig(
                image_size=64, patch_size=4, embed_dim=24, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4, num_labels=10
            )
        ),
        "convnext": lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(hidden_sizes=[24, 48, 64, 96], depths=[1, 1, 2, 1], num_labels=10)
        ),
        "mobilenet_v2": lambda: T.MobileNetV2ForImageClassification(T.MobileNetV2Config(num_labels=10)),
        "mobilenet_v1": lambda: T.MobileNetV1ForImageClassification(T.MobileNetV1Config(num_labels=10)),
        "efficientnet": lambda: T.EfficientNetForImageClassification(
            T.EfficientNetConfig(num_labels=10, hidden_dim=1280, image_size=64, width_coefficient=0.5, depth_coefficient=0.5)
        ),
        "regnet": lambda: T.RegNetForImageClassification(
            T.RegNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], groups_width=16, num_labels=10)
        ),
    }
    for k, f in cfg.items():
        yield f"hf:{k}", f, (3, 64, 64)
        yield f"hf:{k}[logits]", (lambda f=f: Logits(f())), (3, 64, 64)

    def b():
        return T.BertForSequenceClassification(
            T.BertConfig(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=1000, num_labels=4
            )
        )

    yield "hf:bert-tiny[logits]", (lambda: BertLogits(b())), (1, 1, 16)


class Audio(nn.Module):
    def __init__(self, n=10):
        super().__init__()
        L = []
        c = 1
        for o, k, s in ((32, 80, 4), (64, 3, 1), (128, 3, 1)):
            L += [nn.Conv1d(c, o, k, s, k // 2), nn.BatchNorm1d(o), nn.ReLU(), nn.MaxPool1d(4)]
            c = o
        self.f = nn.Sequential(*L)
        self.h = nn.Linear(c, n)

    def forward(self, x):  # (N, 1, 1, T)
        return self.h(self.f(x.flatten(2)).mean(-1))


class Audio3(Audio):
    def forward(self, x):
        return self.h(self.f(x).mean(-1))


class Kws(nn.Module):  # 2-D keyword spotting, DS-CNN
    def __init__(self, n=12):
        super().__init__()
        L = [nn.Conv2d(1, 64, (10, 4), (2, 2), (5, 1)), nn.BatchNorm2d(64), nn.ReLU()]
        for _ in range(4):
            L += [
                nn.Conv2d(64, 64, 3, 1, 1, groups=64),
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.Conv2d(64, 64, 1),
                nn.BatchNorm2d(64),
                nn.ReLU(),
            ]
        self.f = nn.Sequential(*L, nn.Dropout(0.2), nn.AvgPool2d((24, 5)), nn.Flatten())
        self.h = nn.Linear(64, n)

    def forward(self, x):
        return self.h(self.f(x))


class CBS(nn.Module):
    def __init__(s, i, o, k=1, st=1):
        super().__init__()
        s.c = nn.Conv2d(i, o, k, st, k // 2, bias=False)
        s.b = nn.BatchNorm2d(o)
        s.a = nn.SiLU(inplace=True)

    def forward(s, x):
        return s.a(s.b(s.c(x)))


class Bott(nn.Module):
    def __init__(s, c, add=True):
        super().__init__()
        s.a, s.b, s.add = CBS(c, c), CBS(c, c, 3), add

    def forward(s, x):
        return x + s.b(s.a(x)) if s.add else s.b(s.a(x))


class C3(nn.Module):
    def __init__(s, i, o, n=1, add=True):
        super().__init__()
        h = o // 2
        s.c1, s.c2, s.c3 = CBS(i, h), CBS(i, h), CBS(2 * h, o)
        s.m = nn.Sequential(*[Bott(h, add) for _ in range(n)])

    def forward(s, x):
        return s.c3(torch.cat((s.m(s.c1(x)), s.c2(x)), 1))


class C2f(nn.Module):
    def __init__(s, i, o, n=1):
        super().__init__()
        s.h = o // 2
        s.c1, s.c2 = CBS(i, o), CBS((2 + n) * s.h, o)
        s.m = nn.ModuleList(Bott(s.h) for _ in range(n))

    def forward(s, x):
        y = list(s.c1(x).chunk(2, 1))
        for m in s.m:
            y.append(m(y[-1]))
        return s.c2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(s, c):
        super().__init__()
        s.a, s.b, s.p = CBS(c, c // 2), CBS(2 * c, c), nn.MaxPool2d(5, 1, 2)

    def forward(s, x):
        x = s.a(x)
        y = s.p(x)
        z = s.p(y)
        return s.b(torch.cat((x, y, z, s.p(z)), 1))


class Yolo(nn.Module):
    """YOLOv5/8-like toy: multi-output when raw, else concatenated predictions or class logits."""

    def __init__(s, block=C3, out="list", nc=10):
        super().__init__()
        s.out = out
        s.s = nn.Sequential(CBS(3, 16, 3, 2), CBS(16, 32, 3, 2), block(32, 32))
        s.p3 = nn.Sequential(CBS(32, 64, 3, 2), block(64, 64, 2))
        s.p4 = nn.Sequential(CBS(64, 128, 3, 2), block(128, 128, 2))
        s.p5 = nn.Sequential(CBS(128, 256, 3, 2), block(256, 256), SPPF(256))
        s.l5 = CBS(256, 128)
        s.up = nn.Upsample(scale_factor=2)
        s.n4 = block(256, 128)
        s.l4 = CBS(128, 64)
        s.n3 = block(128, 64)
        s.h3, s.h4, s.h5 = nn.Conv2d(64, 3 * (5 + nc), 1), nn.Conv2d(128, 3 * (5 + nc), 1), nn.Conv2d(256, 3 * (5 + nc), 1)
        s.cls = nn.Linear(256, nc)

    def forward(s, x):
        x = s.s(x)
        a = s.p3(x)
        b = s.p4(a)
        c = s.p5(b)
        if s.out == "cls":
            return s.cls(c.mean((2, 3)))
        t = s.l5(c)
        n4 = s.n4(torch.cat((s.up(t), b), 1))
        n3 = s.n3(torch.cat((s.up(s.l4(n4)), a), 1))
        o = [s.h3(n3), s.h4(n4), s.h5(c)]
        return o if s.out == "list" else torch.cat([i.flatten(2) for i in o], 2)


def own():
    yield "own:audio1d (N,1,1,T)", Audio, (1, 1, 4000)
    yield "own:audio1d (N,1,T)", Audio3, (1, 4000)
    yield "own:ds-cnn kws", Kws, (1, 49, 10)
    for b in (C3, C2f):
        for o in ("list", "cat", "cls"):
            yield f"own:yolo-{b.__name__}-{o}", (lambda b=b, o=o: Yolo(b, o)), (3, 128, 128)


def _named(generator):
    return lambda: ((name, factory) for name, factory, _ in generator())


GENERATORS = {"tv": _named(tvseg), "hf": _named(hf), "own": _named(own), "smp": _named(smp)}
