"""The host's side of the agent: requests with deadlines, files by digest, models by handle; refusals become errors."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import BuildError, DeviceError, EdgeCompressError, InputError, UnavailableError, printable
from ...pipeline.signature import DTYPES, MOST_AXES
from ...pipeline.types import Kind
from .. import agent as agent_package
from ..agent import tensors
from ..agent.main import WRONG_FILE
from .base import AgentEnded, BoardError, Stream, Transport
from .schemas import REFUSAL, SCHEMAS, validated

Array = NDArray[Any]

_PACKAGE = "edge_compress_agent"  # the agent inside its file
_MAIN = f"import sys\n\nfrom {_PACKAGE}.main import main\n\nsys.exit(main(sys.argv[1:]))\n"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold
_CHUNK = 4 << 20  # bytes of a model sent at once
_MOST_INPUT = 1 << 30  # bytes of an input that is made up
IDLE_S = 90  # without a request, until the agent ends itself
_START_S, _SHORT_S, _LOAD_S, _SEND_S = 40.0, 20.0, 120.0, 120.0


class Connection:
    """A running agent on a board. Starting it sends the agent's file only where the board does not have it yet.

    The transport stays open when it is closed; `at_end` is called then.

    Raises:
        DeviceError: the board cannot be reached, is busy, or has no Python.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        python: str = "python3",
        at_end: Callable[[], None] = lambda: None,
        emulated: bool = False,
    ) -> None:
        self.transport, self.name, self._at_end, self._emulated = transport, name, at_end, emulated
        data, digest = packed_agent()
        remote = f"{transport.folder}/agent-{digest[:16]}.pyz"
        options = [f"--folder={transport.folder}", f"--idle={IDLE_S}", f"--digest={digest}"]
        command = [python, remote, *options]
        try:
            self.stream: Stream = transport.open(command, _START_S)
        except AgentEnded as ended:
            if ended.code not in (0, 1, 2, WRONG_FILE):  # 2: Python finds no such file; 0, 1: an empty or damaged one
                raise
            self._send_agent(data, remote)
            self.stream = transport.open(command, _START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the agent; safe to call twice."""
        if self.stream.process.poll() is None:
            with contextlib.suppress(DeviceError):
                self.stream.ask({"op": "quit"}, 1.0, "ending the agent")
        self.stream.close()
        self._at_end()

    def ask(self, request: dict[str, Any], deadline_s: float, what: str, payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """The agent's answer to a request; see the agent's package.

        Raises:
            DeviceError: the board failed, or the model did: killed, out of memory, too slow.
            BuildError: the runtime refused the model.
            UnavailableError: the runtime is not on the board.
            InputError: the request asks for what the board does not have.
        """
        answer, data = self.stream.ask(request, deadline_s, what, payload)
        try:
            done = validated({"ok": bool}, answer)["ok"]
            found = validated(SCHEMAS.get(request["op"], {}) if done else REFUSAL, answer)
        except ValueError as error:
            self.stream.close()
            do = "check that the agent on the board is of this version"
            raise DeviceError(f"board {self.name}: {what}", found=f"an invalid reply: {error}", do=do) from error
        if done:
            return found, data
        raise _refused(found["kind"], found["error"], self.name, what, deadline_s)

    def hello(self) -> dict[str, Any]:
        """The board's description; see `describe_board` of the agent."""
        return self.ask({"op": "hello"}, _SHORT_S, "asking what it is")[0]

    def kind(self) -> Kind:
        """Kind of this board's times: emulated if its file or the board itself reports it, else measured."""
        return Kind.EMULATED if self._emulated or self.hello()["emulated"] else Kind.MEASURED

    def runtime(self, name: str) -> tuple[str, str]:
        """(package, version) of a runtime, after it was imported there in a process of its own.

        Raises:
            UnavailableError: none of its packages can be imported.
            DeviceError: importing it killed the process.
        """
        answer, _ = self.ask({"op": "runtime", "runtime": name}, _LOAD_S, f"starting {name}")
        return str(answer["package"]), str(answer["version"])

    def put(self, path: Path) -> tuple[str, bool]:
        """Have a file on the board: (its SHA-256, whether it had to be sent).

        Raises:
            InputError: the file cannot be read.
            DeviceError: the board's disk is full, or the link failed.
        """
        return self.put_bytes(model_bytes(path), path.name)

    def put_bytes(self, data: bytes, name: str) -> tuple[str, bool]:
        """The same of a file's bytes; `name` is for messages."""
        digest, what = sha256(data).hexdigest(), f"sending {name}"
        if self.ask({"op": "has", "sha256": digest}, _SEND_S, what)[0]["has"]:
            return digest, False
        for offset in range(0, max(len(data), 1), _CHUNK):
            request = {"op": "put", "sha256": digest, "size": len(data), "offset": offset}
            self.ask(request, _SEND_S, what, data[offset : offset + _CHUNK])
        return digest, True

    def drop(self, digest: str) -> None:
        """Remove a file from the board."""
        self.ask({"op": "drop", "sha256": digest}, _SHORT_S, "removing a file")

    def load(
        self,
        source: Path | tuple[str, str],
        runtime: str,
        threads: int,
        affinity: tuple[int, ...] | None = None,
        beside: LoadedModel | None = None,
    ) -> LoadedModel:
        """A model on the board, in a process of its own or in that of a model it is timed with.

        `source` is its file, sent where needed, or (digest, name for messages) of a file on the board.
        """
        digest, name = (self.put(source)[0], source.name) if isinstance(source, Path) else source
        about = {"sha256": digest, "runtime": runtime, "threads": threads, "affinity": affinity and list(affinity)}
        request = {"op": "load", **about, "beside": beside and beside.handle}
        answer, _ = self.ask(request, _LOAD_S, f"loading {name}")
        return LoadedModel(self, name, answer)

    def _send_agent(self, data: bytes, remote: str) -> None:
        folder = self.transport.folder
        self.transport.do(["mkdir", "-p", folder], _SHORT_S)
        try:
            self.transport.replace(data, remote, _SEND_S)
        except BoardError as error:
            free = self.transport.run(["df", "-Pk", folder], _SHORT_S).stdout.split()[-3:-2]  # scp reports no reason
            if free and free[0].isdigit() and int(free[0]) * 1024 < 2 * len(data):
                found, expected = f"its disk is full, {int(free[0])} KiB free", "space for the agent and the model files"
                do = "remove files there, or set `folder` in the board's file"
                raise self.transport.error(folder, found, expected, do) from error
            raise


class LoadedModel:
    """A model loaded on a board."""

    def __init__(self, connection: Connection, name: str, loaded: dict[str, Any]) -> None:
        self._connection, self.name = connection, name
        self.handle, self.pid = int(loaded["handle"]), int(loaded["pid"])
        self.package, self.version = str(loaded["package"]), str(loaded["version"])
        self.inputs = list(loaded["inputs"])

    def run(self, feeds: dict[str, Array], deadline_s: float = 120.0) -> dict[str, Array]:
        """The model's outputs by name. The inputs stay in place for timing.

        Raises:
            DeviceError: the inference failed, or the outputs are not as long as their shapes say.
        """
        heads, payload = tensors.packed(feeds)
        request = {"op": "run", "handle": self.handle, "tensors": heads}
        answer, data = self._connection.ask(request, deadline_s, f"running {self.name}", payload)
        return outputs(answer["tensors"], data, f"board {self._connection.name}: outputs of {self.name}")

    def feed_random(self, seed: int) -> None:
        """Put inputs in place, the same for the same seed, and run once.

        Raises:
            BuildError: an input has a shape or type that cannot be made up.
        """
        self.run({i["name"]: _random_input(self.name, i, seed + n) for n, i in enumerate(self.inputs)})

    def layers(self, runs: int, deadline_s: float) -> tuple[tuple[str, str, float], ...]:
        """(operator, its kind, nanoseconds) in the order they ran, by the runtime's own profiler.

        Raises:
            UnavailableError: the runtime has none.
            DeviceError: see `layer_rows`.
        """
        request = {"op": "layers", "handle": self.handle, "runs": runs}
        answer, _ = self._connection.ask(request, deadline_s, f"profiling {self.name}")
        return layer_rows(answer["layers"], f"board {self._connection.name}: profiling {self.name}")

    def peak_rss_bytes(self) -> int:
        """Peak resident memory of its process in bytes, 0 where it cannot be read."""
        answer, _ = self._connection.ask({"op": "memory", "handle": self.handle}, _SHORT_S, f"measuring {self.name}")
        return int(answer["peak_rss_bytes"])

    def unload(self) -> None:
        """Give its memory back; its process on the board ends with the last of its models."""
        self._connection.ask({"op": "unload", "handle": self.handle}, _SHORT_S, f"unloading {self.name}")


def model_bytes(path: Path) -> bytes:
    """The content of a model's file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"model file {path}", found=error.strerror or str(error), expected="a readable file") from error


def layer_rows(rows: Iterable[tuple[str, str, float]], where: str) -> tuple[tuple[str, str, float], ...]:
    """(operator, its kind, nanoseconds) of a profiler; `where` is for messages.

    Raises:
        DeviceError: a time is negative or not finite.
        UnavailableError: no operator took any time, so that they have no shares.
    """
    found = tuple((printable(name), printable(kind), float(ns)) for name, kind, ns in rows)
    if wrong := [f"{ns} ns for {name}" for name, _, ns in found if not 0 <= ns < math.inf]:
        raise DeviceError(where, found=wrong[0], expected="a time")
    if not any(ns for *_, ns in found):
        raise UnavailableError(where, found="no operator that takes measurable time")
    return found


def outputs(heads: Sequence[dict[str, Any]], data: bytes, where: str) -> dict[str, Array]:
    """Arrays of numbers by name out of the bytes of all, see `agent.tensors.unpacked`; `where` is for messages.

    Raises:
        DeviceError: the bytes are not as many as the shapes say, or no numbers.
    """
    if wrong := [
        f"{printable(str(h['name']))} of type {printable(str(h['dtype']))[:100]}" for h in heads if h["dtype"] not in DTYPES
    ]:
        raise DeviceError(where, found=wrong[0], expected="numbers")
    try:
        found = tensors.unpacked(heads, data)
    except tensors.SizeError as error:
        do = "they were cut off; run the same command again"
        raise DeviceError(where, found=f"{error.found} bytes", expected=f"{error.expected} bytes", do=do) from error
    except (TypeError, ValueError, OverflowError) as error:  # a type or a shape that numpy does not know
        raise DeviceError(where, found=str(error), expected="arrays") from error
    return found


def _refused(kind: str, text: str, board: str, what: str, deadline_s: float) -> EdgeCompressError:
    """The error for an agent's refusal."""
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
    return (BoardError if kind == "disk" else DeviceError)(where, found=found, expected=expected, do=do.get(kind, ""))


def _random_input(model: str, entry: dict[str, Any], seed: int) -> Array:
    """Seeded values of an input's own type and shape; a free first dimension (the batch) is 1.

    Raises:
        BuildError: no values can be made up for it.
    """
    what, shape = f"the model {model} cannot be measured", entry["shape"]
    sizes = [1 if n == 0 and not isinstance(s, int) else s for n, s in enumerate(shape)]
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        found = f"input {entry['name']} of shape {shape}"
        raise BuildError(what, found=found, expected="sizes, of which only the first may be free")
    if len(sizes) > MOST_AXES:
        raise BuildError(what, found=f"input {entry['name']} of {len(sizes)} axes", expected=f"at most {MOST_AXES}")
    if 8 * math.prod(sizes) > _MOST_INPUT:  # they are made as float64 or int64; a file's shape may say anything
        found = f"input {entry['name']} of {math.prod(sizes)} elements"
        raise BuildError(what, found=found, expected=f"at most {_MOST_INPUT // 8}")
    rng = np.random.default_rng(seed)
    kind, floats = entry["kind"], {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    if kind in floats:
        return rng.standard_normal(sizes).astype(floats[kind])
    if kind == "tensor(uint8)":
        return rng.integers(0, 256, sizes, dtype=np.uint8)
    if kind == "tensor(int8)":
        return rng.integers(-128, 128, sizes, dtype=np.int8)
    if kind in ("tensor(int32)", "tensor(int64)"):  # token numbers or a mask: 0 and 1 are valid as either
        return rng.integers(0, 2, sizes, dtype=np.int32 if kind == "tensor(int32)" else np.int64)
    found = f"input {entry['name']} of type {kind}"
    raise BuildError(what, found=found, expected="float, float16, double, uint8, int8, int32 or int64")


@functools.lru_cache(maxsize=1)
def packed_agent() -> tuple[bytes, str]:
    """The agent as the one file that a board gets, a zip that Python runs, and its SHA-256; equal sources give equal bytes.

    `zipapp` would store the files' own dates, and another zlib compresses to other bytes: dates are fixed, nothing is compressed.
    """
    folder, buffer = Path(agent_package.__file__).parent, io.BytesIO()
    sources = {f"{_PACKAGE}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*.py")}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted({"__main__.py": _MAIN.encode(), **sources}.items()):
            archive.writestr(zipfile.ZipInfo(name, _LONG_AGO), data)
    return buffer.getvalue(), sha256(buffer.getvalue()).hexdigest()
