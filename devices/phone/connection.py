"""A phone without Python: `benchmark_model` on it, asked through a transport alone. What `Connection` is to boards with Python.

benchmark_model (TensorFlow Lite, LiteRT) makes its own inputs, times one model in a process of its own and prints statistics.
Source: tensorflow/lite/tools/benchmark and google-ai-edge/LiteRT; https://ai.google.dev/edge/litert/models/measurement
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ...pipeline.errors import BuildError, DeviceError, InputError, UnavailableError
from ...pipeline.types import Kind
from ..board import Board
from ..transport.base import BoardError, Transport, last_line
from ..transport.connection import Array
from . import state as phone_state
from .benchmark_model import BenchmarkRun, parse, parse_operators

RUNTIME = "litert"
_Tensor = tuple[str, tuple[int, ...], np.dtype[Any]]
_SHORT_S, _SEND_S, _LOAD_S = 20.0, 120.0, 120.0
_LINK_S = 15.0  # on top of what the program may take
_LATE = 124  # exit code of `timeout`
_DEAD = {128 + s: signal.Signals(s).name for s in (signal.SIGILL, signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)}


class PhoneConnection:
    """A phone that is this process's; what of `Connection` has to do with models.

    Args:
        transport: the way to it; it stays open.
        board: its file; `benchmark_model` is where the program is; a bare name is in the folder of the board's files.
        at_end: called when the session is closed.

    Raises:
        DeviceError: it cannot be reached.
        UnavailableError: the program is not there or may not be run.
    """

    def __init__(self, transport: Transport, board: Board, at_end: Callable[[], None] = lambda: None) -> None:
        self.transport, self.board, self.name, self._at_end = transport, board, board.name, at_end
        named = board.benchmark_model
        self.program = named if "/" in named else f"{transport.folder}/{named}"
        self._digest = self._program_digest()
        self._sent: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the phone back; safe to call twice."""
        self._at_end()

    def hello(self) -> dict[str, Any]:
        """What the phone is; the keys of `describe_board`, and `thermal_status` (0: cool, to 6)."""
        self._make_folder()
        done = self.transport.run(["sh", "-c", phone_state.SCRIPT, "sh", self.transport.folder], _SHORT_S)
        return phone_state.parsed(done.stdout.decode(errors="replace")) | {"runtimes": {"benchmark_model": self._digest[:12]}}

    def kind(self) -> Kind:
        """See `Connection.kind`: what Android's own emulator gives is emulated."""
        return Kind.EMULATED if self.board.emulated or self.hello()["emulated"] else Kind.MEASURED

    def runtime(self, name: str) -> tuple[str, str]:
        """(program, the first digits of its SHA-256): it does not tell its version.

        Raises:
            UnavailableError: another runtime than LiteRT is asked for.
        """
        if name != RUNTIME:
            raise UnavailableError(
                f"board {self.name}: runtime {name}",
                found="benchmark_model, which runs .tflite files",
                expected=RUNTIME,
                do="take --target phone, or give the board a Python and no `benchmark_model`",
            )
        return "benchmark_model", self._digest[:12]

    def load(self, path: Path, runtime: str, threads: int, affinity: tuple[int, ...] | None = None) -> PhoneModel:
        """A model's file on the phone, sent where it is not there yet."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"model file {path}", found=error.strerror or str(error), expected="a readable file") from error
        return self.load_bytes(data, Path(path).name, runtime, threads, affinity)

    def load_bytes(
        self, data: bytes, name: str, runtime: str, threads: int, affinity: tuple[int, ...] | None = None
    ) -> PhoneModel:
        """The same of a file's bytes; `name` is for messages."""
        self.runtime(runtime)
        return PhoneModel(self, name, data, self._put(data, name), threads, affinity)

    def drop(self, remote: str) -> None:
        """Remove a file from the phone; what cannot be removed stays."""
        self._sent.discard(remote)
        with contextlib.suppress(DeviceError):
            self.transport.run(["rm", "-f", remote], _SHORT_S)

    def has(self, remote: str) -> bool:
        """Whether a file is there."""
        return self.transport.run(["test", "-f", remote], _SHORT_S).code == 0

    def call(self, flags: Sequence[str], affinity: tuple[int, ...] | None, deadline_s: float, what: str) -> str:
        """What benchmark_model prints.

        Raises:
            DeviceError: it was killed, or took too long.
            BuildError: it refused the model.
        """
        pinned = ["taskset", f"{sum(1 << cpu for cpu in set(affinity)):x}"] if affinity else []
        # the phone itself ends what takes too long, and its shell says what a signal ended: over ssh that would be a 255
        command = ["timeout", "-k", "5", f"{math.ceil(deadline_s)}", *pinned, self.program, *flags]
        done = self.transport.run(["sh", "-c", '"$@"; exit $?', "sh", *command], deadline_s + _LINK_S)
        text = done.stdout.decode(errors="replace") + "\n" + done.stderr
        where = f"board {self.name}: {what}"
        if done.code == _LATE:
            raise DeviceError(
                where, found=f"no result after {deadline_s:.0f} s", expected="a result", do="see what else runs on the phone"
            )
        if done.code in (126, 127):
            raise self._no_program(last_line(done.stderr) or f"exit code {done.code}")
        if done.code in _DEAD:
            raise DeviceError(
                where,
                found=f"benchmark_model was killed by {_DEAD[done.code]}",
                expected="a result",
                do="the program or the artifact needs an instruction this cpu lacks, or memory ran out",
            )
        if done.code != 0:
            raise BuildError(where, found=_reason(text) or f"exit code {done.code}", expected="a model its runtime takes")
        return text

    def pull(self, remote: str) -> bytes:
        """A file of the phone."""
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            self.transport.pull(remote, Path(folder) / "file", _SEND_S)
            return (Path(folder) / "file").read_bytes()

    def push(self, data: bytes, remote: str) -> None:
        """A file to the phone; whole or not at all."""
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            (Path(folder) / "file").write_bytes(data)
            self.transport.push(Path(folder) / "file", f"{remote}.part", _SEND_S)
        self._do(["mv", f"{remote}.part", remote])

    def _put(self, data: bytes, name: str) -> str:
        digest = sha256(data).hexdigest()
        remote = f"{self.transport.folder}/{digest[:32]}.tflite"
        if remote not in self._sent:
            self._make_folder()
            there = self.transport.run(["sha256sum", remote], _SHORT_S)
            if there.code != 0 or not there.stdout.startswith(digest.encode()):
                self.push(data, remote)
            self._sent.add(remote)
        return remote

    def _make_folder(self) -> None:
        self._do(["mkdir", "-p", self.transport.folder])

    def _do(self, argv: list[str]) -> None:
        done = self.transport.run(argv, _SHORT_S)
        if done.code != 0:
            raise BoardError(
                f"board {self.name}: {argv[0]} in {self.transport.folder}",
                found=last_line(done.stderr) or f"exit code {done.code}",
                expected="a folder that can be written",
                do="set `folder` in the board's file",
            )

    def _program_digest(self) -> str:
        done = self.transport.run(["sha256sum", self.program], _SHORT_S)
        found = done.stdout.decode(errors="replace").split()
        if done.code != 0 or not found or not re.fullmatch("[0-9a-f]{64}", found[0]):
            raise self._no_program(last_line(done.stderr) or "no such program")
        if self.transport.run(["test", "-x", self.program], _SHORT_S).code != 0:
            raise self._no_program("a file that may not be run")
        return found[0]

    def _no_program(self, found: str) -> UnavailableError:
        return UnavailableError(
            f"board {self.name}: {self.program}",
            found=found,
            expected="TensorFlow Lite's benchmark_model for this processor, as `benchmark_model` of the board's file says",
            do="push it there and make it executable (chmod +x)",
        )


class PhoneModel:
    """A model's file on a phone; see `LoadedModel`. Every request is a process of its own there."""

    def __init__(
        self, session: PhoneConnection, name: str, data: bytes, remote: str, threads: int, affinity: tuple[int, ...] | None
    ) -> None:
        self._session, self.name, self._data, self.remote = session, name, data, remote
        self._flags, self._affinity = (f"--graph={remote}", f"--num_threads={threads}", "--use_xnnpack=true"), affinity
        self.package, self.version = session.runtime(RUNTIME)

    def timed(self, runs: int, seconds: float) -> BenchmarkRun:
        """Statistics of at least so many inferences and so many seconds.

        Raises:
            DeviceError, BuildError: see `PhoneConnection.call`.
        """
        loop = (f"--num_runs={runs}", f"--min_secs={seconds:g}", "--warmup_runs=1", "--warmup_min_secs=0.1")
        return parse(self._call(loop, _LOAD_S + 10 * seconds, "measuring"))

    def run(self, feeds: dict[str, Array], deadline_s: float = 120.0) -> dict[str, Array]:
        """The outputs by name, of one inference of these inputs.

        Raises:
            UnavailableError: LiteRT is not on this machine; it says how the file's tensors are shaped.
            DeviceError: the inference failed, or the outputs are not as long as their shapes say.
        """
        session, folder, details = self._session, self._session.transport.folder, self._details()
        out, given, shapes = f"{folder}/outputs", [], []
        for number, (name, _, _) in enumerate(details[0]):  # the program takes inputs by their place
            array = np.ascontiguousarray(feeds[name])
            session.push(array.tobytes(), f"{folder}/input-{number}")
            given.append(f"input-{number}")
            shapes.append(",".join(str(n) for n in array.shape))
        flags = (
            f"--input_layer={','.join(given)}",
            f"--input_layer_shape={':'.join(shapes)}",
            f"--input_layer_value_files={','.join(f'{name}:{folder}/{name}' for name in given)}",
            f"--output_filepath={out}",
        )
        session.drop(out)  # a version that does not know the flag would leave another model's
        self._call(("--num_runs=1", "--min_secs=0", "--warmup_runs=0", "--warmup_min_secs=0", *flags), deadline_s, "running")
        if not session.has(out):
            raise UnavailableError(
                f"board {session.name}: outputs of {self.name}",
                found="a benchmark_model without --output_filepath",
                expected="one of TensorFlow 2.12 or newer",
                do="take a newer one",
            )
        return self._unpacked(session.pull(out), details[1])

    def feed_random(self, seed: int) -> None:
        """Nothing: the program makes its inputs itself."""

    def layers(self, runs: int, deadline_s: float) -> tuple[tuple[str, str, float], ...]:
        """(operator, its kind, nanoseconds) in the order they ran, by the program's own profiler."""
        loop = (f"--num_runs={runs}", "--min_secs=0", "--enable_op_profiling=true")
        found = parse_operators(self._call(loop, deadline_s, "profiling"))
        if not found:
            raise UnavailableError(f"times by layer of {self.name}", found="no table of operators in what benchmark_model prints")
        return tuple((operator.name, operator.kind, 1e6 * operator.mean_ms) for operator in found)

    def peak_rss_bytes(self) -> int:
        """Peak memory as the program says it, 0 where it does not."""
        text = self._call(("--num_runs=1", "--min_secs=0", "--report_peak_memory_footprint=true"), _LOAD_S, "measuring")
        return round((parse(text).memory_mb or 0.0) * (1 << 20))  # its MB are KiB / 1024

    def unload(self) -> None:
        """Nothing: it is in memory only while it runs."""

    def _call(self, flags: Sequence[str], deadline_s: float, what: str) -> str:
        return self._session.call((*self._flags, *flags), self._affinity, deadline_s, f"{what} {self.name}")

    def _details(self) -> tuple[list[_Tensor], list[_Tensor]]:
        """Inputs and outputs in the file's own order."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise UnavailableError("LiteRT is not on this machine", do="pip install 'edge-compress[phone]'") from error
        interpreter = Interpreter(model_content=self._data)
        interpreter.allocate_tensors()
        inputs, outputs = (
            [(str(d["name"]), tuple(int(n) for n in d["shape"]), np.dtype(d["dtype"])) for d in some]
            for some in (interpreter.get_input_details(), interpreter.get_output_details())
        )
        return inputs, outputs

    def _unpacked(self, data: bytes, outputs: list[_Tensor]) -> dict[str, Array]:
        """The outputs by name; in the bytes they follow one another."""
        sizes = [int(np.prod(shape)) * kind.itemsize for _, shape, kind in outputs]
        if sum(sizes) != len(data):
            where, expected = f"board {self._session.name}: outputs of {self.name}", f"{sum(sizes)} bytes"
            raise DeviceError(where, found=f"{len(data)} bytes", expected=expected)
        found: dict[str, Array] = {}
        at = 0
        for (name, shape, kind), size in zip(outputs, sizes, strict=True):
            found[name] = np.frombuffer(data[at : at + size], kind).reshape(shape).copy()
            at += size
        return found


def _reason(text: str) -> str:
    """The line of an error message that says most."""
    errors = [line for line in text.splitlines() if re.search(r"\b(ERROR|E/tflite|F/tflite)\b", line)]
    return last_line("\n".join(errors)) or last_line(text)
