"""TensorRT engines on one machine: built there from ONNX files, kept there, timed, profiled and asked for outputs."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import DeviceError, InputError, UnavailableError
from ...pipeline.options import SPARSITY_KEY, Precision
from ...pipeline.signature import FileTensor
from ..transport.base import Completed
from ..transport.connection import IDLE_S, Connection
from ..transport.schemas import validated
from . import loop as tensorrt_loop
from . import tegrastats, trtexec
from .trtexec import LayerTime, Program, Sparsity, Version

_SHORT_S, _SEND_S, _TIME_S, _BUILD_S = 30.0, 300.0, 180.0, 1800.0
_SLACK_S = 20.0  # of a command, for the way there and for `timeout` to end it
_ENDED = 124  # exit code of `timeout` when it had to
_CHUNK_BYTES = 64 << 20  # inputs sent at once
_POWER_S = 10
ENGINE = ".engine"  # what a file is called that is one already: for this GPU, this TensorRT and this power mode

Array = NDArray[Any]


@dataclass(frozen=True)
class IOTensors:
    """The inputs and outputs of an artifact's file, in order; shapes are known, the batch is 1.

    Raises:
        DeviceError: a shape is not known.
    """

    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]

    def __post_init__(self) -> None:
        if unknown := [tensor.name for tensor in (*self.inputs, *self.outputs) if min(tensor.shape[1:], default=1) < 1]:
            raise DeviceError(f"the shape of {unknown[0]} in the engine's file", found="unknown", do="make the run again")

    @staticmethod
    def sample_bytes(tensors: Sequence[FileTensor]) -> int:
        """Bytes that one sample takes in some of them."""
        return sum(math.prod(tensor.shape[1:]) * np.dtype(tensor.dtype).itemsize for tensor in tensors)


@dataclass(frozen=True)
class Engine:
    """An engine on a board."""

    name: str  # of the file it was built from
    path: str  # on the board
    sparsity: Sparsity
    simulated: bool  # built by a stand-in for trtexec: no figure may be read from it


class Engines:
    """Engines on the board an agent works on. The agent keeps everyone else away from it meanwhile.

    Engines and kernel timings of another power mode are not used. `programs` may be used as trtexec, in that order. Whatever
    times, profiles or runs an engine raises UnavailableError for one that a stand-in for trtexec made.

    Raises:
        UnavailableError: there is no trtexec, or it is older than `trtexec.OLDEST`.
    """

    def __init__(self, agent: Connection, power_mode: str, programs: Sequence[Program] = ()) -> None:
        self.agent, self.transport, self.name = agent, agent.transport, agent.name
        self.program, self.version = self._find(programs or [(place,) for place in trtexec.PLACES])
        mode = "".join(c if c.isalnum() else "-" for c in power_mode) or "any"
        self.folder = f"{self.transport.folder}/tensorrt-{self.version}-{mode}"
        self.gpu: dict[str, str] = {}  # known when an engine has been timed
        self._script = f"{self.folder}/tensorrt_loop.py"
        self._bulk: bool | None = None
        self.transport.do(["mkdir", "-p", self.folder], _SHORT_S)

    def engine(self, path: Path) -> Engine:
        """The engine of an ONNX file, built where the board does not have it yet; a file that is an engine is one as it is.

        Raises:
            BuildError: TensorRT refused the file.
            DeviceError: the board failed, ran out of memory or took too long.
        """
        if path.suffix == ENGINE:
            place = f"{self.transport.folder}/{self.agent.put(path)[0]}"
            return Engine(path.name, place, Sparsity((), ()), self._is_simulated(place))
        precision, sparse = asked_of(path)
        digest, _ = self.agent.put(path)
        key = sha256(f"{digest} {precision} {sparse}".encode()).hexdigest()[:32]
        engine, facts, layers = (f"{self.folder}/{key}.{kind}" for kind in ("engine", "json", "layers"))
        sparsity = self._known(engine, facts)
        if sparsity is None:
            command = trtexec.build_command(
                self.program,
                f"{self.transport.folder}/{digest}",
                f"{engine}.part",
                self.version,
                precision,
                sparse=sparse,
                cache=f"{self.folder}/timing.cache",
                layers=layers,
            )
            log = self._call(command, _BUILD_S, f"building the engine of {path.name}")
            sparsity = trtexec.sparsity(log)
            self.transport.write(json.dumps(vars(sparsity)).encode(), facts, _SEND_S)
            self.transport.do(["mv", f"{engine}.part", engine], _SHORT_S)
        return Engine(path.name, engine, sparsity, self._is_simulated(engine))

    def times_ms(self, engine: Engine, iterations: int) -> tuple[list[float], tuple[str, ...]]:
        """GPU compute time of every inference of a fresh process, and trtexec's warnings about them."""
        self.require_real(engine)
        file = f"{self.folder}/times.json"
        log = self._call(trtexec.time_command(self.program, engine.path, file, iterations), _TIME_S, f"timing {engine.name}")
        self.gpu |= trtexec.gpu(log)
        return trtexec.compute_times_ms(self._text(file)), trtexec.warnings(log)

    def layers(self, engine: Engine) -> tuple[LayerTime, ...]:
        """Times by layer, as the profiler sees them.

        Raises:
            UnavailableError: the program used as trtexec has no profiler.
        """
        self.require_real(engine)
        if len(self.program) > 1:
            raise UnavailableError("times by layer", found="no trtexec on this machine")
        file = f"{self.folder}/profile.json"
        self._call(trtexec.profile_command(self.program, engine.path, file), _TIME_S, f"profiling {engine.name}")
        return trtexec.layer_times(self._text(file))

    def in_bulk(self) -> bool:
        """Whether many images can be answered by one process: the board's Python knows TensorRT. If not, each takes its own."""
        if self._bulk is None:
            self.transport.push(Path(tensorrt_loop.__file__), self._script, _SEND_S)
            done = self._run(["python3", self._script, "--help"], _SHORT_S, "looking for TensorRT's Python package")
            self._bulk = done.code == 0
        return self._bulk

    def outputs(self, engine: Engine, inputs: Sequence[Array], io: IOTensors) -> tuple[Array, ...]:
        """The engine's answers, an array (N, ...) for each output, to network inputs, an array (N, ...) for each input.

        Args:
            engine: one that TensorRT built.
            inputs: in the order of `io.inputs`.
            io: the file's inputs and outputs.

        Raises:
            DeviceError: the engine has other tensors, or there are fewer answers than samples.
        """
        self.require_real(engine)
        cast = [np.ascontiguousarray(array, tensor.dtype) for array, tensor in zip(inputs, io.inputs, strict=True)]
        count = len(cast[0])
        step = max(1, _CHUNK_BYTES // max(io.sample_bytes(io.inputs), 1)) if self.in_bulk() else 1
        ask = self._answered if self.in_bulk() else self._one_by_one
        parts = [ask(engine, [array[at : at + step] for array in cast], io) for at in range(0, count, step)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def power(self, engine: Engine) -> tegrastats.Power | None:
        """Power draw of the board while the engine runs, in a separate run; None where it cannot be read."""
        self.require_real(engine)
        command = trtexec.time_command(self.program, engine.path, f"{self.folder}/power.json", 10, _POWER_S)
        watching = ["timeout", str(_POWER_S), "tegrastats", "--interval", "200"]
        with ThreadPoolExecutor(1) as threads:  # a second channel of the same connection; it ends while the engine still runs
            watched = threads.submit(self.transport.run, watching, _POWER_S + _SLACK_S)
            self._call(command, _TIME_S, f"running {engine.name}")
        try:
            return tegrastats.power(watched.result().stdout.decode(errors="replace").splitlines())
        except DeviceError:
            return None

    def fetch(self, engine: Engine, target: Path) -> None:
        """Copy the engine here."""
        self.transport.pull(engine.path, target, _SEND_S)

    def drop(self, engine: Engine) -> None:
        """Remove it from the board."""
        stem = engine.path.removesuffix(".engine")
        self.transport.do(["rm", "-f", engine.path, f"{stem}.json", f"{stem}.layers"], _SHORT_S)

    def require_real(self, engine: Engine) -> None:
        """Raise UnavailableError for an engine that a stand-in for trtexec built."""
        if engine.simulated:
            found, do = "made by a stand-in for trtexec (it is stamped simulated)", "nothing that is read from it means anything"
            where = f"board {self.name}: the engine of {engine.name}"
            raise UnavailableError(where, found=found, expected="one that TensorRT built", do=do)

    def _answered(self, engine: Engine, inputs: Sequence[Array], io: IOTensors) -> list[Array]:
        """The answers by TensorRT's Python package."""
        source, sink, count = f"{self.folder}/inputs.bin", f"{self.folder}/outputs.bin", len(inputs[0])
        bytes_of = [array.reshape(count, -1).view(np.uint8) for array in inputs]  # one sample after another
        self.transport.write(np.concatenate(bytes_of, axis=1).tobytes(), source, _SEND_S)
        tensors = [[tensor.name, tensor.dtype, io.sample_bytes([tensor])] for tensor in (*io.inputs, *io.outputs)]
        options = [f"--loadEngine={engine.path}", f"--inputs={source}", f"--outputs={sink}", f"--tensors={json.dumps(tensors)}"]
        what = f"asking {engine.name}"
        done = self._run(["python3", self._script, *options], _BUILD_S, what)
        trtexec.require_passed(done.stdout.decode(errors="replace"), done.code, f"board {self.name}: {what}")
        each = io.sample_bytes(io.outputs)
        data = np.frombuffer(self.transport.read(sink, _SEND_S, count * each), np.uint8)
        if len(data) != count * each:
            where, found = f"board {self.name}: outputs of {engine.name}", f"{len(data)} bytes for {count} samples"
            do = "they were cut off; run the same command again"
            raise DeviceError(where, found=found, expected=f"{each} for each", do=do)
        answers, at = [], 0
        for tensor in io.outputs:
            size = io.sample_bytes([tensor])
            part = np.ascontiguousarray(data.reshape(count, each)[:, at : at + size])
            answers.append(part.view(tensor.dtype).reshape(count, *tensor.shape[1:]))
            at += size
        return answers

    def _one_by_one(self, engine: Engine, inputs: Sequence[Array], io: IOTensors) -> list[Array]:
        """One sample's answers by trtexec."""
        sources, sink = {}, f"{self.folder}/outputs.json"
        for number, (array, tensor) in enumerate(zip(inputs, io.inputs, strict=True)):
            sources[tensor.name] = f"{self.folder}/input{number}.bin"
            self.transport.write(array.tobytes(), sources[tensor.name], _SEND_S)
        command = trtexec.output_command(self.program, engine.path, sources, sink)
        self._call(command, _TIME_S, f"asking {engine.name}")
        found = trtexec.outputs(self._text(sink))
        what = f"board {self.name}: outputs of {engine.name}"
        if missing := [tensor.name for tensor in io.outputs if len(found.get(tensor.name, ())) != math.prod(tensor.shape[1:])]:
            raise DeviceError(
                what, found=f"{len(found.get(missing[0], ()))} values of {missing[0]}", expected="all of one sample"
            )
        return [np.array(found[tensor.name], tensor.dtype).reshape(1, *tensor.shape[1:]) for tensor in io.outputs]

    def _known(self, engine: str, facts: str) -> Sparsity | None:
        """What is recorded of an engine that the board has; None where it lacks the engine, or a whole record."""
        if self.transport.run(["test", "-s", engine, "-a", "-s", facts], _SHORT_S).code != 0:
            return None
        try:
            found = validated({"eligible": [str], "picked": [str]}, json.loads(self.transport.read(facts, _SEND_S)))
        except (ValueError, RecursionError):  # a disk that was full, or a power cut
            return None
        return Sparsity(tuple(found["eligible"]), tuple(found["picked"]))

    def _text(self, file: str) -> str:
        """A file that trtexec wrote; what is damaged in it is for its reader to refuse."""
        return self.transport.read(file, _SEND_S).decode(errors="replace")

    def _find(self, programs: Sequence[Program]) -> tuple[Program, Version]:
        for program in programs:
            done = self.transport.run(["timeout", "30", *program, "--help"], _SHORT_S + _SLACK_S)
            version = trtexec.version_of(done.stdout.decode(errors="replace"))
            if version is None:
                continue
            if version < trtexec.OLDEST:
                where, do = f"board {self.name}: TensorRT {version}", "JetPack 6.1 and 6.2 have 10.3"
                raise UnavailableError(where, found="too old", expected="10.0 or newer", do=do)
            return program, version
        found = f"none at {' or '.join(' '.join(p) for p in programs)}"
        do = "sudo apt install nvidia-jetpack, or put trtexec on its PATH"
        raise UnavailableError(f"board {self.name}: trtexec", found=found, expected="JetPack with TensorRT", do=do)

    def _call(self, command: Sequence[str], deadline_s: float, what: str) -> str:
        """The log of a call of trtexec that passed."""
        done = self._run(command, deadline_s, what)
        log = done.stdout.decode(errors="replace") + done.stderr
        trtexec.require_passed(log, done.code, f"board {self.name}: {what}")
        return log

    def _run(self, argv: Sequence[str], deadline_s: float, what: str) -> Completed:
        """A command that the board itself ends at the deadline, whatever becomes of the link."""
        with _kept_awake(self.agent):
            done = self.transport.run(["timeout", "-k", "5", f"{deadline_s:.0f}", *argv], deadline_s + _SLACK_S)
        if done.code == _ENDED:
            found, do = f"no end after {deadline_s:.0f} s", "it was ended there; see what else runs on the board"
            raise DeviceError(f"board {self.name}: {what}", found=found, expected="an end", do=do)
        return done

    def _is_simulated(self, engine: str) -> bool:
        head = self.transport.run(["head", "-c", str(len(trtexec.SIMULATED)), engine], _SHORT_S)
        if head.code != 0:
            raise self.transport.error(f"the engine {engine}", head.stderr.strip()[:300], "a file that can be read")
        return head.stdout == trtexec.SIMULATED


def asked_of(path: Path) -> tuple[Precision, bool]:
    """Precision of an ONNX file, and whether it asks for sparse kernels.

    Raises:
        InputError: it cannot be read as ONNX.
    """
    import onnx

    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own error type is not exported
        raise InputError(f"model file {path}", found=str(error)[:200], expected="an ONNX file") from error
    kinds = {i.data_type for i in model.graph.initializer}
    sparse = any(p.key == SPARSITY_KEY and p.value == "enable" for p in model.metadata_props)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return Precision.INT8, sparse
    return (Precision.FP16 if onnx.TensorProto.FLOAT16 in kinds else Precision.FP32), sparse


@contextlib.contextmanager
def _kept_awake(agent: Connection) -> Iterator[None]:
    """An agent ends itself when nothing comes; while a long command runs beside it, it is asked for nothing now and then."""
    done = threading.Event()

    def ask() -> None:
        with contextlib.suppress(DeviceError):  # whoever asks next learns of it
            while not done.wait(IDLE_S / 3):
                agent.stream.ask({"op": "ping"}, _SHORT_S, "keeping the agent awake")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
