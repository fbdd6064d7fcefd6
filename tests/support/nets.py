"""Small networks, one for each way in which channels are coupled, and images to train them on.

Weights are drawn from a seed, BatchNorm statistics and biases too, so that no value is by chance what it would be by default.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import Coupling, couple
from edge_compress.pipeline.axes.cutting.gate import Checked, check
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.axes.types import Unit
from edge_compress.pipeline.evaluate.unit_prober import removed
from edge_compress.pipeline.types import Plan
from sklearn.datasets import load_digits
from torch import nn

SHAPE = (3, 8, 8)
CLASSES = 5


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def two_of_four(weight: torch.Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of a weight (O, C) or (O, C, kh, kw) are nonzero."""
    fours = weight.detach().movedim(1, -1).reshape(-1, 4)  # KRSC: the input channel is the fastest axis
    return int((fours != 0).sum(1).max()) <= 2


class PaddedBlock(nn.Module):
    """He et al. 2015, shortcut of option A: subsample, then pad the channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.pad, self.stride = (outputs - inputs) // 2, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.pad or self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class OptionA(nn.Module):
    """The CIFAR ResNets' layout with 4, 8 and 12 channels."""

    def __init__(self, channels: int = 3, classes: int = CLASSES, widths: tuple[int, int, int] = (4, 8, 12)) -> None:
        super().__init__()
        a, b, c = widths
        self.conv1, self.bn1 = conv(channels, a), nn.BatchNorm2d(a)
        self.layer1 = nn.Sequential(PaddedBlock(a, a, 1))
        self.layer2 = nn.Sequential(PaddedBlock(a, b, 2), PaddedBlock(b, b, 1))
        self.layer3 = nn.Sequential(PaddedBlock(b, c, 2), PaddedBlock(c, c, 1))
        self.linear = nn.Linear(c, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ProjectedBlock(nn.Module):
    """A projection where the shape changes; ReLU and addition in place, as torchvision writes them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            identity = self.downsample(x)
        y += identity
        return self.relu(y)


class Projection(nn.Module):
    def __init__(self, channels: int = 3, classes: int = CLASSES, widths: tuple[int, int] = (6, 10)) -> None:
        super().__init__()
        a, b = widths
        self.stem = nn.Sequential(conv(channels, a), nn.BatchNorm2d(a), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(ProjectedBlock(a, a), ProjectedBlock(a, a))
        self.layer2 = nn.Sequential(ProjectedBlock(a, b, 2), ProjectedBlock(b, b))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(b, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.layer2(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(x, 1))


class PreActivationBlock(nn.Module):
    """He et al. 2016: normalisation and ReLU before each convolution, nothing after the addition."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.project = conv(inputs, outputs, 1, stride) if inputs != outputs or stride != 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.project is None else self.project(y)
        y = self.conv1(y)
        return self.conv2(F.relu(self.bn2(y))) + shortcut


class PreActivation(nn.Module):
    def __init__(self, channels: int = 3, classes: int = CLASSES, widths: tuple[int, int] = (6, 10)) -> None:
        super().__init__()
        a, b = widths
        self.conv = conv(channels, a)
        self.layer1 = nn.Sequential(PreActivationBlock(a, a), PreActivationBlock(a, a))
        self.layer2 = nn.Sequential(PreActivationBlock(a, b, 2), PreActivationBlock(b, b))
        self.bn = nn.BatchNorm2d(b)
        self.fc = nn.Linear(b, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.layer2(self.layer1(self.conv(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InvertedResidual(nn.Module):
    """MobileNetV2: expand, depthwise, project; no activation at the end."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.expand = nn.Sequential(conv(inputs, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(conv(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden), nn.Hardswish())
        self.project = nn.Sequential(conv(hidden, outputs, 1), nn.BatchNorm2d(outputs))
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), nn.Hardswish())
        self.blocks = nn.Sequential(InvertedResidual(5, 8, 6, 2), InvertedResidual(6, 9, 6), InvertedResidual(6, 7, 6))
        self.head = nn.Sequential(conv(6, 10, 1), nn.BatchNorm2d(10), nn.SiLU())
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.fc(self.drop(x.mean([-2, -1])))


class SqueezeExcite(nn.Module):
    """Gates each channel with a factor computed from all of them."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.expand(gate))


class SqueezeExciteBlock(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, hidden), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = conv(hidden, channels), nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.se(self.bn2(self.conv2(y))) + x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(SqueezeExciteBlock(6, 7), SqueezeExciteBlock(6, 5))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class DenseLayer(nn.Module):
    """DenseNet: reads everything before it, appends a few channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 6, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), conv(6, growth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 5)
        self.dense = nn.Sequential(DenseLayer(5, 3), DenseLayer(8, 4))
        self.transition = nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), conv(12, 7, 1), nn.AvgPool2d(2))
        self.bn, self.fc = nn.BatchNorm2d(7), nn.Linear(7, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.transition(self.dense(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


class Vgg(nn.Module):
    """A plain stack whose linear layer reads flattened positions; a normalised linear layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(32, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 7)),
            *(nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, CLASSES)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class Bare(nn.Module):
    """No normalisation anywhere; one convolution has a bias, the others none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), nn.Conv2d(6, 8, 3, 2, 1), conv(8, 8)
        self.hidden, self.fc = nn.Linear(8, 9, bias=False), nn.Linear(9, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.b(F.leaky_relu(self.a(x), 0.1)))
        x = F.gelu(self.c(x)) + x
        return self.fc(F.relu(self.hidden(x.mean((2, 3)))))


class Grouped(nn.Module):
    """A convolution with two groups, which mixes channels within each half."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped, self.b, self.c = conv(3, 6), conv(6, 8, groups=2), conv(8, 7), conv(7, 6)
        self.bn = nn.BatchNorm2d(7)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.b(F.relu(self.grouped(F.relu(self.a(x)))))))
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


class Normalised(nn.Module):
    """LayerNorm over channels and linear layers on channels-last maps, as in ConvNeXt, between plain convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.a, self.b = conv(6, 8), conv(8, 7)
        self.fc = nn.Linear(7, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        x = F.relu(self.b(F.relu(self.a(x + y))))
        return self.fc(x.mean((2, 3)))


class ConvOut(nn.Module):
    """Fully convolutional: the last convolution's maps are the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 6), conv(6, 7), nn.Conv2d(7, CLASSES, 1)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.silu(self.b(F.relu(self.bn(self.a(x))))))


class ClippedBranch(nn.Module):
    """A residual branch that ends in a ReLU, so that what is added is never negative."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6))
        self.a, self.b = nn.Sequential(conv(6, 8), nn.BatchNorm2d(8)), nn.Sequential(conv(8, 6), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + F.relu(self.b(F.relu(self.a(x))))
        return self.fc(x.mean((2, 3)))


class SamePadding(nn.Module):
    """Padding given as a word, and padding that is not zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding="same")
        self.b = nn.Conv2d(6, 7, 3, padding=1, padding_mode="reflect")
        self.c = nn.Conv2d(7, 6, 3, padding="valid", dilation=2)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.fc(x.mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    net.__name__: net
    for net in (
        *(OptionA, Projection, PreActivation, Mobile, Gated, Concatenated, Vgg),
        *(Bare, Grouped, Normalised, ConvOut, ClippedBranch, SamePadding),
    )
}


class SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.fc = conv(3, 6), conv(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body(F.relu(self.body(self.first(x)))))
        return self.fc(x.mean((2, 3)))


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = conv(3, 6), conv(6, 6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.second(F.relu(self.norm(self.first(x))))))
        return self.fc(x.mean((2, 3)))


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other, self.fc = conv(3, 6), conv(6, 6), conv(6, 6), nn.Linear(6, CLASSES)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.other(F.relu(self.one(self.first(x)))))
        return self.fc(x.mean((2, 3)))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.mean() > 0 else x


class ControlFlow(nn.Module):
    """Which way an image goes depends on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.fc = conv(3, 6), nn.Sequential(Gate()), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.gate(F.relu(self.first(x))).mean((2, 3)))


class NothingToCut(nn.Module):
    """Its only channels are the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.only = conv(3, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x).mean((2, 3))


class NoLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x).mean((2, 3))


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network in eval mode with all its parameters and statistics drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        net = make().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
                value.copy_(0.5 + noise.abs())
            elif value.dim() > 1:
                value.copy_(noise * 1.4 / value[0].numel() ** 0.5)
            else:
                value.copy_(0.3 * noise)
    return net


def checked_of(net: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Checked:
    """What can be removed from a network."""
    return check(couple(capture(net, images(1, shape=shape))))


@functools.cache
def checked(name: str) -> Checked:
    """What can be removed from a network of `NETS`. Not to be changed."""
    return checked_of(drawn(NETS[name]))


def subject(name: str) -> tuple[nn.Module, Coupling]:
    """A network of `NETS` as it was captured, and what can be removed from it. Not to be changed."""
    coupling = checked(name).coupling
    return coupling.walk.captured.module, coupling


def cut_to(checked: Checked, plan: Plan) -> nn.Module:
    """The network of a plan, with the weights that are left."""
    gone = removed(plan, {group.name: len(group.units) for group in checked.coupling.groups})
    return cut(checked.coupling, gone, checked.sized).eval()


def units(coupling: Coupling) -> dict[str, Sequence[Unit]]:
    """The units of every group that makes something cheaper."""
    return {group.name: group.units for group in coupling.paying_groups()}


def images(count: int = 6, seed: int = 1, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits as inputs (1797, 1, 8, 8) and labels, in a fixed order that mixes the writers."""
    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    inputs = torch.from_numpy((scans[order] / 16 - 0.305) / 0.376).float().reshape(-1, 1, 8, 8)
    return inputs, torch.from_numpy(labels[order].astype(np.int64))


def trained(make: Callable[[], nn.Module], steps: int = 120, seed: int = 0) -> nn.Module:
    """A network for `digits`, trained for a second on the first 1,200 of them; eval mode."""
    inputs, labels = digits()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with another number sums are rounded otherwise, and a training this short ends elsewhere
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = make().train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(steps):
            chosen = torch.randint(0, 1200, (64,), generator=generator)
            loss = F.cross_entropy(net(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return net.eval()


def accuracy(net: nn.Module) -> float:
    """Share of the 597 digits that `trained` did not see."""
    inputs, labels = digits()
    with torch.no_grad():
        return float((copy.deepcopy(net).eval()(inputs[1200:]).argmax(1) == labels[1200:]).float().mean())
