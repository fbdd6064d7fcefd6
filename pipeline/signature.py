"""What a network takes and gives, and what its quality is told in."""

from __future__ import annotations

import math
from dataclasses import dataclass

INPUT_NAME = "input"
LOGITS = "logits"
# numpy's names of the numbers that tensors hold; a text from outside is compared with them before numpy sees it, which would
# also read "2f4" or run a parser on "(,)f4"
DTYPES = frozenset(f"{kind}{bits}" for kind, sizes in (("int", (8, 16, 32, 64)), ("uint", (8, 16, 32, 64))) for bits in sizes) | {
    *("bool", "float16", "bfloat16", "float32", "float64")
}
MOST_FIGURE = 1e300  # of a report: plots cannot be drawn up to the largest float
MOST_AXES = 32  # of a tensor; numpy ends at 64, and at 32 before version 2


@dataclass(frozen=True)
class Metric:
    """What quality is told in."""

    name: str
    unit: str
    higher_is_better: bool = True

    def drop(self, dense: float, other: float) -> float:
        """How much worse a value is than the dense network's; negative: better."""
        return dense - other if self.higher_is_better else other - dense

    def shown(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.4g}"


TOP1 = Metric("top-1", "%")


@dataclass(frozen=True)
class Crop:
    """How image files are read: resized, cropped, perhaps turned. The defaults are those of ImageNet evaluation."""

    size: int = 224  # pixels, height and width of the central square
    resize: int = 256  # pixels, of the short side before the square is cut
    interpolation: str = "bilinear"  # a value of torchvision's InterpolationMode
    exif_orientation: bool = False  # whether the images are turned as their EXIF orientation says


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a network takes or gives, without the axis of samples."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"  # numpy's name for it

    @property
    def elements(self) -> int:
        """Numbers in the tensor of one sample."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileTensor:
    """One input or output tensor of an artifact's file."""

    name: str
    shape: tuple[int, ...]  # the batch first
    layout: str = ""  # of images: "NCHW" or "NHWC"
    dtype: str = "float32"  # numpy's name for it
    scaling: str = ""  # what its numbers are, in a formula
    scale: float | None = None  # of a quantized tensor: real = (quantized - zero_point) * scale; None: not quantized
    zero_point: int = 0


@dataclass(frozen=True)
class Signature:
    """What a network takes and gives for one sample, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    by_name: bool = False  # inputs are keyword arguments of these names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a network whose one input is an image.

        Raises:
            ValueError: it takes something else.
        """
        if len(self.inputs) != 1 or len(self.inputs[0].shape) != 3:
            raise ValueError(f"inputs of shapes {[spec.shape for spec in self.inputs]} are not one image")
        channels, height, width = self.inputs[0].shape
        return channels, height, width

    @property
    def is_image_classifier(self) -> bool:
        """Whether the network takes one image and gives one vector, called logits, as `image_signature` says."""
        images = len(self.inputs) == 1 and self.inputs[0].name == INPUT_NAME and len(self.inputs[0].shape) == 3
        vector = [spec.name for spec in self.outputs] == [LOGITS] and len(self.outputs[0].shape) == 1
        return images and vector and not self.by_name


def image_signature(shape: tuple[int, int, int], classes: int = 0) -> Signature:
    """The signature of an image classifier: `input` (C, H, W), `logits` (classes,)."""
    return Signature((TensorSpec(INPUT_NAME, shape),), (TensorSpec(LOGITS, (classes,)),))
