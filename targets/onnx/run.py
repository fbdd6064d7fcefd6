"""ONNX files in ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import BuildError, UnavailableError, deepest_cause
from ...pipeline.signature import Signature, TensorSpec
from ..base import Arrays, Runner
from ..stand_ins import stand_ins

if TYPE_CHECKING:
    import onnx

_log = logging.getLogger(__name__)
_LONGEST_S = 600.0  # for an answer: a file from outside can hold a loop without an end
_BLOCK = 64  # samples a call, where the file allows more than one
_TIPPED = 0.05  # of an output's span: what batching may change in int8, where float rounding tips values over to the next step
_TYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names of types that numpy calls otherwise
Answer = Callable[[dict[str, NDArray[Any]]], Sequence[NDArray[Any]]]  # tensors by name to outputs in order


def predictor(model: str | bytes, threads: int = 1, *, pairwise: bool = False) -> Runner:
    """Inputs to outputs through a fresh ONNX Runtime session; `model` is a path or the file's bytes.

    With several `threads`, as many calls are made side by side, one thread each: within one small sample there is little to
    share. A call has one sample, or 64 where the file leaves their number open. With `pairwise` every Q/DQ pair rounds in
    place and all else is float, instead of ONNX Runtime's own int8 kernels.

    Raises:
        BuildError: the runtime refused the model; from the runner: or its inputs, or it had no answer in time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if pairwise:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 4  # errors are raised as well
    name = "the model" if isinstance(model, bytes) else Path(model).name
    try:
        session = onnxruntime.InferenceSession(_loadable(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base but this one
        raise BuildError(f"ONNX Runtime cannot load {name}", found=str(error)[:500]) from error
    if session.get_providers()[0] != "CPUExecutionProvider":
        raise BuildError(f"ONNX Runtime does not run {name} on the CPU", found=str(session.get_providers()))
    entries = session.get_inputs()
    if not entries or any(_numpy(entry.type) not in np.sctypeDict for entry in entries):
        found = ", ".join(entry.type for entry in entries) or "no input"
        raise BuildError(f"{name}: its inputs", found=found, expected="tensors of numbers")
    first = entries[0].shape[0] if entries[0].shape else 1

    def answer(given: dict[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        once = onnxruntime.RunOptions()
        with _deadlines.watched(once):
            try:
                found: Sequence[NDArray[Any]] = session.run(None, given, once)
                return found
            except Exception as error:  # its exceptions share no base but this one
                found_text = f"no answer after {_LONGEST_S:.0f} s" if once.terminate else deepest_cause(error)
                raise BuildError(f"ONNX Runtime cannot run {name}", found=found_text) from error

    block = first if isinstance(first, int) else _BLOCK
    return in_blocks([(entry.name, _numpy(entry.type)) for entry in entries], answer, block, threads)


class _Deadlines:
    """Ends answers that take longer than `_LONGEST_S`, with one thread for all: a timer each costs as much as a small network."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[float, Any]] = {}
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def watched(self, once: Any) -> Iterator[None]:
        """`once` (RunOptions) terminates when its time is over."""
        with self._lock:
            self._running[id(once)] = time.monotonic(), once
            if self._thread is None or not self._thread.is_alive():  # none after a fork
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._running.pop(id(once), None)

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, _LONGEST_S / 10))
            with self._lock:
                for began, once in self._running.values():
                    if time.monotonic() - began > _LONGEST_S:
                        once.terminate = True


_deadlines = _Deadlines()


def _loadable(model: str | bytes) -> str | bytes:
    """The path, or the file's bytes where its name is not UTF-8, which ONNX Runtime does not open."""
    if isinstance(model, str) and any("\ud800" <= c <= "\udfff" for c in model):
        return Path(model).read_bytes()
    return model


def _numpy(kind: str) -> str:
    """Numpy's name of a type such as `tensor(float)`."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return _TYPES.get(name, name)


def one_by_one(inputs: Sequence[onnx.ValueInfoProto], infer: Answer) -> Runner:
    """A runner that asks for one sample after another, with inputs of a graph."""
    from onnx import helper

    types = [helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name for value in inputs]
    return in_blocks([(value.name, dtype) for value, dtype in zip(inputs, types, strict=True)], infer, 1)


def in_blocks(entries: Sequence[tuple[str, str]], answer: Answer, block: int, workers: int = 1) -> Runner:
    """A runner that asks for `block` samples at once, and so `workers` times side by side.

    Args:
        entries: names and types of the inputs, in order.
        answer: what is asked; by several threads if `workers` is above 1.
        block: samples a call.
        workers: threads that ask.
    """

    def predict(inputs: Arrays) -> Arrays:
        each = inputs if isinstance(inputs, tuple) else (inputs,)
        if len(each) != len(entries):
            raise BuildError("the model's inputs", found=f"{len(each)} given", expected=f"{len(entries)}")
        if not len(each[0]):  # the outputs of no sample have shapes too
            one = predict(tuple(np.zeros((1, *array.shape[1:]), array.dtype) for array in each))
            return tuple(array[:0] for array in one) if isinstance(one, tuple) else one[:0]

        def ask(at: int) -> Sequence[NDArray[Any]]:
            named = zip(entries, each, strict=True)
            return answer({name: np.ascontiguousarray(a[at : at + block], dtype=dtype) for (name, dtype), a in named})

        starts = range(0, len(each[0]), block)
        if workers > 1 and len(starts) > 1:
            with ThreadPoolExecutor(workers) as pool:
                parts = list(pool.map(ask, starts))
        else:
            parts = [ask(at) for at in starts]
        joined = tuple(np.concatenate(same) for same in zip(*parts, strict=True))
        return joined if len(joined) > 1 else joined[0]

    return predict


def simulate(data: bytes, threads: int = 1) -> Runner:
    """The arithmetic that a QDQ file asks for: inputs to outputs, each Q/DQ pair by itself.

    By default ONNX Runtime replaces the pairs by its own int8 kernels, whose arithmetic differs from TensorRT's and which on
    processors without VNNI saturate.

    Raises:
        BuildError: the bytes are not an ONNX model, or the runtime refused it.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own error type is not exported
        raise BuildError("the file is no ONNX model", found=str(error)[:300]) from error
    single = predictor(data, threads, pairwise=True)
    if _names_the_batch(model):
        return single
    two = _two_samples(model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    try:
        batched = predictor(model.SerializeToString(), threads, pairwise=True)
        if _alike(batched(two), single(two)):
            return batched
        reason = "batched answers differ"
    except BuildError as error:  # such as where a constant, of one sample, is joined to what the inputs make
        reason = str(error)
    _log.info("evaluated sample by sample, which is slower: %s", reason)
    return single


def _names_the_batch(model: onnx.ModelProto) -> bool:
    """Whether the first size that some Reshape asks for is a number of samples, as attention's are; or is not known."""
    from onnx import numpy_helper

    constants = {i.name: i for i in model.graph.initializer}
    targets = [constants.get(node.input[1]) for node in model.graph.node if node.op_type == "Reshape"]
    return any(target is None or numpy_helper.to_array(target).tolist()[:1] != [0] for target in targets)


def _two_samples(model: onnx.ModelProto) -> Arrays:
    """Stand-ins for two samples of a file's inputs."""
    from onnx import helper

    tensors = [(value.name, value.type.tensor_type) for value in model.graph.input]
    specs = (
        TensorSpec(name, tuple(d.dim_value for d in t.shape.dim[1:]), helper.tensor_dtype_to_np_dtype(t.elem_type).name)
        for name, t in tensors
    )
    found = stand_ins(Signature(tuple(specs), ()), 2)
    for array in found if isinstance(found, tuple) else (found,):
        if not np.issubdtype(array.dtype, np.floating):  # stand-ins of whole numbers are all alike
            array[1, ..., ::2] = 0
    return found


def _alike(found: Arrays, expected: Arrays) -> bool:
    """Whether outputs of an int8 network are the same but for steps that float rounding tips over."""
    one, other = (each if isinstance(each, tuple) else (each,) for each in (found, expected))
    for a, b in zip(one, other, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        if a.shape != b.shape or (a.size and not np.abs(a - b).max() <= _TIPPED * (np.ptp(b) or 1.0)):
            return False
    return True


def require_runtime() -> None:
    """Raises UnavailableError unless ONNX Runtime is installed."""
    if find_spec("onnxruntime") is None:
        raise UnavailableError("onnxruntime is not installed", do="pip install onnxruntime")
