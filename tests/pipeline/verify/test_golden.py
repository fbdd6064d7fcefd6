"""Golden images: answers of a copy are compared as closely as the machine allows, and a changed artifact shows."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_compress.pipeline.data.splits import network_inputs
from edge_compress.pipeline.errors import UnavailableError, VerifyError
from edge_compress.pipeline.types import Preprocess
from edge_compress.pipeline.verify import golden
from edge_compress.pipeline.verify.golden import OTHER, SAME, Golden, Where, read, replay, to_bytes
from safetensors.numpy import save

HERE = Where("somewhere", "1.2.3", "a processor")


class Runtime:
    """A target that answers the mean of each channel, plus what a test adds to it."""

    runtime = "somewhere"
    takes_pixels = False

    def __init__(self, added: float = 0.0) -> None:
        self.added = added

    @contextmanager
    def runner(self, path: Path, threads: int = 1):
        yield lambda inputs: inputs.mean(axis=(2, 3)) + np.float32(self.added)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "describe", lambda runtime: {"runtime_version": "1.2.3", "cpu": "a processor"})


@pytest.fixture
def kept() -> Golden:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    with Runtime().runner(Path("a")) as predict:
        logits = predict(network_inputs(pixels, Preprocess(mean, std, "none")))
    return Golden((pixels,), (logits,), mean, std, golden.where(Runtime()))  # type: ignore[arg-type]


def test_a_file_holds_images_answers_and_where_they_come_from(kept: Golden, tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(to_bytes(kept))
    found = read(path)
    for name in ("inputs", "outputs"):
        (one,), (other,) = getattr(found, name), getattr(kept, name)
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert (found.mean, found.std, found.where) == (kept.mean, kept.std, HERE)
    assert to_bytes(found) == to_bytes(kept)


def test_the_same_artifact_on_the_same_machine_answers_the_same(kept: Golden) -> None:
    found = replay(kept, Runtime(), Path("a"))  # type: ignore[arg-type]
    assert (found.difference, found.same_class, found.allowed, found.holds) == (0.0, 4, SAME, True)
    assert "identical outputs" in found.text
    assert "somewhere 1.2.3" in found.text
    assert "4 of 4" in found.text


@pytest.mark.parametrize(
    ("elsewhere", "words"),
    [
        (HERE, "same runtime and processor"),
        (replace(HERE, version="1.2.2"), "not the same runtime version"),
        (replace(HERE, cpu="another"), "not the same processor"),
        (replace(HERE, version="", cpu=""), "runtime version and processor"),
    ],
)
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_answers_may_differ_more_where_runtime_or_processor_differ(
    kept: Golden, elsewhere: Where, words: str, share: float
) -> None:
    allowed = SAME if elsewhere == HERE else OTHER
    found = replay(replace(kept, where=elsewhere), Runtime(share * allowed * float(np.ptp(kept.outputs[0]))), Path("a"))  # type: ignore[arg-type]
    assert found.allowed == allowed
    assert found.holds is (share < 1)
    assert words in found.text


def test_a_machine_that_cannot_be_asked_is_taken_for_another(kept: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(runtime: str) -> dict[str, str]:
        raise UnavailableError("not measured here")

    monkeypatch.setattr(golden, "describe", refuse)
    nowhere = replace(kept, where=Where("somewhere", "", ""))
    assert replay(nowhere, Runtime(), Path("a")).allowed == OTHER  # type: ignore[arg-type]


@pytest.mark.parametrize("added", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_no_answer(kept: Golden, added: float) -> None:
    found = replay(replace(kept, where=replace(HERE, cpu="another")), Runtime(added), Path("a"))  # type: ignore[arg-type]
    assert not found.holds


def test_another_number_of_classes_is_another_artifact(kept: Golden) -> None:
    wider = replace(kept, outputs=(np.zeros((4, 5), np.float32),))
    assert not replay(wider, Runtime(), Path("a")).holds  # type: ignore[arg-type]


def _file(**changed: Any) -> bytes:
    arrays = {
        "inputs_0": np.zeros((2, 4, 4, 1), np.uint8),
        "outputs_0": np.zeros((2, 3), np.float32),
    }
    notes: Any = {"mean": [0.5], "std": [0.5], "where": {"runtime": "r", "version": "1", "cpu": "c"}}
    notes |= changed.pop("notes", {})
    arrays |= changed
    return bytes(save({k: v for k, v in arrays.items() if v is not None}, metadata={"golden": json.dumps(notes)}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tensors",
        bytes(save({"inputs_0": np.zeros(1, np.uint8)})),
        _file(outputs_0=None),
        _file(inputs_0=None),
        _file(outputs_0=np.zeros((3, 3), np.float32)),
        _file(outputs_0=np.zeros((2, 3), np.complex64)),
        _file(inputs_0=np.zeros((2, 4, 4, 1), np.float32)),
        _file(inputs_0=np.zeros((2, 4, 4, 3), np.uint8)),
        _file(inputs_0=np.zeros((2, 4, 4), np.uint8)),
        _file(outputs_0=np.zeros((2, 0), np.float32)),
        _file(inputs_0=np.zeros((0, 4, 4, 1), np.uint8), outputs_0=np.zeros((0, 3), np.float32)),
        _file(notes={"mean": "x"}),
        _file(notes={"mean": [10**400]}),
        _file(notes={"mean": [float("nan")]}),
        _file(notes={"std": [0.0]}),
        _file(notes={"std": [1e-60]}),
        bytes(save({"inputs_0": np.zeros(1, np.uint8)}, metadata={"golden": "[" * 100_000})),
        _file(notes={"where": {"no": "such"}}),
        _file(notes={"where": 3}),
    ],
)
def test_a_file_that_holds_none_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(data)
    with pytest.raises(VerifyError, match="holds no golden samples") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_good_file_of_that_kind_is_read(tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    path.write_bytes(_file())
    assert read(path).where == Where("r", "1", "c")
