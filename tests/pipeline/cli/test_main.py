"""The command line: exit codes, one line for each error, a clean stdout, and a quick start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import without_progress
from edge_compress import targets
from edge_compress.pipeline.cli import main as module
from edge_compress.pipeline.cli.main import cli, main
from edge_compress.pipeline.config import Config, to_toml
from edge_compress.pipeline.errors import BuildError, DeviceError, EdgeCompressError, InputError, UnavailableError
from edge_compress.pipeline.options import Budget, Pattern, Precision
from edge_compress.pipeline.report import pages
from edge_compress.pipeline.report.report import encode
from edge_compress.pipeline.types import Kind, Percentiles, Speedup, Timing
from fake_run import fake_results, fake_target, fake_timing, to_report

TIMING = fake_timing(speedup=Speedup(2.13, (2.01, 2.2)))
REPORT: dict[str, Any] = encode(to_report(fake_results(evaluations=2, targets={"x86": fake_target(latency=TIMING)})))


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "names", lambda: ("x86",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the tests' own process keeps its handlers


Pipeline = Callable[[Config, Any], int]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pipeline], None]:
    """Puts a function in the place of the whole pipeline."""

    def put(function: Pipeline) -> None:
        stub = types.ModuleType("edge_compress.pipeline.run")
        stub.run_pipeline = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, stub.__name__, stub)

    return put


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    found = without_progress(err)
    assert out == ""
    assert found.startswith("edge-compress: ")
    assert found.count("\n") == 1
    return found


def test_every_option_reaches_the_pipeline(pipeline: Callable[[Pipeline], None]) -> None:
    given: list[Config] = []

    def run(config: Config, ui: Any) -> int:
        given.append(config)
        config.out.mkdir(parents=True)
        (config.out / "report.json").write_text(json.dumps(REPORT))
        return 0

    pipeline(run)
    text = """--target x86 --model net.py:small --weights net.pt --data npz:set.npz --mean 0.5,0.4,0.3 --std 0.2,0.2,0.1
        --augment none --image-size 64 --device pixel-8 --pattern 2:4 --precision fp32 --latency-budget 8ms --max-accuracy-drop 2
        --min-speedup 1.5
        --reward soft --alpha 2 --beta 3 --lambda 0.25 --score seed --search random --evaluations 7 --finetune-epochs 3
        --mask dynamic --seed 9 --accelerator cpu --threads 2 --out here --require-artifact
        --class-order natural --accept-chance --json --checkpoint-key model --exif-orientation"""
    assert main(text.split()) == 0
    here = Path.cwd()
    assert given == [
        Config(
            targets=("x86",),
            model=f"{here}/net.py:small",
            weights=here / "net.pt",
            data=f"npz:{here}/set.npz",
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.2, 0.1),
            augment="none",
            image_size=64,
            device="pixel-8",
            pattern=Pattern.TWO_FOUR,
            precision=Precision.FP32,
            latency_budget=(Budget(ms=8.0),),
            max_accuracy_drop=2.0,
            min_speedup=1.5,
            reward="soft",
            alpha=2.0,
            beta=3.0,
            lambda_=0.25,
            score="published",
            search="random",
            evaluations=7,
            finetune_epochs=3,
            mask="dynamic",
            seed=9,
            accelerator="cpu",
            threads=2,
            out=here / "here",
            json=True,
            require_artifact=True,
            class_order="natural",
            accept_chance=True,
            checkpoint_key="model",
            exif_orientation=True,
        )
    ]


def test_the_command_line_has_every_setting_and_its_help_says_what_holds_without_it() -> None:
    options = {p.name: p for p in cli.params}
    assert set(options) - {"file", "version", "dry_run"} == {f.name for f in dataclasses.fields(Config)}
    for name, option in options.items():
        text = getattr(option, "help", "")
        assert name == "version" or "[default: " in text, name


def test_what_is_not_given_on_the_command_line_is_left_to_the_file(pipeline: Callable[[Pipeline], None]) -> None:
    config = Config(
        ("x86",),
        max_accuracy_drop=2.0,
        min_speedup=1.5,
        alpha=2.0,
        threads=2,
        evaluations=7,
        out=Path.cwd(),
        json=True,
        require_artifact=True,
    )
    Path("all.toml").write_text(to_toml(config))
    Path("report.json").write_text("{}")
    given: list[Config] = []
    pipeline(lambda config, ui: given.append(config) or 0)  # type: ignore[func-returns-value]
    assert main(["--config", "all.toml"]) == 0
    assert given == [config]


@pytest.mark.parametrize("command", ["", "verify", "release", "report", "profile", "devices", "devices check"])
def test_every_help_teaches_by_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"edge-compress {command}".strip() in capsys.readouterr().out.partition("\n")[2] or command == "devices"


def test_no_target_is_one_line_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "--target x86" in one_line(capsys)


@pytest.mark.parametrize(
    "text",
    [
        "--target arm",
        "--target x86 --latency-budget 2",
        "--target x86 --latency-budget 0",
        "--target x86 --evaluations many",
        "--target x86 --score best",
        "--target x86 --no-such-option",
        "--target x86 --mean a,b",
        "--config absent.toml",
        "no-such-command",
        "--seed 1 devices",
        "verify",
        "profile --device nowhere a.onnx",
        "profile absent.onnx",
        "report .",
        "report . .",
        "release .",
        "release",
        "release absent.json --out dist",
        "verify absent",
        "verify absent.tar.gz",
        "devices check nowhere",
    ],
)
def test_a_wrong_input_is_one_line_and_2(
    text: str, capsys: pytest.CaptureFixture[str], pipeline: Callable[[Pipeline], None]
) -> None:
    pipeline(lambda *_: pytest.fail("the pipeline was started"))
    assert main(text.split()) == 2
    one_line(capsys)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no such file"), 2),
        (UnavailableError("no board"), 3),
        (DeviceError("lost"), 4),
        (BuildError("refused\nin two lines"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_the_user_can_mend_is_one_line_with_its_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str], pipeline: Callable[[Pipeline], None]
) -> None:
    def run(config: Config, ui: Any) -> int:
        raise error

    pipeline(run)
    assert main(["--target", "x86"]) == code
    line = one_line(capsys)
    assert "run the same command again" in line if code == 130 else str(error).split()[0] in line


def test_every_error_of_the_tree_has_the_exit_code_of_the_contract() -> None:
    def tree(cls: type[EdgeCompressError]) -> set[type[EdgeCompressError]]:
        return {cls}.union(*(tree(sub) for sub in cls.__subclasses__()))

    assert {cls.exit_code for cls in tree(EdgeCompressError)} == {1, 2, 3, 4}


def test_a_notebook_shows_an_error_as_one_line_too() -> None:
    shown = InputError("data x", found="nothing", expected="images", do="look")._render_traceback_()  # IPython asks for this
    assert shown == ["InputError: data x: found nothing, expected images; look"]


def test_a_bug_keeps_its_traceback(pipeline: Callable[[Pipeline], None]) -> None:
    def run(config: Config, ui: Any) -> int:
        return {}["a"]  # type: ignore[no-any-return]

    pipeline(run)
    with pytest.raises(KeyError):
        main(["--target", "x86"])


@pytest.mark.parametrize("passed", [True, False])
def test_the_summary_says_verdict_artifact_and_report_and_the_exit_code_is_the_pipelines(
    passed: bool, capsys: pytest.CaptureFixture[str], pipeline: Callable[[Pipeline], None]
) -> None:
    report = json.loads(json.dumps(REPORT))
    report["targets"]["x86"]["verdict"] = {"passed": passed, "reasons": [] if passed else ["The speedup is not real."]}

    def run(config: Config, ui: Any) -> int:
        config.out.mkdir()
        (config.out / "report.json").write_text(json.dumps(report))
        return 0 if passed else 1

    pipeline(run)
    assert main(["--target", "x86", "--out", "run"]) == (0 if passed else 1)
    verdict, artifact, page = capsys.readouterr().out.splitlines()
    assert verdict.startswith("x86: passed" if passed else "x86: failed")
    assert "2.13" in verdict
    assert ("The speedup is not real." in verdict) != passed
    assert artifact.endswith("run/artifacts/x86/model.onnx")
    assert page.endswith("run/report.html")


def test_verify_gives_its_findings_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(json.dumps(REPORT))
    entry = {"sha256": "00" * 32, "size_bytes": 1}
    folder = "artifacts/x86"
    baseline = {**entry, "path": f"{folder}/b.onnx"}
    report["targets"]["x86"]["artifact"] |= {**entry, "path": f"{folder}/a.onnx", "baseline": baseline}
    Path("report.json").write_text(json.dumps(report))
    Path(folder).mkdir(parents=True)
    Path(folder, "b.onnx").write_text("ab")
    assert main(["verify", "."]) == 1
    line = one_line(capsys)
    assert "x86: artifacts/x86/a.onnx is missing" in line
    assert "x86: artifacts/x86/b.onnx has 2 bytes, not 1" in line


def test_report_writes_both_documents_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pages, "to_markdown", lambda report: f"# {report.seed}")
    monkeypatch.setattr(pages, "to_html", lambda report, folder: f"<h1>{report.seed}</h1>")
    Path("report.json").write_text(json.dumps(REPORT | {"seed": 7}))
    assert main(["report", "."]) == 0
    assert (Path("report.md").read_text(), Path("report.html").read_text()) == ("# 7", "<h1>7</h1>")
    assert capsys.readouterr().out.splitlines() == ["report.md", "report.html"]
    assert main(["report", ".", "--out", "page.html"]) == 2
    assert "expected several" in one_line(capsys)


def test_devices_lists_this_machine_and_a_device_that_lacks_something_is_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("local: x86; by local, onnxruntime, 1 thread.") for line in listed)
    assert any(line.startswith("jetson-orin-nano: jetson; by ssh, tensorrt") and "8 GB" in line for line in listed)
    assert main(["devices", "check", "raspberry-pi-5"]) == 2
    assert "a template without an address" in one_line(capsys)
    monkeypatch.setattr(targets, "names", lambda: ())
    assert main(["devices", "check", "local"]) == 3
    out, err = capsys.readouterr()
    assert "x86: unknown target" in err
    assert "noise floor" not in out  # nothing is measured on a device that is not ready
    for fact in ("reachable", "runtime", "disk", "heat", "clocks"):
        assert fact in out


def test_profile_measures_the_others_against_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_compress.devices.local import LocalDevice
    from edge_compress.devices.measure.timing import TimingSettings
    from edge_compress.pipeline.profile import profiling

    measured: list[tuple[str, str, int]] = []

    def measure(self: object, baseline: Path, candidate: Path, settings: TimingSettings, progress: Any) -> Timing:
        measured.append((baseline.name, candidate.name, settings.threads))
        ratio = Speedup(len(measured) * 1.5, (1.25, 3.5))
        dense, artifact = Percentiles(4.0, 5.0, 6.0), Percentiles(2.0, 2.5, 3.0)
        return Timing("local", Kind.MEASURED, dense, artifact, ratio, 0.012, 5, 100, settings.threads, ("noisy",))

    def looked_into(agent: object, row: profiling.Row, path: Path, settings: object) -> tuple[profiling.Row, str]:
        layers = () if path.name == "c.onnx" else (profiling.LayerTime("conv1", "Conv", 0.5),)
        return dataclasses.replace(row, peak_rss_bytes=64_000_000, layers=layers), "no times by layer of c" if not layers else ""

    monkeypatch.setattr(LocalDevice, "measure", measure)
    monkeypatch.setattr(LocalDevice, "connect", lambda device: contextlib.nullcontext(types.SimpleNamespace(name="local")))
    monkeypatch.setattr(profiling, "_looked_into", looked_into)
    assert main(["profile", "a.onnx", "b.onnx", "c.onnx", "--threads", "2", "--out", "shown/here"]) == 0
    assert measured == [("a.onnx", "b.onnx", 2), ("a.onnx", "c.onnx", 2)]
    _, a, b, c, _, head, conv, _, floor, note, page = capsys.readouterr().out.splitlines()
    assert a.split() == ["a.onnx", "4.000", "5.000", "6.000", "64.0"]
    assert b.split() == ["b.onnx", "2.000", "2.500", "3.000", "64.0", "1.50x", "1.25", "to", "3.50", "(noisy)"]
    assert c.split()[5] == "3.00x"
    assert head.split()[-3:] == ["a.onnx", "b.onnx", "c.onnx"]
    assert conv.split() == ["conv1", "0.5000", "0.5000", "-"]
    assert "1.2%" in floor
    assert note == "no times by layer of c"
    assert page == "profile: shown/here/profile.html"
    record = json.loads(Path("shown/here/profile.json").read_text())
    assert record["kind"] == "measured"
    assert [row["name"] for row in record["rows"]] == ["a.onnx", "b.onnx", "c.onnx"]
    assert record["rows"][1]["against"]["speedup"]["median"] == 1.5
    html = Path("shown/here/profile.html").read_text()
    assert "1.50× (1.25 to 3.50), noisy" in html
    assert "<svg" in html


# --- as a process of its own

# what a shell starts in the background ignores Ctrl-C, and so does what that starts: the tests may have been started so
AS_PROCESS = """
import os, signal, subprocess, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)
from edge_compress import targets
targets.names = lambda: ("x86",)
stub = types.ModuleType("edge_compress.pipeline.run")
def run_pipeline(config, ui):
{body}
stub.run_pipeline = run_pipeline
sys.modules[stub.__name__] = stub
from edge_compress.pipeline.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def as_process(body: str) -> list[str]:
    return [sys.executable, "-c", AS_PROCESS.format(body="\n".join(f"    {line}" for line in body.splitlines()))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_130_and_one_line_after_cleaning_up(number: int, tmp_path: Path) -> None:
    body = 'try:\n    print("up", file=sys.stderr, flush=True)\n    time.sleep(60)\nfinally:\n    open("cleaned", "w").close()'
    running = subprocess.Popen([*as_process(body), "--target", "x86"], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert running.stderr is not None
    assert [running.stderr.readline() for _ in range(2)][1] == "up\n"  # after the first line of any run
    running.send_signal(number)
    _, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (130, "edge-compress: interrupted; run the same command again to resume\n")
    assert (tmp_path / "cleaned").exists()


def test_with_json_the_report_and_only_it_is_on_stdout_whatever_libraries_print(tmp_path: Path) -> None:
    body = (
        'print("from a library")\nos.write(1, b"from below python\\n")\nsubprocess.run(["echo", "from a child"])\n'
        'ui.say("progress")\nconfig.out.mkdir(parents=True)\n(config.out / "report.json").write_text(\'{"schema": 1}\')\nreturn 1'
    )
    done = subprocess.run(
        [*as_process(body), "--target", "x86", "--json"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"schema": 1}
    for text in ("from a library", "from below python", "from a child", "progress"):
        assert text in done.stderr


def _cpu_seconds(command: list[str]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_help_takes_at_most_half_a_second_of_cpu() -> None:
    command = [sys.executable, "-c", "import sys; from edge_compress.pipeline.cli.main import main; sys.exit(main(['--help']))"]
    assert min(_cpu_seconds(command) for _ in range(5)) <= 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["verify", "--help"], ["devices"]])
def test_a_quick_answer_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ("torch", "onnx", "onnxruntime", "numpy", "rich", "sklearn", "matplotlib", "filelock")
    start = f"import sys; from edge_compress.pipeline.cli.main import main; main({arguments!r})"
    code = f"{start}; sys.exit([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_console_script_is_this_main() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="edge-compress")
    assert script.load() is module.script


def test_threads_that_the_users_code_left_do_not_hold_the_process() -> None:
    body = """
import sys, threading, time
from edge_compress.pipeline.cli import main as module
threading.Thread(target=time.sleep, args=(600,)).start()
sys.argv = ["edge-compress", "--version"]
module.script()
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.startswith("edge-compress, version")) == (0, True)
