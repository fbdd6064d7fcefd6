"""A program gives the values its module computes, at any batch size, with the weights the module has at that moment."""

from __future__ import annotations

import pytest
import torch
from edge_compress.pipeline.axes.capture import capture, operator_name, tensors_in
from edge_compress.pipeline.axes.program import Program
from networks import NETWORKS
from small_transformers import TRANSFORMERS
from torch import nn

ALL = {**NETWORKS, **{f"transformer_{k}": v for k, v in TRANSFORMERS.items()}}


def answers(program: Program) -> torch.Tensor:
    (output,) = [n for n in program.nodes if n.op == "output"]
    value: torch.Tensor = program.value(output.all_input_nodes[0])
    return value


@pytest.mark.parametrize("name", ALL)
def test_a_program_answers_as_its_module_does(name: str) -> None:
    torch.manual_seed(0)
    module, inputs = ALL[name]().eval(), torch.randn(3, 1, 8, 8)
    captured = capture(module, inputs.clone())
    with torch.no_grad():
        expected = next(tensors_in(module(inputs.clone())))
        found = answers(Program(captured.module, captured))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_layers_columns_times_its_weight_are_its_outputs(name: str) -> None:
    torch.manual_seed(0)
    captured = capture(ALL[name]().eval(), torch.randn(2, 1, 8, 8))
    program = Program(captured.module, captured)
    with torch.no_grad():
        for layer in program.layers():
            outputs = layer.outputs(program.value(layer.node))
            product = program.tensor(layer.weight).flatten(1) @ layer.columns(program.value(layer.data))
            bias = 0.0 if layer.bias is None else program.tensor(layer.bias)[:, None]
            torch.testing.assert_close(product + bias, outputs, rtol=1e-4, atol=1e-4)


def test_weights_are_read_when_an_operator_needs_them() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = Program.of(net, torch.randn(2, 1, 8, 8))
    with torch.no_grad():
        net[3].weight.zero_()
        net[3].bias.fill_(5.0)
        assert torch.equal(answers(program), torch.full((2, 2), 5.0))


def test_values_that_nothing_reads_any_more_are_dropped() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = Program.of(net, torch.randn(2, 1, 8, 8))
    with torch.no_grad():
        for k, node in enumerate(program.nodes[:-1]):
            program.value(node)
            program.drop(k)
    assert [operator_name(n) for n in program.env if n.op == "call_function"] == ["linear"]
