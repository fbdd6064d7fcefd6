"""SIGKILL at random moments inside the stages of a run, the same command again: the uninterrupted run's artifact."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from pathlib import Path

from record import Campaign
from workshop import Reference, Workshop

_SCRATCH = re.compile(r"/torture-[a-z0-9_]{8}/")  # folders that campaigns make
_MOST = 3  # kills of one run
_GRACE_S = 20.0  # until a process that lost its parent has to have ended


def kill_runs(shop: Workshop, kind: str, wanted: Reference, count: int, rng: random.Random, found: Campaign) -> None:
    """Kills runs of a kind `count` times, up to three times each, and lets each of them end then."""
    done = trial = 0
    while done < count and not found.over:
        trial += 1
        folder = shop.folder / kind / f"killed-{trial}"
        history: list[str] = []
        for _ in range(rng.randint(1, min(_MOST, count - done))):
            delay = rng.uniform(0.1, 0.9 * wanted.seconds)
            ended = shop.run(kind, folder, seconds=delay)
            if ended.code is not None:  # what was done before left less than that
                if wrong := shop.difference(kind, ended, folder, wanted):
                    found.violation("a resumed run", f"{wrong}; killed {history}")
                break
            done += 1
            history.append(f"in {ended.stage} after {delay:.3f} s")
            found.saw(f"killed in: {ended.stage}")
            if "Traceback" in ended.err:
                found.violation("traceback", f"{ended.last_line}; killed {history}")
        ended = shop.run(kind, folder)
        if wrong := shop.difference(kind, ended, folder, wanted):
            found.violation("a resumed run", f"{wrong}; killed {history}")
        else:
            found.saw("run resumed to the same artifact")
            shutil.rmtree(folder)
    if left := _orphans(str(shop.folder)):
        found.violation("left running", ", ".join(left))


def _orphans(mark: str) -> list[str]:
    """The command lines of other processes that lost their parent and still run after a while; of our own user alone."""
    until, own = time.monotonic() + _GRACE_S, str(os.getpid())  # which itself may run without a shell

    def others() -> list[str]:
        return [_orphan(process) for process in Path("/proc").glob("[0-9]*") if process.name != own]

    while left := [line for line in others() if _SCRATCH.search(line) or mark in line]:
        if time.monotonic() > until:
            return left
        time.sleep(0.5)
    return []


def _orphan(process: Path) -> str:
    try:
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
        orphaned = status["PPid"] == "1" and status["State"][0] != "Z"
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") if orphaned else ""
    except (OSError, KeyError):  # it has ended meanwhile
        return ""
