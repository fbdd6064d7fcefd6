"""What the user can choose from by name, and the two kinds of limits. Nothing heavy is imported here: `--help` lists these."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

CLASS_ORDERS = ("text", "natural")  # of an image folder's classes; else a file names them
SPARSITY_KEY = "edge-compress.sparsity"  # in an ONNX file's metadata: "enable" where TensorRT may try sparse kernels


class Pattern(StrEnum):
    """What is pruned."""

    CHANNEL = "channel"  # whole channels and residual blocks: the network gets smaller
    WEIGHT = "weight"  # single connections, set to zero
    TWO_FOUR = "2:4"  # two of four consecutive inputs, set to zero


class Precision(StrEnum):
    """Numerical precision of an artifact."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    DYNAMIC = "dynamic"  # int8 weights, activations quantised dynamically


class Score(StrEnum):
    """Importance criterion, see `score/criteria.py`."""

    HASA = "hasa"
    PUBLISHED = "published"  # the formula as published, sign and all
    MAGNITUDE = "magnitude"
    RANDOM = "random"

    @classmethod
    def _missing_(cls, value: object) -> Score | None:
        return cls.PUBLISHED if value == "seed" else None  # its name in earlier versions


class SearchMethod(StrEnum):
    """Search algorithm for the per-layer pruning ratios."""

    PPO = "ppo"
    UNIFORM = "uniform"
    RANDOM = "random"
    KNAPSACK = "knapsack"


class Reward(StrEnum):
    """What the search maximises."""

    HARD = "hard"  # accuracy, subject to the budget
    SOFT = "soft"  # alpha * accuracy - beta * latency


class MaskMode(StrEnum):
    """What becomes of masked connections during fine-tuning."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"  # re-chosen after each epoch


class Augment(StrEnum):
    """Training-time augmentation."""

    NONE = "none"
    CROP_FLIP = "crop-flip"
    SHIFT = "shift"  # the crop without the flip, for images that have a left and a right


class Accelerator(StrEnum):
    """Where the network is scored, reconstructed and fine-tuned."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True)
class Budget:
    """Latency target: a fraction of the dense float model's, or milliseconds. One of the two is set."""

    ratio: float | None = None  # of the dense float model's latency on the same device, in (0, 1]
    ms: float | None = None  # wall time of one inference on the device

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Parses `"0.5"` or `"50%"` (half of the dense model's latency) and `"8ms"`.

        Raises:
            ValueError: neither; the text states what was expected.
        """
        given = text.strip() if isinstance(text, str) else str(text)
        unit = given.endswith("ms")
        try:
            value = float(given.removesuffix("ms") if unit else given.removesuffix("%"))
            value = value / 100 if given.endswith("%") else value
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0 and (unit or value <= 1)):
            raise ValueError("a fraction of the dense model's latency in (0, 1] such as 0.5 or 50%, or milliseconds such as 8ms")
        return cls(ms=value) if unit else cls(ratio=value)

    def __str__(self) -> str:
        return f"{self.ms!r}ms" if self.ms is not None else repr(self.ratio)


@dataclass(frozen=True)
class Drop:
    """How much worse the metric may get: in its own unit, or in per cent of the dense network's value."""

    amount: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str | float) -> Drop:
        """Parses `"0.5"` and `"1%"`; a ValueError states what was expected."""
        number = text.strip() if isinstance(text, str) else str(text)
        try:
            amount = float(number.removesuffix("%"))
        except ValueError:
            amount = math.nan
        if not (math.isfinite(amount) and amount >= 0):
            raise ValueError("a number of at least 0 in the metric's unit such as 0.5, or per cent of it such as 1%")
        return cls(amount, number.endswith("%"))

    def of(self, dense: float) -> float:
        """The drop in the metric's unit."""
        return self.amount / 100.0 * abs(dense) if self.relative else self.amount

    def __str__(self) -> str:
        return f"{self.amount!r}%" if self.relative else repr(self.amount)
