"""An evaluator of plans of units: latency from a table of single knobs, and measured for each candidate.

What a candidate computes, and how it is cut, is the derived class's part, see `unit_evaluator.py`.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn

from ...targets.base import Structure
from ..errors import BuildError, DeviceError
from ..types import Candidate, Kind, Knob, ModelCost, Plan
from .evaluation_context import Bench
from .evaluation_log import Memo
from .file_size import FileSize

FloatArray = NDArray[np.float64]
RIDGE = 1e-3  # of the fit of the operators' latencies
REPRESENTATIVES = 5  # entries of the table that are measured of those that change the network alike


def table_error(estimate: Callable[[tuple[int, ...]], float], tried: tuple[Candidate, ...]) -> float | None:
    """Median relative error of latencies read from the table against the measured ones.

    Over candidates that more than one knob makes: the others are in the table. None when there are none.
    """
    mixed = [c for c in tried if sum(map(bool, c.levels)) > 1 and c.latency_kind is Kind.MEASURED]
    errors = [abs(estimate(c.levels) / c.latency_ratio - 1.0) for c in mixed]
    return float(median(errors)) if errors else None


class TableEvaluator(ABC):
    """`search.problem.Evaluator` over a real network and a real device.

    Answers are kept in `memo`, one JSON line each, so that a search which is run again replays up to where it was; latencies are
    kept in the device's cache, so that every run on this device sees the same number for the same structure.
    """

    def __init__(self, knobs: tuple[Knob, ...], bench: Bench) -> None:
        self._knobs, self.bench = knobs, bench
        self._table: dict[tuple[int, int], float] = {}
        self._sizes: dict[tuple[int, ...], float] = {}
        self._estimates: dict[tuple[int, ...], float] = {}
        self._memo = Memo(bench.memo, bench.note)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The decisions, in the order of every `levels` tuple."""
        return self._knobs

    @abstractmethod
    def plan(self, levels: tuple[int, ...]) -> Plan:
        """The plan of a setting."""

    @abstractmethod
    def structure(self, plan: Plan) -> Structure:
        """The shape of the planned network."""

    @abstractmethod
    def network(self, plan: Plan) -> nn.Module:
        """The planned network with weights re-fit layer by layer on the dense network's inputs, eval mode."""

    @abstractmethod
    def score(self, net: nn.Module, plan: Plan) -> tuple[float, float]:
        """Accuracy (share) and loss of a plan's network on the reward images."""

    @abstractmethod
    def change(self, knob: int, level: int) -> Hashable:
        """What a knob alone changes, without names: entries of the table with the same change must save the same."""

    def evaluate(self, levels: tuple[int, ...]) -> Candidate:
        """Accuracy and loss on the reward images, latency ratio measured on the device."""
        known = self._memo.get(levels)
        if known is not None:
            return known
        start = time.perf_counter()
        plan = self.plan(levels)
        structure = self.structure(plan)
        net = self.network(plan)
        accuracy, loss = self.score(net, plan)
        ratio = self.bench.latency_ratio(structure)
        cost = ModelCost(sum(p.numel() for p in net.parameters()), self.macs(structure))
        size = self.bench.size_bytes(structure) if self.bench.sized else None
        seconds = time.perf_counter() - start
        return self._memo.add(Candidate(levels, accuracy, loss, ratio, self.bench.kind, cost, seconds, size_bytes=size))

    @property
    def width(self) -> int:
        """How many candidates' latencies are measured at once."""
        return self.bench.meter.width

    def expect(self, settings: Sequence[tuple[int, ...]]) -> None:
        """Measure the latencies of settings that are likely to be asked for, each on one of several boards.

        What fails is left: if it is asked for indeed, it fails then.
        """
        new = [levels for levels in settings if self._memo.get(levels) is None]
        with suppress(BuildError, DeviceError):
            self.bench.expect([self.structure(self.plan(levels)) for levels in new])

    def one_shot(self, plan: Plan) -> tuple[float, float]:
        """Accuracy (share) and loss of a plan on the reward images; its latency is not asked for."""
        return self.score(self.network(plan), plan)

    @abstractmethod
    def work(self, structure: Structure) -> FloatArray:
        """Shares of the dense network's work that are left, operator by operator: 1 in the dense network, 0 where one is gone."""

    @abstractmethod
    def macs(self, structure: Structure) -> int:
        """Multiply-accumulates of a structure, batch 1."""

    @abstractmethod
    def stored(self, structure: Structure) -> FloatArray:
        """Weights, values of vectors (or output channels) and layers that a structure's file has, (3,)."""

    def size_estimate(self, levels: tuple[int, ...]) -> float:
        """Bytes of the setting's file without labels and metadata, see `file_size`."""
        if levels not in self._sizes:
            self._sizes[levels] = self._file_size(self.structure(self.plan(levels)))
        return self._sizes[levels]

    @cached_property
    def _file_size(self) -> FileSize:
        deepest = tuple(0 if k.kind == "block" else len(k.kept) - 1 for k in self.knobs)
        blocks = tuple(int(k.kind == "block") for k in self.knobs)
        structures = [self.structure(self.plan(levels)) for levels in (deepest, blocks)]
        alone = [self.alone(i, len(k.kept) - 1) for i, k in enumerate(self.knobs)]
        return FileSize(self.stored, self.bench.size_bytes, [self.alone(-1, 0), *alone, *structures])

    def latency_estimate(self, levels: tuple[int, ...]) -> float:
        """Latency ratio without measuring: of one knob from the table, of several from the operators' latencies.

        Savings of different knobs do not add up where they make the same operator cheaper: one that loses half of its inputs and
        half of its outputs keeps a quarter of its work. So each operator gets a latency, by non-negative least squares on the
        table, of which a setting keeps the share of the work that is left.
        """
        gone = {k.name for k, level in zip(self.knobs, levels, strict=True) if k.kind == "block" and level}
        moved = [(i, level) for i, (k, level) in enumerate(zip(self.knobs, levels, strict=True)) if level and k.block not in gone]
        if len(moved) < 2:
            return self._entry(*(moved[0] if moved else (-1, 0)))
        if levels not in self._estimates:  # a projection onto the budget asks for its neighbours again and again
            latencies = self._latencies
            self._estimates[levels] = float(latencies[0] + latencies[1:] @ self.work(self.structure(self.plan(levels))))
        return self._estimates[levels]

    @cached_property
    def _latencies(self) -> FloatArray:
        """A constant and each operator's latency in the dense network, >= 0, as ratios."""
        entries = [(-1, 0), *((i, level) for i, knob in enumerate(self.knobs) for level in range(1, len(knob.kept)))]
        rows = np.array([[1.0, *self.work(self.alone(*entry))] for entry in entries])
        wanted = np.array([self._entry(*entry) for entry in entries])
        # a little of the same latency for all decides between operators that the table cannot tell apart
        even, alike = RIDGE * np.eye(rows.shape[1]), np.full(rows.shape[1], RIDGE * wanted[0] / rows.shape[1])
        found, _ = nnls(np.vstack([rows, even]), np.concatenate([wanted, alike]))
        return np.asarray(found, np.float64)

    def fill_table(self) -> int:
        """Measure every entry of the table; returns how many there are.

        What one knob of many saves can be less than the noise of a measurement, and a search would pick the knobs that were
        lucky. Entries that change layers of the same shapes in the same way must save the same: they get the
        median of a few of them.
        """
        alike: dict[Hashable, list[tuple[int, int]]] = {}
        for i, knob in enumerate(self.knobs):
            for level in range(1, len(knob.kept)):
                alike.setdefault(self.change(i, level), []).append((i, level))
        measured = {change: same[:: -(-len(same) // REPRESENTATIVES)] for change, same in alike.items()}
        self.bench.measure_ahead([self.alone(*entry) for entry in [(-1, 0), *chain(*measured.values())]])
        self._entry(-1, 0)
        for change, same in alike.items():
            middle = statistics.median(self._entry(*entry) for entry in measured[change])
            self._table.update(dict.fromkeys(same, middle))
        self.__dict__.pop("_latencies", None)  # fitted to entries that were not pooled yet
        self._estimates.clear()
        return len(self._table)

    def _entry(self, knob: int, level: int) -> float:
        if (knob, level) not in self._table:
            self._table[knob, level] = self.bench.latency_ratio(self.alone(knob, level))
        return self._table[knob, level]

    def alone(self, knob: int, level: int) -> Structure:
        """The structure with one knob at a level and the others dense; knob -1: the dense structure."""
        levels = tuple(level if i == knob else 0 for i in range(len(self.knobs)))
        return self.structure(self.plan(levels))
