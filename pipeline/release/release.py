"""Bundles finished runs for shipping: one archive for each target, its digest and, where asked for, a signature beside it.

Everything in a bundle comes from the run folder, so the same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path, PurePath

from .. import config
from ..errors import InputError, VerifyError
from ..files import atomic_write, read_regular
from ..run_folder import CONFIG_NAME
from . import bundle
from .archive import MOST_NAME, Archive, pack
from .consistency import self_contradictions
from .model_card import model_card
from .record import Record, digest_findings, files_of, open_record
from .sbom import sbom
from .signing import SUFFIX as SIGNED
from .signing import Sign

_COPIED = ("plan.json", "report.json", "report.html", "report.md")
_LONGEST_NAME = 64  # characters of a model's name in that of a bundle
_ONLY_HERE = ("out", "json", "require-artifact")  # settings that say nothing of the result


@dataclass(frozen=True)
class Released:
    """One bundle, written."""

    path: Path
    sha256: str
    passed: bool


def release(
    runs: Sequence[Path],
    out: Path,
    *,
    allow_failed: bool = False,
    licenses: Sequence[Path] = (),
    sign: Sign | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Released, ...]:
    """Bundle every target of some runs into a folder. Nothing is written unless all of them may be shipped.

    Args:
        runs: folders of finished runs.
        out: the bundles' folder, made where it is not there.
        allow_failed: bundle artifacts that did not pass their gates too, marked as such.
        licenses: files that go into each bundle's LICENSES/ beside the tool's own: the model's, the data's.
        sign: makes a signature, see `signing.signer`.
        say: called with one line for each target that was not built and is left out.

    Raises:
        InputError: a folder that holds no finished run.
        VerifyError: a gate failed, or a file does not match its record.
        UnavailableError: a package is missing.
    """
    texts = _licences(licenses)
    archives: dict[str, tuple[bytes, bool]] = {}
    for run in runs:
        if not run.is_dir():
            raise InputError(f"{run} is not a run folder", found="a file" if run.exists() else "nothing there")
        with open_record(run) as record:
            for target in _shippable(record, allow_failed, say):
                archive = _archive(record, target, texts)
                passed = record.report.targets[target].verdict.passed
                archives[f"{archive.folder}{bundle.SUFFIX}"] = (pack(archive), passed)
    out.mkdir(parents=True, exist_ok=True)
    return tuple(_write(out, name, data, passed, sign) for name, (data, passed) in archives.items())


def _shippable(record: Record, allow_failed: bool, say: Callable[[str], None]) -> list[str]:
    """The targets of a run that have an artifact to ship.

    Raises:
        VerifyError: a gate failed, there is nothing to ship, or a file does not match the report.
        InputError: the run has no golden samples.
    """
    if wrong := digest_findings(record)[0]:
        raise VerifyError(f"{record.name} does not match its record", found="; ".join(wrong), do="run again")
    if wrong := self_contradictions(record.report, record.targets):
        raise VerifyError(f"{record.name}: its report contradicts itself", found="; ".join(wrong), do="run again")
    results = record.report.targets
    why = {name: f"{name}: {result.why}" for name, result in results.items()}
    absent = [name for name, result in results.items() if result.status == "not_built"]
    failed = [why[name] for name, result in results.items() if not result.verdict.passed and name not in absent]
    if failed and not allow_failed:
        raise VerifyError(
            f"{record.name} did not pass", found=". ".join(failed), do="--allow-failed bundles it anyway, marked as failed"
        )
    names = [name for name in record.artifacts if name not in absent]
    if not names:
        raise VerifyError(f"{record.name} has no artifact", found=". ".join(why.values()) or "no target")
    for name in absent:
        say(f"{record.name}: left out, it was not built: {why[name]}")
    for name in names:
        if results[name].golden is None:
            raise InputError(
                f"{record.name} has no golden samples for {name}",
                found="a run of an earlier version, or one whose artifact ran nowhere",
                do="re-run the run's own command: it adds them, finished stages are kept",
            )
    return names


def _archive(record: Record, target: str, licenses: Mapping[str, bytes]) -> Archive:
    report = record.report
    if links := [name for name in (*_COPIED, CONFIG_NAME) if record.is_link(name)]:
        raise VerifyError(f"{record.root / links[0]}", found="a symbolic link", expected="a file of the run", do="run again")
    files = {name: _read(record.root / name) for name in _COPIED}
    files |= {ref.path: _read(record.path(ref)) for name, ref in files_of(record) if name == target}
    if masks := report.pruned.masks:
        files[masks.path] = _read(record.path(masks))
    files |= {CONFIG_NAME: portable(record.root / CONFIG_NAME).encode(), **licenses}
    files["labels.txt"] = "".join(f"{' '.join(label.split())}\n" for label in report.data.classes).encode()
    names = sorted(name.removeprefix("LICENSES/") for name in licenses)
    files["MODEL_CARD.md"] = model_card(report, target, names).encode()
    files["sbom.cdx.json"] = sbom(report, target, files)
    named = f"{_short(report.model.name)}-{target}"
    digest = hashlib.sha256(bundle.to_bytes(bundle.manifest_of(named, report, target, files))).hexdigest()
    folder = f"{named}-{digest[:8]}"
    return Archive(folder, {**files, bundle.MANIFEST: bundle.to_bytes(bundle.manifest_of(folder, report, target, files))})


def portable(file: Path) -> str:
    """A run's resolved configuration without what is specific to this machine: its output folder, folders of its files.

    Raises:
        InputError: it cannot be read.
    """
    found = config.load(file, {})
    weights, recipe = (None if file is None else Path(file.name) for file in (found.weights, found.recipe))
    found = replace(found, model=_bare(found.model), data=_bare(found.data), device=_bare(found.device))
    found = replace(found, weights=weights, recipe=recipe, class_order=_bare(found.class_order))
    lines = config.to_toml(found).splitlines(keepends=True)
    return "".join(line for line in lines if line.partition(" = ")[0] not in _ONLY_HERE)


def _licences(files: Sequence[Path]) -> dict[str, bytes]:
    """Licence texts by their name in a bundle, the tool's own among them.

    Raises:
        InputError: one cannot be read, its name does not fit into an archive, or two have the same name.
    """
    texts = {"LICENSES/edge-compress.txt": _own_license().encode()}
    for file in files:
        plain = _plain(file.name)
        if not 0 < len(plain) <= MOST_NAME:
            found = f"a name of {len(plain)} letters and digits"
            raise InputError(f"--license {file}", found=found, expected=f"1 to {MOST_NAME}", do="rename it")
        name = f"LICENSES/{plain}"
        if name in texts:
            raise InputError(f"--license {file}", found=f"another {name} in the bundle", do="rename one of the two files")
        texts[name] = _read(file)
    return texts


def _own_license() -> str:
    """The text of this tool's licence."""
    files = metadata.distribution("edge-compress").files or []
    return Path(str(next(file for file in files if file.name == "LICENSE").locate())).read_text(encoding="utf-8")


def _bare(spec: str) -> str:
    """A model or data spec with its paths cut to their last part."""
    return ":".join(PurePath(part).name or part for part in spec.split(":"))


def _short(model: str) -> str:
    return _plain(model.rpartition(":")[2])[:_LONGEST_NAME] or "model"


def _plain(name: str) -> str:
    """A name that an archive may have."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", name).lstrip(".-+")


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read", found=error.strerror or str(error)) from error


def _write(out: Path, name: str, data: bytes, passed: bool, sign: Sign | None) -> Released:
    digest = hashlib.sha256(data).hexdigest()
    beside = {f"{name}.sha256": f"{digest}  {name}\n".encode()} | ({f"{name}{SIGNED}": sign(name, data)} if sign else {})
    for file, content in {name: data, **beside}.items():
        atomic_write(out / file, content)
    return Released(out / name, digest, passed)
