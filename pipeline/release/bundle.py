"""A release bundle of one target: a run folder cut down to one artifact, with a manifest that holds every file's digest.

    NAME/manifest.json            files, versions, digests, and every number with its device and protocol
    NAME/MODEL_CARD.md            what it is, for people
    NAME/artifacts/TARGET/        the artifact, its dense float baseline, golden samples with the artifact's answers
    NAME/labels.txt               class names, one a line, in the order of the logits
    NAME/report.{json,html,md}    NAME/plan.json    NAME/config.toml, without the paths of the machine it was made on
    NAME/sbom.cdx.json            CycloneDX
    NAME/LICENSES/

References in report.json hold here too: files keep the paths they have in the run folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..codec import from_json, parsed, to_json
from ..errors import VerifyError
from ..report.report import Named, Report
from ..signature import TOP1
from ..types import FileRef, Kind
from ..verify.statistics import Interval, latency_ci95, share_ci95
from .archive import Archive, DamagedArchive, unpack

SUFFIX = ".tar.gz"
MANIFEST = "manifest.json"
SCHEMA = 1
MOST_MANIFEST_BYTES = 4 << 20  # it has a thousand files at most, and some twenty numbers
_RIGHT = "every test image once, in the artifact's own runtime"
_PAIRED = f"{_RIGHT}; paired with the dense PyTorch network's answers"


@dataclass(frozen=True)
class Number:
    """A figure, with all that it needs to be believed."""

    name: str
    value: float
    unit: str
    ci95: Interval | None
    kind: Kind
    samples: int
    device: str
    protocol: str


@dataclass(frozen=True)
class Manifest:
    """What is in a bundle."""

    schema: int
    name: str
    target: str
    passed: bool  # all gates; false only where a bundle of a failed run was asked for
    reasons: tuple[str, ...]  # failed gates, one sentence each
    tool: str  # its version
    packages: dict[str, str]
    model: Named  # the dense network; digest of its state dict
    data: Named
    artifact: str  # path of the file
    format: str
    precision: str
    input_name: str
    input_shape: tuple[int, ...]
    numbers: tuple[Number, ...]
    files: tuple[FileRef, ...]  # all but the manifest itself, sorted by path


def manifest_of(name: str, report: Report, target: str, files: Mapping[str, bytes]) -> Manifest:
    """The manifest of a bundle, from the run's report and the bundle's other files.

    Raises:
        ValueError: the target has no artifact.
    """
    found = report.targets[target]
    artifact = found.artifact
    if artifact is None:
        raise ValueError(f"{target} has no artifact")
    return Manifest(
        schema=SCHEMA,
        name=name,
        target=target,
        passed=found.verdict.passed,
        reasons=found.verdict.reasons,
        tool=report.tool.version,
        packages=dict(sorted(report.tool.packages.items())),
        model=report.model,
        data=Named(report.data.name, report.data.sha256),
        artifact=artifact.path,
        format=artifact.format,
        precision=artifact.precision,
        input_name=artifact.input_name,
        input_shape=artifact.input_shape,
        numbers=numbers(report, target),
        files=tuple(FileRef(path, hashlib.sha256(data).hexdigest(), len(data)) for path, data in sorted(files.items())),
    )


def numbers(report: Report, target: str) -> tuple[Number, ...]:
    """The measured figures of a target's artifact; a metric that came to NaN is none, and JSON could not hold it."""
    accuracy, latency = report.targets[target].accuracy, report.targets[target].latency
    found = []
    if accuracy is not None:
        count, kind, where = accuracy.samples, accuracy.kind, _machine(report, target)
        metric = report.metric
        share, points = share_ci95(accuracy.value, count) if metric == TOP1 else None, accuracy.drop_ci95
        unit = metric.unit if metric.unit != "%" else "percent"
        lost = "points" if metric.unit == "%" else unit
        name, how = ("top1", _RIGHT) if metric == TOP1 else ("value", metric.name)
        found += [
            Number(name, accuracy.value, unit, share, kind, count, where, how),
            Number("drop", accuracy.drop, lost, points, kind, count, where, accuracy.interval),
            Number("agreement", accuracy.agreement, "share", None, kind, count, where, _PAIRED),
        ]
    if latency is not None:
        pairs, kind, speedup = latency.pairs, latency.kind, latency.speedup
        protocol = (
            f"one image at a time, {latency.threads} threads, artifact and dense float baseline interleaved in "
            f"{latency.sessions} fresh processes; noise floor {latency.noise_floor:.4f}"
        )
        where = ", ".join((latency.device, *_facts(latency.environment)))
        found.append(Number("speedup", speedup.median, "ratio", speedup.ci95, kind, pairs, where, protocol))
        for side, percentiles in (("artifact", latency.artifact), ("dense", latency.dense)):
            median, ends = percentiles.p50_ms, latency_ci95(latency, side)
            found.append(Number(f"{side}_p50", median, "ms", ends, kind, pairs, where, protocol))
    return tuple(number for number in found if math.isfinite(number.value))


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest's file."""
    return (json.dumps(to_json(manifest), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read(path: Path, data: bytes | None = None) -> tuple[Manifest, Archive]:
    """A bundle's manifest and files, every digest checked; `data`: its bytes, where they were read before.

    Raises:
        InputError: the file does not exist.
        VerifyError: it is damaged, foreign, malicious, or does not match its manifest; the file in it is named.
    """
    try:
        archive = unpack(path, data)
    except DamagedArchive as damage:
        wrong = _changed_files(damage.files)
        raise (DamagedArchive(path.name, f"{damage.found}; {'; '.join(wrong)}", damage.files) if wrong else damage) from None
    manifest = _manifest(path.name, archive.files)
    wrong = differences(manifest.files, archive.files)
    if wrong:
        raise VerifyError(f"{path.name} is not what its manifest says", found="; ".join(wrong))
    return manifest, archive


def differences(refs: tuple[FileRef, ...], files: Mapping[str, bytes]) -> list[str]:
    """Which files are missing, changed, or not in the manifest, a sentence each."""
    wrong = []
    for ref in refs:
        data = files.get(ref.path)
        found = None if data is None else FileRef(ref.path, hashlib.sha256(data).hexdigest(), len(data))
        wrong += complaint(ref, found, "manifest")
    known = {MANIFEST, *(ref.path for ref in refs)}
    return wrong + [f"{name} is not in the manifest" for name in sorted(files) if name not in known]


def contradictions(manifest: Manifest, report: Report) -> list[str]:
    """Returns the fields in which a manifest disagrees with the report in the same bundle, a sentence each."""
    artifact = report.targets[manifest.target].artifact
    if artifact is None:
        return [f"the report has no artifact for {manifest.target}"]
    expected = manifest_of(manifest.name, report, manifest.target, {})
    names = [field.name for field in fields(Manifest) if field.name not in ("files", "schema", "numbers")]
    pairs = {name: (getattr(manifest, name), getattr(expected, name)) for name in names}
    wrong = [f"{name} is {one!r}, not {other!r}" for name, (one, other) in pairs.items() if one != other]
    # how a number is described may differ between versions of this tool, the number may not
    own, theirs = ({n.name: replace(n, protocol="", device="") for n in m.numbers} for m in (manifest, expected))
    wrong += [f"{name} differs" for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    if artifact.sha256 not in [ref.sha256 for ref in manifest.files if ref.path == artifact.path]:
        wrong.append(f"{artifact.path} is not the report's artifact")
    return wrong


def complaint(ref: FileRef, found: FileRef | None, record: str) -> list[str]:
    """Why a file is not the one that a record ("report", "manifest") refers to, one sentence; empty where it is."""
    if found is None:
        return [f"{ref.path} is missing"]
    if found.size_bytes != ref.size_bytes:
        return [f"{ref.path} has {found.size_bytes} bytes, not {ref.size_bytes}"]
    return [] if found.sha256 == ref.sha256 else [f"{ref.path} has another SHA-256 than the {record} says"]


def _manifest(name: str, files: Mapping[str, bytes]) -> Manifest:
    try:
        manifest = from_json(Manifest, parsed(files[MANIFEST], MOST_MANIFEST_BYTES))
        if manifest.schema != SCHEMA:
            raise ValueError(f"schema {manifest.schema}, where this version reads {SCHEMA}")
    except KeyError as error:
        raise VerifyError(f"{name} is not a bundle", found=f"no {error}", expected=MANIFEST) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise VerifyError(f"{name}: {MANIFEST} is not a manifest", found=str(error)) from error
    return manifest


def _changed_files(files: Mapping[str, bytes]) -> list[str]:
    """The files of a damaged archive that do not match its manifest, where that can still be read."""
    try:
        return [text for text in differences(_manifest("", files).files, files) if not text.endswith("missing")]
    except VerifyError:
        return []


def _machine(report: Report, target: str) -> str:
    """Where the artifact classified the test images: an engine on its board, all else on the machine of the run, which the
    latency names when it is the same.
    """
    found = report.targets[target]
    if found.artifact is not None and found.artifact.format == "engine" and found.on_device is not None:
        return f"{found.on_device.device}, {found.on_device.runtime}"
    facts = _facts(found.latency.environment) if found.latency is not None and found.latency.device == "local" else []
    return ", ".join(("local", *facts))


def _facts(environment: Mapping[str, str]) -> list[str]:
    runtime = " ".join(environment[key] for key in ("runtime", "runtime_version") if key in environment)
    return [text for text in (environment.get("cpu", ""), runtime) if text]
