"""What the user can choose from by name. Nothing heavy is imported here: `--help` lists these."""

from __future__ import annotations

from enum import StrEnum


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
