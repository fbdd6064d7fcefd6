"""The resolved configuration: defaults, then a TOML file, then flags.

Keys of the file are the names of the options without the dashes in front (`latency-budget = "8ms"`). Paths in the file are
relative to the file, paths in flags to the working folder; in a `Config` they are absolute.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from .. import targets as target_modules
from . import options
from .errors import InputError, shown
from .files import read_regular
from .options import CLASS_ORDERS, Accelerator, Augment, Budget, Drop, MaskMode, Pattern, Precision, Reward, Score, SearchMethod

_INSTEAD_OF_RECIPE = (
    *("model", "weights", "checkpoint_key", "data"),
    *("mean", "std", "augment", "image_size", "exif_orientation", "class_order"),
)
# what may differ between two calls of the same run
_MAY_CHANGE = ("out", "json", "max_memory", "accelerator", "quiet", "verbose", "require_artifact", "accept_chance")


# (value, folder that relative paths start from) -> the field's value, or ValueError(expected)
Parser = Callable[[Any, Path], Any]


def _text(value: Any, _: Path) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def _path(value: Any, base: Path) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("a path")
    try:
        return Path(os.path.normpath(base / Path(value).expanduser()))
    except RuntimeError as error:  # ~name of nobody here
        raise ValueError("the home folder of a user of this machine") from error


def _spec(value: Any, base: Path) -> str:
    """Returns a model or data spec with the path in it made absolute."""
    text = _text(value, base)
    kind, _, rest = text.partition(":")
    if kind in ("npz", "imagefolder") and rest:
        return f"{kind}:{_path(rest, base)}"
    if kind == "torchvision" and ":" in rest:
        name, _, folder = rest.partition(":")
        return f"{kind}:{name}:{_path(folder, base)}"
    file, _, factory = text.rpartition(":")
    return f"{_path(file, base)}:{factory}" if file.endswith(".py") else text


def _class_order(value: Any, base: Path) -> str:
    text = _text(value, base)
    return text if text in CLASS_ORDERS else str(_path(text, base))


def _device(value: Any, base: Path) -> str:
    text = _text(value, base)
    return str(_path(text, base)) if text.endswith(".toml") or os.sep in text else text


def _choice(kind: type[StrEnum]) -> Parser:
    def parse(value: Any, _: Path) -> StrEnum:
        try:
            return kind(value)
        except ValueError as error:
            raise ValueError(" or ".join(kind)) from error

    return parse


def _pattern(value: Any, base: Path) -> Pattern | None:
    return None if value == "auto" else _choice(Pattern)(value, base)


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Parser:
    """Returns a parser for a number from `low` (exclusive if `above`) to `high`."""

    def parse(value: Any, _: Path) -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not (low < value if above else low <= value) or value > high:
            upper = f" and at most {high:g}" if high < math.inf else ""
            raise ValueError(f"a number {'above' if above else 'of at least'} {low:g}{upper}")
        return float(value)

    return parse


def _integer(low: int, high: int = 2**31 - 1) -> Parser:
    def parse(value: Any, _: Path) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def _channels(each: Parser) -> Parser:
    """Returns a parser for one number per channel: a list, or text with commas."""

    def parse(value: Any, base: Path) -> tuple[float, ...]:
        try:
            numbers = [float(part) for part in value.split(",")] if isinstance(value, str) else list(value)
            parsed = tuple(each(number, base) for number in numbers)
        except (TypeError, ValueError):
            parsed = ()
        if not parsed:
            raise ValueError("one number per channel, for pixels on [0, 1], such as 0.49,0.48,0.45")
        return parsed

    return parse


def _auto_or(number: Parser, expected: str) -> Parser:
    """Returns a parser for "auto" (None) or a number."""

    def parse(value: Any, base: Path) -> Any:
        try:
            return None if value == "auto" else number(float(value) if isinstance(value, str) else value, base)
        except ValueError as error:
            raise ValueError(f"auto, or a number {expected}") from error

    return parse


def _budgets(value: Any, _: Path) -> tuple[Budget, ...]:
    return options.budgets_of(value)


def _drop(value: Any, _: Path) -> Drop:
    return Drop.parse(value if isinstance(value, int | float) and not isinstance(value, bool) else str(value))


def _memory(value: Any, _: Path) -> int:
    return options.memory_in_bytes(value)


def _size(value: Any, _: Path) -> int:
    return options.size_in_bytes(value)


def _bool(value: Any, _: Path) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _targets(value: Any, base: Path) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("a target or a list of targets")
    for name in names:
        target_modules.check(name)
    return tuple(dict.fromkeys(names))  # without repeats


@dataclass(frozen=True)
class Config:
    """Every option of the command line, with its parser. None means: derived later from the model, the data or the target."""

    targets: Annotated[tuple[str, ...], _targets]
    recipe: Annotated[Path | None, _path] = None  # instead of model, weights and data
    model: Annotated[str, _spec] = "digits-resnet"
    weights: Annotated[Path | None, _path] = None
    checkpoint_key: Annotated[str | None, _text] = None  # of the state dict in the file; None: averaged weights where it has some
    data: Annotated[str, _spec] = "digits"
    mean: Annotated[tuple[float, ...] | None, _channels(_number(-1e6, 1e6))] = None  # None: the model's own, else ImageNet's
    std: Annotated[tuple[float, ...] | None, _channels(_number(1e-6, 1e6))] = None
    augment: Annotated[Augment | None, _choice(Augment)] = None  # None: "shift" for digits, else "crop-flip"
    image_size: Annotated[int | None, _integer(4, 4096)] = None  # pixels, of image files; None: the model's own, else 224
    exif_orientation: Annotated[bool, _bool] = False  # turn image files as their EXIF orientation says
    class_order: Annotated[str, _class_order] = "text"  # of an image folder: text, natural, or a file with a name a line
    device: Annotated[str, _device] = "local"
    pattern: Annotated[Pattern | None, _pattern] = None  # None: "auto", what the target can accelerate
    precision: Annotated[Precision | None, _choice(Precision)] = None  # None: the target's best
    float_io: Annotated[bool, _bool] = False  # an int8 .tflite with float input and output
    latency_budget: Annotated[tuple[Budget, ...], _budgets] = (Budget(ratio=0.5),)  # several: a run of its own for each
    max_accuracy_drop: Annotated[float, _number(0.0, 100.0)] = 1.0  # percentage points of top-1 on the test split
    max_drop: Annotated[Drop | None, _drop] = None  # of the metric; None: max_accuracy_drop for top-1, else 1%
    min_speedup: Annotated[float, _number(0.0)] = 1.0  # for the lower end of the 95 % interval
    max_size: Annotated[int | None, _size] = None  # bytes of the artifact's file; None: any
    reward: Annotated[Reward, _choice(Reward)] = Reward.HARD
    alpha: Annotated[float, _number(0.0)] = 1.0
    beta: Annotated[float, _number(0.0)] = 1.0
    lambda_: Annotated[float | None, _auto_or(_number(0.0), "of at least 0")] = None  # None: "auto", tuned on the search split
    score: Annotated[Score, _choice(Score)] = Score.HASA
    search: Annotated[SearchMethod, _choice(SearchMethod)] = SearchMethod.PPO
    evaluations: Annotated[int, _integer(1)] = 200  # 60 for digits
    finetune_epochs: Annotated[int, _integer(0)] = 15  # 8 for digits
    learning_rate: Annotated[float | None, _auto_or(_number(0.0, 1.0, above=True), "above 0 and at most 1")] = None
    max_minutes: Annotated[float | None, _number(0.0, above=True)] = None  # None: as long as it takes
    mask: Annotated[MaskMode, _choice(MaskMode)] = MaskMode.FIXED
    seed: Annotated[int, _integer(0)] = 0
    accelerator: Annotated[Accelerator, _choice(Accelerator)] = Accelerator.AUTO
    max_memory: Annotated[int | None, _memory] = None  # bytes for scoring and reconstruction; None: half of what is free
    threads: Annotated[int, _integer(1, 1024)] = 1  # of the artifact's runtime
    out: Annotated[Path, _path] = Path("runs/run")  # `load` makes it runs/MODEL-TARGETS of the working folder
    json: Annotated[bool, _bool] = False
    quiet: Annotated[bool, _bool] = False
    verbose: Annotated[bool, _bool] = False
    require_artifact: Annotated[bool, _bool] = False
    accept_chance: Annotated[bool, _bool] = False  # continue even if the dense accuracy is at chance level

    @property
    def budget(self) -> Budget:
        """The latency budget of a run that has one."""
        (budget,) = self.latency_budget
        return budget


def load(path: Path | None, flags: Mapping[str, object]) -> Config:
    """Returns the configuration from an optional TOML file and flags, which take precedence.

    `flags` maps fields of `Config` to values as given on the command line; None and () mean "not given".

    Raises:
        InputError: the file cannot be read, a key is unknown, a value is wrong, or no target is given.
    """
    values: dict[str, Any] = {}
    if path is not None:
        known = {key(f.name): f.name for f in fields(Config)}
        for name, value in _read(path).items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                raise InputError(
                    f"{path}: unknown setting {name!r}",
                    do=f"did you mean {close[0]!r}?" if close else f"the settings are {', '.join(known)}",
                )
            values[known[name]] = _parsed(known[name], value, f"{path}: {name}", path.absolute().parent)
    for field_name, value in flags.items():
        if value is not None and value != ():
            values[field_name] = _parsed(field_name, value, f"--{key(field_name)}", Path.cwd())
    if "targets" not in values:
        raise InputError(
            "no target", expected=f"--target {'|'.join(target_modules.names()) or 'NAME'}", do="see edge-compress --help"
        )
    config = Config(**values)
    if config.mean and config.std and len(config.mean) != len(config.std):
        found = f"a mean of {len(config.mean)} and a deviation of {len(config.std)} channels"
        raise InputError("--mean and --std", found=found, expected="one number per channel in both")
    if config.quiet and config.verbose:
        raise InputError("--quiet with --verbose", expected="one of them")
    if config.recipe is not None and (other := [key(n) for n in _INSTEAD_OF_RECIPE if n in values]):
        raise InputError(f"--recipe with --{other[0]}", expected="one of them: a recipe brings its own model and data")
    if config.checkpoint_key is not None and config.weights is None:
        raise InputError("--checkpoint-key without --weights", expected="the file that has it")
    if config.max_accuracy_drop != Config.max_accuracy_drop and (config.recipe is not None or config.max_drop is not None):
        beside = "--recipe" if config.recipe is not None else "--max-drop"
        raise InputError(f"--max-accuracy-drop with {beside}", expected="--max-drop, for any metric", do="leave it out")
    if config.data == "digits" and config.recipe is None:  # small enough that less is enough
        evaluations, epochs = (values.get(name, n) for name, n in (("evaluations", 60), ("finetune_epochs", 8)))
        config = replace(config, evaluations=evaluations, finetune_epochs=epochs)
    if "out" not in values:
        name = _short(config.model if config.recipe is None else config.recipe.stem)
        out = _writable(Path.cwd() / "runs" / "-".join((name, *config.targets)), "--out")
        config = replace(config, out=out)
    return config


def to_toml(config: Config) -> str:
    """Returns the text of a file that `load` reads back as this configuration. None values are left out."""
    lines = ["# Resolved by edge-compress."]
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        if value is not None and not (config.recipe is not None and name in _INSTEAD_OF_RECIPE):
            lines.append(f"{key(name)} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def differences(one: Config, other: Config) -> tuple[str, ...]:
    """Returns the keys of the settings that differ and may not: those that make another run."""
    names = (f.name for f in fields(Config) if f.name not in _MAY_CHANGE)
    return tuple(key(name) for name in names if getattr(one, name) != getattr(other, name))


def key(field_name: str) -> str:
    """Returns a field's key in a file, the option's name without leading dashes: `latency_budget` -> `latency-budget`."""
    return "target" if field_name == "targets" else field_name.rstrip("_").replace("_", "-")


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_regular(path).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read", found=error.strerror or str(error), expected="a TOML file") from error
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError, UnicodeDecodeError, numbers without end
        raise InputError(f"{path} is not TOML", found=str(error)) from error


def _parsed(name: str, value: object, where: str, base: Path) -> Any:
    try:
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError("UTF-8 text")
        return _writable(get_type_hints(Config, include_extras=True)[name].__metadata__[0](value, base), where)
    except (ValueError, OverflowError) as error:
        raise InputError(where, found=shown(value), expected=str(error)) from error


def _writable(value: Any, where: str) -> Any:
    """The value, if it can be written to a file of settings.

    Raises:
        InputError: it is a text or a path of other bytes than UTF-8, or in a folder whose name has them.
    """
    if isinstance(value, str | Path) and not options.is_utf8(str(value)):
        read_as = sys.getfilesystemencoding()
        do = "rename it" if read_as == "utf-8" else f"set PYTHONUTF8=1: names are read as {read_as} in this locale"
        raise InputError(where, found=shown(str(value)), expected="UTF-8 text", do=do)
    return value


def _short(model: str) -> str:
    """Returns a folder name for a model spec: `torchvision:resnet18` -> `resnet18`, `net.py:small` -> `small`."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in model.rpartition(":")[2])


def toml_value(value: object) -> str:
    """A setting's value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        if len(value) == 1 and isinstance(value[0], Budget):
            return toml_value(value[0])
        return f"[{', '.join(toml_value(v) for v in value)}]"
    # JSON's escapes are TOML's, except that TOML wants DEL escaped too
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
