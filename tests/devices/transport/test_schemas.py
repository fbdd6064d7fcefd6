"""What a board may answer: anything else is refused with the place where it is wrong, before anything relies on it."""

from __future__ import annotations

import pytest
from edge_compress.devices.transport.schemas import REFUSAL, SCHEMAS, validated
from hypothesis import given, settings
from hypothesis import strategies as st

GOOD = {
    "has": {"has": True},
    "warm": {"k": [1, 2], "seconds": 0.5},
    "pairs": {
        "wall_ns": [[1.0, 2.0], [3, 4]],
        "cpu_ns": [[1.0, 2.0], [3, 4]],
        "seconds": 1,
        "peak_rss_bytes": 5,
        "temperatures_c": [[]],
        "frequencies_mhz": [],
    },
    "layers": {"layers": [["conv", "Conv", 5.0]]},
    "hello": {
        "machine": dict.fromkeys(("cpu", "cpus", "machine", "board", "python", "governor", "load_average"), "x"),
        "host": "",
        "boot_id": "",
        "power_mode": "",
        "emulated": False,
        "runtimes": {},
        "memory_total_bytes": 1,
        "memory_available_bytes": 1,
        "disk_free_bytes": 1,
        "temperatures_c": {},
        "clocks_mhz": {"cpu0": [1, 1.0, 2.0]},
    },
    "runtime": {"package": "onnxruntime", "version": "1.32.0", "new in a later agent": None},
    "run": {"tensors": [{"name": "y", "dtype": "float32", "shape": [1, 10]}]},
}


@pytest.mark.parametrize("op", GOOD)
def test_an_answer_of_its_shape_comes_through_unchanged(op: str) -> None:
    assert validated(SCHEMAS[op], GOOD[op]) == GOOD[op]


@pytest.mark.parametrize(
    ("op", "change", "told"),
    [
        ("has", {"has": 1}, "has is of type int"),
        ("warm", {"k": "12"}, "k is of type str, not a list"),
        ("warm", {"k": [True]}, r"k\[0\] is of type bool"),
        ("warm", {"seconds": float("nan")}, "seconds is nan"),
        ("pairs", {"wall_ns": [[1, None]]}, r"wall_ns\[0\]\[1\] is missing"),
        ("pairs", {"peak_rss_bytes": 10**30}, "peak_rss_bytes is too large"),
        ("pairs", {"peak_rss_bytes": -1}, "peak_rss_bytes is -1"),
        ("runtime", {"version": "1" * 5000}, "version has 5000 characters"),
        ("run", {"tensors": [{"name": "y", "shape": []}]}, r"tensors\[0\] has no dtype"),
        ("layers", {"layers": [["conv", "Conv"]]}, r"layers\[0\] has 2 entries, not 3"),
        ("layers", {"layers": [["conv", "Conv", float("nan")]]}, r"layers\[0\]\[2\] is nan"),
        ("hello", {"machine": {"cpu": "x"}}, "machine has no cpus"),
        ("hello", {"clocks_mhz": {"cpu0": [1.0]}}, "cpu0 has 1 entries, not 3"),
    ],
)
def test_an_answer_of_another_shape_is_refused_with_its_place(op: str, change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        validated(SCHEMAS[op], {**GOOD[op], **change})


def test_what_would_act_on_a_terminal_is_escaped() -> None:
    found = validated(REFUSAL, {"kind": "load", "error": "\x1b[2Jbad\x07"})
    assert found["error"] == "\\x1b[2Jbad\\x07"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(sorted(SCHEMAS["hello"])), inner),
    max_leaves=20,
)


@given(op=st.sampled_from(sorted(SCHEMAS)), answer=_JSON)
@settings(deadline=None)
def test_any_json_is_taken_or_refused_by_value_error(op: str, answer: object) -> None:
    told = ""
    try:
        validated(SCHEMAS[op], answer)
    except ValueError as error:
        told = str(error)
    assert told.isprintable()
