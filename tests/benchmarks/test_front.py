"""The front's table: every file against the dense network in float and in int8, from one interleaved measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import front
import pytest
import torch
from click.testing import CliRunner, Result

FILES = {"dense float": ("onnxruntime", Path("f.onnx")), "dense int8": ("onnxruntime", Path("q.onnx"))}


def row(method: str, budget: float, epochs: int, seed: int, top1: float) -> dict[str, Any]:
    found = {"method": method, "budget": budget, "epochs": epochs, "seed": seed, "top1": top1}
    return found | {"macs": 2_000_000, "params": 1, "bytes": 1, "file": f"{front.Cell(method, budget, epochs, seed).name}.onnx"}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two seeds of ours and one peer; files take 4, 2, 1, 1.25 and 1.6 ms."""
    rows = [row(front.METHODS[0], 0.3, 0, seed, 90.0 + seed) for seed in (0, 1)] + [row(front.METHODS[3], 0.3, 0, 0, 70.0)]
    asked: dict[str, Path] = {}

    def sessions(files: dict[str, tuple[str, Path]], image: Any) -> list[dict[str, list[float]]]:
        asked.update({name: path for name, (_, path) in files.items()})
        return [{name: [ms] * 20 for name, ms in zip(files, (4.0, 2.0, 1.0, 1.25, 1.6), strict=True)}] * 5

    monkeypatch.setattr(front, "sessions_of", sessions)
    found = front.timed(rows, FILES, Path("work"), None)
    assert [path.name for path in asked.values()] == ["f.onnx", "q.onnx", *(r["file"] for r in rows)]
    return found


def test_speeds_are_over_the_dense_network_in_float_and_in_int8(table: list[dict[str, Any]]) -> None:
    speeds = [[r[f"over {base}"]["median"] for base in front.DENSE] for r in table]
    assert speeds == [pytest.approx(pair) for pair in ([1, 0.5], [2, 1], [4, 2], [3.2, 1.6], [2.5, 1.25])]
    assert [r["p50_ms"] for r in table] == [4.0, 2.0, 1.0, 1.25, 1.6]


def test_the_table_has_one_line_a_point_with_the_mean_and_spread_over_seeds(table: list[dict[str, Any]]) -> None:
    lines = front.to_markdown(table).splitlines()
    assert lines[2].startswith("| dense float |")
    assert "| edge-compress | 0 | 0.3 | 3.60 | 1.80 | 2.0 | 90.50 ± 0.50 |" in lines
    assert "| Torch-Pruning L2 | 0 | 0.3 | 2.50 | 1.25 | 2.0 | 70.00 |" in lines
    assert len(lines) == 2 + 2 + 2


def test_the_plot_names_every_method_that_has_points(table: list[dict[str, Any]]) -> None:
    svg = front.to_svg(table)
    named = [method in svg for method in front.METHODS]
    assert named == [True, False, False, True, False]
    assert svg == front.to_svg(table)


def test_cells_have_names_of_their_own() -> None:
    cells = {front.Cell(m, b, e, s).name for m in front.METHODS for b in (0.5, 0.34) for e in (0, 2) for s in (0, 1)}
    assert len(cells) == len(front.METHODS) * 8
    assert not any(" " in name for name in cells)


class FakeSeed:
    """Stands in for the networks: notes which methods were asked for, and fails at one of them if told to."""

    asked: ClassVar[list[str]] = []
    fails_at: ClassVar[str] = ""

    def __init__(self, flags: dict[str, Any], seed: int, evaluations: int, work: Path, ui: Any) -> None:
        self.seed, self.inputs = seed, torch.zeros(1, 1, 8, 8)

    def networks(self, budget: float, methods: tuple[str, ...]) -> Iterator[tuple[str, None]]:
        for method in methods:
            if method == self.fails_at:
                raise KeyboardInterrupt
            self.asked.append(f"{method} {budget:g} {self.seed}")
            yield method, None

    def finished(self, cell: front.Cell, net: None) -> dict[str, Any]:
        return row(cell.method, cell.budget, cell.epochs, self.seed, 90.0)

    def dense_files(self, smaller: tuple[str, ...]) -> dict[str, tuple[str, Path]]:
        return FILES | {f"{front.parsed(pair)[0]} int8, dense": ("onnxruntime", Path("s.onnx")) for pair in smaller}

    def top1(self, path: Path) -> float:
        return 95.0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Runs the command with two budgets and two methods, seeds 0 and 1."""

    def sessions(files: dict[str, Any], image: Any) -> list[dict[str, list[float]]]:
        return [{name: [1.0] * 20 for name in files}] * 5

    monkeypatch.setattr(front, "Seed", FakeSeed)
    monkeypatch.setattr(front, "sessions_of", sessions)
    monkeypatch.setattr(FakeSeed, "asked", [])
    monkeypatch.setattr(FakeSeed, "fails_at", "")
    usual = ["--budgets", "0.6,0.4", "--epochs", "0,2", "--seeds", "0,1", "--methods", "edge-compress,uniform widths"]
    usual += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "front.json")]
    return lambda *more: CliRunner().invoke(front.main, [*usual, *more])


def test_a_front_that_was_stopped_goes_on_with_the_cells_that_are_missing(
    ran: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSeed, "fails_at", "uniform widths")
    assert ran().exit_code
    assert FakeSeed.asked == ["edge-compress 0.6 0"]
    monkeypatch.setattr(FakeSeed, "fails_at", "")
    result = ran()
    assert result.exit_code == 0, result.output
    later = ["uniform widths 0.6 0", "edge-compress 0.4 0", "uniform widths 0.4 0", "edge-compress 0.6 1", "edge-compress 0.4 1"]
    assert FakeSeed.asked[1:] == later
    assert ran().exit_code == 0
    assert len(FakeSeed.asked) == 6


def test_cells_made_with_other_settings_are_not_mixed_in(ran: Callable[..., Result]) -> None:
    assert ran().exit_code == 0
    result = ran("--evaluations", "7")
    assert result.exit_code == 2
    assert "name another folder" in result.output


def test_a_smaller_network_is_a_row_of_its_own(ran: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "small.pt").touch()
    result = ran("--smaller", f"nets.py:small={tmp_path / 'small.pt'}")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "front.json").read_text())["rows"]
    assert [r["method"] for r in rows[:3]] == ["dense float", "dense int8", "small int8, dense"]
    assert rows[2]["top1"] == 95.0
    assert rows[2]["over dense int8"]["median"] == 1.0


@pytest.mark.parametrize("given", [["nets.py:small"], ["nets.py:small=nowhere.pt"], ["a.py:net=HERE", "b.py:net=HERE"]])
def test_a_smaller_network_without_weights_or_a_name_of_its_own_is_refused_at_once(
    ran: Callable[..., Result], given: list[str]
) -> None:
    result = ran(*(part for pair in given for part in ("--smaller", pair.replace("HERE", __file__))))
    assert result.exit_code == 2
    assert "--smaller" in result.output
    assert not FakeSeed.asked
