"""A pool of interchangeable boards. Each measurement comes from one board; when a board fails, another one is used.

Boards of a class must be alike: the first that is used sets what the others have to be (processor, runtime version,
power mode), and one that differs is not used. A board that failed `leases.SET_ASIDE` times in a row is set aside until
`edge-compress devices check NAME` finds it well.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from ..pipeline.errors import DeviceError
from ..pipeline.types import Timing
from . import leases
from .board import Board
from .device import Device, Progress
from .measure.meter import Meter
from .measure.timing import Ratio, TimingSession, TimingSettings
from .transport.base import BoardError, BusyError
from .transport.connection import Connection

T = TypeVar("T")

PATIENCE_S = 600.0  # while all boards are busy
_LOOK_S = 1.0


class BoardDevice(Device, Protocol):
    """A device that is one board."""

    @property
    def board(self) -> Board:
        """Its file."""


class Pool:
    """A class of boards as a device, see `device.Device`; while all are busy it waits `patience_s` seconds."""

    def __init__(
        self,
        name: str,
        boards: Sequence[Board],
        open_board: Callable[[Board], BoardDevice],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.name, self.boards, self.patience_s = name, tuple(boards), patience_s
        self._devices = {board: open_board(board) for board in boards}
        self._alike: dict[tuple[str, int], dict[str, str]] = {}

    @property
    def devices(self) -> tuple[BoardDevice, ...]:
        """Of its boards, those that are set aside included."""
        return tuple(self._devices.values())

    def close(self) -> None:
        """Leave nothing running here; safe to call twice."""
        for device in self._devices.values():
            device.close()

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """See `device.Device.measure`; started again on another board when one fails."""
        return self.on_any(lambda device: device.measure(baseline, candidate, settings, progress))

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[TimingSession, ...]:
        """See `device.Device.sessions`; all of one board."""
        return self.on_any(lambda device: device.sessions(baseline, candidates, settings, progress))

    def facts(self, runtime: str, threads: int) -> dict[str, str]:
        """The facts that the boards of the class share, read from one of them."""
        if (runtime, threads) not in self._alike:
            self._alike[runtime, threads] = self.on_any(lambda device: _common(device.facts(runtime, threads)))
        return self._alike[runtime, threads]

    def meter(self, baseline: bytes, runtime: str, threads: int, seed: int) -> PoolMeter:
        """See `device.Device.meter`: candidates go to all boards that are free."""
        return PoolMeter(self, baseline, runtime, threads, seed)

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        """An agent on one of the boards."""
        with contextlib.ExitStack() as stack:
            yield self.on_any(lambda device: stack.enter_context(device.connect()))

    def on_any(self, work: Callable[[BoardDevice], T]) -> T:
        """Do something on one free board after another until one has not failed.

        Raises:
            DeviceError: all failed, are set aside, or stayed busy; what the last one said.
            EdgeCompressError: what no other board would do better: a model that is refused, or crashes.
        """
        left = self.usable()
        last: DeviceError | None = None
        deadline = time.monotonic() + self.patience_s
        while left:
            busy = []
            for device in left:
                try:
                    done = work(device)
                except BusyError as error:
                    busy.append(device)
                    last = error
                except BoardError as error:
                    leases.note_failure(device.board, error)
                    last = error
                else:
                    leases.forgive(device.board)
                    return done
            left = busy if time.monotonic() < deadline else []
            time.sleep(_LOOK_S if left else 0.0)
        raise DeviceError(self.name, found=str(last), expected="a board that works") from last

    def usable(self) -> list[BoardDevice]:
        """The boards that are not set aside, the most reliable first.

        Raises:
            DeviceError: there is none.
        """
        failed = {board: leases.failures(board) for board in self.boards}
        good = [board for board in self.boards if failed[board][0] < leases.SET_ASIDE]
        if not good:
            told = "; ".join(f"{board.name} after {n} failures ({why})" for board, (n, why) in failed.items())
            do = "see them with edge-compress devices check NAME, which takes them back"
            raise DeviceError(self.name, found=f"every board is set aside: {told}", expected="one that works", do=do)
        return [self._devices[board] for board in sorted(good, key=lambda board: failed[board][0])]

    def require_alike(self, device: BoardDevice, runtime: str, threads: int) -> None:
        """Raises a BoardError when the board is not what the class was found to be."""
        expected, found = self.facts(runtime, threads), _common(device.facts(runtime, threads))
        for key in expected.keys() | found.keys():
            if expected.get(key) != found.get(key):
                where = f"board {device.name} of {self.name}: {key.replace('_', ' ')}"
                first = f"{expected.get(key) or 'none'}, as the first board that was used"
                do = "make them alike, or give it another class"
                raise BoardError(where, found=found.get(key) or "none", expected=first, do=do)


class PoolMeter(Meter):
    """See `Meter`. A ratio comes from one board and its own baseline; several candidates go to several boards."""

    def __init__(self, pool: Pool, baseline: bytes, runtime: str, threads: int, seed: int) -> None:
        self._pool = pool
        self._how = (runtime, threads)
        self._meters: dict[BoardDevice, Meter] = {
            device: device.meter(baseline, runtime, threads, seed) for device in pool.usable()
        }
        self.width = len(self._meters)
        self._checked: set[BoardDevice] = set()

    def close(self) -> None:
        """End the agents; safe to call twice."""
        for meter in self._meters.values():
            meter.close()

    @property
    def dense_ms(self) -> float:
        """See `Meter.dense_ms`; of the first board that answers."""
        return self._pool.on_any(lambda device: self._ready(device).dense_ms)

    def ratio(self, candidate: bytes) -> Ratio:
        """See `Meter.ratio`; started again on another board when one fails."""
        return self._pool.on_any(lambda device: self._ready(device).ratio(candidate))

    def ratios(self, candidates: Sequence[bytes]) -> list[Ratio]:
        """See `Meter.ratios`: each board takes the next candidate as soon as it is done with one."""
        waiting = iter(range(len(candidates)))
        found: dict[int, Ratio] = {}

        def work(device: BoardDevice) -> None:
            for number in waiting:
                try:
                    found[number] = self._ready(device).ratio(candidates[number])
                except BusyError:  # measured at the end
                    return
                except BoardError as error:
                    leases.note_failure(device.board, error)
                    return

        self._pool.facts(*self._how)  # asked once, before there are threads
        with ThreadPoolExecutor(len(self._meters)) as threads:
            try:
                for done in [threads.submit(work, device) for device in self._meters]:
                    done.result()
            except BaseException:  # an interrupt too: what is not begun is left
                for _ in waiting:
                    pass
                raise
        return [found[n] if n in found else self.ratio(candidates[n]) for n in range(len(candidates))]

    def _ready(self, device: BoardDevice) -> Meter:
        if device not in self._checked:
            self._pool.require_alike(device, *self._how)
            self._checked.add(device)
        return self._meters[device]


def _common(facts: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in facts.items() if key not in ("address", "host")}
