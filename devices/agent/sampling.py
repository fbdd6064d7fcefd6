"""The timing loop on the board: warm-up, and rounds in which every model gives one sample in random order.

It runs in the process that holds all models of a session. In processes of their own they would be on CPUs of their own, and
what slows one of these down (its hyper-thread's work, its clock, its kind of core) would be taken for a property of the model.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from .board import sensors

_WARM = 0.05  # two consecutive windows differ by less: warm
_CLOCK_STEPS = 200  # a sample lasts at least this many steps of the clock


def warm_up(infers: list[Callable[[], object]], floor_ns: float, seconds: float, window: int) -> dict[str, Any]:
    """Run the models in turn until two windows of each agree: the inferences in a sample of each, and the seconds it took.

    Samples of all models get about the same length: on a busy machine a longer one is interrupted more often, and the slower
    model would seem slower than it is.
    """
    floor_ns = max(floor_ns, _CLOCK_STEPS * time.get_clock_info("perf_counter").resolution * 1e9)
    started = time.monotonic()
    best = [math.inf] * len(infers)  # ns of an inference nothing interrupted: the least of wall and CPU time
    times: list[list[float]] = [[] for _ in infers]
    k = [1] * len(infers)

    def once() -> None:
        for i, infer in enumerate(infers):
            wall, cpu = _sample(infer, k[i])
            best[i] = min(best[i], wall, cpu if cpu > 0 else wall)
            times[i].append(wall)

    once()
    once()
    for i, own in enumerate(times):
        k[i] = max(1, math.ceil(floor_ns / best[i]))
        own.clear()
    while time.monotonic() - started < seconds:
        once()
        if all(_settled(own, window) for own in times):
            break
    length = max(floor_ns, *best)
    chosen = [max(round(length / least), math.ceil(floor_ns / least)) for least in best]
    return {"k": chosen, "seconds": time.monotonic() - started}


def pairs(infers: list[Callable[[], object]], k: list[int], rounds: int, seconds: float, seed: int) -> dict[str, Any]:
    """At most so many rounds in at most so many seconds: the samples of each model, and a reading of the sensors a second."""
    wall: list[list[float]] = [[] for _ in infers]
    cpu: list[list[float]] = [[] for _ in infers]
    shuffled, order = random.Random(seed), list(range(len(infers)))
    readings = [sensors()]
    started = looked = time.monotonic()
    while len(wall[0]) < rounds and time.monotonic() - started <= seconds:
        shuffled.shuffle(order)
        for i in order:
            one, other = _sample(infers[i], k[i])
            wall[i].append(one)
            cpu[i].append(other)
        if time.monotonic() - looked > 1.0:
            looked = time.monotonic()
            readings.append(sensors())
    return {
        "wall_ns": wall,
        "cpu_ns": cpu,
        "seconds": time.monotonic() - started,
        "temperatures_c": [t for t, _ in readings],
        "frequencies_mhz": [f for _, f in readings],
    }


def _sample(infer: Callable[[], object], k: int) -> tuple[float, float]:
    """Wall and CPU nanoseconds of one inference, the mean of k; the CPU time is that of all threads of this process."""
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(k):
        infer()
    wall = time.perf_counter_ns() - wall
    return wall / k, (time.process_time_ns() - cpu) / k


def _settled(times: list[float], window: int) -> bool:
    if len(times) < 2 * window:
        return False
    before, after = statistics.median(times[-2 * window : -window]), statistics.median(times[-window:])
    return abs(after / before - 1.0) < _WARM
