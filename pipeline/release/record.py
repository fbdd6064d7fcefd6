"""Opens what `verify`, `release` and `report` read: a run folder, one file in it, a bundle, or a stored report.json.

Imports no torch. Paths in a record come from outside: none leads out of its folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, VerifyError
from ..files import file_ref, has_link, without_links
from ..report.report import Report, ReportedArtifact, read_report
from ..types import FileRef
from . import archive, bundle
from .bundle import Manifest

REPORT = "report.json"
_FOLDERS = ("artifacts", "stages")  # of a run folder


@dataclass(frozen=True)
class Record:
    """A report with the folder that its paths start from."""

    name: str  # as the user gave it
    root: Path
    report: Report
    targets: tuple[str, ...]  # those asked for
    file: Path | None = None  # the one file asked for
    manifest: Manifest | None = None  # of a bundle

    @property
    def artifacts(self) -> dict[str, ReportedArtifact]:
        """The artifacts of the targets asked for."""
        found = {name: self.report.targets[name].artifact for name in self.targets}
        return {name: artifact for name, artifact in found.items() if artifact is not None}

    def path(self, ref: FileRef) -> Path:
        """Path of a file that the report names."""
        return self.root / ref.path

    def is_link(self, name: str) -> bool:
        """See `files.has_link`."""
        return has_link(self.root, name)


@contextmanager
def open_record(path: Path, data: bytes | None = None) -> Iterator[Record]:
    """The record at a path: a bundle (unpacked until the context ends), a run folder, or a file in one.

    `data`: a bundle's bytes, where they were read before: those whose signature was checked are those that are unpacked.

    Raises:
        InputError: there is none, or its report cannot be read.
        VerifyError: a bundle that is damaged or malicious.
    """
    if path.name.endswith(bundle.SUFFIX):
        manifest, files = bundle.read(path, data)
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            archive.extract(files, Path(folder))
            report = _read(Path(folder) / REPORT)
            if manifest.target not in report.targets:
                raise VerifyError(f"{path.name}: {REPORT} has no target {manifest.target}")
            if wrong := bundle.contradictions(manifest, report):
                raise VerifyError(f"{path.name}: manifest and {REPORT} contradict each other", found="; ".join(wrong))
            yield Record(str(path), Path(folder), report, (manifest.target,), manifest=manifest)
        return
    root = _root_of(path) if path.exists() else None
    if root is None:
        raise InputError(f"nothing to verify at {path}", expected="a bundle, a run folder, or an artifact inside one")
    report = _read(root / REPORT)
    yield Record(str(path), root, report, tuple(report.targets), file=path if path.is_file() and path.name != REPORT else None)


def full_report(path: Path) -> Report:
    """The report of a run folder, or of a report.json itself.

    Raises:
        InputError: it cannot be read, or is not a report.
    """
    return _read(path / REPORT if path.is_dir() else path)


def files_of(record: Record) -> tuple[tuple[str, FileRef], ...]:
    """Every file that the report names, with the target it belongs to; a bundle has those of its own target alone."""
    found = [(name, ref) for name in record.targets for ref in record.report.targets[name].files.values()]
    if record.manifest is None:
        pruned = record.report.pruned
        found += [("run", ref) for ref in (pruned.state, pruned.masks) if ref is not None]
    return tuple(found)


def digest_findings(record: Record) -> tuple[list[str], int]:
    """What is wrong with the files that the report names, or with the one asked for; and how many were looked at."""
    findings, looked = [], 0
    for name, ref in files_of(record):
        file = record.path(ref)
        if record.file is not None and without_links(record.file) != without_links(file):
            continue
        looked += 1
        if record.is_link(ref.path):
            findings.append(f"{name}: {ref.path} is a symbolic link, not a file of the run")
            continue
        found = file_ref(file, record.root) if file.is_file() else None
        findings += [f"{name}: {text}" for text in bundle.complaint(ref, found, "report")]
    if record.file is not None and not looked:
        drawn = record.file.name in ("report.html", "report.md")
        why = "is drawn from report.json and has no record of its own" if drawn else "is not named in the report"
        findings.append(f"{record.file.name} {why}")
    return findings, looked


def _read(path: Path) -> Report:
    """Returns the report in a file, which has at least one target, and each artifact in its target's folder.

    Raises:
        InputError: it cannot be read, or is not a report.
    """
    report = read_report(path)
    if not report.targets:
        raise InputError(f"{path} is not a report", found="no target", do="run again")
    for name, target in report.targets.items():
        if target.artifact is not None and not target.artifact.path.startswith(f"artifacts/{name}/"):
            raise InputError(f"{path} is not a report", found=f"{target.artifact.path} as the artifact of {name}", do="run again")
    return report


def _root_of(path: Path) -> Path | None:
    """The run folder of a path: the folder itself, a file at its top, or anything in the folders that a run makes."""
    for root in (path, *path.parents):
        if (root / REPORT).is_file():
            inside = path.relative_to(root).parts
            own = not inside or inside[0] in _FOLDERS or (len(inside) == 1 and path.is_file())
            return root if own else None
    return None
