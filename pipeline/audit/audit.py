"""Checks a run, an artifact or a bundle against its record: digests, golden answers, and figures measured again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ... import targets
from ..errors import InputError, UnavailableError, VerifyError
from ..files import without_links
from ..progress import Progress
from ..release import signing
from ..release.bundle import SUFFIX
from ..release.consistency import self_contradictions
from ..release.record import Record, digest_findings
from ..report.report import Report
from ..types import Accuracy, Timing
from ..verify import golden


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    text: str
    holds: bool = True
    target: str = ""
    figures: Accuracy | Timing | None = None  # measured again

    @property
    def line(self) -> str:
        """The text, with the target it is about."""
        return f"{self.target}: {self.text}" if self.target else self.text


def signature(path: Path, public_key: str | None, data: bytes | None = None) -> Iterator[Check]:
    """Who signed a bundle, checked where a key is given; `data`: its bytes, where they were read before.

    Raises:
        InputError: a key for something that is not a bundle, or not a key.
        UnavailableError, VerifyError: see `signing.check`.
    """
    if public_key is None:
        if path.name.endswith(SUFFIX) and (text := signing.seen(path)):
            yield Check(text)
    elif not path.name.endswith(SUFFIX):
        raise InputError("--public-key", found=str(path), expected="a bundle: nothing else is signed")
    else:
        yield Check(signing.check(path, public_key, data))


def contents(record: Record) -> Iterator[Check]:
    """Digests, the report against itself, then each artifact's answers to its golden samples in its own runtime.

    Raises:
        UnavailableError: a runtime is not here.
    """
    wrong, looked = digest_findings(record)
    wrong += [f"the report contradicts itself: {text}" for text in self_contradictions(record.report, record.targets)]
    yield from (Check(text, holds=False) for text in wrong)
    if wrong:
        return  # the answers of a changed file mean nothing
    manifest = record.manifest
    whole = f"{len(manifest.files)} files, each with the SHA-256 of the manifest" if manifest else ""
    yield Check(whole or f"{looked} file{'s' if looked != 1 else ''} with the SHA-256 of the report")
    if manifest is not None and not manifest.passed:
        yield Check(f"bundled though it did not pass: {'; '.join(manifest.reasons)}", target=manifest.target)
    for name in artifacts_of(record):
        yield from _golden(record, name)


def artifacts_of(record: Record) -> list[str]:
    """The targets whose artifact is asked for."""
    asked = without_links(record.file) if record.file is not None else None
    return [name for name, artifact in record.artifacts.items() if asked in (None, without_links(record.path(artifact)))]


def measured_again(record: Record, data: str | None, recipe: Path | None, device: str | None, ui: Progress) -> Iterator[Check]:
    """Accuracy on the run's own data, speedup on a device, and an engine's golden answers there; see `recheck`.

    Raises:
        UnavailableError: the data are to be read, and PyTorch is not here: `verify` works without it otherwise.
    """
    from . import recheck

    if (data is not None or recipe is not None) and find_spec("torch") is None:
        option = "--data" if data is not None else "--recipe"
        raise UnavailableError(f"verify {option} needs PyTorch", found="none", do="install edge-compress with its dependencies")
    for name in artifacts_of(record):
        if data is not None:
            accuracy, text, holds = recheck.accuracy(record, name, data)
            yield Check(text, holds, name, accuracy)
        if recipe is not None:
            accuracy, text, holds = recheck.by_recipe(record, name, recipe)
            yield Check(text, holds, name, accuracy)
        if device is not None and record.artifacts[name].format == "engine":
            found = recheck.engine_answers(record, name, device)
            yield Check(found.text, found.holds, name)
        if device is not None:
            timing, text, holds = recheck.latency(record, name, device, ui)
            yield Check(text, holds, name, timing)


def report_with(record: Record, checks: Sequence[Check]) -> Report:
    """The record's report, with the figures that were measured again in place of the recorded ones."""
    targets = dict(record.report.targets)
    for check in checks:
        if isinstance(check.figures, Accuracy):
            targets[check.target] = replace(targets[check.target], accuracy=check.figures)
        elif check.figures is not None:
            targets[check.target] = replace(targets[check.target], latency=check.figures)
    return replace(record.report, targets=targets)


def _golden(record: Record, name: str) -> Iterator[Check]:
    ref, artifact = record.report.targets[name].golden, record.artifacts[name]
    if ref is None:
        if record.manifest is not None:
            raise VerifyError(f"{record.name} has no golden samples")
        yield Check("no golden samples: a run of an earlier version", target=name)
        return
    kept = golden.read(record.path(ref))
    if artifact.format == "engine":  # which runs on the board it was built for and nowhere else
        by = f"{kept.where.cpu} with {kept.where.version}"
        text = f"{len(kept.outputs[0])} golden samples, recorded on {by}: an engine runs on such a board only, --device asks it"
        yield Check(text, target=name)
        return
    found = golden.replay(kept, targets.load(name), record.path(artifact))
    yield Check(found.text, found.holds, name)
