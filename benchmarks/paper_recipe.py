"""The recipe of the paper as a checked configuration: the product's settings, and a few that only this training has."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edge_compress.pipeline import config as product
from edge_compress.pipeline.config import Config, key
from edge_compress.pipeline.errors import InputError

# Of the product's settings those that mean something here; the others are about artifacts and latency.
SHARED = (
    *("model", "weights", "data", "mean", "std", "augment", "image_size", "lambda_", "score", "search", "evaluations"),
    *("finetune_epochs", "mask", "seed", "accelerator"),
)


@dataclass(frozen=True)
class Recipe:
    """What the product's settings do not say."""

    sparsity: float = 50.0  # percent of all connections that go
    batch: int = 256  # images for each step, over all processes
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    distill_weight: float = 0.0  # share of the dense network's answers in the loss
    images: int = 1000  # training images for curvature and for the search's BatchNorm statistics
    reward_images: int = 5000  # of the search split, at most


# field -> lowest and highest value; whole numbers where the default is one
LIMITS: dict[str, tuple[float, float]] = {
    "sparsity": (0.1, 99.9),
    "batch": (2, 2**20),
    "learning_rate": (1e-9, 10.0),
    "weight_decay": (0.0, 10.0),
    "distill_weight": (0.0, 1.0),
    "images": (1, 2**20),
    "reward_images": (1, 2**20),
}


def load(path: Path, flags: Mapping[str, Any]) -> tuple[Recipe, Config]:
    """The recipe in a TOML file; flags win over it.

    Args:
        path: the file. Relative paths in it start from the working folder.
        flags: field -> value; None means "not given".

    Raises:
        InputError: the file cannot be read, a key is unknown, or a value is wrong.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read", found=error.strerror or str(error), expected="a TOML file") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is not TOML", found=str(error)) from error
    known = {key(name): name for name in (*SHARED, *(f.name for f in fields(Recipe)))}
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            do = f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(known)}"
            raise InputError(f"{path}: unknown setting {name!r}", do=do)
        values[known[name]] = value
    values |= {name: value for name, value in flags.items() if value is not None}
    own = {name: _checked(name, values.pop(name)) for name in LIMITS if name in values}
    config = product.load(None, {"targets": ("x86",), **values})
    return Recipe(**own), config


def _checked(name: str, value: Any) -> Any:
    low, high = LIMITS[name]
    whole = isinstance(getattr(Recipe, name), int)
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not low <= value <= high:
        expected = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}"
        raise InputError(f"--{key(name)}", found=repr(value), expected=expected)
    return value if whole else float(value)
