"""Mutated inputs at every door: each ends with a documented exit code, and an error is one line on stderr."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from doors import DOORS, Room
from forks import forked
from record import Campaign
from workshop import Reference, Workshop

LIMIT_S = 60.0  # an input that takes longer is a hang


def fuzz(shop: Workshop, wanted: Reference, bundle: Path, count: int, seed: int, found: Campaign) -> None:
    """Tries `count` inputs, shared out among the doors. Input n depends on the seed and n alone."""
    for number in range(count):
        if found.over:
            break
        rng = random.Random(f"{seed}/{number}")
        door = rng.choices(list(DOORS), list(DOORS.values()))[0]
        folder = shop.folder / "fuzz"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            call = door(Room(shop, wanted, bundle, folder), rng)
        except Exception as error:
            found.violation(f"{door.__name__}, no input", f"input {number}: {type(error).__name__}: {error}")
            continue

        def before(call=call, folder=folder) -> None:
            os.environ["EDGE_COMPRESS_CACHE"] = str(folder / "cache")
            if call.before is not None:
                call.before()

        ended = forked(call.work, seconds=LIMIT_S, before=before)
        if wrong := ended.fault(run=call.run) or ("taken, though changed" if call.refused and ended.code == 0 else ""):
            trace = [line.strip() for line in ended.err.splitlines() if line.startswith('  File "')]
            where = trace[-1] if trace and wrong == "traceback" else ""
            found.violation(f"{door.__name__}, {wrong}", f"input {number}: {ended.last_line} {where}")
        else:
            found.saw(f"{door.__name__}: exit code {ended.code}")
