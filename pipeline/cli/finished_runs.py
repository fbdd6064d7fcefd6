"""The commands for finished runs: `verify`, `release`, `report`. Imports only what `--help` needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InputError, VerifyError, described, printable
from .output import echo

if TYPE_CHECKING:
    from ..audit.audit import Check

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("path", type=_PATH)
@click.option("--data", metavar="SPEC", help="Measure accuracy again on the run's own data.  [default: no]")
@click.option(
    "--recipe", type=_PATH, metavar="FILE", help="Measure the metric again by the recipe the run was made from.  [default: no]"
)
@click.option(
    "--device", metavar="NAME", help="Measure the speedup again on a device from `edge-compress devices`.  [default: no]"
)
@click.option(
    "--against",
    type=_PATH,
    metavar="FILE",
    help="Compare with a stored report.json; exit 1 if accuracy or speedup got worse.  [default: none]",
)
@click.option(
    "--public-key", metavar="KEY", help="Check the bundle's signature with this minisign key or key file.  [default: not checked]"
)
def verify(
    path: Path, data: str | None, recipe: Path | None, device: str | None, against: Path | None, public_key: str | None
) -> int:
    """Check a bundle, a run folder or an artifact against its record.

    Compares the digests of all files and the artifact's outputs on its golden samples in its own runtime. --data or --recipe,
    and --device, measure accuracy and speedup again and compare them with the record. With --against the summary is Markdown.
    Exit code 1 if a check fails or the bundle is damaged.

    \b
    Examples:
      edge-compress verify dist/resnet20-x86-1a2b3c4d.tar.gz
      edge-compress verify runs/resnet20 --data npz:cifar10.npz --device local
      edge-compress verify runs/resnet20 --against baseline.json
    """  # noqa: D301
    from .. import progress
    from ..audit import audit
    from ..audit.regression import compare, to_markdown
    from ..release import archive
    from ..release.bundle import SUFFIX
    from ..release.record import full_report, open_record

    stored = None if against is None else full_report(against)
    checks: list[Check] = []

    def tell(found: Iterable[Check]) -> None:
        for check in found:
            checks.append(check)
            if stored is None and check.holds:
                echo(check.line)

    packed = archive.read_whole(path) if path.name.endswith(SUFFIX) else None
    tell(audit.signature(path, public_key, packed))
    with open_record(path, packed) as record:
        tell(audit.contents(record))
        if all(check.holds for check in checks):
            tell(audit.measured_again(record, data, recipe, device, progress.Progress()))
        rows = () if stored is None else compare(stored, audit.report_with(record, checks), record.targets)
    if stored is not None:
        echo(to_markdown(rows, [(check.line, check.holds) for check in checks], path.name))
    if broken := [check.line for check in checks if not check.holds]:
        raise VerifyError(f"{path} does not match its record", found="; ".join(broken))
    if worse := [f"{row.target}: {row.worse}" for row in rows if row.worse]:
        raise VerifyError(f"{path} got worse", found="; ".join(worse))
    if stored is None:
        echo(f"{path}: all checks passed")
    return 0


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, metavar="DIR", default=Path("dist"), show_default=True, help="Folder to write the bundles to.")
@click.option("--allow-failed", is_flag=True, help="Also bundle targets that failed a gate; the bundle says so.")
@click.option(
    "--license",
    "licenses",
    metavar="FILE",
    multiple=True,
    type=_PATH,
    help="Add the model's or the data's licence to the bundle. Repeatable.  [default: none]",
)
@click.option("--sign", "key", type=_PATH, metavar="KEY", help="Sign with this minisign secret key.  [default: not signed]")
def release(runs: tuple[Path, ...], out: Path, allow_failed: bool, licenses: tuple[Path, ...], key: Path | None) -> int:
    """Bundle finished runs for shipping: one reproducible archive for each target that passed its gates.

    A bundle holds the artifact and its baseline, labels, golden samples, report, plan, settings, a manifest of digests and
    figures, a model card, licences and a bill of materials.

    \b
    Example:
      edge-compress release runs/resnet20 --out dist --sign minisign.key
    """  # noqa: D301
    from ..release import signing
    from ..release.release import release as write

    def ask() -> str:
        if not sys.stdin.isatty():
            raise InputError(f"--sign {key}", found="an encrypted key and no terminal", do=f"set {signing.PASSWORD}")
        return str(click.prompt(f"password of {key}", hide_input=True, err=True))

    sign = None if key is None else signing.signer(key, ask)
    for bundle in write(runs, out, allow_failed=allow_failed, licenses=licenses, sign=sign, say=partial(echo, err=True)):
        echo(f"{bundle.path}{'' if bundle.passed else ' (did not pass its gates)'}")
        echo(f"  SHA-256 {bundle.sha256}")
    return 0


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=_PATH)
@click.option(
    "--out", type=_PATH, metavar="FILE", help="Where to write the comparison of several runs.  [default: comparison.html]"
)
def report(runs: tuple[Path, ...], out: Path | None) -> int:
    """Re-render the report of a run, or compare several runs on one page.

    One run folder: writes its report.md and report.html from its report.json. Several (folders, or stored report.json files):
    plots accuracy against measured latency, tabulates the figures and shows where the plans differ.

    \b
    Examples:
      edge-compress report runs/demo
      edge-compress report runs/small runs/large --out comparison.html
    """  # noqa: D301
    from ..files import atomic_write, without_links
    from ..release.record import full_report

    reports = [full_report(run) for run in runs]
    if len(runs) == 1:
        if out is not None:
            raise InputError(
                "--out", found="one run", expected="several", do="leave it out: the report of one run is written to its folder"
            )
        from ..report.pages import to_html, to_markdown

        folder = runs[0] if runs[0].is_dir() else runs[0].parent
        with _rendering(runs):
            drawn = {"report.md": to_markdown(reports[0]), "report.html": to_html(reports[0], folder)}
        for name, text in drawn.items():
            atomic_write(folder / name, text)
            echo(str(folder / name))
        return 0
    from ..report.run_comparison import to_html as comparison

    file = without_links(out or Path("comparison.html"))  # a link is written through
    file.parent.mkdir(parents=True, exist_ok=True)
    names = [printable(run.stem if run.suffix == ".json" else without_links(run).name) for run in runs]
    with _rendering(runs):
        page = comparison(list(zip(names, reports, strict=True)))
    atomic_write(file, page)
    echo(str(file))
    return 0


@contextmanager
def _rendering(runs: tuple[Path, ...]) -> Iterator[None]:
    """Makes what a report from outside does to the pages one line: it has passed the checks, but was not written by a run."""
    try:
        yield
    except Exception as error:
        found = described(error)
        do = "run again, or take the report.json that the run has written"
        raise InputError(f"no page can be made of {', '.join(map(str, runs))}", found=found, do=do) from error
