"""Verifying a run again: golden answers, accuracy on its data, speedup on a device; and the command around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_compress.pipeline.audit import audit, recheck
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.errors import VerifyError
from edge_compress.pipeline.release.archive import Archive, pack, unpack
from edge_compress.pipeline.release.record import open_record
from edge_compress.pipeline.release.release import release
from edge_compress.pipeline.report import pages
from edge_compress.pipeline.report.report import read_report
from edge_compress.pipeline.types import Kind, Speedup, Timing
from edge_compress.pipeline.verify import golden
from edge_compress.pipeline.verify.gates import packed, unpacked
from fake_run import fake_timing
from small_run import change, small_run

Ended = tuple[int, str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def bundled(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (found,) = release([made], tmp_path_factory.mktemp("dist"))
    return found.path


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main(["verify", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str, Any]]]:
    """Puts a device in place that measures what a test wants; gives what it was asked for."""

    def put(low: float, high: float, **changes: Any) -> list[tuple[str, str, Any]]:
        asked: list[tuple[str, str, Any]] = []

        class Device:
            def measure(self, baseline: Path, artifact: Path, settings: Any, progress: Any) -> Timing:
                assert baseline.is_file()
                assert artifact.is_file()
                asked.append((baseline.name, artifact.name, settings))
                here = open_environment(artifact)
                timing = fake_timing(device="local", environment=here, speedup=Speedup((low + high) / 2, (low, high)))
                return replace(timing, **changes)

            def close(self) -> None: ...

        monkeypatch.setattr(recheck, "open_named", lambda name: Device())
        return asked

    return put


def open_environment(artifact: Path) -> dict[str, str]:
    report = json.loads((artifact.parents[2] / "report.json").read_text())
    found: dict[str, str] = report["targets"]["x86"]["latency"]["environment"]
    return found


def test_accuracy_on_the_runs_own_data_agrees(made: Path, verify: Callable[..., Ended]) -> None:
    code, out, err = verify(made, "--data", "digits")
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if "test images" in line)
    assert line.startswith("x86: top-1 95.26 % of 359 test images (95 % interval 92.55 to 97.02)")
    assert "agrees with the recorded 95.26 %" in line


def flipped(folder: Path, lost: int, won: int = 0) -> None:
    """A record in which more (lost) and other (won) images are correct than the artifact classifies correctly."""
    accuracy = read_report(folder / "report.json").targets["x86"].accuracy
    assert accuracy is not None
    right = unpacked(accuracy)
    assert right is not None
    wrong_ones, right_ones = np.flatnonzero(~right)[:lost], np.flatnonzero(right)[:won]
    right[wrong_ones], right[right_ones] = True, False
    change(folder, accuracy__top1=100 * float(right.mean()), accuracy__correct=packed(right))


def test_an_accuracy_that_was_never_reached_does_not_agree(run: Path, verify: Callable[..., Ended]) -> None:
    change(run, accuracy__top1=99.9)
    code, out, err = verify(run, "--data", "digits")
    assert code == 1
    assert "does not agree with the recorded 99.90 % (the record contradicts itself" in err
    assert "golden samples" in out  # what held is said all the same


def test_with_the_same_runtime_and_processor_the_same_images_are_correct(run: Path, verify: Callable[..., Ended]) -> None:
    flipped(run, lost=1)
    code, out, _ = verify(run, "--data", "digits")
    assert code == 0
    assert "(of 359 images 1 are lost and 0 won, at most 1 may change with the same runtime and processor)" in out
    flipped(run, lost=3, won=3)  # the same top-1, but of other images
    code, _, err = verify(run, "--data", "digits")
    assert code == 1
    assert "may change with the same runtime and processor" in err


@pytest.mark.parametrize(("lost", "won", "code"), [(1, 0, 0), (5, 0, 0), (6, 0, 1), (9, 0, 1), (9, 5, 0)])
def test_on_another_processor_images_may_be_lost_and_won_but_not_lost_alone(
    lost: int, won: int, code: int, run: Path, verify: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "where", lambda target: golden.Where("onnxruntime", "1.0", "another"))
    flipped(run, lost, won)
    found, out, err = verify(run, "--data", "digits")
    assert found == code
    assert f"{lost} are lost and {won} won, paired sign test p = " in out + err


def test_without_the_images_of_the_record_the_comparison_is_unpaired_and_says_so(run: Path, verify: Callable[..., Ended]) -> None:
    change(run, accuracy__correct="")
    code, out, _ = verify(run, "--data", "digits")
    assert code == 0
    assert "unpaired: the record does not say which images were classified correctly" in out
    change(run, accuracy__top1=98.6)  # 12 of 359 images more: their intervals overlap, their difference is real
    code, _, err = verify(run, "--data", "digits")
    assert code == 1
    assert "unpaired" in err


def test_other_data_is_wrong_input(run: Path, verify: Callable[..., Ended], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 10
    np.savez(tmp_path / "other.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    code, _, err = verify(run, "--data", f"npz:{tmp_path / 'other.npz'}")
    assert code == 2
    assert "is not what" in err


def test_measuring_on_data_without_pytorch_is_one_line(
    made: Path, verify: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "find_spec", lambda _: None)
    code, _, err = verify(made, "--data", "digits")
    assert code == 3
    assert "verify --data needs PyTorch" in err


def test_a_network_that_answers_no_number_is_never_right(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        runtime = "broken"
        takes_pixels = False

        @contextmanager
        def runner(self, path: Path):
            yield lambda inputs: np.full((len(inputs), 10), np.nan, np.float32)

    monkeypatch.setattr(recheck.targets, "load", lambda name: Broken())
    with open_record(made) as record:
        figures, _, holds = recheck.accuracy(record, "x86", "digits")
    assert (figures.value, holds) == (0.0, False)


@pytest.mark.parametrize(
    ("interval", "changes", "code", "words"),
    [
        ((2.2, 2.3), {}, 0, "agrees with the recorded 2.31 (2.25 to 2.38)"),
        ((3.0, 3.2), {}, 1, "does not agree with the recorded 2.31"),
        ((1.0, 1.2), {}, 1, "does not agree"),
        ((1.0, 1.2), {"device": "board"}, 0, "is of another device"),
        ((1.0, 1.2), {"environment": {"cpu": "other"}}, 0, "is of another cpu"),
        ((2.2, 2.3), {"kind": Kind.EMULATED}, 0, "the record has none that is emulated"),
        ((2.2, 2.3), {"quality": ("noisy",)}, 0, "2.20 to 2.30, noisy; measured"),
    ],
)
def test_a_speedup_agrees_where_its_interval_meets_the_recorded_one_of_the_same_machine(
    interval: tuple[float, float],
    changes: dict[str, Any],
    code: int,
    words: str,
    made: Path,
    verify: Callable[..., Ended],
    device: Callable[..., list[tuple[str, str, Any]]],
) -> None:
    asked = device(*interval, **changes)
    found = verify(made, "--device", "local")
    assert found[0] == code
    assert words in (found[1] if code == 0 else found[2])
    ((baseline, artifact, settings),) = asked
    assert (baseline, artifact, settings.threads, settings.runtime) == ("baseline.onnx", "model.onnx", 1, "onnxruntime")


def test_nothing_is_measured_of_files_that_changed(
    run: Path, verify: Callable[..., Ended], device: Callable[..., list[tuple[str, str, Any]]]
) -> None:
    asked = device(1, 2)
    (run / "artifacts/x86/baseline.onnx").write_bytes(b"")
    code, _, err = verify(run, "--device", "local", "--data", "digits")
    assert (code, asked) == (1, [])
    assert "artifacts/x86/baseline.onnx has 0 bytes" in err


def test_a_run_of_an_earlier_version_is_verified_without_golden_images(run: Path, verify: Callable[..., Ended]) -> None:
    change(run, golden=None)
    code, out, _ = verify(run)
    assert code == 0
    assert "x86: no golden samples" in out


def test_one_artifact_alone_is_asked_its_golden_images(made: Path, verify: Callable[..., Ended]) -> None:
    assert "golden samples" in verify(made / "artifacts/x86/model.onnx")[1]
    code, out, _ = verify(made / "artifacts/x86/baseline.onnx")
    assert (code, "golden" in out) == (0, False)


def test_against_a_stored_report_the_output_is_markdown_and_worse_is_1(
    run: Path, made: Path, verify: Callable[..., Ended], tmp_path: Path
) -> None:
    old = tmp_path / "old.json"
    shutil.copy(made / "report.json", old)
    code, out, err = verify(run, "--against", old)
    assert (code, err) == (0, "")
    assert out.startswith("## edge-compress: run no worse than before\n\n| target |")
    assert "- x86: 16 golden samples" in out
    change(run, latency__speedup={"median": 1.1, "ci95": [1.05, 1.2]})
    code, out, err = verify(run, "--against", old)
    assert code == 1
    assert out.startswith("## edge-compress: run got worse\n\n- **x86: speedup")
    assert "x86: speedup: its whole interval" in err
    assert verify(run, "--against", tmp_path / "absent.json")[0] == 2


def test_against_a_stored_report_figures_measured_again_count(
    run: Path, made: Path, verify: Callable[..., Ended], device: Callable[..., list[tuple[str, str, Any]]]
) -> None:
    device(1.2, 1.3, environment={"cpu": "other"})
    code, out, err = verify(run, "--device", "local", "--data", "digits", "--against", made / "report.json")
    assert code == 1
    assert "1.25 (1.20 to 1.30)" in out
    assert "another cpu" in err


def test_a_key_for_what_is_never_signed_is_wrong_input(made: Path, verify: Callable[..., Ended]) -> None:
    assert verify(made, "--public-key", "RWQ")[0] == 2


@pytest.mark.slow
def test_a_speedup_is_measured_again_on_this_machine(made: Path, verify: Callable[..., Ended]) -> None:
    _, out, err = verify(made, "--device", "local")
    assert "speedup" in out + err
    assert "measured" in out + err


def test_a_report_that_contradicts_itself_does_not_verify_and_is_not_shipped(run: Path, verify: Callable[..., Ended]) -> None:
    change(run, accuracy__drop_pp=40.0)
    code, _, err = verify(run)
    assert code == 1
    assert "the report contradicts itself: x86: a drop of 40, where" in err
    assert "it is said to have passed, but accuracy: top-1 fell by 40.00 points" in err
    with pytest.raises(VerifyError, match="its report contradicts itself"):
        release([run], run.parent / "dist")
    assert not (run.parent / "dist").exists()


def renamed(report: dict[str, Any], where: str, path: str) -> None:
    """Gives a file of the record another path."""
    target = report["targets"]["x86"]
    files = {"state": report["pruned"]["state"], "artifact": target["artifact"], "golden": target["golden"]}
    if where == "masks":
        report["pruned"]["masks"] = {**files["state"], "path": path}
    elif where == "pictures":
        target["pictures"] = [[{**files["state"], "path": path}] * 2]
    else:
        files[where]["path"] = path


@pytest.mark.parametrize("path", ["a" * 5000, "/".join(["a" * 200] * 60), "a\0b"], ids=["long name", "long path", "NUL"])
@pytest.mark.parametrize("where", ["state", "masks", "artifact", "golden", "pictures"])
def test_a_path_that_no_file_can_have_is_one_line(
    where: str, path: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pages, "figures", lambda report: ())  # drawing takes most of a page's time
    report = json.loads((made / "report.json").read_text())
    report.pop("sha256")
    renamed(report, where, path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text(json.dumps(report))
    for command in (["verify", str(run)], ["release", str(run), "--out", str(tmp_path / "dist"), "--allow-failed"]):
        assert main(command) in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert err.startswith("edge-compress: ")
    assert main(["report", str(run)]) in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", []),
        ("target", {"name": "x86"}),
        ("reasons", [1, 2]),
        ("reasons", "it failed"),
        ("passed", "yes"),
        ("tool", None),
        ("packages", ["torch"]),
        ("packages", {"torch": 2}),
        ("model", "net.py"),
        ("artifact", ["artifacts/x86/model.onnx"]),
        ("input_shape", "1x1x8x8"),
        ("input_shape", [1, "1"]),
        ("numbers", {}),
        ("numbers", [{"name": []}]),
        ("files", [["report.json"]]),
        ("files", {"report.json": "ab"}),
        ("files", [{"path": {}, "sha256": "ab", "size_bytes": 1}]),
        ("files", [{"path": "report.json", "sha256": "ab", "size_bytes": "1"}]),
    ],
)
def test_a_manifest_with_a_value_of_another_kind_is_damage_in_one_line(
    key: str, value: object, bundled: Path, tmp_path: Path, verify: Callable[..., Ended]
) -> None:
    found = unpack(bundled)
    manifest = {**json.loads(found.files["manifest.json"]), key: value}
    path = tmp_path / bundled.name
    path.write_bytes(pack(Archive(found.folder, {**found.files, "manifest.json": json.dumps(manifest).encode()})))
    code, out, err = verify(path)
    assert (code, out) == (1, "")
    assert err.startswith(f"edge-compress: {bundled.name}: manifest.json is not a manifest: found ")
    assert len(err.splitlines()) == 1
