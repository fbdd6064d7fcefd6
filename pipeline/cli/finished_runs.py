"""The commands for finished runs: `verify`, `release`, `report`. Nothing is imported here that `--help` does not need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import InputError, VerifyError

if TYPE_CHECKING:
    from ..audit.audit import Check

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("path", type=_PATH)
@click.option("--data", metavar="SPEC", help="The run's own data: accuracy is measured again.  [default: it is not]")
@click.option(
    "--device", metavar="NAME", help="A name from `edge-compress devices`: the speedup is measured again.  [default: it is not]"
)
@click.option(
    "--against",
    type=_PATH,
    metavar="FILE",
    help="A stored report.json: exit 1 when accuracy or speedup got worse.  [default: none]",
)
@click.option(
    "--public-key", metavar="KEY", help="minisign's, or a file with one: who signed the bundle is checked.  [default: it is not]"
)
def verify(path: Path, data: str | None, device: str | None, against: Path | None, public_key: str | None) -> int:
    """Check a bundle, a run folder or an artifact against its record.

    Digests of all files, then the artifact's answers to its golden images in its own runtime. With --data and --device accuracy
    and speedup are measured again: the new intervals must agree with the recorded ones. With --against the summary is Markdown.

    \b
    Examples:
      edge-compress verify dist/resnet20-x86-1a2b3c4d.tar.gz
      edge-compress verify runs/resnet20 --data npz:cifar10.npz --device local
      edge-compress verify runs/resnet20 --against baseline.json
    """  # noqa: D301
    from .. import progress
    from ..audit import audit
    from ..audit.regression import compare, to_markdown
    from ..release.record import full_report, open_record

    stored = None if against is None else full_report(against)
    checks: list[Check] = []

    def tell(found: Iterable[Check]) -> None:
        for check in found:
            checks.append(check)
            if stored is None and check.holds:
                click.echo(check.line)

    tell(audit.signature(path, public_key))
    with open_record(path) as record:
        tell(audit.contents(record))
        if all(check.holds for check in checks):
            tell(audit.measured_again(record, data, device, progress.Progress()))
        rows = () if stored is None else compare(stored, audit.report_with(record, checks), record.targets)
    if stored is not None:
        click.echo(to_markdown(rows, [(check.line, check.holds) for check in checks], path.name))
    if broken := [check.line for check in checks if not check.holds]:
        raise VerifyError(f"{path} is not what its record says", found="; ".join(broken))
    if worse := [f"{row.target}: {row.worse}" for row in rows if row.worse]:
        raise VerifyError(f"{path} got worse", found="; ".join(worse))
    if stored is None:
        click.echo(f"{path}: all of it is what its record says")
    return 0


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, metavar="DIR", default=Path("dist"), show_default=True, help="Folder of the bundles.")
@click.option("--allow-failed", is_flag=True, help="Bundle what did not pass its gates too, marked as such inside.")
@click.option(
    "--license",
    "licenses",
    metavar="FILE",
    multiple=True,
    type=_PATH,
    help="The model's or the data's licence, for the bundle. Repeatable.  [default: none]",
)
@click.option("--sign", "key", type=_PATH, metavar="KEY", help="Sign with this minisign secret key.  [default: not signed]")
def release(runs: tuple[Path, ...], out: Path, allow_failed: bool, licenses: tuple[Path, ...], key: Path | None) -> int:
    """Bundle finished runs for shipping: an archive for each target that passed its gates.

    In it: the artifact with its baseline, labels, golden images, report, plan, settings, a manifest of digests and figures,
    a model card, licences and a bill of materials. The same run gives the same bytes.

    \b
    Example:
      edge-compress release runs/resnet20 --out dist --sign minisign.key
    """  # noqa: D301
    from ..release import signing
    from ..release.release import release as write

    sign = (
        None if key is None else signing.signer(key, lambda: str(click.prompt(f"password of {key}", hide_input=True, err=True)))
    )

    def say(text: str) -> None:
        click.echo(text, err=True)

    for bundle in write(runs, out, allow_failed=allow_failed, licenses=licenses, sign=sign, say=say):
        click.echo(f"{bundle.path}{'' if bundle.passed else ' (did not pass its gates)'}")
        click.echo(f"  SHA-256 {bundle.sha256}")
    return 0


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, metavar="FILE", help="The page over several runs.  [default: comparison.html]")
def report(runs: tuple[Path, ...], out: Path | None) -> int:
    """Write the report of a run again, or one page over several runs.

    One run folder: its report.md and report.html, from its report.json. Several (folders, or stored report.json files): accuracy
    against measured latency, figures side by side, and how their plans differ.

    \b
    Examples:
      edge-compress report runs/demo
      edge-compress report runs/small runs/large --out comparison.html
    """  # noqa: D301
    from ..files import atomic_write
    from ..release.record import full_report

    reports = [full_report(run) for run in runs]
    if len(runs) == 1:
        if out is not None:
            raise InputError("--out", found="one run", expected="several", do="a run's own report is written into its folder")
        from ..report.report import to_html, to_markdown

        folder = runs[0] if runs[0].is_dir() else runs[0].parent
        for name, render in (("report.md", to_markdown), ("report.html", to_html)):
            atomic_write(folder / name, render(reports[0]))
            click.echo(str(folder / name))
        return 0
    from ..report.comparison import to_html as comparison

    file = out or Path("comparison.html")
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(
        file,
        comparison(
            [(run.stem if run.suffix == ".json" else run.resolve().name, found) for run, found in zip(runs, reports, strict=True)]
        ),
    )
    click.echo(str(file))
    return 0
