"""A residual network small enough to export in a second, with everything a cut has to get right."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.onnx.export import export_float
from torch import nn

SHAPE = (3, 12, 12)


class Block(nn.Module):
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Tiny(nn.Module):
    """Stem, identity block, downsampling block, depthwise layer, two identity blocks, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.a = Block(8, 8)
        self.b = Block(8, 16, 2)
        self.dw = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.c = Block(16, 16)
        self.d = Block(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.b(self.a(F.relu(self.bn(self.stem(x)))))
        x = self.d(self.c(F.relu(self.dw(x))))
        return self.head(x.mean((2, 3)))


def make_tiny(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = Tiny().eval()
    with torch.no_grad():
        for name, value in (*net.named_parameters(), *net.named_buffers()):
            if value.dtype != torch.float32:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
                value.copy_(0.5 + noise.abs())
            elif value.dim() > 1:
                value.copy_(noise / (value[0].numel() ** 0.5) * 1.4)
            else:
                value.copy_(0.2 * noise)
    return net


@pytest.fixture(scope="session")
def tiny():
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_onnx(tiny):
    return export_float(tiny, image_signature(SHAPE))


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(1).standard_normal((24, *SHAPE), dtype=np.float32)
