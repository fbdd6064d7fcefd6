"""Single bits flipped in the files of runs, in caches and in bundles: found and said, made again, or without effect."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import copied, forked
from record import Campaign
from workshop import Reference, Workshop

CALL_S = 120.0
_KEY = re.compile(r"-[0-9a-f]{16}\b")
_SAID = re.compile(r"damaged|corrupt|cannot be read|changed since|holds another run|is not a|evaluated again")
_MENDED = re.compile(r"damaged|corrupt|cannot be read")  # what is said where a file's content was found to be wrong
_LATE = ("timing-", "golden-", "pictures-", "unpruned-compared-")  # stages that a half-finished run lacks
_DRAWN = ("report.html", "report.md")  # from report.json, for people
_OWN = ("run.log", ".lock", "seconds.json", "notes.json")  # what was said and how long it took: no result stands on it


def flip(file: Path, rng: random.Random) -> str:
    """Flips one bit of a file; says which."""
    data = bytearray(file.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(bytes(data))
    return f"bit {bit} of byte {at} of {len(data)}"


def written(folder: Path) -> dict[str, int]:
    """When each file below a folder was last written, in nanoseconds."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def rewritten(before: dict[str, int], folder: Path) -> set[str]:
    """The files of a folder that were written, or removed, since `before`."""
    now = written(folder)
    return {name for name, at in before.items() if now.get(name) != at}


def may_be_quiet(file: Path) -> bool:
    """Whether a file may be written again without a word: no result stands on it, or it is what calls leave that may differ.

    That are settings which may change between two calls, and half a line of an evaluation, as a killed run leaves it.
    """
    cut_off = file.name == "evaluations.jsonl" and not file.read_bytes().endswith(b"\n")
    return file.name in (*_OWN, "config.toml") or cut_off


def unsaid(name: str, before: dict[str, int], folder: Path, always: set[str], err: str) -> bool:
    """Whether a file that had a bit flipped was made again without a word.

    Args:
        name: of the file in the folder.
        before: `written` of the folder after the flip, before the call.
        folder: as the call left it.
        always: files that the call writes again where nothing was flipped.
        err: what the call said.
    """
    return name in rewritten(before, folder) - always and not _MENDED.search(err)


def _written_again(shop: Workshop, folder: Path) -> set[str]:
    """The files of a run that the same command writes again where nothing was flipped."""
    copy = copied(folder, shop.folder / "flipped")
    before = written(copy)
    shop.run("demo", copy)
    return rewritten(before, copy)


def flip_unfinished(shop: Workshop, wanted: Reference, count: int, rng: random.Random, found: Campaign) -> None:
    """Flips bits in a run that was stopped before its verification; the same command again ends as if nothing had been."""
    stopped = _stopped(shop, wanted)
    always = _written_again(shop, stopped)
    for _ in range(count):
        if found.over:
            break
        folder = copied(stopped, shop.folder / "flipped")
        file = rng.choice(_files(folder))
        name = _named(file, folder)
        how = f"{name}, {flip(file, rng)}"
        before, quiet = written(folder), may_be_quiet(file)
        ended = shop.run("demo", folder)
        said = "said" if _SAID.search(ended.err) else "without a word"
        if ended.code == 2 and not ended.fault(run=True) and file.name in ended.last_line:
            found.saw(f"refused in one line that names {name}")
        elif (
            ended.code == 2
            and not ended.fault(run=True)
            and "holds another run" in ended.last_line
            and file.name == "config.toml"
        ):
            found.saw(f"refused as another run: {name}")
        elif wrong := shop.difference("demo", ended, folder, wanted):
            found.violation("a run after a flip", f"{wrong}; {how}")
        elif not quiet and unsaid(file.relative_to(folder).as_posix(), before, folder, always, ended.err):
            found.violation("a file made again without a word", how)
        else:
            found.saw(f"ended with the same artifact, {said}")


def flip_finished(shop: Workshop, wanted: Reference, count: int, rng: random.Random, found: Campaign) -> None:
    """Flips bits in a finished run: `verify` finds it, or the same command again gives all that was there before."""
    always = _written_again(shop, wanted.folder)
    for number in range(count):
        if found.over:
            break
        folder = copied(wanted.folder, shop.folder / "flipped")
        named = [path for path in _files(folder) if _in_report(folder, path)] + [folder / "report.json"] * 5
        file = rng.choice(named if number % 2 else _files(folder))
        name, before = _named(file, folder), json.loads((folder / "report.json").read_bytes())
        how = f"{name}, {flip(file, rng)}"
        ended = forked(["verify", str(folder)], seconds=CALL_S)
        if wrong := ended.fault():
            found.violation("verify", f"{wrong}: {ended.last_line}; {how}")
        elif ended.code:
            found.saw(f"found by verify: {name}" if ended.code == 1 else f"refused by verify in one line: {name}")
        elif file.name == "report.json" and json.loads(file.read_bytes()) == before:
            found.saw("without effect: a blank of report.json")
        elif file.name == "report.json" or _in_report(wanted.folder, wanted.folder / file.relative_to(folder)):
            found.violation("verify passed a changed file", how)
        elif file.name in (*_DRAWN, *_OWN):
            found.saw(f"without effect: {name}")
        else:
            _again(shop, wanted, file, folder, always, how, found)


def _again(shop: Workshop, wanted: Reference, file: Path, folder: Path, always: set[str], how: str, found: Campaign) -> None:
    """What `verify` has no record of is of no effect, or the same command makes it again and says so."""
    before, quiet = written(folder), may_be_quiet(file)
    ended = shop.run("demo", folder)
    if ended.code == 2 and not ended.fault(run=True):
        found.saw("not in the record; the same command refuses in one line")
    elif wrong := shop.difference("demo", ended, folder, wanted):
        found.violation("a finished run after a flip", f"{wrong}; {how}")
    elif not quiet and unsaid(file.relative_to(folder).as_posix(), before, folder, always, ended.err):
        found.violation("a file made again without a word", how)
    else:
        said = "said" if _SAID.search(ended.err) else "of no effect"
        found.saw(f"not in the record; the same command gives the same artifact, {said}")


def flip_bundle(shop: Workshop, bundle: Path, count: int, rng: random.Random, found: Campaign) -> None:
    """Flips bits in a bundle: `verify` refuses each."""
    folder = shop.folder / "flipped-bundle"
    folder.mkdir(exist_ok=True)
    for _ in range(count):
        if found.over:
            break
        copy = Path(shutil.copyfile(bundle, folder / bundle.name))
        how = flip(copy, rng)
        ended = forked(["verify", str(copy)], seconds=CALL_S)
        if wrong := ended.fault() or ("" if ended.code in (1, 2) else f"exit code {ended.code}"):
            found.violation("verify of a bundle", f"{wrong}: {ended.last_line}; {how}")
        else:
            found.saw("found by verify")


def flip_latencies(shop: Workshop, count: int, rng: random.Random, found: Campaign) -> None:
    """Flips bits in a latency cache: each ratio is read back unchanged or measured again."""
    from edge_compress.devices.measure.latency_cache import LatencyCache, _valid

    (file,) = (shop.cache("demo") / "latency").glob("*.jsonl")
    lines = file.read_bytes().splitlines()
    context = json.loads(lines[0])["context"]
    kept = dict(filter(None, map(_valid, lines)))

    def read(folder: Path) -> dict[str, Any]:
        return LatencyCache(context, folder)._known

    _flip_lines(file, shop.folder / "flipped-cache", read, kept, count, rng, found)


def flip_evaluations(shop: Workshop, wanted: Reference, count: int, rng: random.Random, found: Campaign) -> None:
    """Flips bits in the evaluations of a search: each is read back unchanged, or evaluated again with a message."""
    from edge_compress.pipeline.evaluate.evaluation_log import Memo

    (file,) = wanted.folder.glob("stages/candidates-*/evaluations.jsonl")
    kept = Memo(file)._known

    def read(folder: Path) -> dict[Any, Any]:
        told: list[str] = []
        known = Memo(folder / file.name, told.append)._known
        if len(known) < len(kept) and not told and (folder / file.name).read_bytes().count(b"\n") == len(kept):
            raise AssertionError("an evaluation is dropped without a word")
        return known

    _flip_lines(file, shop.folder / "flipped-evaluations", read, kept, count, rng, found)


def _flip_lines(
    file: Path,
    folder: Path,
    read: Callable[[Path], dict[Any, Any]],
    kept: dict[Any, Any],
    count: int,
    rng: random.Random,
    found: Campaign,
) -> None:
    """Flips one bit at a time and compares what is read with what was kept; all in one child, the readers are quick."""

    def tried() -> int:
        for _ in range(count):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            copy = Path(shutil.copyfile(file, folder / file.name))
            how = flip(copy, rng)
            try:
                known = read(folder)
            except Exception as error:
                print(json.dumps(["reading", f"{type(error).__name__}: {error}; {how}"]))
                continue
            other = [key for key, value in known.items() if kept.get(key) != value]
            outcome = "another value is read" if other else ("dropped" if len(known) < len(kept) else "without effect")
            print(json.dumps([outcome, how]))
        return 0

    ended = forked(tried, seconds=CALL_S)
    if wrong := ended.fault():
        found.violation("reading", f"{wrong}: {ended.last_line}")
    for outcome, how in map(json.loads, ended.out.splitlines()):
        if outcome in ("dropped", "without effect"):
            found.saw(outcome)
        else:
            found.violation(outcome, how)


def run_with_flipped_cache(shop: Workshop, wanted: Reference, count: int, rng: random.Random, found: Campaign) -> None:
    """Whole runs with a flipped latency cache end with the same artifact: what is dropped is measured again."""
    for _ in range(count):
        if found.over:
            break
        cache = copied(shop.cache("demo"), shop.folder / "flipped-cache")
        how = flip(next((cache / "latency").glob("*.jsonl")), rng)
        folder = shop.folder / "flipped"
        shutil.rmtree(folder, ignore_errors=True)
        ended = shop.run("demo", folder, cache=cache)
        if wrong := shop.difference("demo", ended, folder, wanted):
            found.violation("a run with a flipped cache", f"{wrong}; {how}")
        else:
            found.saw("run ended with the same artifact")


def _stopped(shop: Workshop, wanted: Reference) -> Path:
    """The reference run as if it had been stopped after its build."""
    folder = copied(wanted.folder, shop.folder / "stopped")
    for path in (folder / "stages").iterdir():
        if path.name.startswith(_LATE):
            shutil.rmtree(path)
    for name in ("report.json", "plan.json", *_DRAWN):
        (folder / name).unlink()
    return folder


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size and os.access(path, os.W_OK)]


def _in_report(folder: Path, file: Path) -> bool:
    """Whether the report names the file with its digest."""
    return json.dumps(file.relative_to(folder).as_posix()) in (folder / "report.json").read_text(encoding="utf-8")


def _named(file: Path, folder: Path) -> str:
    return _KEY.sub("", file.relative_to(folder).as_posix())
