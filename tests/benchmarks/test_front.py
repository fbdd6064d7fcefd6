"""The front's table: every file against the dense network in float and in int8, from one interleaved measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import front
import pytest

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
