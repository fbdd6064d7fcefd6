"""The program that runs on a board: one file, Python 3.8 or newer, nothing but the standard library.

It talks in frames over its stdin and stdout: header length and payload length (32 bits each, big endian), a JSON object,
raw bytes. Every request has one answer. Each loaded model is a process of its own, which holds the runtime: what kills
it (SIGILL, SIGSEGV, the kernel when memory runs out) becomes an answer.

    hello  {folder}                                    -> what the board is: see `describe_board`
    has    {sha256}                                    -> {has}
    put    {sha256, size, offset} + bytes              -> {done}; a file is there when its digest is right
    drop   {sha256}                                    -> {}; the file is gone
    runtime {runtime}                                  -> {package, version} of what can be imported there
    load   {sha256, runtime, threads, affinity}        -> {handle, package, version, inputs: [{name, kind, shape}]}
    run    {handle, tensors: [{name, dtype, shape}]} + bytes, little endian -> {tensors} + bytes; the inputs stay in place
    warm   {handles, floor_ns, seconds, window}        -> {k: inferences in a sample, of each, seconds}
    pairs  {handles, k, rounds, seconds, seed}         -> {wall_ns, cpu_ns, peak_rss_bytes: one for each, seconds, ...}
    memory {handle}                                    -> {peak_rss_bytes}
    layers {handle, runs}                              -> {layers: [[name, kind, ns]]} by the runtime's own profiler
    unload {handle, spare}                             -> {}; spare: its process stays, for the next model of its runtime
    ping {}, quit {}
    anything that cannot be done -> {"ok": false, "kind", "error": "one line"}, kind one of "request", "runtime", "load",
    "run", "memory", "disk", "died" (the model's process), "deadline" (it took longer than the request's deadline_s)

It ends itself, and its models' processes with it, when its stdin closes, when no request has come for --idle seconds,
and when a request has taken longer than its deadline. One agent at a time works in a folder: a second one says "busy".
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import random
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAGIC = b"\0edge-compress agent 1\n"  # before the first frame: what a login shell prints comes earlier and is skipped
WRONG_FILE, BUSY = 91, 92  # exit codes
# runtime -> the packages it may come in; the first that loads the model and runs it is taken
RUNTIMES = {"onnxruntime": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}
_HEAD = struct.Struct(">II")
_MOST = 1 << 30  # bytes of a header or a payload
_WARM = 0.05  # two consecutive windows differ by less: warm
_CLOCK_STEPS = 200  # a sample lasts at least this many steps of the clock
_GRACE_S = 5.0  # after a request's deadline, until the agent gives itself up


class Refusal(Exception):
    """A request that cannot be done; `kind` is one of those above."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(" ".join(text.split())[:1000])


class Gone(Exception):
    """The other end of a channel closed it."""


class Late(Exception):
    """A deadline passed."""


class Channel:
    """Frames over two file descriptors. Deadlines are times of `time.monotonic`; None waits for ever."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self._held = bytearray()
        os.set_blocking(sink, False)

    def send(self, header: dict[str, Any], payload: bytes = b"", deadline: float | None = None) -> None:
        """Write one frame.

        Raises:
            Gone, Late: it could not be written, or not all of it.
        """
        head = json.dumps(header).encode()
        left = memoryview(_HEAD.pack(len(head), len(payload)) + head + payload)
        poll = select.poll()
        poll.register(self.sink, select.POLLOUT)
        while left:
            self._wait(poll, deadline)
            try:
                left = left[os.write(self.sink, left[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Gone(error.strerror) from error

    def receive(self, deadline: float | None = None, watch: Channel | None = None) -> tuple[dict[str, Any], bytes]:
        """Read one frame: (header, payload).

        Args:
            deadline: until when.
            watch: another channel; it is an `OSError` when that one closes in the meantime.

        Raises:
            Gone: the stream ended; its text says whether inside a frame.
            Late: the deadline passed.
        """
        self._fill(_HEAD.size, deadline, watch)
        sizes = _HEAD.unpack(self._held[: _HEAD.size])
        if max(sizes) > _MOST:
            raise Gone("bytes that are no frame came")
        self._fill(_HEAD.size + sum(sizes), deadline, watch)
        middle, end = _HEAD.size + sizes[0], _HEAD.size + sum(sizes)
        head, payload = bytes(self._held[_HEAD.size : middle]), bytes(self._held[middle:end])
        del self._held[:end]
        header = json.loads(head)
        return header, payload

    def skip_to(self, mark: bytes, deadline: float | None) -> None:
        """Drop what comes before `mark`, and `mark`; the errors of `receive`."""
        while mark not in self._held:
            if len(self._held) > 1 << 20:
                raise Gone("a megabyte came that is not the agent's")
            self._fill(len(self._held) + 1, deadline, None)
        del self._held[: self._held.index(mark) + len(mark)]

    def _fill(self, count: int, deadline: float | None, watch: Channel | None) -> None:
        if len(self._held) >= count:
            return
        poll = select.poll()
        poll.register(self.source, select.POLLIN)
        if watch is not None:
            poll.register(watch.source, select.POLLIN)
        while len(self._held) < count:
            ready = self._wait(poll, deadline)
            if watch is not None and watch.source in ready and not watch._read():
                raise OSError(errno.EPIPE, "the host has gone")
            if self.source in ready and not self._read():
                raise Gone("in the middle of a frame" if self._held else "")

    def _read(self) -> int:
        chunk = os.read(self.source, 1 << 20)
        self._held += chunk
        return len(chunk)

    @staticmethod
    def _wait(poll: select.poll, deadline: float | None) -> list[int]:
        left = None if deadline is None else deadline - time.monotonic()
        found = [] if left is not None and left <= 0 else poll.poll(None if left is None else math.ceil(left * 1000))
        if not found:
            raise Late
        return [descriptor for descriptor, _ in found]


class Model:
    """A loaded model: a process of its own that holds the runtime."""

    def __init__(self, host: Channel) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--model"]
        quiet = dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")  # the runtime gets its own number
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=quiet)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.channel = Channel(self.process.stdout.fileno(), self.process.stdin.fileno())
        self.host = host
        self.kind: Any = None  # which requests it can be used for again

    def ask(self, header: dict[str, Any], payload: bytes = b"", deadline: float | None = None) -> tuple[dict[str, Any], bytes]:
        """What the process answers.

        Raises:
            Refusal: it refused, died or took too long; in the last two cases it is gone.
            OSError: the host has gone.
        """
        try:
            self.channel.send(header, payload, deadline)
            answer, data = self.channel.receive(deadline, watch=self.host)
        except Late:
            self.close()
            raise Refusal("deadline", "the model's process did not answer in time and was ended") from None
        except Gone:
            raise Refusal("died", "the model's process " + self._how_it_ended()) from None
        if not answer["ok"]:
            raise Refusal(answer["kind"], answer["error"])
        return answer, data

    def close(self) -> None:
        """End the process; safe to call twice."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it can be waited for
            self.process.wait(5)
        code = self.process.poll()
        self.close()
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        names: dict[int, str] = {int(s): s.name for s in signal.Signals}
        likely: dict[int, str] = {
            signal.SIGKILL: " (the kernel sends it when memory runs out)",
            signal.SIGILL: " (the runtime or the artifact needs an instruction this cpu lacks)",
        }
        return "was killed by " + names.get(-code, str(-code)) + likely.get(-code, "")


class Agent:
    """Answers requests; `folder` keeps files by their digest."""

    def __init__(self, channel: Channel, folder: Path) -> None:
        self.channel, self.folder = channel, folder
        self.models: dict[int, Model] = {}
        self.spares: dict[Any, Model] = {}  # processes without a model
        self.count = 0
        self.verified: set[str] = set()

    def serve(self, idle_s: float) -> bool:
        """Answer until told to quit (True), until the host has gone, or until nothing has come for `idle_s` seconds."""
        try:
            while True:
                signal.setitimer(signal.ITIMER_REAL, idle_s + _GRACE_S)
                request, payload = self.channel.receive(time.monotonic() + idle_s)
                if request["op"] == "quit":
                    return True
                left = float(request.get("deadline_s", 30.0))
                # SIGALRM ends this process whatever it is stuck in, a write to a dead link too
                signal.setitimer(signal.ITIMER_REAL, left + 2 * _GRACE_S)
                deadline = time.monotonic() + left
                try:
                    answer, data = self._answer(request, payload, deadline)
                except Refusal as refusal:
                    answer, data = {"ok": False, "kind": refusal.kind, "error": str(refusal)}, b""
                self.channel.send(dict({"ok": True}, **answer), data, deadline + _GRACE_S)
        except (Gone, Late, OSError):
            return False  # nobody is left to tell
        finally:
            for model in [*self.models.values(), *self.spares.values()]:
                model.close()

    def _answer(self, request: dict[str, Any], payload: bytes, deadline: float) -> tuple[dict[str, Any], bytes]:
        op = request["op"]
        if op == "hello":
            return describe_board(self.folder), b""
        if op == "ping":
            return {}, b""
        if op == "has":
            return {"has": self._has(request["sha256"])}, b""
        if op == "put":
            return self._put(request, payload), b""
        if op == "drop":
            self.verified.discard(request["sha256"])
            with contextlib.suppress(OSError):
                self._path(request["sha256"]).unlink()
            return {}, b""
        if op == "runtime":
            model, answer = self._first_that_works(request, deadline)
            model.close()
            return answer, b""
        if op == "load":
            return self._load(request, deadline), b""
        if op in ("run", "layers"):
            return self._model(request["handle"]).ask(request, payload, deadline)
        if op == "memory":
            return {"peak_rss_bytes": peak_rss(self._model(request["handle"]).process.pid)}, b""
        if op == "warm":
            return self._warm(request, deadline), b""
        if op == "pairs":
            return self._pairs(request, deadline), b""
        if op == "unload":
            self._unload(request, deadline)
            return {}, b""
        raise Refusal("request", f"no such request: {op}")

    def _has(self, sha256: str) -> bool:
        path = self._path(sha256)
        if sha256 not in self.verified and path.is_file() and digest_of(path) == sha256:
            self.verified.add(sha256)
        return sha256 in self.verified and path.is_file()

    def _path(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise Refusal("request", f"no SHA-256: {sha256!r}")
        return self.folder / sha256

    def _put(self, request: dict[str, Any], payload: bytes) -> dict[str, Any]:
        path, size, offset = self._path(request["sha256"]), request["size"], request["offset"]
        part = path.with_suffix(".part")
        free = shutil.disk_usage(str(self.folder)).free
        if offset == 0 and free < size:
            raise Refusal("disk", f"{free} bytes free in {self.folder}, {size} needed")
        try:
            with part.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(payload)
                file.truncate()
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise Refusal("disk", f"{error.strerror} in {self.folder}") from error
        if offset + len(payload) < size:
            return {"done": False}
        if digest_of(part) != request["sha256"]:
            part.unlink()
            raise Refusal("request", "the file that came has another digest than was said")
        part.replace(path)
        self.verified.add(request["sha256"])
        return {"done": True}

    def _load(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        if not self._has(request["sha256"]):
            raise Refusal("request", "no such file was put: {}".format(request["sha256"]))
        model, answer = self._first_that_works(dict(request, path=str(self._path(request["sha256"]))), deadline)
        self.count += 1
        self.models[self.count] = model
        return dict(answer, handle=self.count, pid=model.process.pid)

    def _first_that_works(self, request: dict[str, Any], deadline: float) -> tuple[Model, dict[str, Any]]:
        """A process in which one of the runtime's packages did what is asked: a package can import and still not work."""
        refusals = []
        for package in RUNTIMES.get(request["runtime"], ()):
            kind = (package, str(request.get("affinity")))
            model = self.spares.pop(kind, None)
            if model is None or model.process.poll() is not None:
                model = Model(self.channel)
            try:
                answer, _ = model.ask(dict(request, package=package), b"", deadline)
            except Refusal as refusal:
                model.close()
                if refusal.kind in ("request", "deadline"):
                    raise
                refusals.append(refusal)
            except BaseException:
                model.close()
                raise
            else:
                model.kind = kind
                return model, dict(answer, package=package)
        if not refusals:
            raise Refusal("runtime", "{}: this agent runs {}".format(request["runtime"], ", ".join(RUNTIMES)))
        told = [refusal for refusal in refusals if refusal.kind != "runtime"]
        raise told[0] if told else Refusal("runtime", "; ".join(map(str, refusals)))

    def _unload(self, request: dict[str, Any], deadline: float) -> None:
        model = self._model(request["handle"])
        del self.models[request["handle"]]
        if request.get("spare") and model.kind not in self.spares:
            with contextlib.suppress(Refusal):
                model.ask({"op": "forget", "package": model.kind[0]}, b"", deadline)
                self.spares[model.kind] = model
                return
        model.close()

    def _model(self, handle: int) -> Model:
        model = self.models.get(handle)
        if model is None:
            raise Refusal("request", f"no such model: {handle}")
        return model

    def _sample(self, handle: int, k: int, deadline: float) -> tuple[float, float]:
        """Wall and CPU nanoseconds of one inference, the mean of k, taken inside the model's process."""
        answer, _ = self._model(handle).ask({"op": "sample", "k": k}, b"", deadline)
        return answer["wall_ns"], answer["cpu_ns"]

    def _warm(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """As worker.py warms up: in turn until two windows of each agree; then samples of all get about one length."""
        handles, window = request["handles"], request["window"]
        floor_ns = max(request["floor_ns"], _CLOCK_STEPS * time.get_clock_info("perf_counter").resolution * 1e9)
        started = time.monotonic()
        best = {h: math.inf for h in handles}  # ns of an inference nothing interrupted: the least of wall and CPU time
        times: dict[int, list[float]] = {h: [] for h in handles}
        k = {h: 1 for h in handles}

        def once() -> None:
            for h in handles:
                wall, cpu = self._sample(h, k[h], deadline)
                best[h] = min(best[h], wall, cpu if cpu > 0 else wall)
                times[h].append(wall)

        once()
        once()
        for h in handles:
            k[h] = max(1, math.ceil(floor_ns / best[h]))
            times[h].clear()
        while time.monotonic() - started < request["seconds"]:
            once()
            if all(_settled(own, window) for own in times.values()):
                break
        length = max(floor_ns, *best.values())
        chosen = [max(round(length / best[h]), math.ceil(floor_ns / best[h])) for h in handles]
        return {"k": chosen, "seconds": time.monotonic() - started}

    def _pairs(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Rounds in which each model gives one sample, in random order."""
        handles, k = request["handles"], request["k"]
        wall: list[list[float]] = [[] for _ in handles]
        cpu: list[list[float]] = [[] for _ in handles]
        shuffled, order = random.Random(request["seed"]), list(range(len(handles)))
        readings = [sensors()]
        started = looked = time.monotonic()
        while len(wall[0]) < request["rounds"] and time.monotonic() - started <= request["seconds"]:
            shuffled.shuffle(order)
            for i in order:
                one, other = self._sample(handles[i], k[i], deadline)
                wall[i].append(one)
                cpu[i].append(other)
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                readings.append(sensors())
        seconds = time.monotonic() - started
        peaks = [peak_rss(self._model(h).process.pid) for h in handles]
        return {
            "wall_ns": wall,
            "cpu_ns": cpu,
            "seconds": seconds,
            "temperatures_c": [t for t, _ in readings],
            "frequencies_mhz": [f for _, f in readings],
            "peak_rss_bytes": peaks,
        }


def _settled(times: list[float], window: int) -> bool:
    if len(times) < 2 * window:
        return False
    before, after = statistics.median(times[-2 * window : -window]), statistics.median(times[-window:])
    return abs(after / before - 1.0) < _WARM


def describe_board(folder: Path) -> dict[str, Any]:
    """What the board is: machine, memory, disk, heat, clocks, runtimes; what cannot be read is empty or 0."""
    memory = {line.split(":")[0]: line.split()[1] for line in _read("/proc/meminfo").splitlines() if len(line.split()) > 1}
    zones = {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        value = _read(zone / "temp").strip()
        if value.lstrip("-").isdigit():
            zones["{} {}".format(zone.name[12:], _read(zone / "type").strip())] = int(value) / 1000
    clocks = {}
    for cpu in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        values = [_read(cpu / name).strip() for name in ("scaling_cur_freq", "cpuinfo_min_freq", "cpuinfo_max_freq")]
        if all(v.isdigit() for v in values):
            clocks[cpu.parent.name] = [int(v) / 1000 for v in values]
    return {
        "protocol": 1,
        "pid": os.getpid(),
        "machine": describe_machine(),
        "boot_id": _read("/proc/sys/kernel/random/boot_id").strip(),
        "memory_total_bytes": int(memory.get("MemTotal", 0)) * 1024,
        "memory_available_bytes": int(memory.get("MemAvailable", 0)) * 1024,
        "disk_free_bytes": shutil.disk_usage(str(folder)).free,
        "temperatures_c": zones,
        "clocks_mhz": clocks,  # cpu -> [now, least, most]
        "runtimes": runtime_versions(),
        "power_mode": power_mode(),
        "emulated": emulated(),
    }


def describe_machine() -> dict[str, str]:
    """What decides latency and can be read without rights: cpu, governor, load."""
    return dict(
        _fixed(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or "unknown",
        load_average=f"{os.getloadavg()[0]:.2f}",
    )


@functools.lru_cache(maxsize=None)  # noqa: UP033 - reading /proc/cpuinfo takes long with many cpus; 3.8 has no `cache`
def _fixed() -> dict[str, str]:
    info = _read("/proc/cpuinfo").splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith(("model name", "Model", "CPU part"))]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpus": str(os.cpu_count()),
        "machine": platform.machine(),
        "board": _read("/proc/device-tree/model").strip("\0 \n"),
        "python": platform.python_version(),
    }


def runtime_versions() -> dict[str, str]:
    """Installed runtimes and their versions, read without importing them."""
    from importlib import metadata

    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu", "tensorrt", "ai-edge-litert", "tflite-runtime", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = str(metadata.version(name))
    return found


def power_mode() -> str:
    """The power mode of a Jetson, such as 15W or MAXN; empty elsewhere."""
    tool = shutil.which("nvpmodel")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, "-q"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.decode(errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if "Power Mode" in line and ":" in line), "")


def emulated() -> bool:
    """Whether this is an Arm user space on another machine's kernel, where times mean nothing."""
    arm = platform.machine().startswith(("aarch64", "arm"))
    return any(name.startswith("QEMU_") for name in os.environ) or (arm and "vendor_id" in _read("/proc/cpuinfo"))


def sensors() -> tuple[list[float], list[float]]:
    """Temperatures in degrees Celsius and frequencies in MHz; empty where the machine shows none."""
    zones = [_read(p).strip() for p in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))]
    cpus = sorted(os.sched_getaffinity(0))[:8]  # asking a cpu wakes it
    clocks = [_read(f"/sys/devices/system/cpu/cpu{n}/cpufreq/scaling_cur_freq").strip() for n in cpus]
    return [int(z) / 1000 for z in zones if z.lstrip("-").isdigit()], [int(c) / 1000 for c in clocks if c.isdigit()]


def peak_rss(pid: int) -> int:
    """Peak resident memory of a process in bytes; 0 where it cannot be read."""
    lines = [line for line in _read(f"/proc/{pid}/status").splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such sensor on this machine
        return ""


class _OnnxRuntime:
    """ONNX Runtime on the cpu; numpy comes with it."""

    def __init__(self, package: str) -> None:
        import numpy
        import onnxruntime

        self.numpy, self.runtime, self.version = numpy, onnxruntime, str(onnxruntime.__version__)
        onnxruntime.set_default_logger_severity(3)
        self.feeds: dict[str, Any] = {}

    def load(self, path: str, threads: int) -> None:
        self.path, self.threads, self.feeds = path, threads, {}
        self.session = self._session(self._options())

    def _options(self) -> Any:
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def _session(self, options: Any) -> Any:
        try:
            return self.runtime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base but this one
            raise Refusal(_memory_or("load", error), str(error)) from error

    def inputs(self) -> list[dict[str, Any]]:
        return [{"name": i.name, "kind": i.type, "shape": list(i.shape)} for i in self.session.get_inputs()]

    def feed(self, arrays: dict[str, Any]) -> None:
        self.feeds = arrays

    def infer(self) -> Any:
        try:
            return self.session.run(None, self.feeds)
        except Exception as error:
            raise Refusal(_memory_or("run", error), str(error)) from error

    def outputs(self) -> dict[str, Any]:
        return dict(zip([o.name for o in self.session.get_outputs()], self.infer()))  # noqa: B905 - strict is newer than 3.8

    def layers(self, runs: int) -> list[list[Any]]:
        """By its profiler, in a session of its own; the first inference is left out."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling, options.profile_file_prefix = True, folder + "/profile"
            session = self._session(options)
            for _ in range(runs + 1):
                session.run(None, self.feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        found: dict[Any, list[float]] = {}  # several operators can have one name
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                about = event["args"]
                key = (event["name"][: -len("_kernel_time")], about.get("op_name", ""), about.get("node_index"))
                found.setdefault(key, []).append(event["dur"] * 1000.0)
        return [[name, kind, _middle(times[1:] or times)] for (name, kind, _), times in found.items()]


class _LiteRt:
    """LiteRT, or TensorFlow Lite as it was called before, with XNNPACK on the cpu."""

    def __init__(self, package: str) -> None:
        import numpy

        self.numpy = numpy
        self.interpreter_class = importlib.import_module(package + ".interpreter").Interpreter
        known = runtime_versions().get(package.replace("_", "-"), "unknown")
        self.version = str(getattr(importlib.import_module(package), "__version__", known))

    def load(self, path: str, threads: int) -> None:
        try:
            self.interpreter = self.interpreter_class(model_path=path, num_threads=threads)
            self.interpreter.allocate_tensors()
            self.entries = self.interpreter.get_input_details()
            for entry in self.entries:
                self.interpreter.set_tensor(entry["index"], self.numpy.zeros(entry["shape"], entry["dtype"]))
            self.outputs()
        except Exception as error:  # another numpy than it was built for is not a RuntimeError
            raise Refusal(_memory_or("load", error), str(error)) from error

    def inputs(self) -> list[dict[str, Any]]:
        names = {"float32": "float", "float64": "double"}
        kinds = [self.numpy.dtype(e["dtype"]).name for e in self.entries]
        return [
            {"name": e["name"], "kind": f"tensor({names.get(kind, kind)})", "shape": [int(n) for n in e["shape"]]}
            for e, kind in zip(self.entries, kinds)  # noqa: B905
        ]

    def feed(self, arrays: dict[str, Any]) -> None:
        try:
            for entry in self.entries:
                self.interpreter.set_tensor(entry["index"], arrays[entry["name"]])
        except (KeyError, ValueError) as error:
            raise Refusal("request", f"inputs: {error}") from error

    def infer(self) -> None:
        try:
            self.interpreter.invoke()
        except Exception as error:
            raise Refusal(_memory_or("run", error), str(error)) from error

    def outputs(self) -> dict[str, Any]:
        self.infer()
        return {o["name"]: self.interpreter.get_tensor(o["index"]) for o in self.interpreter.get_output_details()}

    def layers(self, runs: int) -> list[list[Any]]:
        raise Refusal("runtime", "litert: its Python interface has no profiler")


def _middle(times: list[float]) -> float:
    """Mean of the middle half: the profiler counts whole microseconds, and some runs are interrupted."""
    ordered, quarter = sorted(times), len(times) // 4
    return statistics.mean(ordered[quarter : len(times) - quarter])


def _unpacked(tensors: list[dict[str, Any]], payload: bytes, numpy: Any) -> dict[str, Any]:
    """Arrays out of raw bytes, whose number must be that of the shapes."""
    sizes = [numpy.dtype(t["dtype"]).itemsize * math.prod(t["shape"]) for t in tensors]
    if sum(sizes) != len(payload):
        raise Refusal("request", f"input tensors of {sum(sizes)} bytes, {len(payload)} came")
    arrays, start = {}, 0
    for tensor, size in zip(tensors, sizes):  # noqa: B905 - strict is newer than 3.8
        flat = numpy.frombuffer(payload[start : start + size], dtype=tensor["dtype"])
        arrays[tensor["name"]] = flat.reshape(tensor["shape"])
        start += size
    return arrays


def _packed(arrays: dict[str, Any], numpy: Any) -> tuple[list[dict[str, Any]], bytes]:
    whole = {name: numpy.ascontiguousarray(a) for name, a in arrays.items()}
    heads = [{"name": name, "dtype": a.dtype.name, "shape": list(a.shape)} for name, a in whole.items()]
    return heads, b"".join(a.tobytes() for a in whole.values())


def _memory_or(kind: str, error: Exception) -> str:
    text = str(error).lower()
    return "memory" if isinstance(error, MemoryError) or "bad_alloc" in text or "failed to allocate memory" in text else kind


def _model_main() -> None:
    """The process of one model."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the agent
    channel = _own_channel()
    gc.disable()  # it would run in the middle of a sample
    model: Any = None  # the runtime, and in it the model
    while True:
        try:
            request, payload = channel.receive()
        except Gone:
            return
        answer: dict[str, Any] = {}
        data = b""
        try:
            if request["op"] in ("runtime", "load"):
                model = model or _runtime(request["runtime"], request["package"])
                answer = {"version": model.version}
                if request["op"] == "load":
                    if request.get("affinity"):
                        pin(request["affinity"])
                    model.load(request["path"], request["threads"])
                    answer["inputs"] = model.inputs()
            elif request["op"] == "forget":
                model = type(model)(request["package"])
            elif request["op"] == "run":
                model.feed(_unpacked(request["tensors"], payload, model.numpy))
                answer["tensors"], data = _packed(model.outputs(), model.numpy)
            elif request["op"] == "layers":
                answer["layers"] = model.layers(request["runs"])
            else:
                answer = dict(_timed(model, request["k"]))
            channel.send(dict(answer, ok=True), data)
        except Refusal as refusal:
            channel.send({"ok": False, "kind": refusal.kind, "error": str(refusal)})


def _runtime(runtime: str, package: str) -> Any:
    try:
        return {"onnxruntime": _OnnxRuntime, "litert": _LiteRt}[runtime](package)
    except Exception as error:  # a wheel for another machine fails in its own ways
        raise Refusal("runtime", f"{package}: {error}") from error


def _timed(model: Any, k: int) -> dict[str, float]:
    infer = model.infer
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(k):
        infer()
    wall = time.perf_counter_ns() - wall
    return {"wall_ns": wall / k, "cpu_ns": (time.process_time_ns() - cpu) / k}


def pin(cpus: list[int]) -> None:
    """Run on these cpus only."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise Refusal("request", f"affinity {cpus}: {error.strerror}; there are {os.cpu_count()}") from error


def _own_channel() -> Channel:
    """Stdin and a copy of stdout; what libraries print goes to stderr, or it would end up among the frames."""
    sink = os.dup(1)
    os.dup2(2, 1)
    return Channel(0, sink)


def main(arguments: list[str]) -> int:
    """`--model`, or `--folder F --idle S --digest D`, where D is what this file's SHA-256 must be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides when this process ends
    if arguments == ["--model"]:
        _model_main()
        return 0
    options = dict(arg[2:].split("=", 1) for arg in arguments)
    if digest_of(Path(__file__)) != options["digest"]:
        return WRONG_FILE
    folder = Path(options["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a+")
    if not _locked(lock.fileno()):
        lock.seek(0)
        sys.stderr.write(f"busy: process {lock.read().strip()} measures on this board\n")
        return BUSY
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    for left in folder.glob("*.part"):  # of agents that were killed
        if len(left.stem) == 64:
            with contextlib.suppress(OSError):
                left.unlink()
    channel = _own_channel()
    os.write(channel.sink, MAGIC)
    told = Agent(channel, folder).serve(float(options["idle"]))
    lock.close()  # before the answer: who reads it may start the next agent at once
    if told:
        with contextlib.suppress(Gone, Late):
            channel.send({"ok": True}, b"", time.monotonic() + _GRACE_S)
    return 0


def _locked(descriptor: int) -> bool:
    """Take the folder's lock; an agent whose host has just gone gets two seconds to end."""
    for _ in range(20):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.1)
        else:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
