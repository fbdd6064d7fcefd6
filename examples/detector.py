"""A small one-stage detector without anchors: network, loss and decoding.

Every cell of three maps (strides 8, 16 and 32) says where a box is, relative to the cell, and what is in it. The network gives
these maps as they are; boxes are computed from them outside of it, by `decoded`, so that it can be exported to anything.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scenes import CLASSES
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, generalized_box_iou_loss
from torchvision.utils import draw_bounding_boxes

STRIDES = (8, 16, 32)
LARGEST_SIDES = (24.0, 36.0, float("inf"))  # pixels, of a box that a map learns; smaller ones are for the map before
BOX = 4  # channels of a map that hold the box: centre and size, in cells; then come one for whether it is there, and the classes
Maps = tuple[Tensor, Tensor, Tensor]  # (N, 5 + classes, H / stride, W / stride) by stride, where they are answers


class Conv(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


class Bottleneck(nn.Module):
    """Two convolutions, and a shortcut past them."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = Conv(width, width), Conv(width, width), shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape."""
        found: Tensor = self.second(self.first(x))
        return x + found if self.shortcut else found


class C2f(nn.Module):
    """Half of the channels go through bottlenecks; the other half and what each bottleneck gives are joined at the end."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.split = Conv(inputs, outputs, 1)
        self.blocks = nn.ModuleList(Bottleneck(outputs // 2, shortcut) for _ in range(depth))
        self.join = Conv((2 + depth) * (outputs // 2), outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, outputs, H, W)."""
        parts = list(self.split(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        joined: Tensor = self.join(torch.cat(parts, 1))
        return joined


class Head(nn.Module):
    """One map: boxes and whether they are there, and classes, each by two convolutions of their own."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        last = nn.Conv2d(inputs, BOX + 1, 1)
        last.state_dict()["bias"][BOX] = -4.0  # nearly all cells are empty
        self.boxes = nn.Sequential(Conv(inputs, inputs), last)
        self.classes = nn.Sequential(Conv(inputs, inputs), nn.Conv2d(inputs, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The map (N, 5 + classes, H, W)."""
        return torch.cat([self.boxes(x), self.classes(x)], 1)


class Detector(nn.Module):
    """Backbone to stride 32, features passed back up to stride 8 and down again, a head at each of three strides."""

    def __init__(self, widths: tuple[int, int, int, int, int] = (16, 24, 48, 80, 112)) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(Conv(3, a, stride=2), Conv(a, b, stride=2), C2f(b, b))
        self.stage8 = nn.Sequential(Conv(b, c, stride=2), C2f(c, c, 2))
        self.stage16 = nn.Sequential(Conv(c, d, stride=2), C2f(d, d, 2))
        self.stage32 = nn.Sequential(Conv(d, e, stride=2), C2f(e, e))
        self.up16, self.up8 = C2f(e + d, d, shortcut=False), C2f(d + c, c, shortcut=False)
        self.down16, self.join16 = Conv(c, c, stride=2), C2f(c + d, d, shortcut=False)
        self.down32, self.join32 = Conv(d, d, stride=2), C2f(d + e, e, shortcut=False)
        self.heads = nn.ModuleList(Head(width) for width in (c, d, e))

    def features(self, images: Tensor) -> Maps:
        """What the backbone finds, at strides 8, 16 and 32."""
        x8 = self.stage8(self.stem(images))
        x16 = self.stage16(x8)
        return x8, x16, self.stage32(x16)

    def forward(self, images: Tensor) -> Maps:
        """The maps of images (N, 3, H, W) whose sides are multiples of 32."""
        x8, x16, x32 = self.features(images)
        x16 = self.up16(torch.cat([F.interpolate(x32, scale_factor=2.0), x16], 1))
        x8 = self.up8(torch.cat([F.interpolate(x16, scale_factor=2.0), x8], 1))
        x16 = self.join16(torch.cat([self.down16(x8), x16], 1))
        x32 = self.join32(torch.cat([self.down32(x16), x32], 1))
        return self.heads[0](x8), self.heads[1](x16), self.heads[2](x32)


def detection_loss(maps: Maps, targets: Tensor) -> Tensor:
    """Error of the boxes (generalised IoU), of whether they are there and of their classes (cross-entropy), per cell; a scalar.

    A box is to be found by the cells of one map whose centres are less than a cell away from its own: four, mostly. There it is
    to be answered with as much confidence as the box is right, everywhere else with none.

    Args:
        maps: what the network gave.
        targets: (N, boxes, 5), rows (class, left, top, right, bottom) in pixels; rows of class -1 are no boxes.
    """
    predicted, presence, logits = _parts(maps)
    centres, strides = _cells(maps)
    boxes = targets[:, None, :, 1:]
    middle, side = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).amax(-1)
    away = (centres[None, :, None] - middle).abs().amax(-1) / strides[None]  # (N, cells, boxes), in cells
    level = torch.bucketize(side, side.new_tensor(LARGEST_SIDES))
    away = away.masked_fill((side.new_tensor(STRIDES)[level] != strides[None]) | (targets[:, None, :, 0] < 0), float("inf"))
    distance, nearest = away.min(-1)
    image, cell = torch.nonzero(distance < 1.0, as_tuple=True)
    found, wanted = predicted[image, cell], targets[image, nearest[image, cell]]
    confidence = torch.zeros_like(presence)
    confidence[image, cell] = _iou(found.detach(), wanted[:, 1:])
    box_error = generalized_box_iou_loss(found, wanted[:, 1:], reduction="sum")
    presence_error = F.binary_cross_entropy_with_logits(presence, confidence, reduction="sum")
    class_error = F.cross_entropy(logits[image, cell], wanted[:, 0].long(), reduction="sum")
    error: Tensor = (2.0 * box_error + presence_error + class_error) / max(len(image), 1)
    return error


def decoded(maps: Maps, least: float = 0.02, overlap: float = 0.5, most: int = 50) -> list[dict[str, Tensor]]:
    """What is in each image: "boxes" (n, 4) as left, top, right, bottom in pixels, "scores" (n,) and "labels" (n,), best first.

    Args:
        maps: what the network, or an artifact made of it, gave.
        least: score of a box that is kept.
        overlap: IoU of two boxes of one class, above which the one with the lower score goes.
        most: boxes per image.
    """
    found = []
    for boxes, presence, logits in zip(*_parts(maps), strict=True):
        shares, labels = logits.softmax(-1).max(-1)
        scores = presence.sigmoid() * shares
        sure = scores >= least
        boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
        kept = batched_nms(boxes, scores, labels, overlap)[:most]
        found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return found


def drawn(inputs: Tensor, maps: Maps, target: Tensor) -> NDArray[np.uint8]:
    """An image (H, W, 3) with the boxes that were found in it, and their classes; true boxes are thin and white.

    Args:
        inputs: the image (1, 3, H, W), as the network takes it.
        maps: what the network, or an artifact made of it, gave.
        target: see `detection_loss`; of this image (1, boxes, 5).
    """
    large = 3  # times as large, so that letters can be read
    image = (inputs[0] * 64.0 + 127.5).clamp(0, 255).to(torch.uint8)
    image = image.repeat_interleave(large, 1).repeat_interleave(large, 2)
    (found,) = decoded(maps, least=0.3)
    image = draw_bounding_boxes(image, target[0, target[0, :, 0] >= 0, 1:] * large, colors="white")
    names = [str(int(label)) for label in found["labels"]]
    return draw_bounding_boxes(image, found["boxes"] * large, names, colors="orange", width=2).permute(1, 2, 0).numpy()


def _parts(maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
    """Of all cells: boxes (N, cells, 4) in pixels, logits of presence (N, cells) and of classes (N, cells, classes)."""
    centres, strides = _cells(maps)
    raw = torch.cat([part.flatten(2).transpose(1, 2) for part in maps], 1)
    middle = centres + raw[..., :2] * strides
    half = F.softplus(raw[..., 2:BOX]) * strides / 2
    return torch.cat([middle - half, middle + half], -1), raw[..., BOX], raw[..., BOX + 1 :]


def _cells(maps: Maps) -> tuple[Tensor, Tensor]:
    """Centres (cells, 2) in pixels and strides (cells, 1) of the cells of all maps."""
    centres, strides = [], []
    for part, stride in zip(maps, STRIDES, strict=True):
        down, across = (torch.arange(n, device=part.device, dtype=part.dtype) for n in part.shape[2:])
        rows, columns = torch.meshgrid(down, across, indexing="ij")
        centres.append((torch.stack([columns, rows], -1).reshape(-1, 2) + 0.5) * stride)
        strides.append(torch.full_like(centres[-1][:, :1], stride))
    return torch.cat(centres), torch.cat(strides)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (n,) of each box (n, 4) of `a` with the one of `b` in the same row."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    shared = sides.prod(-1)
    return shared / ((a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - shared)
