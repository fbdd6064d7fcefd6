"""A run that is stopped goes on where it was and ends with the same bits; one that is finished does nothing again."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_runs import EPOCHS, Finished, Workshop, report_of, snapshot, without_progress
from edge_compress.pipeline.verify.golden import read
from printed import printed

Call = Callable[[list[str]], Finished]

VOLATILE = {
    "started",
    "finished",
    "command",
    "sha256",
}  # what of a report belongs to the call, not to the run; its digest covers that


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "artifacts/x86/model.onnx").read_bytes()).hexdigest()


def results(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file that a stage made, with the time it was written."""
    return {name: state for name, state in snapshot(folder).items() if name.startswith(("stages/", "artifacts/"))}


def test_the_same_command_again_runs_no_stage(workshop: Workshop, uninterrupted: Path) -> None:
    before, report = results(uninterrupted), report_of(uninterrupted)
    again = workshop.run(workshop.arguments(uninterrupted))
    assert again.code == 0
    assert again.stages == []
    assert without_progress(again.err) == ""
    assert len(list((uninterrupted / "stages").glob("curvature-*/result.json"))) == 1  # kept by itself, should ranking stop
    assert results(uninterrupted) == before
    fresh = report_of(uninterrupted)
    assert {k: v for k, v in fresh.items() if k not in VOLATILE} == {k: v for k, v in report.items() if k not in VOLATILE}
    assert fresh["targets"]["x86"]["artifact"]["sha256"] == digest(uninterrupted)


def test_the_code_that_is_printed_classifies_stored_pixels_as_the_artifact_did(uninterrupted: Path) -> None:
    golden = read(uninterrupted / report_of(uninterrupted)["targets"]["x86"]["golden"]["path"])
    _, predict = printed(uninterrupted, "x86")
    for pixels, logits in zip(golden.inputs[0], golden.outputs[0], strict=True):
        np.testing.assert_allclose(predict(pixels), logits, rtol=1e-4, atol=1e-5)


# line of progress that is waited for -> stages that were finished before that call, which must not come again
KILLS: dict[str, tuple[str, ...]] = {
    "  ppo: 6/": (),
    "  epoch 1:": ("sensitivity",),
    "  timing sessions: 2/": ("prepare search", "sensitivity", "search", "compensate"),
}


SEARCHED = ("prepare search", "sensitivity", "search")
ALL_KILLS: dict[str, tuple[str, ...]] = {
    "dense baseline x86 ...": (),
    "prepare search ...": (),
    "sensitivity ...": ("dense baseline x86",),
    "  ppo: 6/": (),
    "compensate ...": ("sensitivity",),
    "  epoch 1:": SEARCHED,
    "test split ...": (*SEARCHED, "compensate"),
    "build x86 ...": (*SEARCHED, "compensate", "fine-tune"),
    "  timing sessions: 2/": (*SEARCHED, "compensate", "fine-tune", "test split"),
    "unpruned x86 ...": (*SEARCHED, "compensate", "fine-tune", "test split", "build x86"),
}


JUDGED = (0, 1)  # in a few sessions beside other tests the latency gate may fail; what is tested is the artifact


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "kills", [KILLS, pytest.param(ALL_KILLS, marks=pytest.mark.slow)], ids=["in search, training and timing", "in every stage"]
)
def test_a_run_killed_in_its_stages_gives_the_artifact_of_an_uninterrupted_one(
    kills: dict[str, tuple[str, ...]], workshop: Workshop, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    for line, finished in kills.items():
        with workshop.start(workshop.arguments(folder)) as process:
            process.wait_for(line)
            ended = process.send(signal.SIGKILL)
        assert ended.code == -signal.SIGKILL, line
        assert not set(finished) & set(ended.stages), line
        assert not (folder / "report.json").exists()
    last = workshop.call(workshop.arguments(folder))
    assert last.code in JUDGED, last.err
    verified = [] if "unpruned x86 ..." in kills else ["verify x86"]
    assert last.stages == [*verified, "unpruned x86", "compare with int8 alone", "memory and layers x86"]
    assert digest(folder) == digest(uninterrupted)
    own, other = (report_of(f)["pruned"] for f in (folder, uninterrupted))
    assert own["state"] == other["state"]
    assert len(own["finetune"]) == EPOCHS
    assert own["search"]["best"]["levels"] == other["search"]["best"]["levels"]
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow  # a whole run and more: minutes
@pytest.mark.timeout(1200)
def test_a_run_killed_at_a_random_moment_gives_the_same_artifact(workshop: Workshop, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    span = sum(report_of(uninterrupted)["stage_seconds"].values())
    delay = random.SystemRandom().uniform(0, span)
    with workshop.start(workshop.arguments(folder)) as process:
        process.wait_for("prepare search ...")
        time.sleep(delay)
        process.send(signal.SIGKILL)
    last = workshop.call(workshop.arguments(folder))
    assert last.code in JUDGED, f"killed after {delay:.3f} s: {last.err}"
    assert digest(folder) == digest(uninterrupted), f"killed after {delay:.3f} s"


@pytest.mark.slow  # a whole run and more: minutes
@pytest.mark.timeout(1200)
def test_an_interrupted_run_says_so_and_goes_on_and_a_second_one_beside_it_stops(
    workshop: Workshop, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with workshop.start(workshop.arguments(folder)) as first:
        first.wait_for("prepare search ...")
        first.process.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the second one takes
        second = workshop.run(workshop.arguments(folder))
        first.process.send_signal(signal.SIGCONT)
        first.wait_for("  timing sessions: 2/")  # a worker is at work, which Ctrl-C reaches too
        interrupted = first.send(signal.SIGINT)
    assert second.code == 2
    assert second.stages == []
    assert f"process {first.process.pid}" in second.complaint
    assert "another run is active" in second.complaint
    assert interrupted.code == 130, interrupted.err
    assert interrupted.complaint == "edge-compress: interrupted; run the same command again to resume"
    assert not (folder / "report.json").exists()
    last = workshop.call(workshop.arguments(folder))
    assert last.code == 0, last.err
    assert last.stages == ["verify x86", "unpruned x86", "compare with int8 alone", "memory and layers x86"]
    assert digest(folder) == digest(uninterrupted)


def test_a_damaged_result_is_made_again_and_nothing_else(
    workshop: Workshop, uninterrupted: Path, tmp_path: Path, here: Call
) -> None:
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (weights,) = (folder / "stages").glob("finetune-*/weights.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\x00\x00\x80\x7f")  # an infinity
    again = here(workshop.arguments(folder))
    assert again.code == 0, again.err
    assert "is damaged" in again.err
    assert again.stages == ["fine-tune"]
    assert weights.read_bytes() == whole
    assert digest(folder) == digest(uninterrupted)


def test_a_damaged_artifact_is_built_again(workshop: Workshop, uninterrupted: Path, tmp_path: Path, here: Call) -> None:
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (folder / "artifacts/x86/model.onnx").write_bytes(b"")
    again = here(workshop.arguments(folder))
    assert again.code == 0, again.err
    assert again.stages == ["build x86"]
    assert digest(folder) == digest(uninterrupted)


def test_files_that_cannot_be_read_are_named_on_stderr_and_in_the_report(
    workshop: Workshop, uninterrupted: Path, tmp_path: Path, here: Call
) -> None:
    folder = Path(shutil.copytree(uninterrupted, tmp_path / "run"))
    (stage,) = (folder / "stages").glob("finetune-*")
    (stage / "result.json").unlink()
    checkpoint = stage / "finetune.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    (folder / "stages" / "seconds.json").write_text("{")
    again = here(workshop.arguments(folder))
    assert again.code == 0, again.err
    assert again.stages == ["fine-tune"]
    assert digest(folder) == digest(uninterrupted)
    for said in ("the checkpoint finetune.safetensors is damaged", "seconds.json is damaged"):
        assert said in again.err
        assert any(said in note for note in report_of(folder)["notes"])
        assert all(said in (folder / page).read_text() for page in ("report.md", "report.html"))
