"""Loading a user's network: the weights that are asked for are the ones that compute, and bad input is one line."""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.user_code import user_factory
from edge_compress.pipeline.errors import InputError, UnavailableError
from edge_compress.pipeline.network.weights import state_sha256
from edge_compress.pipeline.signature import Crop
from edge_compress.pipeline.task.checkpoint import put_state, read_state
from edge_compress.pipeline.task.models import LoadedModel, evaluation_crop, initial_network, load_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

NET = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

MEAN = (0.5, 0.4, 0.3)
STD = [0.2, 0.2, 0.2]

@dataclass(frozen=True)
class Config:
    width: int = 4

class Net(nn.Module):
    def __init__(self, num_classes=5, config=Config()):
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, 3, padding=1)
        self.bn = nn.BatchNorm2d(config.width)
        self.fc = nn.Linear(config.width, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

def fixed():
    return Net(5)

def sized(num_classes):
    return Net(num_classes)

def needs(path):
    return Net()

def raises():
    raise RuntimeError("no licence\\nfor this")

def number():
    return 7

def pair():
    class Pair(Net):
        def forward(self, x):
            return super().forward(x), x
    return Pair()

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))

class Broken(Net):
    def forward(self, x):
        return super().forward(x) / 0

net = Net()
"""
SHAPE = (3, 8, 8)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def made(net: Path, factory: str = "fixed") -> nn.Module:
    module = user_factory(f"{net}:{factory}", "model").function()
    assert isinstance(module, nn.Module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module.eval()


def saved(net: Path, state: Any = None, name: str = "net.pt") -> Path:
    torch.save(made(net).state_dict() if state is None else state, net.parent / name)
    return net.parent / name


def load(spec: str | Path, weights: Path | None, classes: int = 5, image_shape: tuple[int, int, int] = SHAPE) -> LoadedModel:
    return load_model(str(spec), weights, classes=classes, image_shape=image_shape)


def refusal(spec: str | Path, weights: Path | None, classes: int = 5, image_shape: tuple[int, int, int] = SHAPE) -> str:
    with pytest.raises(InputError) as caught:
        load(spec, weights, classes, image_shape)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- what is loaded computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["fixed", "sized", "Net"])
def test_file_factory_with_its_weights_computes_what_the_original_computes(net: Path, factory: str) -> None:
    original = made(net)
    loaded = load(f"{net}:{factory}", saved(net))
    images = torch.randn(4, *SHAPE)
    assert torch.equal(loaded.module(images), original(images))
    assert not loaded.module.training
    assert loaded.name == f"net.py:{factory}"
    assert loaded.mean == (0.5, 0.4, 0.3)
    assert loaded.std == (0.2, 0.2, 0.2)
    assert loaded.sha256 == state_sha256(original)
    assert not any(name == "net" for name in sys.modules)


def test_wrapped_prefixed_and_half_precision_states_give_the_same_network(net: Path) -> None:
    state = {k: v.half().float() if v.is_floating_point() else v for k, v in made(net).state_dict().items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    parallel = {f"module.{k}": v for k, v in state.items()}
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(half, net.parent / "half.safetensors")
    variants = [
        saved(net, state, "plain.pth"),
        saved(net, {"state_dict": parallel, "epoch": 3}, "wrapped.pt"),
        saved(net, {"model": half, "arch": "net"}, "half.pt"),
        saved(net, {f"_orig_mod.{k}": v for k, v in state.items()}, "compiled.pt"),
        saved(net, old, "old.pt"),
        net.parent / "half.safetensors",
    ]
    loaded = [load(f"{net}:fixed", path) for path in variants]
    assert len({m.sha256 for m in loaded}) == 1
    assert all(p.dtype == torch.float32 for m in loaded for p in m.module.parameters())


def test_package_factory_is_imported_from_the_working_folder(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (net.parent / "some_package_of_mine").mkdir()
    (net.parent / "some_package_of_mine" / "nets.py").write_text(NET)
    weights = saved(net)
    monkeypatch.chdir(net.parent)
    path = list(sys.path)
    loaded = load("some_package_of_mine.nets:sized", weights)
    assert loaded.name == "some_package_of_mine.nets:sized"
    assert loaded.mean == (0.5, 0.4, 0.3)
    assert sys.path == path


def test_a_file_may_import_what_lies_beside_it(net: Path) -> None:
    (net.parent / "layers_beside_it.py").write_text("WIDTH = 4\n")
    (net.parent / "user.py").write_text(NET.replace("import torch\n", "import torch\nfrom layers_beside_it import WIDTH\n", 1))
    path = list(sys.path)
    assert load(f"{net.parent / 'user.py'}:fixed", saved(net)).sha256 == state_sha256(made(net))
    assert sys.path == path


def test_torchvision_network_is_sized_for_the_data_and_takes_its_weights(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    original = squeezenet1_1(num_classes=7).eval()
    torch.save(original.state_dict(), tmp_path / "net.pt")
    loaded = load("torchvision:squeezenet1_1", tmp_path / "net.pt", 7, (3, 64, 64))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.module(images), original(images))
    assert loaded.mean == (0.485, 0.456, 0.406)
    assert "did you mean 'resnet18'" in refusal("torchvision:resnet_18", tmp_path / "net.pt")
    assert "did you mean 'resnet18'" in refusal("torchvision:resnet_18", None)  # the name comes first: no weights would help


def test_timm_network_brings_its_statistics(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    original = timm.create_model("test_resnet", pretrained=False, num_classes=7).eval()
    torch.save(original.state_dict(), tmp_path / "net.pt")
    loaded = load("timm:test_resnet", tmp_path / "net.pt", 7, (3, 64, 64))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.module(images), original(images))
    assert loaded.mean == tuple(original.default_cfg["mean"])
    assert loaded.std == tuple(original.default_cfg["std"])
    assert "did you mean" in refusal("timm:test_resnett", tmp_path / "net.pt", 7)


@pytest.mark.parametrize(
    ("spec", "crop"),
    [
        ("torchvision:resnet18", Crop(224, 256, "bilinear")),
        ("torchvision:inception_v3", Crop(299, 342, "bilinear")),
        ("torchvision:efficientnet_b3", Crop(300, 320, "bicubic")),
        ("torchvision:no_such_model", None),
        ("timm:inception_v3", Crop(299, 341, "bicubic")),
        ("timm:resnet50.a1_in1k", Crop(224, 235, "bicubic")),
        ("timm:no_such_model", None),
        ("digits-resnet", None),
    ],
)
def test_the_evaluation_crop_is_the_published_one(spec: str, crop: Crop | None) -> None:
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    assert evaluation_crop(spec) == crop


def test_timm_that_is_not_installed_is_unavailable_with_the_extra(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnavailableError, match=r"pip install -c constraints.txt \'\.\[timm\]\'"):
        load("timm:resnet18", saved(net))


def test_digits_resnet_needs_no_weights_and_does_not_touch_the_random_state() -> None:
    before = torch.random.get_rng_state()
    first, again = (load("digits-resnet", None, 10, (1, 8, 8)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.sha256 == again.sha256
    assert first.mean is not None
    assert re.search(r"fails on an input \(1, 3, 8, 8\)", refusal("digits-resnet", None, 10))
    assert "classes do not match" in refusal("digits-resnet", None, 7, (1, 8, 8))


# -- the digest ----------------------------------------------------------------------------------------------------------


def test_state_digest_sees_values_names_types_and_shapes_but_not_order() -> None:
    def module(**tensors: torch.Tensor) -> nn.Module:
        made = nn.Module()
        for name, tensor in tensors.items():
            made.register_buffer(name, tensor)
        return made

    a, b = torch.arange(6.0), torch.zeros(())
    digests = [
        state_sha256(m)
        for m in (
            module(a=a, b=b),
            module(a=a + torch.tensor([0, 0, 0, 0, 0, 1e-5]), b=b),
            module(a=a.view(2, 3), b=b),
            module(a=a, c=b),
            module(a=a.bfloat16(), b=b),
        )
    ]
    assert len(set(digests)) == 5
    assert state_sha256(module(b=b, a=a)) == digests[0]
    assert state_sha256(module(a=torch.stack([a, a], 1)[:, 0], b=b)) == digests[0]  # strided the other way


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("absent", "found no 'absent'"),
        ("fixd", "did you mean 'fixed'"),
        ("net", "a Net"),
        ("needs", "TypeError: needs.. missing 1 required positional argument: 'path'"),
        ("raises", "RuntimeError: no licence for this"),
        ("number", "found a int, expected a torch.nn.Module"),
        ("pair", "its output: found a tuple"),
        ("lazy", "expected no lazy layers"),
        ("Broken", "found NaN or infinity, expected finite logits"),
    ],
)
def test_unusable_factories_are_refused_with_their_own_words(net: Path, factory: str, message: str) -> None:
    assert re.search(message, refusal(f"{net}:{factory}", saved(net)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import no_such_package_here\n", "no_such_package_here"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_files_that_do_not_run_are_refused_and_leave_nothing_behind(net: Path, text: str, message: str) -> None:
    bad, weights = net.parent / "bad.py", saved(net)
    modules, path = set(sys.modules), list(sys.path)
    bad.write_text(text)
    assert message in refusal(f"{bad}:f", weights)
    assert not [name for name in set(sys.modules) - modules if name.startswith("_edge_compress")]
    assert sys.path == path


def test_unknown_specs_and_missing_files_are_refused(net: Path) -> None:
    weights = saved(net)
    assert "digits-resnet, torchvision:NAME" in refusal("resnet", weights)
    assert "no such file" in refusal(f"{net.parent / 'absent.py'}:f", weights)
    assert "No module named 'absent_package'" in refusal("absent_package.nets:f", weights)
    assert "--weights" in refusal(f"{net}:fixed", None)
    assert "--weights" in refusal("torchvision:resnet18", None)


@pytest.mark.parametrize(
    ("line", "message"), [("STD = (0, 1, 1)", "from 1e-06"), ("MEAN = 0.5", "MEAN: found 0.5"), ("MEAN = (1, 2)", "3 numbers")]
)
def test_statistics_that_cannot_be_are_refused(net: Path, line: str, message: str) -> None:
    weights = saved(net)
    net.write_text(NET + line + "\n")
    assert message in refusal(f"{net}:fixed", weights)


class Code:
    """A class of this file: a pickle of it is code."""


def test_weights_that_are_no_state_dict_are_refused(net: Path) -> None:
    spec = f"{net}:fixed"
    assert "no such file" in refusal(spec, net.parent / "absent.pt")
    assert "expected a state dict" in refusal(spec, net)  # a Python file
    message = refusal(spec, saved(net, nn.Linear(2, 2), "module.pt"))
    assert "a pickle of code (torch.nn.modules.linear.Linear)" in message
    assert "torch.save(model.state_dict(), FILE)" in message
    assert "a pickle of code" in refusal(spec, saved(net, {"state_dict": {}, "args": Code()}, "args.pt"))
    assert "found a Tensor" in refusal(spec, saved(net, torch.zeros(3), "tensor.pt"))
    assert "an empty one" in refusal(spec, saved(net, {}, "empty.pt"))
    assert "'epoch' with a int" in refusal(spec, saved(net, {"epoch": 3}, "epoch.pt"))
    end_only = b"PK\x05\x06" + b"\xff" * 18  # is_zipfile() takes it for a zip
    (net.parent / "end.pt").write_bytes(b"x" * 40 + end_only)
    assert "expected a state dict" in refusal(spec, net.parent / "end.pt")
    for name in ("noise.pt", "noise.safetensors", "nothing.pt", "zip.pth"):
        content = {"nothing.pt": b"", "zip.pth": b"PK\x03\x04 and then nothing"}.get(name, b"\x93 no weights in here")
        (net.parent / name).write_bytes(content)
        assert "expected a state dict" in refusal(spec, net.parent / name)


def test_weights_of_another_model_are_named_with_the_first_key_and_the_count(net: Path) -> None:
    spec, state = f"{net}:fixed", made(net).state_dict()
    renamed = {k.replace("conv", "stem"): v for k, v in state.items()}
    message = refusal(spec, saved(net, renamed))
    assert "2 missing keys (first: conv.weight), 2 unexpected keys (first: stem.weight)" in message
    wide = {**state, "conv.weight": torch.zeros(6, 3, 3, 3), "conv.bias": torch.zeros(6)}
    message = refusal(spec, saved(net, wide))
    assert "conv.weight of shape (6, 3, 3, 3) (2 keys of another shape), expected (4, 3, 3, 3)" in message


def test_only_the_last_layer_differing_means_other_classes(net: Path) -> None:
    state = made(net).state_dict() | {"fc.weight": torch.zeros(9, 4), "fc.bias": torch.zeros(9)}
    message = refusal(f"{net}:sized", saved(net, state))
    assert "classes do not match" in message
    assert "did you mean data with 9 classes? This has 5" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(net: Path, value: float) -> None:
    state = made(net).state_dict()
    state["bn.running_var"][1] = value
    assert "NaN or infinity in bn.running_var (1 of 4 values)" in refusal(f"{net}:fixed", saved(net, state))


def test_values_too_large_for_the_module_are_refused(net: Path) -> None:
    state = {k: v.double() for k, v in made(net).state_dict().items()} | {"fc.bias": torch.full((5,), 1e300, dtype=torch.float64)}
    assert "fc.bias" in refusal(f"{net}:fixed", saved(net, state))


def test_data_of_other_classes_or_shape_is_refused(net: Path) -> None:
    weights = saved(net)
    message = refusal(f"{net}:fixed", weights, classes=10)
    assert "classes do not match: found output (1, 5), expected (1, 10)" in message
    (net.parent / "net1.py").write_text(NET.replace("MEAN", "A").replace("STD", "B"))
    message = refusal(f"{net.parent / 'net1.py'}:fixed", weights, image_shape=(1, 8, 8))
    assert "fails on an input (1, 1, 8, 8)" in message
    assert "expected input" in message


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_one_missing_extra_or_reshaped_key_is_named(data: st.DataObject) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    state = module.state_dict()
    key = data.draw(st.sampled_from([k for k in state if not k.endswith("num_batches_tracked")]))
    kind = data.draw(st.sampled_from(["missing", "unexpected", "shape"]))
    changed = {
        "missing": {k: v for k, v in state.items() if k != key},
        "unexpected": {**state, f"extra.{key}": state[key]},
        "shape": {**state, key: torch.zeros(*state[key].shape, 2)},
    }[kind]
    with pytest.raises(InputError, match=re.escape(key)):
        put_state(module, changed, "net.pt", classes=3)
    raised = {k: v + 1 for k, v in state.items()}
    put_state(module, raised, "net.pt", classes=3)
    assert torch.equal(module.state_dict()[key], raised[key])


def test_read_state_strips_nothing_that_only_some_keys_have(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "net.pt")
    assert set(read_state(tmp_path / "net.pt")) == {"module.a", "b"}


@pytest.mark.parametrize(
    "form",
    [
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()} | {"loss.weight": torch.ones(3)}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {"model_state_dict": s, "epoch": 3},
        lambda s: {"net": s},
        lambda s: {"state_dict": {k: torch.zeros_like(v) for k, v in s.items()}, "state_dict_ema": s},
        lambda s: s | {"conv.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        lambda s: {"state_dict": s, "best": np.float64(0.9), "args": argparse.Namespace(lr=0.1), "from": Path("runs/a")},
        lambda s: {"state_dict": s, "curve": np.arange(3.0)},
        lambda s: (
            {("conv.weight_orig" if k == "conv.weight" else k): v for k, v in s.items()}
            | {"conv.weight_mask": torch.ones_like(s["conv.weight"])}
        ),
    ],
    ids=["lightning", "compiled and parallel", "model_state_dict", "net", "averaged", "thop", "what else", "array", "pruned"],
)
def test_checkpoints_as_training_scripts_write_them_give_the_network(net: Path, form: Any) -> None:
    state = made(net).state_dict()
    assert load(f"{net}:fixed", saved(net, form(state), "form.pt")).sha256 == load(f"{net}:fixed", saved(net, state)).sha256


@pytest.mark.parametrize("wrapper", ["torch.compile", "nn.DataParallel"])
def test_a_network_in_a_wrapper_is_the_network_and_that_is_said(net: Path, wrapper: str) -> None:
    net.write_text(f"{net.read_text()}\n\ndef wrapped():\n    return {wrapper}(fixed())\n")
    weights = saved(net, made(net).state_dict())
    found = load(f"{net}:wrapped", weights)
    assert found.sha256 == load(f"{net}:fixed", weights).sha256
    assert found.notes[0].endswith("was unwrapped")


UNUSABLE = {
    "meta": ("with torch.device('meta'):\n        return fixed()", "conv.weight, a tensor on the meta device"),
    "meta in a wrapper": (
        "with torch.device('meta'):\n        return nn.DataParallel(fixed())",
        "conv.weight, a tensor on the meta device",
    ),
    "meta buffer": (
        "net = fixed()\n    net.register_buffer('mean', torch.zeros(3, device='meta'))\n    return net",
        "mean, a tensor on the meta device",
    ),
    "exported": ("return torch.export.export(fixed().eval(), (torch.zeros(1, 3, 8, 8),)).module()", "an exported program"),
    "exported inside": (
        "return nn.Sequential(torch.export.export(fixed().eval(), (torch.zeros(1, 3, 8, 8),)).module())",
        "an exported program",
    ),
    "its own eval": (
        "class Odd(Net):\n        def train(self, mode=True):\n            raise RuntimeError('always trains')\n    return Odd()",
        "RuntimeError: always trains",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_networks_that_cannot_be_put_into_eval_mode_are_refused_for_a_run_and_an_inspection(net: Path, kind: str) -> None:
    body, told = UNUSABLE[kind]
    weights = saved(net)
    net.write_text(f"{NET}\n\ndef odd():\n    {body}\n")
    assert told in refusal(f"{net}:odd", weights)
    with pytest.raises(InputError, match=re.escape(told)):
        initial_network(f"{net}:odd", None)


def test_one_logit_for_two_classes_is_refused_with_what_makes_two_of_it(net: Path) -> None:
    net.write_text(
        NET + "\n\ndef binary():\n    return Net(1)\n\nclass Two(Net):\n    def forward(self, x):\n"
        "        y = super().forward(x)\n        return torch.cat([-y / 2, y / 2], 1)\n\ndef wrapped():\n    return Two(1)\n"
    )
    weights = saved(net, made(net, "binary").state_dict(), "one.pt")
    message = refusal(f"{net}:binary", weights, classes=2)
    assert "classes do not match: found output (1, 1), expected (1, 2)" in message
    assert "return torch.cat([-y / 2, y / 2], 1)" in message
    assert "torch.cat" not in refusal(f"{net}:binary", weights, classes=3)
    images = torch.rand(4, *SHAPE)  # what it advises is right: the probability of the second class is that of the one logit
    two, one = load(f"{net}:wrapped", weights, classes=2).module(images), made(net, "binary")
    one.load_state_dict(torch.load(weights))
    assert torch.allclose(two.softmax(1)[:, 1:], torch.sigmoid(one(images)))


def test_the_home_of_nobody_is_refused(net: Path) -> None:
    spec = "~nobody-of-this-name/net.py:fixed"
    assert "expected the home folder of a user of this machine" in refusal(spec, saved(net))
    for act in (lambda: initial_network(spec, None), lambda: evaluation_crop(spec)):
        with pytest.raises(InputError, match="the home folder of a user of this machine"):
            act()
    assert "found no such file" in refusal(f"{net}:fixed", Path("~nobody-of-this-name/net.pt"))


@pytest.mark.parametrize("suffix", ["ckpt", "bin", "tar", ""])
def test_a_file_is_read_by_what_is_in_it_not_by_its_name(net: Path, suffix: str) -> None:
    state = made(net).state_dict()
    assert set(read_state(saved(net, state, f"net.{suffix}" if suffix else "net"))) == set(state)


def test_programs_are_named_as_what_they_are(net: Path) -> None:
    torch.jit.trace(made(net), torch.zeros(1, 3, 8, 8)).save(str(net.parent / "scripted.pt"))
    exported = torch.export.export(made(net), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(exported, net.parent / "exported.pt2")
    assert "found a TorchScript program" in refusal(f"{net}:fixed", net.parent / "scripted.pt")
    assert "found a program of torch.export" in refusal(f"{net}:fixed", net.parent / "exported.pt2")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.to_sparse(), "conv.weight, a sparse tensor"),
        (lambda t: t.to(torch.complex64), "conv.weight, a complex tensor"),
        (lambda t: t.to("meta"), "conv.weight, a meta tensor"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "conv.weight, a quantised tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_another_kind_are_refused_by_name(net: Path, change: Any, told: str) -> None:
    state = made(net).state_dict()
    state["conv.weight"] = change(state["conv.weight"])
    assert told in refusal(f"{net}:fixed", saved(net, state))


def test_what_was_chosen_or_ignored_in_a_checkpoint_is_said(net: Path) -> None:
    state = made(net).state_dict()
    lightning = {"state_dict": {f"model.{k}": v for k, v in state.items()} | {"loss.weight": torch.ones(3)}}
    averaged = {"state_dict": state, "state_dict_ema": state}
    notes = [load(f"{net}:fixed", saved(net, form, "form.pt")).notes for form in (lightning, averaged, state)]
    assert notes == [
        ("weights: the prefix 'model.' was removed; 1 other entries ignored, first loss.weight",),
        ("weights: 'state_dict_ema' of the checkpoint was used, not 'state_dict'; --checkpoint-key names another",),
        (),
    ]


@pytest.mark.parametrize("form", ["beside", "below", "in a wrapper of its own"])
def test_the_state_dict_that_is_asked_for_is_taken(net: Path, form: str) -> None:
    state = made(net).state_dict()
    other = {name: torch.full_like(tensor, 0.5) for name, tensor in state.items()}
    content = {
        "beside": {"state_dict_ema": other, "state_dict": state},
        "below": {"model": {"state_dict_ema": other, "state_dict": state}, "epoch": 3},
        "in a wrapper of its own": {"model_ema": other, "state_dict": {"net": {f"module.{k}": v for k, v in state.items()}}},
    }[form]
    weights = saved(net, content, "two.pt")
    found = load_model(f"{net}:fixed", weights, classes=5, image_shape=SHAPE, checkpoint_key="state_dict")
    assert found.sha256 == state_sha256(made(net))
    assert found.notes == ()
    assert load(f"{net}:fixed", weights).sha256 != found.sha256


def test_any_name_of_a_checkpoint_can_be_asked_for(net: Path) -> None:
    state = made(net).state_dict()
    weights = saved(net, {"generator": state, "discriminator": {"weight": torch.ones(3)}}, "two.pt")
    assert set(read_state(weights, key="generator")) == set(state)
    with pytest.raises(
        InputError, match="--checkpoint-key ema: found 'discriminator', 'generator', expected the name of a state"
    ):
        read_state(weights, key="ema")
    safetensors.torch.save_file(state, net.parent / "one.safetensors")
    with pytest.raises(InputError, match="--checkpoint-key ema: found no state dict under a name"):
        read_state(net.parent / "one.safetensors", key="ema")


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["state_dict"] = state
    torch.save(state, tmp_path / "itself.pt")
    with pytest.raises(InputError, match="state dict"):
        read_state(tmp_path / "itself.pt")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(144, 5))",
            "without running statistics",
        ),
        ("Always()", "two answers for the same image that differ in eval mode, first in its forward"),
        ("nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(192, 192), Always()))", "differ in eval mode, first in 1.1"),
    ],
    ids=["BatchNorm without statistics", "dropout that is always on", "dropout that is always on, inside"],
)
def test_networks_without_one_answer_for_an_image_are_refused_at_the_start(body: str, words: str, tmp_path: Path) -> None:
    source = "import torch\nfrom torch import nn\nclass Always(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    source += "        self.fc = nn.Linear(192, 5)\n    def forward(self, x):\n"
    source += "        return nn.functional.dropout(self.fc(x.flatten(1)), 0.5)\n"
    (tmp_path / "odd.py").write_text(f"{source}def factory():\n    torch.manual_seed(0)\n    return {body}\n")
    module = user_factory(f"{tmp_path}/odd.py:factory", "model").function()
    torch.save(module.state_dict(), tmp_path / "odd.pt")
    with pytest.raises(InputError, match=words):
        load_model(f"{tmp_path}/odd.py:factory", tmp_path / "odd.pt", classes=5, image_shape=(3, 8, 8))


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    state = {"weight": torch.randn(64, 64)}
    torch.save(state, tmp_path / "net.pt")
    data = bytearray((tmp_path / "net.pt").read_bytes())
    data[data.index(state["weight"].numpy().tobytes()) + 1000] ^= 4
    (tmp_path / "net.pt").write_bytes(data)
    assert not torch.equal(torch.load(tmp_path / "net.pt")["weight"], state["weight"])  # torch does not notice
    with pytest.raises(InputError, match="a damaged file"):
        read_state(tmp_path / "net.pt")


def zipped(path: Path, state: object, compression: int) -> bytes:
    """A checkpoint whose zip archive is compressed, which PyTorch does not write."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(path.with_suffix(".zip"), "w", compression) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    return path.with_suffix(".zip").read_bytes()


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("legacy", lambda data: data[:18]),
        ("legacy", lambda data: data[:28]),
        ("legacy", lambda data: data[: data.index(b"cpu") + 40]),
        ("legacy", lambda data: re.sub(rb"(\d{6})(\d)", lambda m: m[1] + bytes([m[2][0] ^ 1]), data, count=1)),
        ("lzma", lambda data: data[:60] + bytes(20) + data[80:]),
        ("zip64 of two disks", lambda data: data[:-22] + struct.pack("<IIQI", 0x07064B50, 0, 0, 2) + data[-22:]),
    ],
    ids=["cut in its magic number", "cut in its header", "cut in its tensors", "another storage", "LZMA", "of two disks"],
)
def test_a_checkpoint_that_was_cut_or_changed_is_one_line(kind: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path, state = tmp_path / "net.pt", {"weight": torch.ones(4, 4), "bias": torch.ones(4)}
    torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    data = zipped(path, state, zipfile.ZIP_LZMA) if kind == "lzma" else path.read_bytes()
    path.write_bytes(damage(data))
    with pytest.raises(InputError, match=r"weights net\.pt: found .*, expected a state dict"):
        read_state(path)


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    torch.save({"weight": torch.ones(3)}, tmp_path / "net.pt")
    torch.serialization.set_crc32_options(True)
    assert read_state(tmp_path / "net.pt")["weight"].tolist() == [1, 1, 1]


def test_integers_in_place_of_float_weights_are_refused(net: Path) -> None:
    state = made(net).state_dict()
    first = next(name for name, tensor in state.items() if tensor.ndim > 1)
    weights = saved(net, state | {first: (100 * state[first]).to(torch.int8)})
    with pytest.raises(InputError, match=f"{first} of int8, expected floating"):
        load_model(f"{net}:fixed", weights, classes=5, image_shape=(3, 8, 8))


@pytest.mark.parametrize(
    "fails",
    [
        "ImportError('libtorch.so')",
        "RuntimeError('operator torchvision::nms does not exist')",
        "AttributeError('_C')",
        "OSError(2)",
    ],
)
def test_a_torchvision_built_for_another_torch_is_one_line(
    fails: str, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub/torchvision").mkdir(parents=True)
    (tmp_path / "stub/torchvision/__init__.py").write_text(f"raise {fails}\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "stub")
    (tmp_path / "images/train/a").mkdir(parents=True)
    (tmp_path / "images/test/a").mkdir(parents=True)
    for act in (
        lambda: evaluation_crop("torchvision:resnet18"),
        lambda: load("torchvision:resnet18", saved(net)),
        lambda: load_data(f"torchvision:CIFAR10:{tmp_path}", seed=0),
        lambda: load_data(f"imagefolder:{tmp_path / 'images'}", seed=0),
    ):
        with pytest.raises(UnavailableError, match=r"torchvision cannot be imported.*constraints\.txt"):
            act()


def test_what_most_runs_do_not_need_is_not_imported_with_the_pipeline() -> None:
    for module, heavy in (
        ("pipeline.run", {"torchvision", "timm", "matplotlib"}),
        ("pipeline.profile.profiling", {"torch", "onnx", "torchvision"}),
    ):
        code = f"import sys, edge_compress.{module}; print(sorted({heavy} & sys.modules.keys()))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", module


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_network_that_is_only_looked_at_has_as_many_classes_as_its_weights(tmp_path: Path, prefix: str) -> None:
    own = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save({prefix + name: tensor for name, tensor in own.state_dict().items()}, tmp_path / "own.pt")
    found = initial_network("torchvision:squeezenet1_1", tmp_path / "own.pt")
    assert torch.equal(found.get_parameter("classifier.1.weight"), own.get_parameter("classifier.1.weight"))
    assert initial_network("torchvision:squeezenet1_1", None).get_parameter("classifier.1.weight").shape[0] == 1000
