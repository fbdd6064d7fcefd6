"""What the user can choose from by name, and how limits, sizes and names are read.

Nothing heavy is imported here: `--help` lists these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

CLASS_ORDERS = ("text", "natural")  # of an image folder's classes; else a file names them
LEAST_MEMORY = 256 * 10**6  # bytes: below, a single layer of an ordinary network cannot be solved
MOST_BYTES = 1 << 63  # of a limit: reports hold integers of 64 bits
MOST_MS = 1e9  # of a latency: 11 days
MOST_THREADS = 1024  # a board file or a record from outside may ask for any number, on boards whose processors are not known here
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
        if not (0 < value <= (MOST_MS if unit else 1)):
            raise ValueError("a fraction of the dense model's latency in (0, 1] such as 0.5 or 50%, or milliseconds such as 8ms")
        return cls(ms=value) if unit else cls(ratio=value)

    def __str__(self) -> str:
        return f"{self.ms!r}ms" if self.ms is not None else repr(self.ratio)


def budgets_of(value: object) -> tuple[Budget, ...]:
    """Parses one budget or several (a list, or text with commas); a ValueError states what was expected."""
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    each = (Budget.parse(one if isinstance(one, int | float) and not isinstance(one, bool) else str(one)) for one in given)
    if not (found := tuple(dict.fromkeys(each))):
        raise ValueError("at least one budget, such as 0.5")
    return found


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


def size_in_bytes(value: object) -> int:
    """Parses bytes, kB, MB or GB (powers of ten); a ValueError states what was expected."""
    text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    units = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "": 1}
    unit = next(unit for unit in units if text.endswith(unit))
    try:
        count = float(text.removesuffix(unit))
    except ValueError:
        count = math.nan
    if not 1 <= count * units[unit] < MOST_BYTES:
        raise ValueError("bytes such as 98496, or 500kB, or 1.5MB")
    return int(count * units[unit])


def memory_in_bytes(value: object) -> int:
    """Parses a size of memory to work in; a ValueError states what was expected."""
    try:
        found = size_in_bytes(value)
    except ValueError as error:
        raise ValueError("such as 4GB or 512MB") from error
    if found < LEAST_MEMORY:
        raise ValueError(f"at least {LEAST_MEMORY // 10**6}MB")
    return found


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; names of files that are other bytes cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
