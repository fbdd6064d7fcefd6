"""A stand-in for trtexec, for tests: it knows the options of the version it is told to be, replays output that real ones printed,
writes its files in their layout, and can fail and hang. It runs no network. What it builds is stamped: nothing may be read of it.

It is one program for the PATH of a pretended board; `trtexec.json` beside it says how it behaves:
    version   "100300" and so on                     times_ms   of an inference, by the digest of the engine's source
    ms_per_kb of the engine's source, for all others  sparse     times this, where sparse kernels were allowed
    fail      "parse", "memory", "crash", "options"  hang       seconds
    unstable  true: the warning about clocks         eligible, picked: layers, with sparse kernels allowed
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

STAMP = b"edge-compress: simulated engine"


def _options(names: str) -> set[str]:
    return {f"--{name}" for name in names.split()}


EVERY = _options(
    """
    help onnx saveEngine loadEngine inputIOFormats outputIOFormats minShapes optShapes maxShapes shapes memPoolSize
    avgTiming refit stripWeights versionCompatible vc excludeLeanRuntime noTF32 stronglyTyped safe buildDLAStandalone
    allowGPUFallback consistency restricted skipInference directIO layerDeviceTypes sparsity profilingVerbosity
    tacticSources noBuilderCache timingCacheFile errorOnTimingCacheMiss builderOptimizationLevel
    hardwareCompatibilityLevel maxAuxStreams preview tempdir tempfileControls useRuntime leanDLLPath device useDLACore
    staticPlugins setPluginsToSerialize dynamicPlugins ignoreParsedPluginLibs infStreams iterations duration warmUp
    sleepTime idleTime exposeDMA noDataTransfers useManagedMemory useSpinWait threads useCudaGraph separateProfileRun
    timeDeserialize timeRefit persistentCacheRatio loadInputs avgRuns verbose dumpRefit dumpOutput dumpRawBindingsToFile
    dumpProfile dumpLayerInfo exportTimes exportOutput exportProfile exportLayerInfo percentile
    """
)
BY_MAJOR = {  # what one side knows and the other does not
    10: _options("fp16 bf16 int8 fp8 int4 best calib precisionConstraints layerPrecisions layerOutputTypes"),
    11: _options("includeDataTransfers noCudaGraph noSpinWait"),
}
# printed by TensorRT 10.3 on a Jetson for the ResNet-50 that JetPack ships, --fp16 --noDataTransfers (published log, May 2025)
SUMMARY = """=== Performance summary ===
Throughput: 318.007 qps
Latency: min = 3.12671 ms, max = 3.15479 ms, mean = 3.14068 ms, median = 3.14062 ms, percentile(90%) = 3.14587 ms, \
percentile(95%) = 3.14771 ms, percentile(99%) = 3.15039 ms
Enqueue Time: min = 0.844238 ms, max = 2.05505 ms, mean = 0.887139 ms, median = 0.872437 ms, percentile(90%) = 0.932861 ms, \
percentile(95%) = 0.953735 ms, percentile(99%) = 1.0658 ms
H2D Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, percentile(90%) = 0 ms, percentile(95%) = 0 ms, \
percentile(99%) = 0 ms
GPU Compute Time: min = 3.12671 ms, max = 3.15479 ms, mean = 3.14068 ms, median = 3.14062 ms, percentile(90%) = 3.14587 ms, \
percentile(95%) = 3.14771 ms, percentile(99%) = 3.15039 ms
D2H Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, percentile(90%) = 0 ms, percentile(95%) = 0 ms, \
percentile(99%) = 0 ms
Total Host Walltime: 3.00622 s
Total GPU Compute Time: 3.00249 s
Explanations of the performance metrics are printed in the verbose logs."""
KEYS = ("startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs", "endD2hMs")


def info(text: str, mark: str = "I") -> None:
    for line in text.splitlines():
        print(f"[05/13/2025-10:36:46] [{mark}] {line}", flush=True)


def refuse(*errors: str) -> None:
    for error in errors:
        info(error, "E")
    print(f"&&&& FAILED {BANNER}")
    sys.exit(1)


def built(options: dict[str, str]) -> None:
    source = Path(options["--onnx"])
    if TOLD.get("fail") == "parse":
        refuse(
            '[TRT] ModelImporter.cpp:949: While parsing node number 103 [Unique -> "u"]:',
            "[TRT] ModelImporter.cpp:953: ERROR: onnxOpCheckers.cpp:150 In function checkUnique: [8] false",
            "Failed to parse onnx file",
            "Parsing model failed",
            "Failed to create engine from model or file.",
            "Engine set up failed",
        )
    if TOLD.get("fail") == "memory":
        refuse("[TRT] [allocator] Error Code 1: Cuda Runtime (out of memory)", "Engine could not be created from network")
    if options.get("--sparsity") == "enable":
        info("[TRT] (Sparsity) Layers eligible for sparse math: " + ", ".join(TOLD.get("eligible", [])), "V")
        info(
            "[TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: " + ", ".join(TOLD.get("picked", [])),
            "V",
        )
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    sparse = TOLD.get("sparse", 1.0) if options.get("--sparsity") == "enable" else 1.0
    about = {
        "simulated": True,
        "source": digest,
        "kb": source.stat().st_size / 1000,
        "sparse": sparse,
        "options": sorted(options),
    }
    Path(options["--saveEngine"]).write_bytes(STAMP + b"\n" + json.dumps(about).encode())
    if "--exportLayerInfo" in options:
        Path(options["--exportLayerInfo"]).write_text(json.dumps({"Layers": [], "Bindings": []}))
    if "--timingCacheFile" in options:
        with Path(options["--timingCacheFile"]).open("ab") as cache:
            cache.write(digest[:8].encode())
    info("Engine built in 8.30 sec.")


def ran(options: dict[str, str]) -> None:
    engine = Path(options["--loadEngine"])
    about = json.loads(engine.read_bytes().removeprefix(STAMP))
    usual = about["kb"] * TOLD["ms_per_kb"] if "ms_per_kb" in TOLD else 4.0
    base = TOLD.get("times_ms", {}).get(about["source"], usual) * about["sparse"]
    count = int(options.get("--iterations", "10"))
    rows, at = [], 200.1
    for i in range(count):
        compute = base * (1 + 0.001 * (i % 7))
        stamps = dict(zip(KEYS, [at + 0.1 * k for k in range(8)], strict=True))
        rows.append({**stamps, "h2dMs": 0.0, "computeMs": round(compute, 6), "d2hMs": 0.0, "latencyMs": round(compute, 6)})
        at += compute
    if "--exportTimes" in options:
        text = "\n, ".join("{ " + ", ".join(f'"{k}" : {v:.6g}' for k, v in row.items()) + " }" for row in rows)
        Path(options["--exportTimes"]).write_text(f"[\n  {text}\n]\n")
    if "--exportProfile" in options:
        Path(options["--exportProfile"]).write_text(
            f'[\n  {{ "count" : {count} }}\n, {{ "name" : "conv1 + relu \\"a\\"", "timeMs" : 31.2, "averageMs" : 0.0492, '
            '"medianMs" : 0.0490, "percentage" : 62.1 }\n'
            ', { "name" : "fc "quoted" name", "timeMs" : 19.0, "averageMs" : 0.03, "medianMs" : 0.03, "percentage" : 37.9 }\n]\n'
        )
    if "--exportOutput" in options:
        inputs = dict(part.split(":") for part in options["--loadInputs"].split(","))
        sum_ = sum(sum(Path(file).read_bytes()) for file in inputs.values()) % 10
        values = ", ".join("1" if i == sum_ else "0" for i in range(10))
        logits = f'  {{ "name" : "logits"\n  , "dimensions" : "1x10"\n  , "values" : [ {values} ]\n  }}\n'
        count = f'  {{ "name" : "count"\n  , "dimensions" : "1x1x1"\n  , "values" : [ {len(inputs)} ]\n  }}\n'
        Path(options["--exportOutput"]).write_text(f"[\n{count},\n{logits}]\n")
    info("Selected Device: Orin\nCompute Capability: 8.7\nSMs: 16")
    info("Average on 10 runs - GPU latency: 4.77773 ms - Host latency: 4.83598 ms (enqueue 0.363794 ms)")
    info(SUMMARY)
    if TOLD.get("unstable"):
        info("* GPU compute time is unstable, with coefficient of variance = 3.1%.", "W")


def main() -> None:
    options = {name: value for name, _, value in (a.partition("=") for a in sys.argv[1:])}
    major = int(TOLD["version"]) // 10_000 if len(TOLD["version"]) == 6 else 8
    print(f"&&&& RUNNING {BANNER}", flush=True)
    known = EVERY | BY_MAJOR.get(major, BY_MAJOR[10])
    unknown = [f"Unknown option: {name} {options[name]}" for name in options if name not in known]
    if unknown:
        refuse(*unknown)
    if "--help" in options:
        print("=== Model Options ===\n  --onnx=<file>               ONNX model")
        return
    if "--onnx" not in options and "--loadEngine" not in options:
        refuse("Model missing or format not recognized")
    time.sleep(TOLD.get("hang", 0))
    if TOLD.get("fail") == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    (built if "--onnx" in options else ran)(options)
    info("simulated: no TensorRT ran here")
    print(f"&&&& PASSED {BANNER}")


if __name__ == "__main__":
    TOLD = json.loads((Path(__file__).parent / "trtexec.json").read_text())
    BANNER = f"TensorRT.trtexec [TensorRT v{TOLD['version']}] # {' '.join(sys.argv)}"
    main()
