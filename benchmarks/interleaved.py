"""Files of several runtimes timed together: every file three times a round, in random order, in several fresh processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[np.float32]
Predict = Callable[[Array], Array]
SESSIONS, ROUNDS = 5, 150


def onnx_runtime(path: Path) -> Predict:
    """One image through ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: np.asarray(session.run(None, {name: image})[0])


def openvino(path: Path) -> Predict:
    """One image through OpenVINO on one thread."""
    import openvino as ov

    compiled = ov.Core().compile_model(
        str(path),
        "CPU",
        {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
    )
    request = compiled.create_infer_request()
    return lambda image: np.asarray(request.infer({0: image})[compiled.output(0)])


def openvino_files(dense: Path, images: Array, folder: Path) -> dict[str, tuple[str, Path]]:
    """The dense network in OpenVINO, in float and in NNCF's int8: row -> (runtime, file). Empty if not installed."""
    try:
        import nncf
        import openvino as ov
    except ImportError as error:
        print(f"openvino rows left out: {error}")
        return {}
    small = nncf.quantize(
        ov.Core().read_model(str(dense)),
        nncf.Dataset(list(images), lambda image: image[None]),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=False,
    )
    ov.save_model(small, str(folder / "openvino-int8.xml"), compress_to_fp16=False)
    return {"openvino float": ("openvino", dense), "openvino + nncf int8": ("openvino", folder / "openvino-int8.xml")}


RUNTIMES: dict[str, Callable[[Path], Predict]] = {"onnxruntime": onnx_runtime, "openvino": openvino}


def session(
    rows: dict[str, tuple[str, Path]], image: Array, seed: int, answers: multiprocessing.Queue[dict[str, list[float]]]
) -> None:
    """One fresh process: every row timed once a round, in random order."""
    models = {name: RUNTIMES[runtime](path) for name, (runtime, path) in rows.items()}
    for predict in models.values():
        for _ in range(50):
            predict(image)
    rng, times = np.random.default_rng(seed), {name: [] for name in models}  # type: ignore[var-annotated]
    for _ in range(ROUNDS):
        for name in rng.permutation(list(models)):
            start = time.perf_counter_ns()
            for _ in range(3):
                models[name](image)
            times[name].append((time.perf_counter_ns() - start) / 3e6)
    answers.put(times)


def sessions_of(rows: dict[str, tuple[str, Path]], image: Array) -> list[dict[str, list[float]]]:
    """Milliseconds of every row in each of several fresh processes."""
    context = multiprocessing.get_context("spawn")
    collected = []
    for seed in range(SESSIONS):
        answers: multiprocessing.Queue[dict[str, list[float]]] = context.Queue()
        process = context.Process(target=session, args=(rows, image, seed, answers))
        process.start()
        collected.append(answers.get(timeout=60 * len(rows) + 240))
        process.join()
    return collected
