"""Candidates answer in int8 nearly what they answer in float, with their own weights; a graph that does not follow is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from edge_compress.pipeline.axes.capture import numbers_in
from edge_compress.pipeline.axes.cutting.gate import Checked
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.evaluate.exported import answering, sources, unit_graph
from edge_compress.pipeline.evaluate.exported.answering import Int8Answers
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.task.samples import Batch
from torch import Tensor, nn

from .test_unit_graph import RESIDUAL, SMALL, checked_of, drawn, signature_of


class Detector(nn.Module):
    """A residual trunk with two outputs, the first of them of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.branch = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24)
        )
        self.one, self.many = nn.Conv2d(24, 1, 1), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.branch(x)).relu()
        return self.one(x), self.many(x.mean((2, 3)))


def calibration() -> Tensor:
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def spread(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest root-mean-square difference of an output, in units of its deviation."""
    return max(float(((a - b).square().mean() / b.var()).sqrt()) for a, b in zip(found, expected, strict=True))


def refit(checked: Checked, small: nn.Module) -> nn.Module:
    """As after reconstruction: other weights, biases and statistics."""
    answering._redraw(small, checked)
    return small.eval()


@pytest.mark.parametrize("name", [*SMALL, *RESIDUAL, "detector"])
def test_a_candidate_with_weights_of_its_own_answers_nearly_as_in_float(name: str) -> None:
    torch.manual_seed(0)
    checked = checked_of({**SMALL, **RESIDUAL, "detector": Detector}[name]())
    graph = Int8Answers(checked, signature_of(checked), calibration())
    for plan in ({}, drawn(checked)):
        small = refit(checked, cut(checked.coupling, plan, checked.sized))
        with torch.no_grad():
            expected = tuple(numbers_in(small(calibration())))
            dense = tuple(numbers_in(checked.coupling.walk.captured.module(calibration())))
        found = graph.answers(small, plan, calibration())
        assert [t.shape for t in found] == [t.shape for t in expected]
        assert 1e-6 < spread(found, expected) < 0.2
        assert spread(dense, expected) > 2 * spread(found, expected)  # they are the candidate's answers, not the dense network's


def test_a_bias_of_one_number_follows_the_candidate() -> None:
    checked = checked_of(Detector())
    graph = Int8Answers(checked, signature_of(checked), calibration())
    small = cut(checked.coupling, {}, checked.sized).eval()
    before = graph.answers(small, {}, calibration())[0]
    with torch.no_grad():
        small.one.bias.add_(0.1)
    after = graph.answers(small, {}, calibration())[0]
    assert float((after - before).mean()) == pytest.approx(0.1, abs=0.03)


def test_a_graph_whose_weights_were_mistaken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of the same make are taken for each other: the graph is cut rightly, and must not be filled wrongly."""

    def mixed(*args: object) -> dict[str, sources.Source]:
        found = real(*args)
        other = found["first.0.weight"]
        return found | {"second.0.weight": replace(found["second.0.weight"], parameter=other.parameter, folded=other.folded)}

    checked = checked_of(RESIDUAL["residual"]())
    real = sources.sources_of
    monkeypatch.setattr("edge_compress.pipeline.evaluate.exported.ties.sources_of", mixed)
    with pytest.raises(BuildError, match="does not answer as a network with other weights does"):
        Int8Answers(checked, signature_of(checked), calibration())
    assert unit_graph.SAME < 0.01


class Denoiser(nn.Module):
    """An image to an image: the network's output is a sum with its stem, whose branch can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.body(x)


def test_a_branch_that_ends_in_the_networks_output_goes_from_the_int8_graph() -> None:
    checked = checked_of(Denoiser())
    (block,) = checked.coupling.blocks
    graph = Int8Answers(checked, signature_of(checked), calibration())
    plan = {block.name: [0]}
    small = cut(checked.coupling, plan, checked.sized).eval()
    with torch.no_grad():
        expected = (small(calibration()),)
    assert spread(graph.answers(small, plan, calibration()), expected) < 0.2


class Judged:
    """Reward samples whose judge looks at one number of the answers."""

    def __init__(self, net: nn.Module) -> None:
        self.batch = Batch(calibration(), torch.zeros(32))
        self._net = net

    def calibration(self, precision: Precision) -> Tensor | None:
        return calibration() if precision is Precision.INT8 else None

    def answers(self, net: nn.Module) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (net(calibration()),)

    def judge(self, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        wanted = self.answers(self._net)[0].argmax(1)
        return float((outputs[0].argmax(1) == wanted).float().mean()), 0.0


def judged(precision: Precision) -> tuple[Int8Answers | None, list[str]]:
    checked, said = checked_of(RESIDUAL["residual"]()), []
    reward: Any = Judged(checked.coupling.walk.captured.module)
    return answering.int8_answers(checked, signature_of(checked), reward, precision, said.append), said


def test_candidates_of_a_float_artifact_answer_in_float_and_nothing_is_said() -> None:
    assert judged(Precision.FP32) == (None, [])


def test_where_int8_itself_costs_much_candidates_answer_in_float_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = judged(Precision.INT8)
    assert isinstance(found, Int8Answers)
    assert said == []
    monkeypatch.setattr(answering, "COST", -1.0)
    found, said = judged(Precision.INT8)
    assert found is None
    assert "in int8 the dense network loses" in said[0]


def test_where_the_graph_cannot_be_filled_candidates_answer_in_float_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise BuildError("operators of one name")

    monkeypatch.setattr(answering, "UnitGraph", refused)
    found, said = judged(Precision.INT8)
    assert found is None
    assert said == ["Candidates answered in float: operators of one name"]
