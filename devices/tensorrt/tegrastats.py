"""tegrastats, the Jetson's own monitor: its lines as watts.

Boards name their rails differently. Orin Nano and NX have VDD_IN, the module's input; AGX Orin has none, so there the sum of
its rails stands for it, which is less than the board takes from its plug. Sources: lines that users of these boards published;
2026-11.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

TOTAL = "VDD_IN"


@dataclass(frozen=True)
class Power:
    """Power draw of a board during a run."""

    watts: float
    of: str  # "VDD_IN", or the rails that were summed
    readings: int

    def __str__(self) -> str:
        return f"{self.watts:.2f} W ({self.of}, {self.readings} readings)"


def rails_w(line: str) -> dict[str, float]:
    """Watts of every rail at the instant of a line; empty where it is not a line of tegrastats or no rail may be read."""
    if "RAM " not in line or "CPU [" not in line:
        return {}
    return {name: int(now) / 1000 for name, now in re.findall(r"\b(V[A-Z0-9_]+) (\d{1,9})mW(?:/\d+mW)?", line)}


def power(lines: Iterable[str]) -> Power | None:
    """Mean power over all lines; None where no line reports any."""
    found = [rails for rails in map(rails_w, lines) if rails]
    if not found:
        return None
    rails = [TOTAL] if all(TOTAL in r for r in found) else sorted(set.intersection(*(set(r) for r in found)))
    if not rails:
        return None
    return Power(mean(sum(r[name] for name in rails) for r in found), " + ".join(rails), len(found))
