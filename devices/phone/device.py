"""A phone without Python as a device: models are timed there by `benchmark_model`, one process for each time.

It prints statistics of its loop and no samples: what stands for a sample here is the median of one loop (its mean, in versions
that print no median), and baseline and candidates take turns loop by loop, in a random order in every round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from ...pipeline.errors import DeviceError
from ..measure.meter import Meter
from ..measure.timing import Ratio, TimingSession, TimingSettings
from ..remote import RemoteDevice, wall_session
from .connection import PhoneConnection, PhoneModel

ROUNDS = 8  # of a session: each of them a loop of every model
QUICK_ROUNDS = 3  # for a candidate of a search
LOOP_RUNS, LOOP_SECONDS = 20, 0.3  # at least


class PhoneDevice(RemoteDevice):
    """See `device.Device`; models are .tflite files, and percentiles are those of loops, not of single inferences."""

    def connect(self) -> PhoneConnection:  # type: ignore[override]
        """The phone, which is this process's until the connection is closed.

        Raises:
            DeviceError, UnavailableError: another process of this machine has it; else see `PhoneConnection`.
        """
        return cast(PhoneConnection, super().connect())

    def _connected(self, at_end: Callable[[], None]) -> PhoneConnection:  # type: ignore[override]
        return PhoneConnection(self.transport, self.board, at_end)

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> Meter:
        """See `device.Device.meter`."""
        settings = TimingSettings(threads=threads, affinity=self.board.affinity, runtime=runtime, seed=seed)
        return PhoneMeter(self.connect, baseline, settings)

    def _state(self, phone: PhoneConnection) -> dict[str, Any]:  # type: ignore[override]
        found = _cool(phone)
        self._require_power_mode(str(found["power_mode"]))
        return found

    def _sampler(  # type: ignore[override]
        self, phone: PhoneConnection, before: dict[str, Any], models: Sequence[Path], settings: TimingSettings
    ) -> Callable[[int], TimingSession]:
        loaded = [phone.load(path, settings.runtime, settings.threads, settings.affinity) for path in models]
        rounds = min(ROUNDS, settings.max_pairs)
        return lambda number: _session(phone, loaded, rounds, settings.seed + number)


class PhoneMeter(Meter):
    """See `Meter`: a candidate's file is sent, timed in turns with the baseline, and removed. Nothing stays open."""

    def __init__(self, connect: Callable[[], PhoneConnection], baseline: bytes, settings: TimingSettings) -> None:
        self._connect, self._baseline, self._settings = connect, baseline, settings

    @cached_property
    def dense_ms(self) -> float:
        """See `Meter.dense_ms`."""
        with self._connect() as phone:
            dense = self._load(phone, self._baseline, "the dense model")
            _cool(phone)
            return float(np.median([_loop_us(dense) for _ in range(QUICK_ROUNDS)])) / 1e3

    def ratio(self, candidate: bytes) -> Ratio:
        """See `Meter.ratio`."""
        return self.ratios([candidate])[0]

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """See `Meter.ratios`: one after another, in one connection."""
        found = []
        with self._connect() as phone:
            dense = self._load(phone, self._baseline, "the dense model")
            for data in candidates:
                _cool(phone)
                model = self._load(phone, data, "a candidate of the search")
                try:
                    found.append(_quick_ratio(dense, model))
                finally:  # hundreds of them would fill a phone
                    if model.remote != dense.remote:
                        phone.drop(model.remote)
        return found

    def _load(self, phone: PhoneConnection, data: bytes, name: str) -> PhoneModel:
        settings = self._settings
        return phone.load((data, name), settings.runtime, settings.threads, settings.affinity)


def _quick_ratio(dense: PhoneModel, model: PhoneModel) -> Ratio:
    ratios = []
    for turn in range(QUICK_ROUNDS):
        first, second = (dense, model) if turn % 2 == 0 else (model, dense)
        times = {id(first): _loop_us(first), id(second): _loop_us(second)}
        ratios.append(times[id(model)] / times[id(dense)])
    median = float(np.median(ratios))
    return Ratio(median, float(np.ptp(ratios)) / 2 / median)


def _session(phone: PhoneConnection, models: Sequence[PhoneModel], rounds: int, seed: int) -> TimingSession:
    rng = np.random.default_rng(seed)
    times = np.zeros((len(models), rounds))
    for i in range(rounds):
        for m in rng.permutation(len(models)):
            times[m, i] = 1e3 * _loop_us(models[m])
    state = _cool(phone)
    facts = {
        "runtime_version": " ".join(phone.runtime("litert")),
        "thermal_status": str(state["thermal_status"]),
        "time": "a sample is the median of one loop of benchmark_model, in versions without a median its mean",
    }
    return wall_session(times, LOOP_RUNS, state, 0.1, facts)


def _loop_us(model: PhoneModel) -> float:
    found = model.timed(LOOP_RUNS, LOOP_SECONDS)
    value = found.mean_us if found.median_us is None else found.median_us
    if not (math.isfinite(value) and value > 0):
        do = "see the phone's benchmark_model"
        raise DeviceError(f"the time of {model.name}", found=f"{value} us", expected="a time", do=do)
    return value


def _cool(phone: PhoneConnection) -> dict[str, Any]:
    """The phone's state, in which it does not throttle.

    Raises:
        BoardError: it reports a thermal status above 0.
    """
    state = phone.hello()
    if state["thermal_status"] > 0:
        found = f"thermal status {state['thermal_status']}: it is hot and throttles"
        do = "let it cool, out of its case and not charging, then run the same command again"
        raise phone.transport.error("its temperature", found, "status 0", do)
    return state
