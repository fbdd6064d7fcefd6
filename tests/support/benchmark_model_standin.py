"""A stand-in for TensorFlow Lite's benchmark_model: its flags, its lines, real loops, real outputs where LiteRT is.

The loop's work grows with the model file's size, so that a smaller file is really faster. BENCHMARK_FORM says which version's
lines are printed, BENCHMARK_TROUBLE what goes wrong, BENCHMARK_CLOCK=counted that a loop takes what its work says, however
busy this machine is.
"""

import os
import signal
import statistics
import sys
import time
from pathlib import Path

FLAGS = {
    "graph", "num_threads", "use_xnnpack", "num_runs", "min_secs", "warmup_runs", "warmup_min_secs", "enable_op_profiling",
    "report_peak_memory_footprint", "input_layer", "input_layer_shape", "input_layer_value_files", "output_filepath",
}  # fmt: skip


def main() -> int:
    given = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    unknown = sorted(set(given) - FLAGS)
    if unknown:  # the real one ignores them; a flag that is misspelt must not pass here
        print(f"ERROR: unknown flags {unknown}", file=sys.stderr)
        return 1
    trouble = os.environ.get("BENCHMARK_TROUBLE", "")
    if trouble == "killed":
        os.kill(os.getpid(), signal.SIGILL)
    data = Path(given["graph"]).read_bytes()
    if data[4:8] != b"TFL3":
        print("INFO: STARTING!\nERROR: The model is not a valid Flatbuffer buffer\nERROR: Failed to load model", file=sys.stderr)
        return 1
    start = time.perf_counter()
    work(len(data))
    first = 1e6 * (time.perf_counter() - start)
    warm = [lap(len(data)) for _ in range(int(given.get("warmup_runs", 1)))]
    laps, begun = [], time.perf_counter()
    while len(laps) < int(given.get("num_runs", 50)) or time.perf_counter() - begun < float(given.get("min_secs", 1)):
        laps.append(lap(len(data)))
    report(os.environ.get("BENCHMARK_FORM", "new"), given, first, warm or [first], laps)
    if "output_filepath" in given and trouble != "old":
        outputs = infer(data, given)
        Path(given["output_filepath"]).write_bytes(outputs[:-4] if trouble == "short" else outputs)
    return 0


def work(size: int) -> None:
    total = 0
    for n in range(size // 100):
        total += n


def lap(size: int) -> float:
    start = time.perf_counter()
    work(size)
    return size / 100 if os.environ.get("BENCHMARK_CLOCK") == "counted" else 1e6 * (time.perf_counter() - start)


def report(form: str, given: dict[str, str], first: float, warm: list[float], laps: list[float]) -> None:
    mark = "INFO: " if form == "new" else ""
    if form != "oldest":
        for floor, times in ((1, warm), (int(given.get("num_runs", 50)), laps)):
            print(f"{mark}Running benchmark for at least {floor} iterations and at least 0.5 seconds")
            print(mark + line(form, times), file=sys.stderr)
    means = statistics.mean(warm), statistics.mean(laps)
    if form == "oldest":
        print(f"Average inference timings in us: Warmup: {means[0]:g}, Init: 100, Inference: {means[1]:g}")
    else:
        print(
            f"{mark}Inference timings in us: Init: 100, First inference: {first:.0f}, "
            f"Warmup (avg): {means[0]:g}, Inference (avg): {means[1]:g}"
        )
    if given.get("report_peak_memory_footprint") == "true":
        print("Overall peak memory footprint (MB) via periodic monitoring: 12.5")
    if given.get("enable_op_profiling") == "true":
        print("Operator-wise Profiling Info for Regular Benchmark Runs:")
        print("============================== Run Order ==============================")
        for number, kind in enumerate(("CONV_2D", "FULLY_CONNECTED")):
            start = [] if form == "new" else ["0.0"]  # a column that newer versions lack
            cells = [kind, *start, "0.1", f"{means[1] / 2e3:g}", "50%", "50%", "0.0", "1", f"[layer{number}]:{number}"]
            print("".join(f"\t{cell:>10}" for cell in cells))
        print("============================== Top by Computation Time ==============================")


def line(form: str, times: list[float]) -> str:
    if len(times) == 1 and form == "new":
        return f"count=1 curr={times[0]:.0f} p5={times[0]:.0f} median={times[0]:.0f} p95={times[0]:.0f}"
    text = f"count={len(times)} first={times[0]:.0f} curr={times[-1]:.0f} min={min(times):.0f} max={max(times):.0f}"
    text += f" avg={statistics.mean(times):g} std={statistics.pstdev(times):.0f}"
    return text + (f" p5={min(times):.0f} median={statistics.median(times):.0f} p95={max(times):.0f}" if form == "new" else "")


def infer(data: bytes, given: dict[str, str]) -> bytes:
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data)
    interpreter.allocate_tensors()
    details = interpreter.get_input_details()  # taken in their order, whatever they are called
    shapes = given["input_layer_shape"].split(":")
    files = dict(pair.replace("::", "\0").split(":", 1) for pair in given["input_layer_value_files"].split(","))
    for name, shape, detail in zip(given["input_layer"].split(","), shapes, details, strict=True):
        values = np.frombuffer(Path(files[name.replace(":", "\0")]).read_bytes(), detail["dtype"])
        interpreter.set_tensor(detail["index"], values.reshape([int(n) for n in shape.split(",")]))
    interpreter.invoke()
    return b"".join(interpreter.get_tensor(o["index"]).tobytes() for o in interpreter.get_output_details())


if __name__ == "__main__":
    sys.exit(main())
