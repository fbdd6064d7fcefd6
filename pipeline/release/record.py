"""What `verify`, `release` and `report` read: a run folder, one artifact in it, a bundle, or a stored report.json.

Imports no torch. Paths in a record come from outside: none leads out of its folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..codec import from_json
from ..errors import InputError, VerifyError
from ..files import sha256_file
from ..report.words import Json
from ..types import FileRef
from . import archive, bundle
from .bundle import Manifest

REPORT = "report.json"
_KEYS = ("schema", "model", "data", "dense", "pruned", "targets", "gates", "tool")


@dataclass(frozen=True)
class Record:
    """A report with the folder that its paths start from."""

    name: str  # as the user gave it
    root: Path
    report: Json
    targets: tuple[str, ...]  # those asked for
    file: Path | None = None  # the one file asked for
    manifest: Manifest | None = None  # of a bundle

    def artifact(self, target: str) -> Json | None:
        """The artifact's entry in the report."""
        found: Json | None = self.report["targets"][target]["artifact"]
        return found

    def path(self, entry: Json) -> Path:
        """Where a file that the report names lies."""
        return self.root / ref_of(entry).path


@contextmanager
def open_record(path: Path) -> Iterator[Record]:
    """The record at a path: a bundle (unpacked until the context ends), a run folder, or a file in one.

    Raises:
        InputError: there is nothing of the kind, or its report cannot be read.
        VerifyError: a bundle that is damaged or made to do harm.
    """
    if path.name.endswith(bundle.SUFFIX):
        manifest, files = bundle.read(path)
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            archive.extract(files, Path(folder))
            report = read_report(Path(folder) / REPORT)
            if manifest.target not in report["targets"]:
                raise VerifyError(f"{path.name}: {REPORT} has no target {manifest.target}")
            yield Record(str(path), Path(folder), report, (manifest.target,), manifest=manifest)
        return
    root = next((parent for parent in (path, *path.parents) if (parent / REPORT).is_file()), None)
    if root is None or not path.exists():
        raise InputError(f"nothing to verify at {path}", expected="a bundle, a run folder, or an artifact inside one")
    report = read_report(root / REPORT)
    yield Record(str(path), root, report, tuple(report["targets"]), file=path if path.is_file() and path.name != REPORT else None)


def read_report(path: Path) -> Json:
    """A report.json.

    Raises:
        InputError: it cannot be read, or is no report.
    """
    try:
        report = json.loads(path.read_bytes())
        for target in report["targets"].values():
            for key in ("artifact", "baseline", "golden"):
                _refs_in(target, key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{path} is no report", found=found or repr(error), expected="the report.json of a finished run", do="run again"
        ) from error
    whole: Json = report
    return whole


def full_report(path: Path) -> Json:
    """The report of a run folder, or a report.json itself, with all that documents are made of.

    Raises:
        InputError: it cannot be read, or keys are missing.
    """
    file = path / REPORT if path.is_dir() else path
    report = read_report(file)
    missing = [key for key in _KEYS if key not in report]
    if missing:
        raise InputError(f"{file} is no whole report", found=f"no {', '.join(missing)}", do="run again")
    return report


def ref_of(entry: Json) -> FileRef:
    """A file's reference in a report, its path checked.

    Raises:
        ValueError: the path is absolute or leads out of the folder.
    """
    ref = from_json(FileRef, {key: entry[key] for key in ("path", "sha256", "size_bytes")})
    if not isinstance(ref.path, str) or not isinstance(ref.sha256, str) or not isinstance(ref.size_bytes, int):
        raise TypeError(f"a file is named {ref.path!r} of {ref.size_bytes!r} bytes")
    pure = PurePosixPath(ref.path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in ref.path or not pure.parts:
        raise ValueError(f"{ref.path!r} leads out of the run folder")
    return ref


def files_of(record: Record) -> tuple[tuple[str, FileRef], ...]:
    """Every file that the report names, with the target it belongs to; a bundle has those of its own target alone."""
    found = [
        (name, ref)
        for name in record.targets
        for key in ("artifact", "baseline", "golden")
        for ref in _refs_in(record.report["targets"][name], key)
    ]
    if record.manifest is None:
        pruned = record.report.get("pruned", {})
        found += [("run", ref_of(pruned[key])) for key in ("state", "masks") if pruned.get(key)]
    return tuple(found)


def digest_findings(record: Record) -> tuple[list[str], int]:
    """What does not hold among the files that the report names, or the one asked for; and how many were looked at."""
    findings, looked = [], 0
    for name, ref in files_of(record):
        file = record.root / ref.path
        if record.file is not None and record.file.resolve() != file.resolve():
            continue
        looked += 1
        if not file.is_file():
            findings.append(f"{name}: {ref.path} is missing")
        elif file.stat().st_size != ref.size_bytes:
            findings.append(f"{name}: {ref.path} has {file.stat().st_size} bytes, not {ref.size_bytes}")
        elif sha256_file(file) != ref.sha256:
            findings.append(f"{name}: {ref.path} has another SHA-256 than the report says")
    if record.file is not None and not looked and record.file.name not in ("report.html", "report.md"):
        findings.append(f"{record.file.name} is not named in the report")
    return findings, looked


def _refs_in(target: Any, key: str) -> list[FileRef]:
    """The reference of this kind, if the target has one."""
    artifact = target["artifact"]
    entry = {"artifact": artifact, "baseline": (artifact or {}).get("baseline"), "golden": target.get("golden")}[key]
    return [] if entry is None else [ref_of(entry)]
