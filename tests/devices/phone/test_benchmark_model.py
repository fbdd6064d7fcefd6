"""Output in the form of benchmark_model's four generations; the statistics lines are from users' logs."""

import time

import pytest
from edge_compress.devices.phone.benchmark_model import BenchmarkRun, OperatorTime, parse, parse_operators
from edge_compress.pipeline.errors import DeviceError

OLDEST = "Average inference timings in us: Warmup: 83235, Init: 38467, Inference: 79760.9\n"
V2_4 = """Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=2 first=360262 curr=248910 min=248910 max=360262 avg=304586 std=55676
Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=50 first=249042 curr=250889 min=247067 max=254474 avg=249684 std=1442
Inference timings in us: Init: 16242, First inference: 360262, Warmup (avg): 304586, Inference (avg): 249684
Peak memory footprint (MB): init=4.92969 overall=138.809
"""
V2_5 = V2_4.replace(
    "Peak memory footprint (MB): init=4.92969 overall=138.809",
    "Memory footprint delta from the start of the tool (MB): init=6.14844 overall=109.848",
)
NEW = """INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=1 curr=1357602 p5=1357602 median=1357602 p95=1357602
INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=50 first=1249964 curr=1240143 min=1238588 max=1252566 avg=1.24027e+06 std=2565 p5=1238753 median=1239807 p95=1247415
INFO: Inference timings in us: Init: 5579, First inference: 1357602, Warmup (avg): 1.3576e+06, Inference (avg): 1.24027e+06
INFO: Overall peak memory footprint (MB) via periodic monitoring: 12.3
"""
PROFILE = """Profiling Info for Benchmark Initialization:
============================== Run Order ==============================
\t             [node type]\t  [start]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t         AllocateTensors\t    0.000\t    9.000\t    9.000\t 100.000%\t100.000%\t     0.000\t        1\t[AllocateTensors/0]

Operator-wise Profiling Info for Regular Benchmark Runs:
============================== Run Order ==============================
\t             [node type]\t  [start]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t                 CONV_2D\t    0.000\t    4.269\t    4.269\t  0.107%\t  0.107%\t     0.000\t        0\t[M/Conv2d_0/Relu6]
\t       DEPTHWISE_CONV_2D\t    4.269\t    8.000\t    7.500\t 99.893%\t100.000%\t     0.000\t        1\t[M/Conv2d_1/Relu6]

============================== Top by Computation Time ==============================
\t             [node type]\t  [start]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]\t[times called]\t[Name]
\t       DEPTHWISE_CONV_2D\t    4.269\t    8.000\t    7.500\t 99.893%\t 99.893%\t     0.000\t        1\t[M/Conv2d_1/Relu6]
Number of nodes executed: 2
Timings (microseconds): count=50 first=79449 curr=81350 min=77385 max=88213 avg=79732 std=1929
Memory (bytes): count=0
"""


def test_the_oldest_prints_averages_only():
    assert parse(OLDEST) == BenchmarkRun(79760.9)


@pytest.mark.parametrize(("text", "memory"), [(V2_4, 138.809), (V2_5, 109.848)])
def test_the_measured_loop_is_not_the_warm_up(text, memory):
    assert parse(text) == BenchmarkRun(249684, None, memory)


def test_percentiles_and_scientific_notation_of_the_new_one():
    assert parse(NEW) == BenchmarkRun(1240270.0, 1239807, 12.3)


def test_a_single_inference_has_its_own_form():
    single = "count=1 curr=1357602 p5=1357602 median=1357602 p95=1357602\n" + NEW.splitlines()[5]
    assert parse(single).median_us == 1357602


def test_prefixes_of_a_log_do_not_matter():
    logged = "".join(f"07-08 15:34:26.201 I/tflite  ( 5395): {line}\n" for line in V2_4.splitlines())
    assert parse(logged) == parse(V2_4)


def test_the_profilers_own_statistics_are_not_taken_for_the_loops():
    assert parse(NEW + PROFILE.replace("std=1929", "std=1929 median=79732")) == parse(NEW)


def test_operators_are_those_of_the_measured_loop_in_order():
    assert parse_operators(V2_4 + PROFILE) == (
        OperatorTime("CONV_2D", 4.269, "M/Conv2d_0/Relu6"),
        OperatorTime("DEPTHWISE_CONV_2D", 7.5, "M/Conv2d_1/Relu6"),
    )
    assert parse_operators(V2_4) == ()


@pytest.mark.parametrize(("text", "found"), [("", "no output"), ("ERROR: Failed to load model x.tflite", "Failed to load model")])
def test_output_without_a_result_is_an_error_that_shows_its_last_line(text, found):
    with pytest.raises(DeviceError, match=found):
        parse(text)


@pytest.mark.parametrize("size", ["1e999", "-5"])
def test_a_memory_footprint_that_is_no_size_is_refused(size):
    with pytest.raises(DeviceError, match="its memory"):
        parse(V2_4.replace("overall=138.809", f"overall={size}"))


def test_an_operator_without_a_time_is_refused():
    with pytest.raises(DeviceError, match="milliseconds"):
        parse_operators(PROFILE.replace("7.500", "fast"))


def test_long_lines_are_not_searched():
    started = time.monotonic()
    assert parse("Inference timings in us: " * 40_000 + "\n" + OLDEST) == BenchmarkRun(79760.9)
    assert time.monotonic() - started < 5
