"""The run folder: keeps each finished stage under a key of everything it depends on, so that runs resume.

    with RunFolder(config, log) as run:
        stage = run.stage("search", "1", settings, inputs=(subject.key,))
        found = stage.result(SearchResult)
        if found is None:
            found = search(...)          # its own checkpoints go to stage.folder
            stage.finish(found)

A stage's key is the digest of its name, version, settings and inputs' keys. Results carry their own digest and those of the
files they name; a result whose digests do not match is recomputed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from .codec import from_json, json_sha256, require_durations, to_json
from .config import Config, differences, load, to_toml
from .errors import InputError, says_full
from .files import atomic_write, disk_errors, is_scratch, link_or_copy, sha256_file
from .types import FileRef

T = TypeVar("T")
Log = Callable[[str], None]

CONFIG_NAME = "config.toml"
LOG_NAME = "run.log"
_LOCK_NAME = ".lock"
_HOLDER_NAME = ".holder"
_NOTES_NAME = "notes.json"


class RunFolder:
    """An open run folder, locked by one process.

    Entering creates the folder (`config.out`) with its `config.toml`, or opens an existing one of the same run.

    Args:
        config: the resolved configuration.
        log: called with one line for each damaged result that is recomputed.
        adjusted: keys of settings that the run chose itself, and may choose otherwise the next time.

    Raises:
        InputError: on entering, if another process holds the lock, or the folder contains another run or other files.
    """

    def __init__(self, config: Config, log: Log, adjusted: tuple[str, ...] = ()) -> None:
        self.path = config.out.absolute()
        self._adjusted = adjusted
        self.log = log
        self._config = config
        self._stages: list[Stage] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk_errors(self.path))
            try:
                self._refuse_other_folders()
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock(stack)
            except OSError as error:
                if says_full(error):
                    raise
                raise InputError(
                    f"{self.path} cannot be a run folder", found=error.strerror or str(error), do="choose another --out"
                ) from error
            self._claim()
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def stage(self, name: str, version: str, settings: object, inputs: tuple[str, ...] = ()) -> Stage:
        """Returns the stage of this name with these settings.

        Args:
            name: letters, digits, "-".
            version: to be raised when the stage's code gives another result for the same settings and inputs.
            settings: dataclasses, dicts, lists, strings and numbers: all that the result depends on besides `inputs`.
            inputs: keys of the stages and digests of the files that it reads.
        """
        record = {"stage": name, "version": version, "settings": to_json(settings), "inputs": list(inputs)}
        key = json_sha256(record)
        folder = self.path / "stages" / f"{name}-{key[:16]}"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._stages.append(stage := Stage(name, key, folder, self, record))
        return stage

    def notes(self) -> list[str]:
        """Returns what the stages asked for so far have noted, in this call or in the one that finished them."""
        return list(dict.fromkeys(note for stage in self._stages for note in stage.notes()))

    def share(self, other: Path) -> None:
        """Hard-links the finished stages requested so far into another run folder."""
        for stage in self._stages:
            for file in stage.files():
                link_or_copy(file, other / file.relative_to(self.path))

    def _refuse_other_folders(self) -> None:
        """Checks, before anything is written, that the folder is new, empty, or a run's."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file", expected="a folder for the run", do="choose another --out")
        if not self.path.is_dir() or (self.path / CONFIG_NAME).is_file():
            return
        # a run killed before it wrote its config leaves only these
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in (_LOCK_NAME, _HOLDER_NAME) and not is_scratch(p))
        if foreign:
            raise InputError(
                f"{self.path} is not a run folder",
                found=foreign[0],
                expected=f"an empty folder or one with {CONFIG_NAME}",
                do="choose another --out",
            )

    def _lock(self, stack: contextlib.ExitStack) -> None:
        import filelock

        lock = filelock.FileLock(self.path / _LOCK_NAME)
        holder = self.path / _HOLDER_NAME
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except filelock.Timeout as error:
            pid = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
            raise InputError(
                f"another run is active in {self.path}", found=f"process {pid}", do="wait for it to end, or choose another --out"
            ) from error
        atomic_write(holder, str(os.getpid()))
        stack.callback(holder.unlink, missing_ok=True)

    def _claim(self) -> None:
        """With the lock held, removes temporary files of a killed run and writes the configuration."""
        for leftover in self.path.rglob(".*.tmp"):
            if is_scratch(leftover):
                leftover.unlink(missing_ok=True)
        other = self._configured()
        self._refuse_another_run(other)
        if other != self._config:
            atomic_write(self.path / CONFIG_NAME, to_toml(self._config))

    def refuse_what_a_run_would(self) -> None:
        """Raise InputError where entering would, for what the folder holds; nothing is changed."""
        self._refuse_other_folders()
        self._refuse_another_run(self._configured())

    def _refuse_another_run(self, other: Config | None) -> None:
        changed = () if other is None else differences(other, self._config)
        differing = [name for name in changed if name not in self._adjusted]
        if other is not None and differing and self._holds_work():
            found, expected = (
                ", ".join(line for line in to_toml(c).splitlines() if line.split(" = ")[0] in differing) or "the defaults"
                for c in (other, self._config)
            )
            raise InputError(
                f"{self.path} holds another run",
                found=found,
                expected=expected,
                do="choose another --out; nothing was changed",
            )

    def _configured(self) -> Config | None:
        file = self.path / CONFIG_NAME
        return load(file, {}) if file.is_file() else None

    def _holds_work(self) -> bool:
        """Tells whether there is more than a configuration: a run that ended at wrong input leaves no more and may be changed."""
        own = (CONFIG_NAME, LOG_NAME, _LOCK_NAME, _HOLDER_NAME)
        found = (p for p in self.path.rglob("*") if p.is_file() and not is_scratch(p))
        return any(not (p.parent == self.path and p.name in own) for p in found)


class _Notes(logging.Handler):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(record.getMessage())


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its key, its folder, and its result once it is finished."""

    name: str
    key: str  # SHA-256 of name, version, settings and inputs' keys; an input of the stages that read this one
    folder: Path  # the stage's own: checkpoints, scratch and output files
    run: RunFolder
    record: dict[str, Any]  # what the key was made of, kept beside the result for readers

    def result(self, cls: type[T]) -> T | None:
        """Returns the finished result, or None if there is none or its digests, or those of its files, do not match."""
        file = self._file
        if not file.is_file():
            return None
        try:
            stored = json.loads(file.read_bytes())
            if stored["key"] != self.key or stored["sha256"] != json_sha256(stored["result"]):
                raise ValueError("its digest does not match")
            require_durations(stored["result"])
            value = from_json(cls, stored["result"])
            self._check_files(value)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            self.run.log(f"{self.name}: {file} is damaged ({error}); recomputed")
            return None
        return value

    @property
    def finished(self) -> bool:
        """Whether a result was recorded; it may be damaged."""
        return self._file.is_file()

    def differing(self, setting: str) -> set[str]:
        """Returns the fields of one setting, a dataclass, that changed since the latest other result of this stage."""
        others = [file for file in self.folder.parent.glob(f"{self.name}-*/result.json") if file.parent != self.folder]
        for file in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                one, other = json.loads(file.read_bytes())["settings"][setting], self.record["settings"][setting]
                return {name for name in {**one, **other} if one.get(name) != other.get(name)}
        return set()

    def note(self, text: str) -> None:
        """Keeps a remark on how the result was made (what was reduced, left out): the report shows it whenever it is used."""
        if text not in self.notes():
            self.run.log(f"{self.name}: {text}")
            atomic_write(self.folder / _NOTES_NAME, json.dumps([*self.notes(), text], indent=1) + "\n")

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps warnings that the package logs meanwhile as remarks: fallbacks deep inside a computation."""
        logger, handler = logging.getLogger(__name__.partition(".")[0]), _Notes(self.note)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    def notes(self) -> list[str]:
        """Returns the remarks on the result; where their file cannot be read, one that says so."""
        try:
            return [str(text) for text in json.loads((self.folder / _NOTES_NAME).read_bytes())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, RecursionError) as error:
            return [f"{self.name}: remarks of an earlier call cannot be read ({error})"]

    def files(self) -> list[Path]:
        """Returns the stage's files; of an unfinished stage its notes alone."""
        if self._file.is_file():
            return [path for path in self.folder.rglob("*") if path.is_file()]
        return [path for path in [self.folder / _NOTES_NAME] if path.is_file()]

    def finish(self, value: object) -> None:
        """Records the stage's result, so that it is not run again.

        Raises:
            ValueError: a file it names is missing or does not match its reference.
            UnavailableError: the disk is full.
        """
        self._check_files(value)
        result = to_json(value)
        stored = {**self.record, "key": self.key, "sha256": json_sha256(result), "result": result}
        atomic_write(self._file, json.dumps(stored, indent=1, sort_keys=True) + "\n")

    def once(self, cls: type[T], make: Callable[[], T]) -> T:
        """The finished result; made and recorded first where there is none."""
        value = self.result(cls)
        if value is None:
            value = make()
            self.finish(value)
        return value

    @property
    def _file(self) -> Path:
        return self.folder / "result.json"

    def _check_files(self, value: object) -> None:
        for ref in file_refs(value):
            path = self.run.path / ref.path
            if not path.is_file():
                raise ValueError(f"{ref.path} is missing")
            if path.stat().st_size != ref.size_bytes or sha256_file(path) != ref.sha256:
                raise ValueError(f"{ref.path} has changed")


def file_refs(value: object) -> Iterator[FileRef]:
    """Yields all file references in a result."""
    if isinstance(value, FileRef):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from file_refs(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from file_refs(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from file_refs(item)
