"""The evaluations on disk: what was finished is read back, what a killed run left unfinished is not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from edge_compress.pipeline.codec import json_sha256, to_json
from edge_compress.pipeline.evaluate.evaluation_log import Memo
from edge_compress.pipeline.types import Candidate, Kind, ModelCost

FIRST = Candidate((0, 2), 0.5, 1.25, 0.75, Kind.MEASURED, ModelCost(10, 100), 0.5)
SECOND = replace(FIRST, levels=(1, 0), accuracy=0.75, density=0.3)


def test_candidates_are_read_back_by_their_levels(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "memo")
    assert [memo.add(c) for c in (FIRST, SECOND)] == [FIRST, SECOND]
    again = Memo(tmp_path / "memo")
    assert [again.get(levels) for levels in ((0, 2), (1, 0), (1, 1))] == [FIRST, SECOND, None]
    assert memo.get((1, 0)) == SECOND


@pytest.mark.parametrize(
    "leaving",
    [
        *(b'{"levels": [1', b'{"levels": [1, 0]}\n{"le', b"nonsense\n", b"[]\n", b"\xff\n", b'"text"\n', b"null\n"),
        b"[" * 100_000 + b"\n",
        b'{"check": ' * 100_000 + b"\n",
        b'{"check": "", "levels": [' + b"9" * 5000 + b"]}\n",
    ],
    ids=range(10),
)
def test_what_a_killed_run_left_is_cut_off_and_written_again(tmp_path: Path, leaving: bytes) -> None:
    path = tmp_path / "memo"
    Memo(path).add(FIRST)
    good = path.read_bytes()
    path.write_bytes(good + leaving)
    memo = Memo(path)
    assert path.read_bytes() == good
    assert memo.get((1, 0)) is None
    memo.add(SECOND)
    again = Memo(path)
    assert [again.get(levels) for levels in ((0, 2), (1, 0))] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("levels", [[1], [0]]),
        ("levels", {"1": 0}),
        ("levels", [1.5, 0]),
        ("accuracy", 10**400),
        ("accuracy", [0.5]),
        ("cost", {"params": 10**400, "macs": "1"}),
        ("latency_kind", ["measured"]),
        ("another", 1),
    ],
)
def test_a_line_that_no_evaluation_has_is_dropped_though_its_checksum_is_right(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "memo"
    Memo(path).add(FIRST)
    found = to_json(SECOND) | {key: value}
    with path.open("a") as file:
        file.write(json.dumps({**found, "check": json_sha256(found)}) + "\n")
    said: list[str] = []
    memo = Memo(path, said.append)
    assert [memo.get(candidate.levels) for candidate in (FIRST, SECOND)] == [FIRST, None]
    assert said == ["1 of 2 kept evaluations are corrupt (memo): evaluated again"]
    assert len(path.read_text().splitlines()) == 1


def test_every_flipped_bit_is_found_costs_one_line_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "memo"
    memo = Memo(path)
    for candidate in (FIRST, SECOND):
        memo.add(candidate)
    good = path.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        at, bit = generator.randrange(len(good)), generator.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        said: list[str] = []
        found = Memo(path, said.append)
        kept = [found.get(candidate.levels) for candidate in (FIRST, SECOND)]
        assert all(one in (None, wanted) for one, wanted in zip(kept, (FIRST, SECOND), strict=True))
        if kept != [FIRST, SECOND]:
            assert said or at >= good.rstrip(b"\n").rfind(b"\n")  # a truncated last line is not reported
            assert any(kept) or b"\n" not in (good[at : at + 1],)
        assert [Memo(path, pytest.fail).get(c.levels) for c in (FIRST, SECOND)] == kept
