"""What the user can choose from by name. Nothing heavy is imported here: `--help` lists these."""

from __future__ import annotations

from enum import StrEnum


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
