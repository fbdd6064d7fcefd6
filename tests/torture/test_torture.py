"""Some minutes of the campaign of injected faults; `make torture` is the hour. And: what it is to find, it finds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
from flips import flip, may_be_quiet, unsaid, written
from forks import Ended

HERE = Path(__file__).parent


def tortured(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The campaign in a process of its own: it forks, which this one, with its threads, must not."""
    command = [sys.executable, str(HERE), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, check=False)


@pytest.mark.slow  # minutes
@pytest.mark.timeout(1500)
def test_no_injected_fault_gives_another_artifact_a_traceback_or_a_hang(tmp_path: Path) -> None:
    seed = str(random.SystemRandom().randrange(2**31))
    few = ("--minutes", "4", "--kind", "demo", "--kills", "4", "--flips", "40", "--inputs", "300")
    done = tortured(tmp_path / "torture.json", "--seed", seed, *few)
    assert (tmp_path / "torture.json").is_file(), done.stderr
    found = json.loads((tmp_path / "torture.json").read_text(encoding="utf-8"))
    assert found["violations"] == 0, json.dumps(found, indent=1)
    assert done.returncode == 0
    campaigns = found["campaigns"]
    assert len(campaigns) == 9  # of four kinds
    assert all(campaign["tried"] for campaign in campaigns.values())


def ended(code: int | None, err: str = "", out: str = "") -> Ended:
    return Ended(code, out, err, 1.0)


LINE = "edge-compress: wrong\n"
TRACE = "Traceback (most recent call last):\n"


@pytest.mark.parametrize(
    ("one", "found"),
    [
        (ended(2, LINE), ""),
        (ended(0), ""),
        (ended(None), "hang"),
        (ended(1, TRACE), "traceback"),
        (ended(-11), "ended by signal 11"),
        (ended(70), "exit code 70"),
        (ended(2), "0 lines of error, not one at the end"),
        (ended(2, LINE + LINE), "2 lines of error, not one at the end"),
        (ended(2, "noise\n" + LINE), "other lines beside the error"),
        (ended(2, LINE, "\x1b[31m"), "raw escape sequence"),
        (ended(0, LINE), "exit code 0 with 'edge-compress: wrong'"),
        (ended(1), "0 lines of error, not one at the end"),
    ],
)
def test_only_a_documented_end_is_without_fault(one: Ended, found: str) -> None:
    assert one.fault() == found


def test_a_run_may_say_more_and_end_with_a_failed_gate() -> None:
    assert ended(1, "search ...\n").fault(run=True) == ""
    assert ended(3, "search ...\n" + LINE).fault(run=True) == ""
    assert ended(3, LINE + "search ...\n").fault(run=True)


def test_a_flip_changes_one_bit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    flip(file, random.Random(1))
    assert sum(byte.bit_count() for byte in file.read_bytes()) == 1


def test_a_file_that_is_made_again_without_a_word_is_told_from_one_that_is_not_read(tmp_path: Path) -> None:
    for name in ("read", "unread", "always", "gone"):
        (tmp_path / name).write_bytes(b"changed")
    before = written(tmp_path)
    for name in ("read", "always"):
        (tmp_path / name).write_bytes(b"as it was")
        os.utime(tmp_path / name, ns=(0, 0))  # whatever the clock's steps
    (tmp_path / "gone").unlink()
    names = ("read", "unread", "always", "gone")
    assert [unsaid(name, before, tmp_path, {"always"}, "finetune ...\n") for name in names] == [True, False, False, True]
    said = f"{tmp_path / 'read'} is damaged (its digest does not match); recomputed"
    assert not any(unsaid(name, before, tmp_path, {"always"}, said) for name in names)


def test_only_what_no_result_stands_on_and_half_a_line_may_be_mended_without_a_word(tmp_path: Path) -> None:
    texts = {"run.log": "", "config.toml": "", "result.json": "{}", "weights.safetensors": "x", "evaluations.jsonl": "{}\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert [name for name in texts if may_be_quiet(tmp_path / name)] == ["run.log", "config.toml"]
    (tmp_path / "evaluations.jsonl").write_text("{}\x0b")
    assert may_be_quiet(tmp_path / "evaluations.jsonl")


FORKS = """
import os, sys, time
from forks import forked
slow = forked(lambda: time.sleep(60) or 0, seconds=0.5)
assert slow.code is None and slow.seconds < 30, slow
def noisy():
    print("out"); print("err", file=sys.stderr); return 3
assert (lambda e: (e.code, e.out, e.err))(forked(noisy, seconds=30)) == (3, "out\\n", "err\\n")
broken = forked(lambda: 1 // 0, seconds=30)
assert broken.fault() == "traceback", broken
killed = forked(lambda: os.kill(os.getpid(), 11), seconds=30)
assert killed.code == -11, killed
"""
FAULTS = """
import errno, os, sys
from pathlib import Path
root = Path(sys.argv[1])
from edge_compress.pipeline.files import atomic_write
from write_faults import Injector
log = root / "place"
(root / "run").mkdir()
failed = frozenset(filter(None, sys.argv[2].split("|")))
Injector((root / "run",), failed, errno.ENOSPC, log).install()
try:
    atomic_write(root / "run" / "file", "x")
except Exception as error:
    print(log.read_text(), type(error).__name__)
else:
    print("written")
"""


def script(text: str, *arguments: str) -> str:
    """What a Python process prints that has the campaign's modules."""
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", text, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_child_is_ended_in_time_and_says_how_it_ended() -> None:
    script(FORKS)


def test_each_step_of_a_write_fails_once(tmp_path: Path) -> None:
    failed: list[str] = []
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        said = script(FAULTS, str(folder), "|".join(failed))
        if said == "written":
            break
        place, _, error = said.rpartition(" ")
        assert error == "UnavailableError"
        assert not list((folder / "run").iterdir()) or place == "fsync ."  # the folder's: the file is there by then
        failed.append(place)
    assert failed == ["open .file.", "write .file.", "fsync .file.", "replace file", "fsync ."]


def test_mutations_change_their_input_and_are_the_same_for_the_same_seed() -> None:
    value = {"a": [1, 2.5, "x"], "b": {"c": None}}
    made = [mutations.json_text(mutations.changed_json(value, random.Random(seed)), random.Random(seed)) for seed in range(200)]
    again = [mutations.json_text(mutations.changed_json(value, random.Random(seed)), random.Random(seed)) for seed in range(200)]
    assert made == again
    assert len(set(made)) > 100
    assert value == {"a": [1, 2.5, "x"], "b": {"c": None}}
