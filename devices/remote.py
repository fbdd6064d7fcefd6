"""A board behind a transport, with the same `measure` as this machine: same settings, same rounds, same statistics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import BuildError, DeviceError, EdgeCompressError, InputError, UnavailableError
from ..pipeline.types import Kind, Timing
from . import agent as agent_file
from .adb import ADB_FOLDER, AdbTransport
from .boards import Board
from .local import Progress, Take, measure_with, session_of
from .ssh import SSH_FOLDER, SshTransport
from .stats import half_width, paired_ratios
from .timing import Session, TimingSettings
from .transport import AgentEnded, Stream, Transport
from .worker import Refusal, _random_input

_CHUNK = 4 << 20  # bytes of a model sent at once
_IDLE_S = 90  # without a request, until the agent ends itself
_START_S, _SHORT_S, _LOAD_S, _SEND_S = 40.0, 20.0, 120.0, 120.0

Array = NDArray[Any]


class AgentSession:
    """A running agent on a board. Starting it sends the agent's file only where the board does not have it yet.

    Args:
        transport: the way to the board; it stays open.
        name: of the board, for messages.
        python: the interpreter there.

    Raises:
        DeviceError: the board cannot be reached, is busy, or has no Python.
    """

    def __init__(self, transport: Transport, name: str, python: str = "python3") -> None:
        self.transport, self.name = transport, name
        source = Path(agent_file.__file__)
        digest = sha256(source.read_bytes()).hexdigest()
        remote = f"{transport.folder}/agent-{digest[:16]}.py"
        options = [f"--folder={transport.folder}", f"--idle={_IDLE_S}", f"--digest={digest}"]
        command = [python, remote, *options]
        self.agent_sent = False
        try:
            self.stream: Stream = transport.open(command, _START_S)
        except AgentEnded as ended:
            if ended.code not in (2, agent_file.WRONG_FILE):  # 2: Python finds no such file
                raise
            self._send_agent(source, remote)
            self.stream = transport.open(command, _START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the agent; safe to call twice."""
        if self.stream.process.poll() is None:
            with contextlib.suppress(DeviceError):
                self.stream.ask({"op": "quit"}, 1.0, "ending the agent")
        self.stream.close()

    def ask(self, request: dict[str, Any], deadline_s: float, what: str, payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """The agent's answer to a request of agent.py.

        Raises:
            DeviceError: the board failed, or the model did: killed, out of memory, too slow.
            BuildError: the runtime refused the model.
            UnavailableError: the runtime is not on the board.
            InputError: the request asks for what the board does not have.
        """
        answer, data = self.stream.ask(request, deadline_s, what, payload)
        if answer["ok"]:
            return answer, data
        raise _refused(str(answer["kind"]), str(answer["error"]), self.name, what, deadline_s)

    def hello(self) -> dict[str, Any]:
        """What the board is; see `agent.describe_board`."""
        return self.ask({"op": "hello"}, _SHORT_S, "asking what it is")[0]

    def put(self, path: Path) -> tuple[str, bool]:
        """Have a file on the board: (its SHA-256, whether it had to be sent).

        Raises:
            InputError: the file cannot be read.
            DeviceError: the board's disk is full, or the link failed.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"model file {path}", found=error.strerror or str(error), expected="a readable file") from error
        digest, what = sha256(data).hexdigest(), f"sending {path.name}"
        if self.ask({"op": "has", "sha256": digest}, _SEND_S, what)[0]["has"]:
            return digest, False
        for offset in range(0, max(len(data), 1), _CHUNK):
            request = {"op": "put", "sha256": digest, "size": len(data), "offset": offset}
            self.ask(request, _SEND_S, what, data[offset : offset + _CHUNK])
        return digest, True

    def load(self, path: Path, runtime: str, threads: int, affinity: tuple[int, ...] | None = None) -> RemoteModel:
        """A model in a fresh process on the board, its file sent where needed."""
        digest, _ = self.put(path)
        request = {
            "op": "load",
            "sha256": digest,
            "runtime": runtime,
            "threads": threads,
            "affinity": affinity and list(affinity),
        }
        answer, _ = self.ask(request, _LOAD_S, f"loading {path.name}")
        return RemoteModel(self, path.name, answer)

    def _send_agent(self, source: Path, remote: str) -> None:
        for argv in (["mkdir", "-p", self.transport.folder], None, ["mv", f"{remote}.part", remote]):
            if argv is None:
                self.transport.push(source, f"{remote}.part", _SEND_S)
                continue
            done = self.transport.run(argv, _SHORT_S)
            if done.code != 0:
                raise DeviceError(
                    f"board {self.name}: {argv[0]} in {self.transport.folder}",
                    found=" ".join(done.stderr.split())[:300] or f"exit code {done.code}",
                    expected="a folder that can be written",
                    do="set `folder` in the board's file",
                )
        self.agent_sent = True


class RemoteModel:
    """A model loaded on a board, in a process of its own there."""

    def __init__(self, session: AgentSession, name: str, loaded: dict[str, Any]) -> None:
        self._session, self.name = session, name
        self.handle, self.pid = int(loaded["handle"]), int(loaded["pid"])
        self.version, self.inputs = str(loaded["version"]), list(loaded["inputs"])

    def run(self, feeds: dict[str, Array], deadline_s: float = 120.0) -> dict[str, Array]:
        """The model's outputs by name. The inputs stay in place for `AgentSession`'s timing.

        Raises:
            DeviceError: the inference failed, or the outputs are not as long as their shapes say.
        """
        arrays = {name: np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")) for name, a in feeds.items()}
        heads = [{"name": n, "dtype": a.dtype.name, "shape": list(a.shape)} for n, a in arrays.items()]
        request = {"op": "run", "handle": self.handle, "tensors": heads}
        answer, data = self._session.ask(
            request, deadline_s, f"running {self.name}", b"".join(a.tobytes() for a in arrays.values())
        )
        return unpacked(answer["tensors"], data, self._session.name, self.name)

    def feed_random(self, seed: int) -> None:
        """Put the same inputs in place as worker.py measures with, and run once.

        Raises:
            BuildError: an input has a shape or type that cannot be made up.
        """
        try:
            feeds = {i["name"]: _random_input(i["name"], i["kind"], i["shape"], seed + n) for n, i in enumerate(self.inputs)}
        except Refusal as refusal:
            raise BuildError(f"the model {self.name} cannot be measured", found=str(refusal)) from refusal
        self.run(feeds)

    def unload(self) -> None:
        """End its process on the board."""
        self._session.ask({"op": "unload", "handle": self.handle}, _SHORT_S, f"unloading {self.name}")


def unpacked(heads: Sequence[dict[str, Any]], data: bytes, board: str, model: str) -> dict[str, Array]:
    """Tensors out of raw bytes.

    Raises:
        DeviceError: there are fewer bytes, or more, than the shapes say.
    """
    kinds = [np.dtype(h["dtype"]).newbyteorder("<") for h in heads]
    sizes = [kind.itemsize * math.prod(h["shape"]) for kind, h in zip(kinds, heads, strict=True)]
    if sum(sizes) != len(data):
        raise DeviceError(
            f"board {board}: outputs of {model}",
            found=f"{len(data)} bytes",
            expected=f"{sum(sizes)} bytes",
            do="they were cut off; run the same command again",
        )
    tensors, start = {}, 0
    for head, kind, size in zip(heads, kinds, sizes, strict=True):
        tensors[str(head["name"])] = np.frombuffer(data[start : start + size], dtype=kind).reshape(head["shape"])
        start += size
    return tensors


class RemoteDevice:
    """A board over ssh or adb. Nothing is connected until something is asked of it."""

    def __init__(self, board: Board, transport: Transport) -> None:
        self.name, self.board, self.transport = board.name, board, transport

    def close(self) -> None:
        """Leave nothing running here; safe to call twice."""
        self.transport.close()

    def connect(self) -> AgentSession:
        """An agent on the board; see `AgentSession`."""
        return AgentSession(self.transport, self.name, self.board.python)

    def measure(self, baseline: Path, candidate: Path, settings: TimingSettings, progress: Progress | None = None) -> Timing:
        """Latency of `candidate` against `baseline`, as `LocalDevice.measure` gives it, on the board.

        Every session loads its models into fresh processes there. What an emulated board gives is of kind `emulated`.

        Raises:
            InputError, DeviceError, BuildError, UnavailableError: see `AgentSession.ask`; also a `DeviceError` when the
                power mode is not the board file's, or changed while it was measured.
        """
        with self._taking() as (take, kind):
            return measure_with(take, self.name, baseline, candidate, settings, progress, kind)

    def sessions(
        self, baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None = None
    ) -> tuple[Session, ...]:
        """The raw samples of fresh processes on the board; see `local.sessions`.

        Raises:
            UnavailableError: the board is emulated, so that nobody takes its times for measured ones.
        """
        with self._taking() as (take, kind):
            if kind is not Kind.MEASURED:
                raise UnavailableError(f"board {self.name}", found="an emulated board", expected="a real one for its times")
            return take(baseline, candidates, settings, progress)

    @contextlib.contextmanager
    def _taking(self) -> Iterator[tuple[Take, Kind]]:
        with self.connect() as agent:
            before = agent.hello()
            self._require_power_mode(str(before["power_mode"]))

            def take(
                baseline: Path, candidates: Sequence[Path], settings: TimingSettings, progress: Progress | None
            ) -> tuple[Session, ...]:
                done = []
                for number in range(settings.sessions):
                    done.append(_take_one(agent, (baseline, *candidates), settings, settings.seed + number))
                    self._require_steady(before, done[-1].machine["power_mode"])
                    if progress is not None:
                        progress(number + 1, settings.sessions)
                return tuple(done)

            yield take, Kind.EMULATED if self.board.emulated or before["emulated"] else Kind.MEASURED

    def _require_power_mode(self, found: str) -> None:
        if self.board.power_mode and found != self.board.power_mode:
            raise DeviceError(
                f"board {self.name}: power mode",
                found=found or "none that can be read",
                expected=self.board.power_mode,
                do="set it with nvpmodel, or take `power_mode` out of the board's file",
            )

    def _require_steady(self, before: dict[str, Any], power_mode: str) -> None:
        if power_mode != before["power_mode"]:
            raise DeviceError(
                f"board {self.name}: power mode",
                found=f"{before['power_mode']}, then {power_mode}",
                expected="one mode while it is measured",
                do="run the same command again",
            )


def open_device(board: Board) -> RemoteDevice:
    """The device a board's file describes, over its own transport.

    Raises:
        InputError: a template without an address.
        ValueError: a board that needs no transport.
    """
    if board.transport not in ("ssh", "adb"):
        raise ValueError(f"transport {board.transport!r} is not remote")
    if not board.address:
        raise InputError(
            f"board {board.name}",
            found="a template without an address",
            expected="`address` in its file",
            do=f"copy {board.file} to your own folder of devices under another name and add it",
        )
    if board.transport == "ssh":
        return RemoteDevice(board, SshTransport(board.name, board.address, board.folder or SSH_FOLDER))
    return RemoteDevice(board, AdbTransport(board.name, board.address, board.folder or ADB_FOLDER))


def _take_one(agent: AgentSession, models: Sequence[Path], settings: TimingSettings, seed: int) -> Session:
    """One session: fresh processes, warm-up, rounds until the interval is narrow enough or a limit is reached."""
    what = "measuring " + " and ".join(dict.fromkeys(p.name for p in models))
    loaded = [agent.load(path, settings.runtime, settings.threads, settings.affinity) for path in models]
    for model in loaded:
        model.feed_random(seed)
    handles = [model.handle for model in loaded]
    deadline_s = settings.deadline_s(len(models))
    warm = {"op": "warm", "handles": handles, "floor_ns": settings.min_sample_ms * 1e6, "window": settings.warmup_window}
    warmed, _ = agent.ask({**warm, "seconds": settings.warmup_seconds}, deadline_s, what)
    rounds = _Rounds(len(models), settings)
    while rounds.stop is None:
        request = {"op": "pairs", "handles": handles, "k": warmed["k"], "seed": seed + rounds.done, **rounds.next()}
        rounds.add(agent.ask(request, deadline_s, what)[0])
    board = agent.hello()
    for model in loaded:
        model.unload()
    return session_of(
        {
            "models": [{"wall_ns": w, "cpu_ns": c, "k": k} for w, c, k in zip(rounds.wall, rounds.cpu, warmed["k"], strict=True)],
            "stop": rounds.stop,
            "warmup_s": warmed["seconds"],
            "temperatures_c": rounds.temperatures_c,
            "frequencies_mhz": rounds.frequencies_mhz,
            "peak_rss_bytes": rounds.peak_rss_bytes,
            "machine": board["machine"]
            | {"runtime_version": loaded[0].version, "power_mode": board["power_mode"], "boot_id": board["boot_id"]},
        }
    )


class _Rounds:
    """The samples of a session so far, and when it ends: as worker.py decides it."""

    def __init__(self, models: int, settings: TimingSettings) -> None:
        self.settings = settings
        self.wall: list[list[float]] = [[] for _ in range(models)]
        self.cpu: list[list[float]] = [[] for _ in range(models)]
        self.temperatures_c: list[list[float]] = []
        self.frequencies_mhz: list[list[float]] = []
        self.peak_rss_bytes = 0
        self.seconds = 0.0  # on the board
        self.stop: str | None = None
        self._check = settings.min_pairs

    @property
    def done(self) -> int:
        return len(self.wall[0])

    def next(self) -> dict[str, float]:
        """How much to ask for."""
        rounds = min(self._check, self.settings.max_pairs) - self.done
        return {"rounds": rounds, "seconds": max(0.0, self.settings.max_seconds - self.seconds)}

    def add(self, answer: dict[str, Any]) -> None:
        for kept, more in ((self.wall, answer["wall_ns"]), (self.cpu, answer["cpu_ns"])):
            for own, new in zip(kept, more, strict=True):
                own.extend(new)
        self.temperatures_c += answer["temperatures_c"]
        self.frequencies_mhz += answer["frequencies_mhz"]
        self.peak_rss_bytes = max(self.peak_rss_bytes, answer["peak_rss_bytes"])
        self.seconds += answer["seconds"]
        if self.done >= self.settings.max_pairs:
            self.stop = "pairs"
        elif self.seconds > self.settings.max_seconds:
            self.stop = "time"
        elif self.done >= self._check:
            self._check = self.done + max(5, self.done // 4)
            if self._widest() < self.settings.half_width:
                self.stop = "converged"

    def _widest(self) -> float:
        base = np.array(self.wall[0])
        arrays = [paired_ratios(base, np.array(w)) for w in self.wall[1:]] or [base]
        return max(half_width(a, block=self.settings.block) for a in arrays)


def _refused(kind: str, text: str, board: str, what: str, deadline_s: float) -> EdgeCompressError:
    """The error an agent's refusal stands for."""
    where = f"board {board}: {what}"
    if kind == "load":
        return BuildError(where, found=text, expected="a model its runtime takes")
    if kind == "runtime":
        return UnavailableError(where, found=text, expected="a runtime on the board", do="install it there")
    if kind == "request":
        return InputError(where, found=text)
    do = {
        "died": "the runtime crashed or was killed on the board; the next measurement starts it afresh",
        "memory": "the board has too little memory for this model",
        "disk": "remove files there, or set `folder` in the board's file",
        "deadline": "use more threads, or see what else runs on the board",
    }
    found = f"{text} (after {deadline_s:.0f} s)" if kind == "deadline" else text
    expected = {"disk": "space for it"}.get(kind, "an answer")
    return DeviceError(where, found=found, expected=expected, do=do.get(kind, ""))


def overhead_ms(agent: AgentSession, requests: int = 200) -> float:
    """Median milliseconds of a request that does nothing on the board: what the link and the agent cost."""
    spent = []
    for _ in range(requests):
        started = time.perf_counter()
        agent.stream.ask({"op": "ping"}, _SHORT_S, "a request without work")
        spent.append(time.perf_counter() - started)
    return float(np.median(spent)) * 1e3
