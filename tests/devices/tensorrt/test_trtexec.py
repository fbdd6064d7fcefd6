"""Command lines by version, and logs and files that real trtexecs wrote, as numbers."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trtexec_standin as standin
from edge_compress.devices.tensorrt import trtexec
from edge_compress.devices.tensorrt.trtexec import Version
from edge_compress.pipeline.errors import BuildError, DeviceError
from edge_compress.pipeline.options import Precision

OLD, NEW = Version(10, 3, 0), Version(11, 1, 0)
# Orin NX, AGX Orin and others, as published; see the module's docstring
RECORDED = """&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --loadEngine=m.engine
[01/08/2024-15:39:39] [I] Selected Device: Orin
[01/08/2024-15:39:39] [I] Compute Capability: 8.7
[01/08/2024-15:39:39] [I] SMs: 16
[02/27/2024-18:35:51] [I] Average on 10 runs - GPU latency: 4.77773 ms - Host latency: 4.83598 ms (enqueue 0.363794 ms)
[02/27/2024-18:35:51] [I] === Performance summary ===
[02/27/2024-18:35:51] [I] Throughput: 208.729 qps
[02/27/2024-18:35:51] [I] Latency: min = 4.81763 ms, max = 4.86572 ms, mean = 4.83767 ms, median = 4.83752 ms, \
percentile(90%) = 4.84772 ms, percentile(95%) = 4.85034 ms, percentile(99%) = 4.85547 ms
[02/27/2024-18:35:51] [I] Enqueue Time: min = 0.345459 ms, max = 0.39978 ms, mean = 0.357979 ms, median = 1e-05 ms
[02/27/2024-18:35:51] [W] * GPU compute time is unstable, with coefficient of variance = 3.1%.
[02/27/2024-18:35:51] [W]   If not already in use, locking GPU clock frequency or adding --useSpinWait may improve the stability.
[02/27/2024-18:35:51] [W] * Throughput may be bound by Enqueue Time rather than GPU Compute and the GPU may be under-utilized.
&&&& PASSED TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --loadEngine=m.engine --useCudaGraph
"""


def commands(version, precision=Precision.INT8):
    build = trtexec.build_command(
        ("trtexec",), "m.onnx", "m.engine", version, precision, sparse=True, cache="t.bin", layers="l.json"
    )
    return [
        build,
        trtexec.time_command(("trtexec",), "m.engine", "t.json", 250),
        trtexec.profile_command(("trtexec",), "m.engine", "p.json"),
        trtexec.output_command(("trtexec",), "m.engine", {"image": "x.bin", "words": "w.bin"}, "o.json"),
    ]


@pytest.mark.parametrize("version", [OLD, Version(10, 16, 2), NEW, Version(11, 4, 1)])
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP16, Precision.FP32])
def test_no_command_has_an_option_that_its_version_does_not_know(version, precision):
    known = {*standin.EVERY, *standin.BY_MAJOR[version.major]}
    for command in commands(version, precision):
        names = [argument.partition("=")[0] for argument in command[1:]]
        assert set(names) <= known, command
        assert len(names) == len(set(names))


def test_precisions_are_allowed_by_flags_before_11_and_never_after():
    assert trtexec.precision_flags(OLD, Precision.INT8) == ("--fp16", "--int8")
    assert trtexec.precision_flags(OLD, Precision.FP16) == ("--fp16",)
    assert trtexec.precision_flags(OLD, Precision.FP32) == ()
    for precision in Precision:
        assert trtexec.precision_flags(NEW, precision) == ()


def test_sparse_kernels_are_only_allowed_when_asked_for():
    args = (("trtexec",), "m.onnx", "m.engine", OLD, Precision.INT8)
    assert "--sparsity=enable" in trtexec.build_command(*args, sparse=True, cache="c", layers="l")
    assert "--sparsity=disable" in trtexec.build_command(*args, sparse=False, cache="c", layers="l")


@pytest.mark.parametrize(
    ("number", "version"),
    [("8602", Version(8, 6, 2)), ("100300", OLD), ("101602", Version(10, 16, 2)), ("110401", Version(11, 4, 1))],
)
def test_the_banner_tells_the_version(number, version):
    assert trtexec.version_of(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] [b106] # trtexec --help\n") == version
    assert trtexec.version_of("sh: 1: trtexec: not found") is None


def test_versions_are_ordered_as_numbers():
    assert Version(10, 3, 0) < Version(10, 16, 2) < Version(11, 0, 0)
    assert str(OLD) == "10.3.0"


def test_the_gpu_and_what_trtexec_warns_of_are_read_from_a_recorded_log():
    assert trtexec.gpu(RECORDED) == {"gpu": "Orin", "compute_capability": "8.7", "sms": "16"}
    warned = trtexec.warnings(RECORDED)
    assert len(warned) == 2
    assert "coefficient of variance" in warned[0]


def test_times_are_those_of_the_gpu_in_the_order_they_ran(tmp_path):
    text = """[
  { "startEnqMs" : 200.1, "endEnqMs" : 200.4, "startComputeMs" : 200.2, "computeMs" : 4.77, "latencyMs" : 4.83 }
, { "startEnqMs" : 204.9, "endEnqMs" : 205.2, "startComputeMs" : 205.0, "computeMs" : 4.75, "latencyMs" : 4.82 }
]
"""
    assert trtexec.compute_times_ms(text) == [4.77, 4.75]
    for broken in ("", "[", "[{}]", "[]", '[{"computeMs": 0}]', '{"computeMs": 1}'):
        with pytest.raises(DeviceError):
            trtexec.compute_times_ms(broken)


def test_layers_are_read_even_where_a_name_breaks_the_json():
    good = (
        '[\n  { "count" : 634 }\n, { "name" : "Conv_0 + Relu_1", "timeMs" : 31.2, "averageMs" : 0.0492, "percentage" : 2.1 }\n]\n'
    )
    assert trtexec.layer_times(good) == (trtexec.LayerTime("Conv_0 + Relu_1", 0.0492),)
    bad = good.replace("Relu_1", 'a "quoted" one').replace('"percentage"', '"medianMs" : 0.049, "percentage"')
    assert trtexec.layer_times(bad) == (trtexec.LayerTime('Conv_0 + a "quoted" one', 0.0492),)


def test_sparse_layers_are_counted_from_a_verbose_build():
    log = (
        "[02/01/2026-10:00:00] [V] [TRT] (Sparsity) Layers eligible for sparse math: conv1 + relu, conv2\n"
        "[02/01/2026-10:00:01] [V] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2\n"
    )
    assert trtexec.sparsity(log) == trtexec.Sparsity(("conv1 + relu", "conv2"), ("conv2",))
    assert trtexec.sparsity("") == trtexec.Sparsity((), ())


def test_every_input_has_a_file_of_its_own():
    assert "--loadInputs=image:x.bin,words:w.bin" in commands(NEW)[-1]


def test_outputs_are_tensors_and_cut_off_ones_are_refused():
    one = '  { "name" : "logits"\n  , "dimensions" : "1x3"\n  , "values" : [ 0.1, -2, 3e-05 ]\n  }'
    other = '  { "name" : "boxes"\n  , "dimensions" : "1x2x1"\n  , "values" : [ 1, 2 ]\n  }'
    text = f"[\n{one}\n,\n{other}\n]\n"
    assert trtexec.outputs(text) == {"logits": [0.1, -2.0, 3e-05], "boxes": [1.0, 2.0]}
    masked = trtexec.outputs(text.replace("-2,", "-inf,").replace("3e-05", "nan"))["logits"]
    assert masked[1] == -math.inf
    assert math.isnan(masked[2])
    for broken in (text.replace("1x3", "1x4"), text[:30], "{}", "[]", "[{}]", "[" * 100_000, text.replace("-2", "1" + "0" * 400)):
        with pytest.raises(DeviceError):
            trtexec.outputs(broken)


@pytest.mark.parametrize(
    ("log", "code", "raised", "told"),
    [
        (
            "[x] [E] Unknown option: --workspace 2048\n[x] [E] Unknown option: --buildOnly \n&&&& FAILED",
            1,
            DeviceError,
            "--workspace",
        ),
        ("[x] [E] [TRT] checkUnique: [8] false\n[x] [E] Failed to parse onnx file\n&&&& FAILED", 1, BuildError, "checkUnique"),
        ("[x] [E] [TRT] Error Code 1: Cuda Runtime (out of memory)\n&&&& FAILED", 1, DeviceError, "memory ran out"),
        ("", 139, DeviceError, "exit code 139"),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v100300]", 0, DeviceError, "PASSED"),
    ],
)
def test_a_call_that_did_not_pass_says_why(log, code, raised, told):
    with pytest.raises(raised, match=told):
        trtexec.require_passed(log, code, "building")
    trtexec.require_passed(RECORDED, 0, "timing")


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "trtexec"
    path.write_text(Path(standin.__file__).read_text())

    def call(version, *arguments, **told):
        (tmp_path / "trtexec.json").write_text(json.dumps({"version": version, **told}))
        done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    return call


@pytest.mark.parametrize(
    ("version", "option"),
    [
        ("100300", "--includeDataTransfers"),
        ("100300", "--buildOnly"),
        ("100300", "--workspace=2048"),
        ("110100", "--int8"),
        ("110100", "--fp16"),
    ],
)
def test_the_standin_refuses_what_its_version_does_not_know_as_the_real_one_does(program, version, option):
    code, log = program(version, "--onnx=m.onnx", option)
    assert code == 1
    assert f"[E] Unknown option: {option.partition('=')[0]}" in log
    with pytest.raises(DeviceError, match="Unknown option"):
        trtexec.require_passed(log, code, "building")


def test_the_standin_stamps_what_it_builds(program, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"x")
    for command in commands(OLD)[:1]:
        arguments = [a.replace("=m.", f"={tmp_path}/m.").replace("=t.", f"={tmp_path}/t.") for a in command[1:]]
        arguments = [a.replace("=l.", f"={tmp_path}/l.") for a in arguments]
        code, log = program("100300", *arguments)
        trtexec.require_passed(log, code, "building")
    assert (tmp_path / "m.engine").read_bytes().startswith(trtexec.SIMULATED)
    assert standin.STAMP == trtexec.SIMULATED


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "c", "averageMs": "fast"}]',
        '[{"averageMs": 1}]',
        "[5]",
        '[{"name": "c", "averageMs": NaN}]',
        '{ "name" : "c", "timeMs" : 1, "averageMs" : x, broken',
        "[" * 100_000,
    ],
)
def test_a_profile_that_is_none_is_refused(text):
    with pytest.raises(DeviceError, match="the profile trtexec wrote"):
        trtexec.layer_times(text)


def test_times_that_are_not_finite_are_refused():
    with pytest.raises(DeviceError, match="mean nothing"):
        trtexec.compute_times_ms('[{"computeMs": NaN}]')


def test_a_long_line_of_a_broken_profile_is_read_in_linear_time():
    started = time.monotonic()
    assert trtexec.layer_times('"name" : "' * 100_000) == ()
    assert time.monotonic() - started < 5
