"""TensorRT engines on one machine: built there from ONNX files, kept there, timed, profiled and asked for outputs."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import DeviceError, InputError, UnavailableError
from ...pipeline.types import SPARSITY_KEY, Precision
from ..transport.base import BoardError, Completed
from ..transport.connection import IDLE_S, Connection
from . import loop as tensorrt_loop
from . import tegrastats, trtexec
from .trtexec import LayerTime, Program, Sparsity, Version

_SHORT_S, _SEND_S, _TIME_S, _BUILD_S = 30.0, 300.0, 180.0, 1800.0
_SLACK_S = 20.0  # of a command, for the way there and for `timeout` to end it
_ENDED = 124  # exit code of `timeout` when it had to
_CHUNK_BYTES = 64 << 20  # inputs sent at once
_POWER_S = 10
ENGINE = ".engine"  # what a file is called that is one already: for this GPU, this TensorRT and this power mode

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Engine:
    """An engine on a board."""

    name: str  # of the file it was built from
    path: str  # on the board
    sparsity: Sparsity
    simulated: bool  # a stand-in made it: nothing may be read from it


class Engines:
    """Engines on the board an agent works on. The agent keeps everyone else away from it meanwhile.

    Args:
        agent: running on the board; files go through it, by digest.
        power_mode: of the board, as it described itself: engines and kernel timings of another are not used.
        programs: what may stand for trtexec there, in order.

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
        self._do(["mkdir", "-p", self.folder], _SHORT_S, "making a folder")

    def engine(self, path: Path, *, again: bool = False) -> Engine:
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
        if again or not self._there(engine) or not self._there(facts):
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
            found = trtexec.sparsity(log)
            self._write(facts, json.dumps({"eligible": found.eligible, "picked": found.picked}).encode())
            self._do(["mv", f"{engine}.part", engine], _SHORT_S, "keeping the engine")
        known = json.loads(self._read(facts))
        sparsity = Sparsity(tuple(known["eligible"]), tuple(known["picked"]))
        return Engine(path.name, engine, sparsity, self._is_simulated(engine))

    def times_ms(self, engine: Engine, iterations: int) -> tuple[list[float], tuple[str, ...]]:
        """GPU compute time of every inference of a fresh process, and what trtexec says against them.

        Raises:
            UnavailableError: a stand-in made the engine.
        """
        self.require_real(engine)
        file = f"{self.folder}/times.json"
        log = self._call(trtexec.time_command(self.program, engine.path, file, iterations), _TIME_S, f"timing {engine.name}")
        self.gpu |= trtexec.gpu(log)
        return trtexec.compute_times_ms(self._read(file).decode()), trtexec.warnings(log)

    def layers(self, engine: Engine) -> tuple[LayerTime, ...]:
        """Times by layer, as the profiler sees them.

        Raises:
            UnavailableError: a stand-in made the engine, or what stands for trtexec has no profiler.
        """
        self.require_real(engine)
        if len(self.program) > 1:
            raise UnavailableError("times by layer", found="no trtexec on this machine")
        file = f"{self.folder}/profile.json"
        self._call(trtexec.profile_command(self.program, engine.path, file), _TIME_S, f"profiling {engine.name}")
        return trtexec.layer_times(self._read(file).decode())

    def in_bulk(self) -> bool:
        """Whether many images can be answered by one process: the board's Python knows TensorRT. If not, each takes its own."""
        if self._bulk is None:
            self.transport.push(Path(tensorrt_loop.__file__), self._script, _SEND_S)
            done = self._run(["python3", self._script, "--help"], _SHORT_S, "looking for TensorRT's Python package")
            self._bulk = done.code == 0
        return self._bulk

    def outputs(self, engine: Engine, inputs: FloatArray) -> FloatArray:
        """The engine's answers (N, classes), float32, to network inputs (N, C, H, W).

        Raises:
            UnavailableError: a stand-in made the engine.
            DeviceError: there are fewer answers than images.
        """
        self.require_real(engine)
        if not self.in_bulk():
            return self._one_by_one(engine, inputs)
        step = max(1, _CHUNK_BYTES // max(inputs[:1].nbytes, 1))
        return np.concatenate([self._answered(engine, inputs[at : at + step]) for at in range(0, len(inputs), step)])

    def power(self, engine: Engine) -> tegrastats.Power | None:
        """What the board takes while the engine runs, in a run of its own; None where that cannot be read.

        Raises:
            UnavailableError: a stand-in made the engine.
        """
        self.require_real(engine)
        command = trtexec.time_command(self.program, engine.path, f"{self.folder}/power.json", 10, _POWER_S)
        watched: list[Completed] = []

        def watch() -> None:  # a second channel of the same connection; it ends by itself while the engine still runs
            with contextlib.suppress(DeviceError):
                watching = ["timeout", str(_POWER_S), "tegrastats", "--interval", "200"]
                watched.append(self.transport.run(watching, _POWER_S + _SLACK_S))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            self._call(command, _TIME_S, f"running {engine.name}")
        finally:
            thread.join()
        return tegrastats.power(watched[0].stdout.decode(errors="replace").splitlines()) if watched else None

    def fetch(self, engine: Engine, target: Path) -> None:
        """Copy the engine here."""
        self.transport.pull(engine.path, target, _SEND_S)

    def drop(self, engine: Engine) -> None:
        """Remove it from the board."""
        stem = engine.path.removesuffix(".engine")
        self._do(["rm", "-f", engine.path, f"{stem}.json", f"{stem}.layers"], _SHORT_S, "removing an engine")

    def require_real(self, engine: Engine) -> None:
        """Raise UnavailableError for what a stand-in made."""
        if engine.simulated:
            raise UnavailableError(
                f"board {self.name}: the engine of {engine.name}",
                found="made by a stand-in for trtexec (it is stamped simulated)",
                expected="one that TensorRT built",
                do="nothing that is read from it means anything",
            )

    def _answered(self, engine: Engine, inputs: FloatArray) -> FloatArray:
        """The answers by TensorRT's Python package."""
        source, sink = f"{self.folder}/inputs.bin", f"{self.folder}/outputs.bin"
        self._write(source, np.ascontiguousarray(inputs, dtype="<f4").tobytes())
        command = ["python3", self._script, f"--loadEngine={engine.path}", f"--inputs={source}", f"--outputs={sink}"]
        what = f"asking {engine.name}"
        done = self._run(command, _BUILD_S, what)
        trtexec.require_passed(done.stdout.decode(errors="replace"), done.code, f"board {self.name}: {what}")
        values = np.frombuffer(self._read(sink), dtype="<f4")
        if len(values) == 0 or len(values) % len(inputs):
            raise DeviceError(
                f"board {self.name}: outputs of {engine.name}",
                found=f"{len(values)} values for {len(inputs)} images",
                expected="as many for each",
                do="they were cut off; run the same command again",
            )
        return values.reshape(len(inputs), -1).astype(np.float32)

    def _one_by_one(self, engine: Engine, inputs: FloatArray) -> FloatArray:
        source, sink = f"{self.folder}/inputs.bin", f"{self.folder}/outputs.json"
        rows = []
        for image in inputs:
            self._write(source, np.ascontiguousarray(image, dtype="<f4").tobytes())
            command = trtexec.output_command(self.program, engine.path, {"input": source}, sink)
            self._call(command, _TIME_S, f"asking {engine.name}")
            ((_, values),) = trtexec.outputs(self._read(sink).decode()).values()
            rows.append(values)
        return np.array(rows, np.float32)

    def _find(self, programs: Sequence[Program]) -> tuple[Program, Version]:
        for program in programs:
            done = self.transport.run(["timeout", "30", *program, "--help"], _SHORT_S + _SLACK_S)
            version = trtexec.version_of(done.stdout.decode(errors="replace"))
            if version is None:
                continue
            if (version.major, version.minor, version.patch) < trtexec.OLDEST:
                raise UnavailableError(
                    f"board {self.name}: TensorRT {version}",
                    found="too old",
                    expected="10.0 or newer",
                    do="JetPack 6.1 and 6.2 have 10.3",
                )
            return program, version
        raise UnavailableError(
            f"board {self.name}: trtexec",
            found=f"none at {' or '.join(' '.join(p) for p in programs)}",
            expected="JetPack with TensorRT",
            do="sudo apt install nvidia-jetpack, or put trtexec on its PATH",
        )

    def _call(self, command: Sequence[str], deadline_s: float, what: str) -> str:
        """The log of a call of trtexec that passed."""
        done = self._run(command, deadline_s, what)
        log = done.stdout.decode(errors="replace") + done.stderr
        trtexec.require_passed(log, done.code, f"board {self.name}: {what}")
        return log

    def _do(self, argv: Sequence[str], deadline_s: float, what: str) -> Completed:
        """A command that must succeed."""
        done = self._run(argv, deadline_s, what)
        if done.code != 0:
            raise BoardError(
                f"board {self.name}: {what}",
                found=" ".join(done.stderr.split())[:300] or f"exit code {done.code}",
                expected="success",
            )
        return done

    def _run(self, argv: Sequence[str], deadline_s: float, what: str) -> Completed:
        """A command that the board itself ends at the deadline, whatever becomes of the link."""
        with _kept_awake(self.agent):
            done = self.transport.run(["timeout", "-k", "5", f"{deadline_s:.0f}", *argv], deadline_s + _SLACK_S)
        if done.code == _ENDED:
            raise DeviceError(
                f"board {self.name}: {what}",
                found=f"no end after {deadline_s:.0f} s",
                expected="an end",
                do="it was ended there; see what else runs on the board",
            )
        return done

    def _is_simulated(self, engine: str) -> bool:
        head = self._do(["head", "-c", str(len(trtexec.SIMULATED)), engine], _SHORT_S, "looking at the engine")
        return head.stdout == trtexec.SIMULATED

    def _there(self, file: str) -> bool:
        return self._run(["test", "-s", file], _SHORT_S, "looking for a file").code == 0

    def _read(self, file: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            local = Path(folder) / "file"
            self.transport.pull(file, local, _SEND_S)
            return local.read_bytes()

    def _write(self, file: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
            local = Path(folder) / "file"
            local.write_bytes(data)
            self.transport.push(local, file, _SEND_S)


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
