"""trtexec's building and timing with TensorRT's Python package, and, beyond trtexec, an engine over many inputs from a file.

One file, Python 3.8 or newer, the standard library, `tensorrt` and the CUDA runtime it needs anyway. It is run in a process of
its own, on a board (for outputs) or on a machine with a GPU where there is no trtexec, and takes the options of trtexec that
trtexec.py gives:

    --onnx=F --saveEngine=F [--fp16] [--int8] [--sparsity=enable] [--timingCacheFile=F] [--exportLayerInfo=F] ...   build
    --loadEngine=F --iterations=N --warmUp=MS --duration=S --exportTimes=F ...                                      time
    --loadEngine=F --inputs=F --outputs=F --tensors=JSON    one sample after another, as raw bytes; JSON names the tensors that
                                                            follow each other, inputs first: [[name, type, bytes], ...]

Its log has trtexec's banner with its own name. Exit code 3: there is no TensorRT here, or no GPU.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

NAME = "TensorRT.python"
# those of the last two lines make no difference here
OPTIONS = (
    *("--help", "--onnx", "--saveEngine", "--fp16", "--int8", "--sparsity", "--timingCacheFile", "--builderOptimizationLevel"),
    *("--memPoolSize", "--loadEngine", "--warmUp", "--duration", "--iterations", "--exportTimes", "--inputs", "--outputs"),
    "--tensors",
    *("--avgRuns", "--useSpinWait", "--useCudaGraph", "--noDataTransfers", "--percentile", "--skipInference", "--verbose"),
    *("--separateProfileRun", "--profilingVerbosity", "--exportLayerInfo"),
)
UNAVAILABLE = 3
WIDTHS = {"FLOAT": 4, "HALF": 2, "INT64": 8, "INT32": 4, "INT8": 1, "UINT8": 1, "BOOL": 1}  # bytes, by TensorRT's name
NUMPY = {"FLOAT": "float32", "HALF": "float16"}  # where numpy's name is another one


def say(text: str) -> None:
    """A line of the log."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Cuda:
    """The few calls of the CUDA runtime that running an engine takes."""

    def __init__(self) -> None:
        beside = [path for root in sys.path for path in Path(root).glob("nvidia/*/lib/libcudart.so*")]
        installed = Path("/usr/local").glob("cuda*/lib64/libcudart.so")
        for place in ("libcudart.so", "libcudart.so.13", "libcudart.so.12", *installed, *beside):
            try:
                self.library = ctypes.CDLL(str(place))
                return
            except OSError:
                continue
        raise OSError("no CUDA runtime (libcudart) was found")

    def call(self, name: str, *arguments: Any) -> None:
        """Call it; what is not success is an OSError with CUDA's own text."""
        code = getattr(self.library, name)(*arguments)
        if code != 0:
            self.library.cudaGetErrorString.restype = ctypes.c_char_p
            text = self.library.cudaGetErrorString(code).decode()
            raise OSError(f"{name}: {text}")

    def made(self, name: str) -> ctypes.c_void_p:
        """A stream or an event."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle))
        return handle

    def memory(self, size: int) -> ctypes.c_void_p:
        """Bytes on the GPU; they go with the process."""
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def copy(self, target: Any, source: Any, size: int, *, to_gpu: bool) -> None:
        """Copy between host and GPU, and wait for it."""
        self.call("cudaMemcpy", target, source, ctypes.c_size_t(size), ctypes.c_int(1 if to_gpu else 2))


class Loaded:
    """An engine and memory for its inputs and outputs."""

    def __init__(self, trt: Any, path: str) -> None:
        self.cuda = Cuda()
        logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(logger)
        self.engine = self.runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self.engine is None:
            raise OSError(f"the engine {path} cannot be loaded by TensorRT {trt.__version__} on this GPU")
        self.context = self.engine.create_execution_context()
        self.stream = self.cuda.made("cudaStreamCreate")
        self.kinds, self.sizes, self.places = {}, {}, {}  # by name: type, bytes, where
        self.inputs: list[str] = []
        for name in [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]:
            kind = next((k for k in WIDTHS if getattr(trt.DataType, k, None) == self.engine.get_tensor_dtype(name)), None)
            if kind is None:
                raise OSError(f"{name} is a {self.engine.get_tensor_dtype(name)} tensor")
            if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs.append(name)
            self.kinds[name] = NUMPY.get(kind, kind.lower())
            self.sizes[name] = WIDTHS[kind] * math.prod(self.engine.get_tensor_shape(name))
            self.places[name] = self.cuda.memory(self.sizes[name])
            self.context.set_tensor_address(name, self.places[name].value)

    def start(self) -> None:
        """Queue one inference."""
        if not self.context.execute_async_v3(self.stream.value):
            raise OSError("the engine did not run")

    def wait(self) -> None:
        """Until all that was queued is done."""
        self.cuda.call("cudaStreamSynchronize", self.stream)


def build(trt: Any, options: dict[str, str]) -> None:
    """Build an engine as trtexec does by the same options."""
    logger = trt.Logger(trt.Logger.INFO if "--verbose" in options else trt.Logger.WARNING)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    weak = ("--fp16" in options or "--int8" in options) and hasattr(trt.BuilderFlag, "INT8")
    network = builder.create_network(0 if weak or typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(options["--onnx"]).read_bytes()):
        for i in range(parser.num_errors):
            say(f"[E] {parser.get_error(i).desc()}")
        raise OSError("Failed to parse onnx file")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.get("--memPoolSize", "x:1024").split(":")[1]) << 20)
    config.builder_optimization_level = int(options.get("--builderOptimizationLevel", "3"))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for name, flag in (("--fp16", "FP16"), ("--int8", "INT8")):
        if weak and name in options:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    if options.get("--sparsity") == "enable":
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    cache_file = Path(options.get("--timingCacheFile", "timing.cache"))
    cache = config.create_timing_cache(cache_file.read_bytes() if cache_file.exists() else b"")
    config.set_timing_cache(cache, False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise OSError("Failed to create engine from model or file.")
    Path(options["--saveEngine"]).write_bytes(bytes(engine))
    kept = config.get_timing_cache()
    if kept is not None:
        cache_file.write_bytes(bytes(kept.serialize()))


def timed(trt: Any, options: dict[str, str]) -> None:
    """Time an engine on the GPU's own clock, one inference after another."""
    loaded = Loaded(trt, options["--loadEngine"])
    cuda = loaded.cuda
    begin, end = cuda.made("cudaEventCreate"), cuda.made("cudaEventCreate")
    until = time.monotonic() + float(options.get("--warmUp", "200")) / 1e3
    while time.monotonic() < until:
        loaded.start()
        loaded.wait()
    least, until = int(options.get("--iterations", "10")), time.monotonic() + float(options.get("--duration", "3"))
    rows: list[dict[str, float]] = []
    while len(rows) < least or time.monotonic() < until:
        cuda.call("cudaEventRecord", begin, loaded.stream)
        loaded.start()
        cuda.call("cudaEventRecord", end, loaded.stream)
        loaded.wait()
        ms = ctypes.c_float()
        cuda.call("cudaEventElapsedTime", ctypes.byref(ms), begin, end)
        rows.append({"computeMs": ms.value, "latencyMs": ms.value})
    Path(options["--exportTimes"]).write_text(json.dumps(rows), encoding="utf-8")


def answered(trt: Any, options: dict[str, str]) -> None:
    """The engine's outputs for every sample of a file."""
    loaded = Loaded(trt, options["--loadEngine"])
    wanted = {name: (kind, size) for name, kind, size in json.loads(options["--tensors"])}
    there = {name: (loaded.kinds[name], size) for name, size in loaded.sizes.items()}
    if wanted != there:
        raise OSError(f"the engine's tensors are {there}, not {wanted}")
    given = [name for name in wanted if name in loaded.inputs]
    rooms = {name: ctypes.create_string_buffer(loaded.sizes[name]) for name in wanted if name not in given}
    size = sum(loaded.sizes[name] for name in given)
    with Path(options["--inputs"]).open("rb") as source, Path(options["--outputs"]).open("wb") as sink:
        while True:
            data = source.read(size)
            if not data:
                break
            if len(data) != size:
                raise OSError(f"the inputs end in the middle of a sample ({len(data)} of {size} bytes)")
            at = 0
            for name in given:
                loaded.cuda.copy(loaded.places[name], data[at : at + loaded.sizes[name]], loaded.sizes[name], to_gpu=True)
                at += loaded.sizes[name]
            loaded.start()
            loaded.wait()
            for name, room in rooms.items():
                loaded.cuda.copy(room, loaded.places[name], len(room), to_gpu=False)
                sink.write(room.raw)


def main(arguments: list[str]) -> int:
    """See above."""
    options = {name: value for name, _, value in (argument.partition("=") for argument in arguments)}
    try:
        import tensorrt as trt
    except ImportError as error:
        say(f"[E] no TensorRT for this Python: {error}")
        return UNAVAILABLE
    numbers = [int(part) for part in trt.__version__.split(".")[:3]]
    banner = f"{NAME} [TensorRT v{numbers[0] * 10000 + numbers[1] * 100 + numbers[2]}]"
    say(f"&&&& RUNNING {banner}")
    unknown = sorted(set(options).difference(OPTIONS))
    try:
        for name in unknown:
            say(f"[E] Unknown option: {name}")
        if unknown:
            raise OSError("unknown options")
        if "--onnx" in options:
            build(trt, options)
        elif "--inputs" in options:
            answered(trt, options)
        elif "--loadEngine" in options:
            timed(trt, options)
    except (OSError, TypeError) as error:  # TypeError: TensorRT's own where there is no GPU
        say(f"[E] {error}")
        say(f"&&&& FAILED {banner}")
        return UNAVAILABLE if "factory function returned nullptr" in str(error) or "libcudart" in str(error) else 1
    say(f"&&&& PASSED {banner}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
