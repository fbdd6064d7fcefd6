"""The benchmark of methods: its rows, that it goes on where it stopped, and that ours is ahead on the embedded network."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import table1
import table1_bench
import table1_methods
import table1_report
import table1_training
import torch
from click.testing import CliRunner
from edge_compress.pipeline.types import Knob


def row(method: str, sparsity: float, seed: int, top1: float) -> dict[str, Any]:
    return {
        "method": method, "regime": "one-shot", "sparsity": sparsity, "seed": seed, "top1": top1,
        "macs": 41_000_000, "macs_nonzero": 4_000_000, "latency_ratio": 1.0, "seconds": 1.0,
    }  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[table1.Cell]:
    """Rows cost nothing and are counted; the third one that is asked for fails."""
    asked: list[table1.Cell] = []

    def fill(cell: table1.Cell, *rest: object) -> dict[str, Any]:
        asked.append(cell)
        if len(asked) == 3:
            raise KeyboardInterrupt
        made = row(cell.method, cell.sparsity, cell.seed, 90.0)
        return {k: v for k, v in made.items() if k not in ("method", "regime", "sparsity", "seed")}

    monkeypatch.setattr(table1, "fill", fill)
    monkeypatch.setattr(table1, "loaded_for", lambda *_: None)
    monkeypatch.setattr(table1, "Bench", lambda loaded, seed, *_: type("Bench", (), {"seed": seed})())
    return asked


def test_a_second_call_does_only_what_is_missing(tmp_path, counted):
    out = tmp_path / "table.json"
    asked = [
        "--methods",
        "dense,magnitude,random",
        "--sparsity",
        "50,90",
        "--seeds",
        "0",
        "--regime",
        "one-shot",
        "--out",
        str(out),
    ]
    assert CliRunner().invoke(table1.main, asked).exit_code == 1  # interrupted in the third row
    before = json.loads(out.read_text())["rows"]
    assert len(before) == 2
    assert CliRunner().invoke(table1.main, asked).exit_code == 0
    assert len(counted) == 6  # five rows, one of them begun twice
    rows = json.loads(out.read_text())["rows"]
    assert len({(r["method"], r["sparsity"]) for r in rows}) == len(rows) == 5
    assert CliRunner().invoke(table1.main, asked).exit_code == 0
    assert len(counted) == 6
    assert all(r in rows for r in before)


def test_another_command_does_not_mix_its_rows_in(tmp_path, counted):
    out = tmp_path / "table.json"
    asked = ["--methods", "magnitude", "--sparsity", "50", "--seeds", "0", "--regime", "one-shot", "--out", str(out)]
    assert CliRunner().invoke(table1.main, asked).exit_code == 0
    before = out.read_bytes()
    result = CliRunner().invoke(table1.main, [*asked, "--epochs", "7"])
    assert result.exit_code == 1
    assert "rows of another command" in result.output
    assert out.read_bytes() == before


def test_processes_that_fill_one_table_keep_each_others_rows(tmp_path):
    settings = {"epochs": 5}
    one, other = (table1.Table(tmp_path / "table.json", "c", settings) for _ in range(2))
    values = {k: v for k, v in row("", 0.0, 0, 90.0).items() if k not in ("method", "regime", "sparsity", "seed")}
    one.add(table1.Cell("magnitude", "one-shot", 50.0, 0), values)
    other.add(table1.Cell("magnitude", "one-shot", 50.0, 1), values)
    one.add(table1.Cell("magnitude", "one-shot", 50.0, 2), values)
    assert [r["seed"] for r in json.loads((tmp_path / "table.json").read_text())["rows"]] == [0, 1, 2]


def test_a_teacher_answers_once_for_the_same_images_and_never_for_others():
    asked = []
    net = torch.nn.Flatten()
    net.register_forward_hook(lambda *_: asked.append(1))
    teacher = table1_bench.Remembering(net)
    images, others = torch.rand(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher(images), images.flatten(1))
    assert torch.equal(teacher(images.contiguous(memory_format=torch.channels_last)), images.flatten(1))
    assert len(asked) == 1
    assert torch.equal(teacher(others), others.flatten(1))
    with torch.autocast("cpu", torch.bfloat16):
        teacher(images)
    assert len(asked) == 3


def test_no_path_of_this_machine_is_kept(tmp_path, counted, monkeypatch):
    out = tmp_path / "table.json"
    given = ["--model", f"{tmp_path}/net.py:make", "--weights", f"{tmp_path}/w.pt", f"--data=npz:{tmp_path}/d.npz"]
    given += ["--methods", "magnitude", "--sparsity", "50", "--seeds", "0", "--regime", "one-shot", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "table1.py"), *given])
    assert CliRunner().invoke(table1.main, given).exit_code == 0
    command = json.loads(out.read_text())["command"]
    assert command.startswith("python table1.py --model net.py:make --weights w.pt --data=npz:d.npz")
    assert all(str(tmp_path) not in path.read_text() for path in tmp_path.glob("table.*") if path.is_file())


def test_wrong_names_are_one_line(tmp_path):
    result = CliRunner().invoke(table1.main, ["--methods", "magnitud", "--out", str(tmp_path / "t.json")])
    assert result.exit_code == 1
    assert "magnitud" in result.output
    assert "sparse-momentum" in result.output
    assert "Traceback" not in result.output


def test_markdown_has_mean_and_spread():
    rows = [row("magnitude", 80.0, 0, 70.0), row("magnitude", 80.0, 1, 74.0), row("amp-hasa", 80.0, 0, 88.0)]
    table = {"command": "c", "settings": {"epochs": 5}, "dense": {"top1": 91.8, "macs": 41_000_000}, "rows": rows}
    text = table1_report.to_markdown(table)
    assert "| magnitude | 72.00 ± 2.00 |" in text
    assert "| amp-hasa | 88.00 (1) |" in text
    assert "MACs saved: none" in text
    assert table1_report.to_svg(table) == table1_report.to_svg(table)


def test_every_method_named_in_the_table_can_be_run():
    assert {"sparse-momentum", "lottery-one-shot", "lottery-iterative"} <= set(table1_training.FINE_TUNED)
    cells = list(table1.cells(table1.METHODS, table1.REGIMES, (50.0,), (0, 1)))
    assert len(cells) == 2 * (1 + len(table1_methods.ONE_SHOT) + len(table1_training.FINE_TUNED))
    assert not any(c.regime == "one-shot" and c.method.startswith(("sparse", "lottery")) for c in cells)


def test_iterative_tickets_take_a_fifth_of_what_is_left():
    assert list(table1_training.rounds(0.5)) == pytest.approx([0.2, 0.36, 0.488, 0.5])
    assert list(table1_training.rounds(0.2)) == pytest.approx([0.2])


def test_sparse_momentum_moves_weights_to_where_the_momentum_is():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(10, 10, generator=generator) for name in ("calm", "busy")}
    for weight in weights.values():
        weight[torch.rand(10, 10, generator=generator) < 0.5] = 0.0
    momenta = {n: torch.rand(10, 10, generator=generator) * size for n, size in (("calm", 0.01), ("busy", 1.0))}
    masks = table1_training.redistribute(weights, momenta, 0.2)
    had, has = ({n: int(m.sum()) for n, m in kind.items()} for kind in ({n: w != 0 for n, w in weights.items()}, masks))
    assert sum(has.values()) == sum(had.values())
    assert has["busy"] > had["busy"]
    assert has["calm"] < had["calm"]
    new = masks["busy"] & (weights["busy"] == 0)
    left_out = ~masks["busy"] & (weights["busy"] == 0)
    assert momenta["busy"][new].min() >= momenta["busy"][left_out].max()


@pytest.mark.parametrize("counts", [(1000, 33), (500, 166), (100, 33)])
def test_counts_meet_the_sparsity_to_the_connection(counts):
    found = table1_methods.exactly({"a": (counts[0], 1000), "b": (counts[1], 333)}, 0.2)
    assert sum(found.values()) == round(0.2 * 1333)
    assert 0 < found["a"] <= 1000
    assert 0 < found["b"] <= 333
    assert found["a"] / found["b"] == pytest.approx(counts[0] / counts[1], rel=0.1)


def test_levels_keep_the_proportions_and_the_budget():
    knobs = tuple(Knob(n, "layer", 1000, tuple(round(1000 * 0.85**i) for i in range(25))) for n in "ab")
    levels = table1_methods.within(knobs, {"a": 300, "b": 100}, 0.2)
    kept = [k.kept[level] for k, level in zip(knobs, levels, strict=True)]
    assert 0.85 * 400 <= sum(kept) <= 400
    assert kept[0] / kept[1] == pytest.approx(3, rel=0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quick_puts_amp_hasa_ahead_of_magnitude(tmp_path):
    out = tmp_path / "quick.json"
    result = CliRunner().invoke(table1.main, ["--quick", "--methods", "dense,magnitude,amp-hasa", "--out", str(out)])
    assert result.exit_code == 0, result.output
    table = json.loads(out.read_text())
    assert set(table) == {"command", "settings", "dense", "rows"}
    for found in table["rows"]:
        assert {"method", "regime", "sparsity", "seed", "top1", "macs", "latency_ratio"} <= set(found)
        assert found["macs"] == table["dense"]["macs"]
        assert found["zeros"] == pytest.approx(found["sparsity"], abs=0.1)
    top1 = {(r["method"], r["sparsity"]): r["top1"] for r in table["rows"]}
    highest = max(s for _, s in top1)
    assert top1["amp-hasa", highest] > top1["magnitude", highest]


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8])
def test_no_row_of_the_table_trains_longer_than_the_others(epochs, tmp_path, monkeypatch):
    """The search for a ticket is training; what `-long` adds to it is what its row says."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 4))
    for method, run in {**table1_training.FINE_TUNED, **table1_training.LONGER}.items():
        trained: list[int] = []

        def count(bench, start, training, name, remask=None, trained=trained):
            trained.append(training.epochs)
            return start.net

        masks = {"0": torch.ones(4, 8, dtype=torch.bool)}
        bench = type(
            "Bench", (), {"seed": 0, "net": net, "weights": {"0": net[0].weight.detach()}, "masked": lambda self, masks: net}
        )()
        made = table1_bench.Pruned(net, masks)
        monkeypatch.setattr(table1_training, "trained", count)
        monkeypatch.setattr(table1_training, "one_shot", lambda *_, made=made: made)
        run(bench, 0.8, table1_training.Training(epochs, tmp_path / "row", lambda *_: None))
        assert sum(trained) == table1_training.total_epochs(method, 0.8, epochs), method
        assert (sum(trained) > epochs) == (method in table1_training.LONGER), method


def test_equal_iterative_tickets_end_at_the_sparsity_asked_for(tmp_path, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(100, 10))
    seen = []

    def watch(bench, start, training, name, remask=None):
        seen.append(1.0 - float(start.masks["0"].float().mean()))
        return start.net

    bench = type("Bench", (), {"seed": 0, "weights": {"0": net[0].weight.detach()}, "masked": lambda self, masks: net})()
    monkeypatch.setattr(table1_training, "trained", watch)
    table1_training.ticket_iterative(bench, 0.91, table1_training.Training(5, tmp_path / "row", lambda *_: None))
    assert seen == pytest.approx([0.0, 0.7, 0.91])


def test_a_row_with_training_starts_from_the_network_of_the_row_without(tmp_path, monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4)).eval()
    mask = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    calls = []

    def make(bench, sparsity):
        calls.append(sparsity)
        return table1_bench.Pruned(net, {"0": mask}, {"search_loss": 0.25})

    bench = type("Bench", (), {"seed": 3, "folder": tmp_path, "net": torch.nn.Sequential(torch.nn.Linear(8, 4), net[1])})()
    monkeypatch.setitem(table1_methods.ONE_SHOT, "magnitude", make)
    first = table1_methods.one_shot(bench, "magnitude", 0.5)
    again = table1_methods.one_shot(bench, "magnitude", 0.5)
    assert calls == [0.5]
    assert first.facts == again.facts == {"search_loss": 0.25}
    assert torch.equal(again.masks["0"], mask)
    assert torch.equal(again.net[0].weight, net[0].weight)
    table1_methods.one_shot(bench, "magnitude", 0.9)
    assert calls == [0.5, 0.9]


def test_sparse_momentum_moves_weights_that_lie_channels_last():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, 3, 3, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
    momentum = torch.randn(weight.shape, generator=generator)
    wanted = table1_training.redistribute({"a": weight}, {"a": momentum}, 0.2)["a"]
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(table1_training.redistribute({"a": last}, {"a": momentum}, 0.2)["a"], wanted)
