"""A latency is measured once, and whatever happens to the file, the cache works."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from edge_compress.devices.folders import cache_folder
from edge_compress.devices.measure import latency_cache
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.timing import NOISY_RATIO, Ratio
from edge_compress.pipeline.errors import InputError, UnavailableError
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

CONTEXT = {"device": "local", "cpu": "a cpu", "threads": "1"}


def test_ratio_is_kept_between_runs(tmp_path):
    first = LatencyCache(CONTEXT, tmp_path)
    assert first.get("a") is None
    assert first.put("a", Ratio(0.1 + 0.2)) == 0.1 + 0.2
    assert LatencyCache(CONTEXT, tmp_path).get("a") == 0.1 + 0.2
    assert len(LatencyCache(CONTEXT, tmp_path)) == 1


def test_first_write_wins_here_and_in_other_runs(tmp_path):
    one, other = LatencyCache(CONTEXT, tmp_path), LatencyCache(CONTEXT, tmp_path)
    assert one.put("a", Ratio(0.5)) == 0.5
    assert one.put("a", Ratio(0.6)) == 0.5
    assert other.put("a", Ratio(0.7)) == 0.5
    assert other.get("a") == 0.5
    assert LatencyCache(CONTEXT, tmp_path).get("a") == 0.5


def test_what_another_run_stores_meanwhile_is_seen(tmp_path):
    one, other = LatencyCache(CONTEXT, tmp_path), LatencyCache(CONTEXT, tmp_path)
    assert one.get("a") is None
    other.put("a", Ratio(0.5))
    assert one.get("a") == 0.5


def test_another_context_is_another_cache_whatever_the_order_of_its_keys(tmp_path):
    LatencyCache(CONTEXT, tmp_path).put("a", Ratio(0.5))
    assert LatencyCache({**CONTEXT, "threads": "2"}, tmp_path).get("a") is None
    assert LatencyCache(dict(reversed(CONTEXT.items())), tmp_path).get("a") == 0.5


def test_cut_at_any_byte_of_the_last_line_it_stays_usable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a hundred times
    cache = LatencyCache(CONTEXT, tmp_path)
    cache.put("a", Ratio(0.5))
    begin = cache.path.stat().st_size
    cache.put("b", Ratio(0.25))
    whole = cache.path.read_bytes()
    for cut in range(begin, len(whole)):
        cache.path.write_bytes(whole[:cut])
        after = LatencyCache(CONTEXT, tmp_path)
        assert after.get("a") == 0.5
        kept = after.get("b")
        assert kept in (None, 0.25)
        assert (kept is None) == (cut < len(whole) - 1)
        stored = after.put("b", Ratio(0.75))
        assert stored == (0.75 if kept is None else 0.25)
        after.put("c", Ratio(0.125))
        again = LatencyCache(CONTEXT, tmp_path)
        assert (again.get("a"), again.get("b"), again.get("c")) == (0.5, stored, 0.125)


@given(st.integers(0, 2**20), st.integers(0, 7))
@settings(deadline=None, max_examples=60)
def test_a_flipped_bit_never_gives_a_wrong_ratio(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("cache")
    cache = LatencyCache(CONTEXT, folder)
    cache.put("a", Ratio(0.5))
    cache.put("b", Ratio(0.25))
    data = bytearray(cache.path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    cache.path.write_bytes(bytes(data))
    after = LatencyCache(CONTEXT, folder)
    assert after.get("a") in (None, 0.5)
    assert after.get("b") in (None, 0.25)
    assert after.put("c", Ratio(2.0)) == LatencyCache(CONTEXT, folder).get("c")


WRITER = """
import sys
from pathlib import Path
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.timing import Ratio
cache = LatencyCache({"device": "local"}, Path(sys.argv[1]))
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    cache.put(str(i), Ratio(float(sys.argv[2])))
"""


def writer(folder, ratio, count):
    command = [sys.executable, "-P", "-c", WRITER, str(folder), str(ratio), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_two_runs_at_once_agree_on_every_structure(tmp_path):
    runs = [writer(tmp_path, ratio, 60) for ratio in (0.25, 0.75)]
    for run in runs:
        run.communicate(timeout=60)
        assert run.returncode == 0
    cache = LatencyCache({"device": "local"}, tmp_path)
    assert len(cache) == 60
    assert all(cache.get(str(i)) in (0.25, 0.75) for i in range(60))
    assert cache.path.read_bytes().count(b"\n") == 61  # nothing is stored twice


def test_killed_while_it_writes_it_stays_usable(tmp_path):
    run = writer(tmp_path, 0.5, 10**9)
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    cache = LatencyCache({"device": "local"}, tmp_path)
    assert len(cache) > 0
    assert cache.get("0") == 0.5
    assert cache.put("new", Ratio(0.125)) == 0.125
    assert LatencyCache({"device": "local"}, tmp_path).get("new") == 0.125


def test_full_disk_is_one_line_and_what_was_stored_stays(tmp_path, monkeypatch):
    cache = LatencyCache(CONTEXT, tmp_path)
    cache.put("a", Ratio(0.5))
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    with pytest.raises(UnavailableError, match=os.strerror(errno.ENOSPC)) as caught:
        cache.put("b", Ratio(0.25))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert "EDGE_COMPRESS_CACHE" in str(caught.value)
    monkeypatch.undo()
    assert cache.put("b", Ratio(0.75)) == 0.75
    assert LatencyCache(CONTEXT, tmp_path).get("a") == 0.5


def test_a_pipe_in_the_files_place_is_refused_at_once(tmp_path):
    cache = LatencyCache(CONTEXT, tmp_path)
    cache.path.unlink(missing_ok=True)
    os.mkfifo(cache.path)
    for act in (lambda: cache.get("x"), lambda: cache.put("x", Ratio(0.5, 0.01))):
        with pytest.raises(InputError, match="not a regular file"):
            act()


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        LatencyCache(CONTEXT, tmp_path / "file" / "below")


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_ratio_that_is_none_is_refused(tmp_path, ratio):
    with pytest.raises(ValueError, match="ratio"):
        LatencyCache(CONTEXT, tmp_path).put("a", Ratio(ratio))


def test_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("EDGE_COMPRESS_CACHE", raising=False)
    assert cache_folder() == tmp_path / "xdg" / "edge-compress" / "latency"
    monkeypatch.setenv("EDGE_COMPRESS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "latency"
    LatencyCache(CONTEXT).put("a", Ratio(0.5))
    assert list((tmp_path / "own" / "latency").glob("*.jsonl"))


def aged(monkeypatch, **age):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(**age)

    monkeypatch.setattr(latency_cache, "datetime", Clock)


@pytest.mark.parametrize(("hours", "kept"), [(0, True), (11, True), (13, False)])
def test_a_noisy_ratio_counts_while_its_run_may_be_resumed_and_is_measured_again_after(tmp_path, monkeypatch, hours, kept):
    aged(monkeypatch, hours=hours)
    noisy = LatencyCache(CONTEXT, tmp_path)
    assert noisy.put("a", Ratio(0.9, 2 * NOISY_RATIO)) == 0.9
    assert noisy.get("a") == 0.9  # a run agrees with itself
    monkeypatch.undo()
    later = LatencyCache(CONTEXT, tmp_path)
    assert later.get("a") == (0.9 if kept else None)
    assert later.put("a", Ratio(0.5, NOISY_RATIO / 2)) == (0.9 if kept else 0.5)
    assert LatencyCache(CONTEXT, tmp_path).get("a") == (0.9 if kept else 0.5)


@pytest.mark.parametrize(("days", "kept"), [(1, True), (29, True), (31, False), (-3, False)])
def test_an_old_ratio_is_measured_again_and_so_is_one_of_the_future(tmp_path, monkeypatch, days, kept):
    aged(monkeypatch, days=days)
    LatencyCache(CONTEXT, tmp_path).put("a", Ratio(0.5))
    monkeypatch.undo()
    again = LatencyCache(CONTEXT, tmp_path)
    assert again.get("a") == (0.5 if kept else None)
    assert again.put("a", Ratio(0.25)) == (0.5 if kept else 0.25)
    assert LatencyCache(CONTEXT, tmp_path).get("a") == (0.5 if kept else 0.25)


def sealed(**changes):
    """A line of the file with values of its own, and the check that belongs to them."""
    found = {"key": hashlib.sha256(b"a").hexdigest(), "ratio": 0.5, "half_width": 0.0, "when": datetime.now(UTC).isoformat()}
    found |= changes
    return json.dumps({**found, "check": hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]})


@pytest.mark.parametrize("ratio", [0.0, -0.5, float("inf"), float("nan"), 1e300])
def test_an_impossible_ratio_in_the_file_does_not_count(tmp_path, ratio):
    cache = LatencyCache(CONTEXT, tmp_path)
    with cache.path.open("a") as file:
        file.write(sealed(ratio=ratio) + "\n")
    assert LatencyCache(CONTEXT, tmp_path).get("a") is None
    with cache.path.open("a") as file:
        file.write(sealed() + "\n")
    assert LatencyCache(CONTEXT, tmp_path).get("a") == 0.5  # else the line above was refused for another reason


def test_a_lock_that_another_process_holds_on_to_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(latency_cache, "LOCK_S", 0.2)
    first = LatencyCache({"device": "a"}, tmp_path)
    with FileLock(first.path.with_suffix(".lock")), pytest.raises(UnavailableError, match="held its lock"):
        LatencyCache({"device": "a"}, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"ratio": ' * 100_000,
        '{"key": "a", "ratio": ' + "9" * 5000 + "}",
        sealed(ratio=10**400),
        sealed(half_width=10**400),
        sealed(key=["a"]),
        sealed(key={"a": []}),
        sealed(when=10**400),
        sealed(when=["2026-01-01"]),
        sealed(ratio=[0.5]),
        "[]",
        "null",
        '"ratio"',
        "\0",
    ],
    ids=range(14),
)
def test_a_line_of_another_shape_costs_that_line_alone(tmp_path, line):
    cache = LatencyCache(CONTEXT, tmp_path)
    with cache.path.open("a") as file:
        file.write(f"{line}\n{sealed()}\n")
    after = LatencyCache(CONTEXT, tmp_path)
    assert (after.get("a"), after.get("b")) == (0.5, None)
    assert after.put("b", Ratio(0.25)) == LatencyCache(CONTEXT, tmp_path).get("b") == 0.25
