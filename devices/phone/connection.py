"""A phone without Python: `benchmark_model` on it, used through a transport alone, as `Connection` is for boards with Python.

benchmark_model (TensorFlow Lite, LiteRT) makes its own inputs, times one model in a process of its own and prints statistics.
Source: tensorflow/lite/tools/benchmark and google-ai-edge/LiteRT; https://ai.google.dev/edge/litert/models/measurement
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from ...pipeline.errors import BuildError, DeviceError, UnavailableError, install_hint
from ...pipeline.types import Kind
from ..board import Board
from ..transport.base import Transport, last_line
from ..transport.connection import Array, layer_rows, model_bytes, outputs
from . import state as phone_state
from .benchmark_model import BenchmarkRun, parse, parse_operators

RUNTIME = "litert"
_SHORT_S, _SEND_S, _LOAD_S = 20.0, 120.0, 120.0
_LINK_S = 15.0  # on top of what the program may take
_LATE = 124  # exit code of `timeout`
_DEAD = {128 + s: signal.Signals(s).name for s in (signal.SIGILL, signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)}


class PhoneConnection:
    """A phone held by this process: the part of `Connection` that deals with models.

    The transport stays open when it is closed; `at_end` is called then.

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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the phone back; safe to call twice."""
        self._at_end()

    def hello(self) -> dict[str, Any]:
        """The phone's description; the keys of `describe_board`, and `thermal_status` (0: cool, to 6)."""
        self.transport.do(["mkdir", "-p", self.transport.folder], _SHORT_S)
        done = self.transport.run(["sh", "-c", phone_state.SCRIPT, "sh", self.transport.folder], _SHORT_S)
        return phone_state.parsed(done.stdout.decode(errors="replace")) | {"runtimes": {"benchmark_model": self._digest[:12]}}

    def kind(self) -> Kind:
        """See `Connection.kind`; times in Android's emulator are emulated."""
        return Kind.EMULATED if self.board.emulated or self.hello()["emulated"] else Kind.MEASURED

    def runtime(self, name: str) -> tuple[str, str]:
        """(program, the first digits of its SHA-256, as it does not report a version).

        Raises:
            UnavailableError: another runtime than LiteRT is asked for.
        """
        if name != RUNTIME:
            found = "benchmark_model, which runs .tflite files"
            do = "take --target phone, or give the board a Python and no `benchmark_model`"
            raise UnavailableError(f"board {self.name}: runtime {name}", found=found, expected=RUNTIME, do=do)
        return "benchmark_model", self._digest[:12]

    def load(
        self, source: Path | tuple[bytes, str], runtime: str, threads: int, affinity: tuple[int, ...] | None = None
    ) -> PhoneModel:
        """A model's file, or its content and a name for messages, on the phone; sent where it is not there yet."""
        data, name = (model_bytes(source), source.name) if isinstance(source, Path) else source
        self.runtime(runtime)
        return PhoneModel(self, name, data, self._put(data), threads, affinity)

    def drop(self, remote: str) -> None:
        """Remove a file from the phone; what cannot be removed stays."""
        self._sent.discard(remote)
        with contextlib.suppress(DeviceError):
            self.transport.run(["rm", "-f", remote], _SHORT_S)

    def call(self, flags: Sequence[str], affinity: tuple[int, ...] | None, deadline_s: float, what: str) -> str:
        """The output of benchmark_model.

        Raises:
            DeviceError: it was killed, or took too long.
            BuildError: it refused the model.
        """
        pinned = ["taskset", f"{sum(1 << cpu for cpu in set(affinity)):x}"] if affinity else []
        # the phone itself ends a run that takes too long, and its shell reports signals, which ssh would turn into a 255
        command = ["timeout", "-k", "5", f"{math.ceil(deadline_s)}", *pinned, self.program, *flags]
        done = self.transport.run(["sh", "-c", '"$@"; exit $?', "sh", *command], deadline_s + _LINK_S)
        text = done.stdout.decode(errors="replace") + "\n" + done.stderr
        where = f"board {self.name}: {what}"
        if done.code == _LATE:
            found, do = f"no result after {deadline_s:.0f} s", "see what else runs on the phone"
            raise DeviceError(where, found=found, expected="a result", do=do)
        if done.code in (126, 127):
            raise self._no_program(last_line(done.stderr) or f"exit code {done.code}")
        if done.code in _DEAD:
            do = "the program or the artifact needs an instruction this cpu lacks, or memory ran out"
            found = f"benchmark_model was killed by {_DEAD[done.code]}"
            raise DeviceError(where, found=found, expected="a result", do=do)
        if done.code != 0:
            raise BuildError(where, found=_reason(text) or f"exit code {done.code}", expected="a model its runtime takes")
        return text

    def _put(self, data: bytes) -> str:
        digest = sha256(data).hexdigest()
        remote = f"{self.transport.folder}/{digest[:32]}.tflite"
        if remote not in self._sent:
            self.transport.do(["mkdir", "-p", self.transport.folder], _SHORT_S)
            there = self.transport.run(["sha256sum", remote], _SHORT_S)
            if there.code != 0 or not there.stdout.startswith(digest.encode()):
                self.transport.replace(data, remote, _SEND_S)
            self._sent.add(remote)
        return remote

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
            UnavailableError: LiteRT, which reads the shapes of the file's tensors, is not on this machine.
            DeviceError: the inference failed, or the outputs are not as long as their shapes say.
        """
        transport, folder = self._session.transport, self._session.transport.folder
        inputs, heads = self._details()
        out, given, shapes = f"{folder}/outputs", [], []
        for number, name in enumerate(inputs):  # the program takes inputs by their place
            array = np.ascontiguousarray(feeds[name])
            transport.replace(array.tobytes(), f"{folder}/input-{number}", _SEND_S)
            given.append(f"input-{number}")
            shapes.append(",".join(str(n) for n in array.shape))
        flags = (
            f"--input_layer={','.join(given)}",
            f"--input_layer_shape={':'.join(shapes)}",
            f"--input_layer_value_files={','.join(f'{name}:{folder}/{name}' for name in given)}",
            f"--output_filepath={out}",
        )
        self._session.drop(out)  # a version that does not know the flag would leave another model's
        self._call(("--num_runs=1", "--min_secs=0", "--warmup_runs=0", "--warmup_min_secs=0", *flags), deadline_s, "running")
        where = f"board {self._session.name}: outputs of {self.name}"
        if transport.run(["test", "-f", out], _SHORT_S).code != 0:
            found, expected = "a benchmark_model without --output_filepath", "one of TensorFlow 2.12 or newer"
            raise UnavailableError(where, found=found, expected=expected, do="take a newer one")
        return outputs(heads, transport.read(out, _SEND_S), where)

    def feed_random(self, seed: int) -> None:
        """Nothing: the program makes its inputs itself."""

    def layers(self, runs: int, deadline_s: float) -> tuple[tuple[str, str, float], ...]:
        """(operator, its kind, nanoseconds) in the order they ran, by the program's own profiler."""
        loop = (f"--num_runs={runs}", "--min_secs=0", "--enable_op_profiling=true")
        found = parse_operators(self._call(loop, deadline_s, "profiling"))
        if not found:
            raise UnavailableError(f"times by layer of {self.name}", found="no table of operators in what benchmark_model prints")
        rows = ((operator.name, operator.kind, 1e6 * operator.mean_ms) for operator in found)
        return layer_rows(rows, f"board {self._session.name}: profiling {self.name}")

    def peak_rss_bytes(self) -> int:
        """Peak memory in bytes as the program reports it, 0 where it does not."""
        text = self._call(("--num_runs=1", "--min_secs=0", "--report_peak_memory_footprint=true"), _LOAD_S, "measuring")
        return round((parse(text).memory_mb or 0.0) * (1 << 20))  # its MB are KiB / 1024

    def unload(self) -> None:
        """Nothing: it is in memory only while it runs."""

    def _call(self, flags: Sequence[str], deadline_s: float, what: str) -> str:
        return self._session.call((*self._flags, *flags), self._affinity, deadline_s, f"{what} {self.name}")

    def _details(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Names of the inputs, and name, type and shape of the outputs, in the file's own order."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise UnavailableError("LiteRT is not on this machine", do=install_hint("phone")) from error
        interpreter = Interpreter(model_content=self._data)
        interpreter.allocate_tensors()
        heads = [
            {"name": str(d["name"]), "dtype": np.dtype(d["dtype"]).name, "shape": [int(n) for n in d["shape"]]}
            for d in interpreter.get_output_details()
        ]
        return [str(d["name"]) for d in interpreter.get_input_details()], heads


def _reason(text: str) -> str:
    """The most informative line of an error message."""
    errors = [line for line in text.splitlines() if re.search(r"\b(ERROR|E/tflite|F/tflite)\b", line)]
    return last_line("\n".join(errors)) or last_line(text)
