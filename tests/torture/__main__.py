"""`python tests/torture`: all campaigns, within a time, into a JSON file. Exit code 1 where there is a violation."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import flips
import write_faults
from forks import forked
from fuzz import fuzz
from kills import kill_runs
from record import Record
from workshop import KINDS, Reference, Workshop, available, workshop_in

CAMPAIGNS = ("fuzz", "kills", "faults", "flips")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaigns asked for; returns the exit code."""
    asked = _parser().parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if asked.seed is None else asked.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        shop = workshop_in(Path(folder) / "workshop")
        demo = shop.reference("demo")
        bundle = _bundle(shop, demo)
        record = Record(Path(folder), seed, asked.minutes)
        for name in asked.campaign or CAMPAIGNS:
            {"kills": _kills, "flips": _flips, "faults": _faults, "fuzz": _fuzz}[name](asked, record, shop, demo, bundle)
        record.write(asked.out, add=asked.add)
    print(f"{record.violations} violations; {asked.out}", file=sys.stderr)
    return 1 if record.violations else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--seed", type=int, help="of everything that is chosen at random  [default: another each time]")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="of trials, after the preparation  [default: 60]",
    )
    parser.add_argument("--campaign", action="append", choices=CAMPAIGNS, help="only this one; repeatable  [default: all]")
    parser.add_argument("--add", action="store_true", help="keep the other campaigns in the file")
    parser.add_argument("--kills", type=int, default=100, help="of the demo's run")
    parser.add_argument("--other-kills", type=int, default=30, help="of each other kind of run")
    parser.add_argument("--kind", action="append", choices=KINDS, help="kinds of run to kill; repeatable  [default: all]")
    parser.add_argument("--flips", type=int, default=1000, help="in each of run folders, caches and bundles")
    parser.add_argument("--inputs", type=int, default=2000, help="mutated ones")
    return parser


def _kills(asked: argparse.Namespace, record: Record, shop: Workshop, demo: Reference, bundle: Path) -> None:
    for kind in asked.kind or KINDS:
        with record.campaign(f"kills, {kind}", 0.35 if kind == "demo" else 0.2) as found:
            if not available(kind):
                found.skipped = "its packages are not installed"
                continue
            started = time.monotonic()
            wanted = demo if kind == "demo" else shop.reference(kind)
            found.until += time.monotonic() - started  # reference runs do not count as trials
            count = asked.kills if kind == "demo" else asked.other_kills
            kill_runs(shop, kind, wanted, count, random.Random(f"{record.seed}/{kind}"), found)


def _flips(asked: argparse.Namespace, record: Record, shop: Workshop, demo: Reference, bundle: Path) -> None:
    count = asked.flips
    with record.campaign("bit flips, bundle", 0.3) as found:
        flips.flip_bundle(shop, bundle, count, random.Random(f"{record.seed}/bundle"), found)
    with record.campaign("bit flips, latency cache") as found:
        flips.flip_latencies(shop, count, random.Random(f"{record.seed}/latencies"), found)
    with record.campaign("bit flips, evaluations") as found:
        flips.flip_evaluations(shop, demo, count, random.Random(f"{record.seed}/evaluations"), found)
    with record.campaign("bit flips, runs with a flipped latency cache", 0.1) as found:
        flips.run_with_flipped_cache(shop, demo, -(-count // 100), random.Random(f"{record.seed}/cached"), found)
    with record.campaign("bit flips, finished run", 0.5) as found:
        flips.flip_finished(shop, demo, count, random.Random(f"{record.seed}/finished"), found)
    with record.campaign("bit flips, half-finished run") as found:
        flips.flip_unfinished(shop, demo, count, random.Random(f"{record.seed}/unfinished"), found)


def _faults(asked: argparse.Namespace, record: Record, shop: Workshop, demo: Reference, bundle: Path) -> None:
    turn = record.seed % len(write_faults.ERRORS)  # over the nights each place fails with each error
    with record.campaign("failed writes", 0.5) as found:
        write_faults.fail_writes(shop, demo, write_faults.ERRORS[turn:] + write_faults.ERRORS[:turn], found)


def _fuzz(asked: argparse.Namespace, record: Record, shop: Workshop, demo: Reference, bundle: Path) -> None:
    with record.campaign("mutated inputs", 0.35) as found:
        fuzz(shop, demo, bundle, asked.inputs, record.seed, found)


def _bundle(shop: Workshop, demo: Reference) -> Path:
    ended = forked(["release", str(demo.folder), "--out", str(shop.folder / "bundles"), "--allow-failed"], seconds=120)
    if ended.code != 0:
        raise RuntimeError(ended.err)
    (bundle,) = (shop.folder / "bundles").glob("*.tar.gz")
    return bundle


if __name__ == "__main__":
    sys.exit(main())
