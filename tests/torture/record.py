"""What the campaigns found: counts by outcome and every violation, as a JSON file without paths of this machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Campaign:
    """Counts and violations of one campaign."""

    name: str
    hide: Callable[[str], str]
    until: float  # by time.monotonic: no new trial after it
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def saw(self, outcome: str) -> None:
        self.outcomes[self.hide(outcome)] += 1

    def violation(self, what: str, detail: str) -> None:
        """Counts a violation under `what`; `detail` says how it came about."""
        self.saw(f"violation: {what}")
        self.violations.append(self.hide(f"{what}: {detail}"))
        print(f"{self.name}: VIOLATION {self.violations[-1]}", file=sys.stderr, flush=True)

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = {"skipped": self.skipped} if self.skipped else {"tried": sum(self.outcomes.values())}
        outcomes = dict(sorted(self.outcomes.items()))
        return found | {"outcomes": outcomes, "violations": self.violations, "seconds": round(self.seconds, 1)}


class Record:
    """The campaigns of one call.

    Args:
        root: the workshop's folder, which no line may name.
        seed: of all of them.
        minutes: they have together; the rest is counted as not reached.
    """

    def __init__(self, root: Path, seed: int, minutes: float) -> None:
        self._root, self.seed = root, seed
        self._until = time.monotonic() + 60 * minutes
        self.campaigns: list[Campaign] = []

    @contextmanager
    def campaign(self, name: str, share: float = 1.0) -> Iterator[Campaign]:
        """A new campaign, which may take this share of the time that is left; what it raises is a violation of its own."""
        now = time.monotonic()
        one = Campaign(name, self._hidden, now + share * max(self._until - now, 0.0))
        self.campaigns.append(one)
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            yield one
        except Exception as error:
            one.violation("the campaign itself failed", f"{type(error).__name__}: {error}")
        one.seconds = time.monotonic() - now
        print(f"{name}: {json.dumps(one.result()['outcomes'])}", file=sys.stderr, flush=True)

    @property
    def violations(self) -> int:
        return sum(len(one.violations) for one in self.campaigns)

    def write(self, file: Path, *, add: bool = False) -> None:
        """Writes the file; with `add` the campaigns in it stay that were not made now. Each has its own commit and seed."""
        commit = _commit()
        campaigns = {one.name: one.result() | {"commit": commit, "seed": self.seed} for one in self.campaigns}
        if add and file.is_file():
            before = json.loads(file.read_bytes())
            own = {key: before[key] for key in ("commit", "seed")}
            campaigns = {name: own | one for name, one in before["campaigns"].items()} | campaigns
        found = {
            "commit": commit,
            "processor": _processor(),
            "seed": self.seed,
            "violations": sum(len(one["violations"]) for one in campaigns.values()),
            "campaigns": campaigns,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _hidden(self, text: str) -> str:
        for path, word in ((self._root, "WORKSHOP"), (Path(__file__).parents[2], "."), (Path.home(), "~")):
            for each in (path, path.resolve()):
                text = text.replace(str(each), word)
        return text.replace(tempfile.gettempdir(), "TMP")[:600]


def _commit() -> str:
    """The commit that was tested, with "+changes" where the product differs from it."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "pipeline", "targets", "devices", "calibration", "tests")
    return f"{git('rev-parse', 'HEAD') or 'unknown'}{'+changes' if changed else ''}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
