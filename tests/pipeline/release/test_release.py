"""Bundles: only what passed, the same bytes every time, every change found, nothing of this machine in them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.errors import InputError, UnavailableError, VerifyError
from edge_compress.pipeline.release import archive, bundle, signing
from edge_compress.pipeline.release.archive import Archive, pack, unpack
from edge_compress.pipeline.release.release import portable, release
from edge_compress.pipeline.report.report import Report, decode
from small_run import change, small_run

pytest.importorskip("cyclonedx", reason="the bill of materials needs the extra [release]")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def shipped(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, which tests leave as it is."""
    (found,) = release([made], tmp_path_factory.mktemp("dist"))
    return found.path


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


# --- what is in a bundle ----------------------------------------------------------------------------------------------


def test_a_bundle_has_all_that_a_team_ships(shipped: Path, made: Path) -> None:
    manifest, found = bundle.read(shipped)
    assert set(found.files) == {
        "manifest.json",
        "MODEL_CARD.md",
        "LICENSES/edge-compress.txt",
        "artifacts/x86/model.onnx",
        "artifacts/x86/baseline.onnx",
        "artifacts/x86/golden.safetensors",
        "labels.txt",
        "config.toml",
        "plan.json",
        "report.json",
        "report.html",
        "report.md",
        "sbom.cdx.json",
    }
    for name in ("artifacts/x86/model.onnx", "report.json", "report.html", "report.md", "plan.json"):
        assert found.files[name] == (made / name).read_bytes()
    assert found.files["labels.txt"].decode().splitlines() == [f"digit {n}" for n in range(10)]
    assert b"Apache License" in found.files["LICENSES/edge-compress.txt"]
    assert found.folder == manifest.name == shipped.name.removesuffix(".tar.gz")
    assert re.fullmatch(r"linear-x86-[0-9a-f]{8}", manifest.name)


def test_the_manifest_says_what_went_in_and_how_each_number_came_about(shipped: Path, made: Path) -> None:
    manifest, _ = bundle.read(shipped)
    report = json.loads((made / "report.json").read_text())
    assert (manifest.model.name, manifest.model.sha256) == ("net.py:linear", "34" * 32)
    assert (manifest.data.name, manifest.data.sha256) == ("digits", report["data"]["sha256"])
    assert manifest.packages == report["tool"]["packages"]
    assert (manifest.artifact, manifest.target, manifest.passed, manifest.reasons) == (
        "artifacts/x86/model.onnx",
        "x86",
        True,
        (),
    )
    numbers = {number.name: number for number in manifest.numbers}
    assert set(numbers) == {"top1", "drop", "agreement", "speedup", "artifact_p50", "dense_p50"}
    for number in numbers.values():
        assert str(number.kind) == "measured"
        assert number.device.startswith("local, ")
        assert "onnxruntime" in number.device
        assert number.protocol
        assert number.ci95 is None or number.ci95[0] <= number.value <= number.ci95[1] or number.unit == "ms"
    assert numbers["top1"].samples == 359
    low, high = numbers["top1"].ci95 or (0, 0)
    assert low < numbers["top1"].value < high < low + 6  # 359 images tell no more
    assert numbers["speedup"].ci95 == tuple(report["targets"]["x86"]["latency"]["speedup"]["ci95"])


def test_what_was_not_measured_is_no_number_of_the_bundle(run: Path, tmp_path: Path) -> None:
    change(
        run,
        latency={
            **dict.fromkeys(("dense", "artifact", "speedup", "environment")),
            "kind": "none",
            "device": "board",
            "quality": [],
        },
        verdict={"passed": False, "reasons": ["latency: not measured on a device (kind none)"]},
    )
    (found,) = release([run], tmp_path / "dist", allow_failed=True)
    manifest, files = bundle.read(found.path)
    assert {number.name for number in manifest.numbers} == {"top1", "drop", "agreement"}
    card = files.files["MODEL_CARD.md"].decode()
    assert "no device has run it" in card
    assert "Speedup over" not in card


def test_the_card_gives_accuracy_with_n_and_interval_latency_with_device_and_limits(shipped: Path) -> None:
    card = bundle.read(shipped)[1].files["MODEL_CARD.md"].decode()
    assert re.search(r"\| Top-1 on the test split, % \| [\d.]+ \([\d.]+ to [\d.]+\) \| 359 \| measured \| local, ", card)
    assert re.search(r"\| Speedup over the dense float model \| 2.31 \(2.25 to 2.38\) \| 1,500 \| measured \| local, ", card)
    for section in ("What it is", "What it was trained and measured on", "Figures", "Limits", "Licences", "How it was made"):
        assert f"\n## {section}\n" in card
    assert "1,151 samples to train on" in card
    assert "None" not in card
    assert "gates" not in card


def test_the_bill_names_the_artifact_what_it_is_made_of_and_the_packages_with_their_licences(shipped: Path, made: Path) -> None:
    from cyclonedx.model.bom import Bom

    raw = json.loads(bundle.read(shipped)[1].files["sbom.cdx.json"])
    assert (raw["bomFormat"], raw["specVersion"]) == ("CycloneDX", "1.6")
    whole = raw["metadata"]["component"]
    report = json.loads((made / "report.json").read_text())
    assert whole["type"] == "machine-learning-model"
    assert whole["hashes"] == [{"alg": "SHA-256", "content": report["targets"]["x86"]["artifact"]["sha256"]}]
    assert raw["metadata"]["timestamp"] == report["finished"]
    parts = {part["bom-ref"]: part for part in raw["components"]}
    assert parts["data"]["hashes"][0]["content"] == report["data"]["sha256"]
    assert parts["dense"]["hashes"][0]["content"] == report["model"]["sha256"]
    assert {"file:artifacts/x86/model.onnx", "file:labels.txt", "pkg:pypi/torch@2.14.1"} <= set(parts)
    assert parts["pkg:pypi/torch@2.14.1"]["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]
    assert parts["pkg:pypi/onnxruntime@1.32.0"]["licenses"] == [{"license": {"name": "MIT License"}}]
    assert parts["pkg:pypi/numpy@2.3.5"]["licenses"] == [{"license": {"name": "Some words of its own"}}]
    assert len(Bom.from_json(raw).components) == len(parts)  # its own library reads it


def test_licences_of_the_model_go_along(made: Path, tmp_path: Path) -> None:
    (tmp_path / "weights licence.txt").write_text("you may")
    (found,) = release([made], tmp_path / "dist", licenses=[tmp_path / "weights licence.txt"])
    files = bundle.read(found.path)[1].files
    assert files["LICENSES/weights-licence.txt"] == b"you may"
    assert "`weights-licence.txt`" in files["MODEL_CARD.md"].decode()
    with pytest.raises(InputError, match="cannot be read"):
        release([made], tmp_path / "dist", licenses=[tmp_path / "absent"])


def test_of_two_licences_with_one_name_none_is_lost(made: Path, tmp_path: Path) -> None:
    files = [tmp_path / folder / "LICENSE" for folder in ("model", "data")]
    for file in files:
        file.parent.mkdir()
        file.write_text(file.parent.name)
    with pytest.raises(InputError, match="another LICENSES/LICENSE"):
        release([made], tmp_path / "dist", licenses=files)
    own = tmp_path / "edge-compress.txt"
    own.write_text("not the tool's")
    with pytest.raises(InputError, match=r"another LICENSES/edge-compress\.txt"):
        release([made], tmp_path / "dist", licenses=[own])


def test_a_long_name_of_a_model_is_cut_in_that_of_its_bundle(run: Path, tmp_path: Path) -> None:
    stored = json.loads((run / "report.json").read_text())
    stored["model"]["name"] = "net.py:" + "long" * 100
    del stored["sha256"]
    (run / "report.json").write_text(json.dumps(stored))
    (found,) = release([run], tmp_path / "dist")
    assert bundle.read(found.path)[0].target == "x86"
    assert len(found.path.name) < 100


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes_from_another_folder_another_day_and_another_process(
    made: Path, shipped: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(made, tmp_path / "a folder of another name" / "run"))
    for path in (elsewhere, *elsewhere.rglob("*")):
        os.utime(path, (1e9, 1e9))
    command = "import sys; from edge_compress.pipeline.cli.main import main; sys.exit(main(sys.argv[1:]))"
    later = {"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "LC_ALL": "C", "USER": "another", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", command, "release", str(elsewhere), "--out", str(tmp_path / "dist")],
        env=os.environ | later,
        cwd=tmp_path,
        umask=0o077,
        capture_output=True,
        text=True,
        check=True,
    )
    (again,) = (tmp_path / "dist").glob("*.tar.gz")
    assert again.name == shipped.name
    assert again.read_bytes() == shipped.read_bytes()
    assert done.stdout.splitlines()[0] == str(again)


def test_nothing_of_this_machine_is_in_a_bundle(shipped: Path, made: Path) -> None:
    for name, data in bundle.read(shipped)[1].files.items():
        assert str(made.parent).encode() not in data, name
        assert str(Path.home()).encode() + b"/" not in data, name


def test_settings_lose_the_folders_of_their_files_and_nothing_else(run: Path) -> None:
    (run / "config.toml").write_text(
        f'target = ["x86"]\nmodel = "{run}/nets/mine.py:make"\nweights = "{run}/w/net.pt"\ndata = "imagefolder:{run}/birds"\n'
        f'device = "{run}/board.toml"\nout = "{run}"\nseed = 3\n'
    )
    found = tomllib.loads(portable(run / "config.toml"))
    assert (found["model"], found["weights"], found["data"]) == ("mine.py:make", "net.pt", "imagefolder:birds")
    assert (found["device"], found["seed"]) == ("board.toml", 3)
    assert "out" not in found
    (run / "config.toml").write_text(f'target = ["x86"]\nmodel = "torchvision:resnet18"\ndata = "torchvision:CIFAR10:{run}/c"\n')
    found = tomllib.loads(portable(run / "config.toml"))
    assert (found["model"], found["data"]) == ("torchvision:resnet18", "torchvision:CIFAR10:c")


@pytest.mark.parametrize(("setting", "name"), [("recipe", "recipe.py"), ("class-order", "classes.txt")])
def test_settings_lose_the_folder_of_the_recipe_and_of_the_list_of_classes(run: Path, setting: str, name: str) -> None:
    (run / "config.toml").write_text(f'target = ["x86"]\n{setting} = "{run}/mine/{name}"\n')
    assert tomllib.loads(portable(run / "config.toml"))[setting] == name


def test_a_manifest_that_takes_gigabytes_to_parse_is_refused_before(tmp_path: Path) -> None:
    lists = b"[" + b",".join([b"[]"] * (2 << 20)) + b"]"
    noise = random.Random(0).randbytes(1 << 20)  # else it is refused for its ratio
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(pack(Archive("bundle", {"manifest.json": lists, "noise": noise})))
    with pytest.raises(VerifyError, match=r"manifest\.json is not a manifest: found 6291457 bytes, at most 4194304 are read"):
        bundle.read(path)


def test_the_digest_beside_it_is_what_sha256sum_takes(shipped: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", f"{shipped.name}.sha256"], cwd=shipped.parent, check=True)


# --- only what passed -------------------------------------------------------------------------------------------------


def test_a_run_that_failed_its_gates_is_refused_and_the_gate_is_named(
    tmp_path: Path, ended: Callable[..., tuple[int, str, str]]
) -> None:
    run = small_run(tmp_path / "run", passed=False)
    code, out, err = ended("release", run, "--out", tmp_path / "dist")
    assert (code, out) == (1, "")
    assert "accuracy: top-1 fell by 2.00 points" in err
    assert "--allow-failed" in err
    assert not (tmp_path / "dist").exists()
    code, out, err = ended("release", run, "--out", tmp_path / "dist", "--allow-failed")
    assert (code, err) == (0, "")
    assert "did not pass" in out
    (path,) = (tmp_path / "dist").glob("*.tar.gz")
    manifest, files = bundle.read(path)
    assert (manifest.passed, manifest.reasons) == (False, ("accuracy: top-1 fell by 2.00 points, at most 1 allowed",))
    assert "did not pass its gates" in files.files["MODEL_CARD.md"].decode()
    code, out, err = ended("verify", path)
    assert code == 0
    assert "bundled though it did not pass: accuracy" in out


@pytest.mark.parametrize("name", ["artifacts/x86/model.onnx", "artifacts/x86/baseline.onnx", "artifacts/x86/golden.safetensors"])
def test_a_file_that_is_not_what_the_report_says_is_refused_and_named(name: str, run: Path, tmp_path: Path) -> None:
    data = bytearray((run / name).read_bytes())
    data[-1] ^= 1
    (run / name).write_bytes(data)
    with pytest.raises(VerifyError, match=f"{name} has another SHA-256"):
        release([run], tmp_path / "dist", allow_failed=True)
    (run / name).unlink()
    with pytest.raises(VerifyError, match=f"{name} is missing"):
        release([run], tmp_path / "dist", allow_failed=True)
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("name", ["report.html", "plan.json", "config.toml", "artifacts/x86/model.onnx"])
def test_nothing_that_a_link_leads_to_is_bundled(name: str, run: Path, tmp_path: Path) -> None:
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerifyError, match="symbolic link"):
        release([run], tmp_path / "dist")


def test_one_run_that_may_not_be_shipped_holds_back_all(made: Path, run: Path, tmp_path: Path) -> None:
    change(run, verdict={"passed": False, "reasons": ["speedup: not real"]})
    with pytest.raises(VerifyError, match="speedup: not real"):
        release([made, run], tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_a_target_that_was_not_built_is_left_out_and_said(
    run: Path, tmp_path: Path, ended: Callable[..., tuple[int, str, str]]
) -> None:
    report = json.loads((run / "report.json").read_text())
    absent = {
        "artifact": None,
        "golden": None,
        "status": "not_built",
        "verdict": {"passed": False, "reasons": ["no TensorRT here"]},
    }
    del report["sha256"]
    report["targets"]["jetson"], report["passed"] = report["targets"]["x86"] | absent, False
    (run / "report.json").write_text(json.dumps(report))
    code, _, err = ended("release", run, "--out", tmp_path / "dist")
    assert code == 0
    assert "left out, it was not built: jetson: no TensorRT here" in err
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    graph = report["targets"]["x86"]["artifact"]  # what an engine would be built from is there
    (run / "artifacts" / "jetson").mkdir()
    for name in ("model.onnx", "baseline.onnx"):
        shutil.copy(run / "artifacts" / "x86" / name, run / "artifacts" / "jetson" / name)
    report["targets"]["jetson"]["artifact"] = json.loads(json.dumps(graph).replace("artifacts/x86/", "artifacts/jetson/"))
    (run / "report.json").write_text(json.dumps(report))
    assert ended("release", run, "--out", tmp_path / "dist")[0] == 0
    report["targets"]["jetson"] |= {"status": "failed", "artifact": None}
    (run / "report.json").write_text(json.dumps(report))
    assert ended("release", run, "--out", tmp_path / "dist")[0] == 1
    del report["targets"]["x86"]
    report["targets"]["jetson"]["status"] = "not_built"
    (run / "report.json").write_text(json.dumps(report))
    code, _, err = ended("release", run, "--out", tmp_path / "dist")
    assert code == 1
    assert "has no artifact: found jetson: no TensorRT here" in err


def test_several_runs_give_several_bundles_and_the_same_run_twice_one(made: Path, run: Path, tmp_path: Path) -> None:
    change(run, latency__noise_floor=0.01)
    assert len(release([made, run, made], tmp_path / "dist")) == 2
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 2


def test_what_is_no_finished_run_of_this_version_is_wrong_input(run: Path, tmp_path: Path, shipped: Path) -> None:
    for path, words in ((tmp_path, "nothing to verify"), (tmp_path / "gone", "not a run folder"), (shipped, "not a run folder")):
        with pytest.raises(InputError, match=words):
            release([path], tmp_path / "dist")
    change(run, golden=None)
    with pytest.raises(InputError, match=r"no golden samples for x86.*re-run"):
        release([run], tmp_path / "dist")


def test_without_the_library_the_bill_is_what_is_missing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_compress.pipeline.release import sbom

    monkeypatch.setattr(sbom, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip install -c constraints.txt '\.\[release\]'"):
        release([made], tmp_path / "dist")


# --- signed -----------------------------------------------------------------------------------------------------------


def test_a_signed_bundle_says_who_signed_it_and_another_key_is_refused(
    made: Path, tmp_path: Path, ended: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    minisign = pytest.importorskip("minisign", reason="signatures need the extra [release]")
    monkeypatch.chdir(tmp_path)
    for name in ("ours", "theirs"):
        pair = minisign.KeyPair.generate()
        Path(f"{name}.key").write_bytes(bytes(pair.secret_key) + b"\n")
        Path(f"{name}.pub").write_bytes(bytes(pair.public_key) + b"\n")
    assert ended("release", made, "--sign", "ours.key")[0] == 0
    (path,) = Path("dist").glob("*.tar.gz")
    code, out, _ = ended("verify", path, "--public-key", "ours.pub")
    assert code == 0
    assert out.startswith("signed with key ")
    assert f"signed comment: file:{path.name}" in out
    assert "was not checked: give --public-key" in ended("verify", path)[1]
    code, out, err = ended("verify", path, "--public-key", "theirs.pub")
    assert (code, out) == (1, "")  # before anything of it is read
    assert "the signature does not hold" in err
    Path(f"{path}.minisig").unlink()
    assert "is not signed" in ended("verify", path, "--public-key", "ours.pub")[2]
    assert ended("release", made, "--sign", "absent.key")[0] == 2


def test_what_lies_beside_an_older_bundle_does_not_vouch_for_a_new_one(
    made: Path, run: Path, tmp_path: Path, ended: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    minisign = pytest.importorskip("minisign", reason="signatures need the extra [release]")
    monkeypatch.chdir(tmp_path)
    pair = minisign.KeyPair.generate()
    Path("key").write_bytes(bytes(pair.secret_key) + b"\n")
    Path("key.pub").write_bytes(bytes(pair.public_key) + b"\n")
    change(run, latency__noise_floor=0.01)
    (old,) = release([made], tmp_path / "old", sign=signing.signer(Path("key"), str))
    (new,) = release([run], tmp_path / "new")
    assert old.path.name != new.path.name  # so that neither takes the other's place
    code, _, err = ended("verify", new.path, "--public-key", "key.pub")
    assert (code, "is not signed" in err) == (1, True)  # as after a kill before the signature was written
    for suffix in (".minisig", ".sha256"):
        beside = Path(f"{old.path}{suffix}").read_text()
        Path(f"{new.path}{suffix}").write_text(beside.replace(old.path.name, new.path.name))
    code, out, err = ended("verify", new.path, "--public-key", "key.pub")
    assert (code, out) == (1, "")
    assert "the signature does not hold" in err
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", f"{new.path.name}.sha256"], cwd="new", capture_output=True, check=False
    )
    assert checked.returncode == 1
    assert ended("release", run, "--out", "new", "--sign", "key")[0] == 0
    assert ended("verify", new.path, "--public-key", "key.pub")[0] == 0
    subprocess.run(["sha256sum", "--check", "--strict", f"{new.path.name}.sha256"], cwd="new", capture_output=True, check=True)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_a_bundle_verifies_in_its_own_runtime(shipped: Path, ended: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = ended("verify", shipped)
    assert (code, err) == (0, "")
    files, answers, last = out.splitlines()
    assert files == "12 files, each with the SHA-256 of the manifest"
    assert answers.startswith("x86: 16 golden samples in onnxruntime ")
    assert "identical outputs" in answers
    assert last == f"{shipped}: all checks passed"


def test_a_thousand_random_flipped_bits_are_all_found_and_named(shipped: Path, tmp_path: Path) -> None:
    data, rng, named = shipped.read_bytes(), random.Random(0), 0
    copy = tmp_path / shipped.name
    for _ in range(1000):
        bit = rng.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(changed)
        with pytest.raises(VerifyError) as caught:
            bundle.read(copy)
        text = str(caught.value)
        assert shipped.name in text, bit
        assert "\n" not in text
        named += any(name in text for name in ("artifacts/", "report.", "plan.json", "LICENSES", "MODEL_CARD", "sbom", "config"))
    assert named > 700  # beside the archive, the file in it that is affected, where the rest can be read


@pytest.mark.parametrize("name", ["artifacts/x86/model.onnx", "report.json", "labels.txt", "MODEL_CARD.md"])
def test_a_file_exchanged_in_a_repacked_bundle_is_found_and_named(name: str, shipped: Path, tmp_path: Path) -> None:
    found = unpack(shipped)
    for files, words in (
        ({**found.files, name: found.files[name] + b" "}, f"{name} has "),
        ({**found.files, name: found.files[name][:-1] + b"\0"}, f"{name} has another SHA-256"),
        ({key: data for key, data in found.files.items() if key != name}, f"{name} is missing"),
        ({**found.files, f"{name}.more": b""}, f"{name}.more is not in the manifest"),
    ):
        path = tmp_path / "x.tar.gz"
        path.write_bytes(pack(Archive(found.folder, files)))
        with pytest.raises(VerifyError, match=re.escape(words)):
            bundle.read(path)


def _any_paths(data: dict[str, Any]) -> Report:
    """The report in JSON, though a path in it leads elsewhere."""
    entry = data["targets"]["x86"]["artifact"]
    report = decode({**data, "targets": {"x86": {**data["targets"]["x86"], "artifact": {**entry, "path": "x"}}}})
    target = report.targets["x86"]
    return replace(report, targets={"x86": replace(target, artifact=replace(target.artifact, path=entry["path"]))})


def _resealed(shipped: Path, path: Path, **files: bytes) -> Path:
    """The bundle with other files and a manifest that agrees with them."""
    found = unpack(shipped)
    changed = {**found.files, **files}
    report = json.loads(changed["report.json"])
    del changed["manifest.json"]
    manifest = bundle.manifest_of(found.folder, _any_paths(report), "x86", changed)
    path.write_bytes(pack(Archive(found.folder, {**changed, "manifest.json": bundle.to_bytes(manifest)})))
    return path


def test_an_artifact_that_answers_otherwise_does_not_verify(
    shipped: Path, tmp_path: Path, ended: Callable[..., tuple[int, str, str]]
) -> None:
    files = unpack(shipped).files
    report = json.loads(files["report.json"])
    baseline = files["artifacts/x86/baseline.onnx"]
    at = baseline.rindex(b"\x3d", 0, len(baseline) - 200)  # somewhere in the weights
    wrong = baseline[:at] + b"\x41" + baseline[at + 1 :]
    report["targets"]["x86"]["artifact"] |= {"sha256": hashlib.sha256(wrong).hexdigest(), "size_bytes": len(wrong)}
    del report["sha256"]  # as in a report of an earlier version
    path = _resealed(
        shipped, tmp_path / "x.tar.gz", **{"artifacts/x86/model.onnx": wrong, "report.json": json.dumps(report).encode()}
    )
    code, _, err = ended("verify", path)
    assert code == 1
    assert "golden samples" in err
    assert "outputs differ" in err


@pytest.mark.parametrize(
    ("change_of", "words"),
    [
        (lambda m, r: m.update(passed=not m["passed"]), "passed is"),
        (lambda m, r: m["numbers"][0].update(value=99.9), "differs"),
        (lambda m, r: m.update(artifact=next(f["path"] for f in m["files"] if "baseline" in f["path"])), "artifact is"),
        (lambda m, r: r["targets"]["x86"].update(artifact=None), "no artifact"),
        (lambda m, r: m.update(precision="fp16"), "precision is"),
    ],
    ids=["passed", "a figure", "another file", "none", "precision"],
)
def test_a_manifest_that_contradicts_the_report_beside_it_is_damage_though_every_digest_is_right(
    change_of: Callable[[dict[str, Any], dict[str, Any]], None],
    words: str,
    shipped: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str, str]],
) -> None:
    files = dict(unpack(shipped).files)
    manifest, report = json.loads(files["manifest.json"]), json.loads(files["report.json"])
    change_of(manifest, report)
    del report["sha256"]  # as in a report of an earlier version
    data = json.dumps(report).encode()
    for entry in manifest["files"]:
        if entry["path"] == "report.json":
            entry |= {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    path = tmp_path / shipped.name
    files |= {"report.json": data, "manifest.json": json.dumps(manifest).encode()}
    path.write_bytes(pack(Archive(unpack(shipped).folder, files)))
    code, _, err = ended("verify", path)
    assert code == 1, err
    assert words in err


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "artifacts/../../x", "a\\b"])
def test_a_report_that_names_files_elsewhere_is_refused(path: str, shipped: Path, run: Path, tmp_path: Path) -> None:
    report = change(run, artifact__path=path)
    with pytest.raises(InputError, match="leads out of the run folder"):
        release([run], tmp_path / "dist")
    assert main(["verify", str(run)]) == 2
    sealed = _resealed(shipped, tmp_path / "x.tar.gz", **{"report.json": json.dumps(report).encode()})
    assert main(["verify", str(sealed)]) == 2


@pytest.mark.parametrize("manifest", [b"", b"{}", b"[]", b"null", b'{"schema": 1}', b'{"schema": "x"}', b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_none_is_refused(manifest: bytes, shipped: Path, tmp_path: Path) -> None:
    found = unpack(shipped)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(pack(Archive(found.folder, {**found.files, "manifest.json": manifest})))
    with pytest.raises(VerifyError, match=r"manifest\.json") as caught:
        bundle.read(path)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_a_later_schema_is_not_guessed_at(shipped: Path, tmp_path: Path) -> None:
    found = unpack(shipped)
    later = {**json.loads(found.files["manifest.json"]), "schema": 2}
    path = tmp_path / "x.tar.gz"
    path.write_bytes(pack(Archive(found.folder, {**found.files, "manifest.json": json.dumps(later).encode()})))
    with pytest.raises(VerifyError, match="schema 2"):
        bundle.read(path)


@pytest.mark.parametrize("kind", ["bundle", "run", "artifact"])
def test_verifying_imports_neither_torch_nor_what_made_the_run(kind: str, shipped: Path, made: Path) -> None:
    path = {"bundle": shipped, "run": made, "artifact": made / "artifacts/x86/model.onnx"}[kind]
    heavy = ("torch", "torchvision", "sklearn", "scipy", "matplotlib", "gymnasium", "stable_baselines3", "onnx", "cyclonedx")
    code = (
        "import sys\nfrom edge_compress.pipeline.cli.main import main\n"
        f"code = main(['verify', {str(path)!r}])\nsys.exit(str([m for m in {heavy!r} if m in sys.modules]) if not code else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_unpacking_leaves_nothing_behind(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    seen: list[Any] = []
    monkeypatch.setattr(archive, "extract", lambda found, into, real=archive.extract: (seen.append(into), real(found, into)))
    assert main(["verify", str(shipped)]) == 0
    assert seen[0].parent == tmp_path
    assert not seen[0].exists()
    assert list(tmp_path.glob("edge-compress*")) == []
