"""tegrastats, the Jetson's own monitor: its lines as watts and temperatures.

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
class Reading:
    """One line."""

    rails_w: dict[str, float]  # the instant value, not the mean since tegrastats was started
    temperatures_c: dict[str, float]
    gpu_percent: int | None


@dataclass(frozen=True)
class Power:
    """What a board took while something ran."""

    watts: float
    of: str  # "VDD_IN", or the rails that were summed
    readings: int

    def __str__(self) -> str:
        return f"{self.watts:.2f} W ({self.of}, {self.readings} readings)"


def reading(line: str) -> Reading | None:
    """What a line says; None where it is not tegrastats'. Rails are missing where they may not be read."""
    if "RAM " not in line or "CPU [" not in line:
        return None
    rails = {name: int(now) / 1000 for name, now in re.findall(r"\b(V[A-Z0-9_]+) (\d+)mW(?:/\d+mW)?", line)}
    heat = {name.lower(): float(value) for name, value in re.findall(r"\b([A-Za-z]\w*)@(-?[\d.]+)C\b", line)}
    load = re.search(r"\bGR3D_FREQ (\d+)%", line)
    return Reading(rails, heat, int(load[1]) if load else None)


def power(lines: Iterable[str]) -> Power | None:
    """The mean over all lines; None where no line tells."""
    found = [r.rails_w for line in lines if (r := reading(line)) is not None and r.rails_w]
    if not found:
        return None
    rails = [TOTAL] if all(TOTAL in r for r in found) else sorted(set.intersection(*(set(r) for r in found)))
    if not rails:
        return None
    return Power(mean(sum(r[name] for name in rails) for r in found), " + ".join(rails), len(found))
