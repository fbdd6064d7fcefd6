from __future__ import annotations

import copy
import itertools

import nets
import pytest
import torch
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.reconstruct import optimal_brain_surgeon as obs
from edge_compress.pipeline.reconstruct.least_squares import solve_masked
from edge_compress.pipeline.reconstruct.sequential import sequential_masked
from edge_compress.pipeline.score.mask_knobs import selections
from edge_compress.pipeline.score.masks import weight_masks
from oracles import dearest
from torch import nn


def problem(k: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs' X X^T, and weights."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(k, dtype=torch.float64) + 0.7 * torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(k, 200, generator=generator, dtype=torch.float64)
    return x @ x.T, torch.randn(outputs, k, generator=generator, dtype=torch.float64)


def error(gram: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> float:
    lost = weight - solve_masked(weight, gram, mask, damping=0.0)
    return float(((lost @ gram) * lost).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_first_cost_is_what_removing_that_connection_costs(seed):
    gram, weight = problem(6, 1, seed)
    costs = obs.removal_costs(gram, weight @ gram, damping=1e-6, share=0.01)
    alone = [error(gram, weight, torch.arange(6)[None] != p) for p in range(6)]
    assert int(costs.argmin()) == min(range(6), key=alone.__getitem__)
    assert float(costs.min()) == pytest.approx(min(alone), rel=0.05)  # but for the damping


@pytest.mark.parametrize("seed", range(5))
def test_one_by_one_the_costs_add_up_to_the_error_where_they_rise_on_their_own(seed):
    gram, weight = problem(8, 2, seed)
    costs = obs.removal_costs(gram, weight @ gram, damping=1e-6, share=0.01)
    kept = obs.highest(costs, 8)
    assert int(kept.sum()) == 8
    assert error(gram, weight, kept) <= float(costs[~kept].sum()) * (1 + 1e-3)  # never more: costs are made to rise


def test_the_support_is_far_better_than_magnitudes_and_near_the_best_there_is():
    ratios = []
    for seed in range(20):
        gram, weight = problem(9, 1, seed)
        supports = [torch.tensor([[i in s for i in range(9)]]) for s in itertools.combinations(range(9), 4)]
        best = min(error(gram, weight, s) for s in supports)
        found = error(gram, weight, obs.highest(obs.removal_costs(gram, weight @ gram, damping=1e-6), 4))
        by_size = error(gram, weight, obs.highest(weight.abs(), 4))
        ratios.append((found / best, by_size / best))
    chosen, magnitude = torch.tensor(ratios).median(0).values.tolist()
    assert chosen < 1.15
    assert magnitude > 1.5 * chosen


def test_costs_survive_inputs_that_are_always_zero():
    gram, weight = problem(5, 2)
    gram[2], gram[:, 2] = 0.0, 0.0
    costs = obs.removal_costs(gram, weight @ gram)
    assert costs.isfinite().all()
    assert (costs[:, 2] <= costs.min(1).values + 1e-9).all()


def test_output_curvature_is_the_squared_jacobian_of_a_linear_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5, bias=False))
    found = obs.output_curvature(net, torch.randn(4000, 4))
    expected = net[1].weight.detach().double().square().sum(0)  # E[(v^T J)_o^2] = sum_c J_co^2
    torch.testing.assert_close(found["0"], expected, rtol=0.1, atol=0.0)
    torch.testing.assert_close(found["1"], torch.ones(5, dtype=torch.float64), rtol=0.1, atol=0.0)


def test_output_curvature_sums_over_positions_and_leaves_the_network_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 2, bias=False)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = obs.output_curvature(net, torch.randn(4000, 1, 2, 2))
    expected = net[2].weight.detach().double().square().sum(0).view(2, 4).sum(1)
    torch.testing.assert_close(found["0"], expected, rtol=0.1, atol=0.0)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_layers_that_choose_from_what_they_are_fed_answer_better_than_with_magnitudes():
    net = capture(nets.OptionA(widths=(8, 16, 24)), nets.images(1)).module
    images = torch.randn(300, *nets.SHAPE, generator=torch.Generator().manual_seed(0))
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "conv" in n]
    weights = {n: net.get_parameter(f"{n}.weight").detach() for n in names}
    masks = weight_masks({n: w.abs() for n, w in weights.items()}, dict.fromkeys(names, 0.7))
    curvature = obs.output_curvature(net, images)
    lost = []
    for choose in (None, obs.chooser(curvature)):
        found = sequential_masked(net, masks, images, fixed=selections(net), choose=choose)
        assert all(int((found.get_parameter(f"{n}.weight") != 0).sum()) <= int(masks[n].sum()) for n in names)
        with torch.no_grad():
            lost.append(float((found(images) - net(images)).square().mean()))
    assert lost[1] < 0.9 * lost[0]


def test_a_layer_too_dear_to_choose_from_keeps_its_mask(monkeypatch):
    net = capture(nets.OptionA(widths=(8, 16, 24)), nets.images(1)).module
    images = torch.randn(50, *nets.SHAPE, generator=torch.Generator().manual_seed(0))
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and "conv" in n]
    weights = {n: net.get_parameter(f"{n}.weight").detach() for n in names}
    masks = weight_masks({n: w.abs() for n, w in weights.items()}, dict.fromkeys(names, 0.5))
    dearest = max(names, key=lambda n: len(weights[n]) * weights[n][0].numel() ** 3)
    monkeypatch.setattr(obs, "MOST_WORK", len(weights[dearest]) * float(weights[dearest][0].numel()) ** 3 - 1)
    found = obs.chosen_masks(net, masks, images, fixed=selections(net))
    assert torch.equal(found[dearest], masks[dearest])
    assert sum(not torch.equal(found[n], masks[n]) for n in names) > len(names) // 2
    assert all(int(found[n].sum()) == int(masks[n].sum()) for n in names)


class Tokens(nn.Module):
    """Linear layers on tokens (n, 4, c) and, where `maps`, on NHWC maps whose height equals the layers' outputs."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.maps = maps
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.narrow, self.fc = nn.Linear(8, 2), nn.Linear(2, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x.permute(0, 2, 3, 1) if self.maps else x.flatten(2).transpose(1, 2)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        x = torch.relu(self.narrow(x))  # as many outputs as the map is high
        return self.fc(x.mean((1, 2)) if self.maps else x.mean(1))


def on_tokens(maps: bool) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Tokens(maps).eval(), torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("maps", [False, True], ids=["tokens", "maps"])
def test_the_curvature_of_linear_layers_on_tokens_and_maps_is_taken_over_their_outputs(maps):
    net, images = on_tokens(maps)
    found = obs.output_curvature(net, images, seed=3)
    assert {name: len(value) for name, value in found.items()} == {
        "stem": 8,
        "up": 16,
        "down": 8,
        "narrow": 2,
        "fc": nets.CLASSES,
    }
    # E[g^2] per output, from the Jacobian of the logits with respect to the layer's outputs of one image at a time
    kept: list[torch.Tensor] = []
    handle = net.get_submodule("narrow").register_forward_hook(lambda module, args, out: kept.append(out))
    exact = torch.zeros(2)
    for image in images:
        kept.clear()
        logits = net(image[None])
        for logit in logits[0]:
            (gradient,) = torch.autograd.grad(logit, kept[0], retain_graph=True)
            exact += gradient.square().flatten(0, -2).sum(0)
    handle.remove()
    assert found["narrow"].float() == pytest.approx(exact / len(images), rel=0.25)  # sampled: one v for each image


@pytest.mark.parametrize("maps", [False, True], ids=["tokens", "maps"])
def test_linear_layers_on_tokens_and_maps_are_reconstructed(maps):
    net, images = on_tokens(maps)
    masks = {
        name: layer.weight.detach().abs() >= layer.weight.detach().abs().flatten().median()
        for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear)
    }
    chosen = obs.chosen_masks(net, masks, images)
    assert {name: int(mask.sum()) for name, mask in chosen.items()} == {name: int(mask.sum()) for name, mask in masks.items()}
    assert any(not torch.equal(chosen[name], masks[name]) for name in masks)
    with torch.no_grad():
        wanted = net(images)
        errors = []
        for solved in (True, False):
            small = sequential_masked(net, chosen, images, fixed=() if solved else (*masks, "stem"))
            for name, mask in chosen.items():
                weight = small.get_submodule(name).weight
                assert not solved or not bool(weight[~mask].any())
                weight.mul_(mask)
            errors.append(float((small(images) - wanted).square().mean()))
    assert errors[0] < 0.5 * errors[1]


class _Tokens(nn.Module):
    """Linear layers on channels-last maps (n, H, W, C), with as many rows as outputs, and on tokens (n, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.on_maps = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8)
        self.on_tokens, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x)).permute(0, 2, 3, 1)
        x = torch.relu(self.on_maps(x)).flatten(1, 2)
        return self.head(torch.relu(self.on_tokens(x)).mean(1))


def _tokens():
    torch.manual_seed(0)
    net = _Tokens().eval()
    images = torch.randn(300, *nets.SHAPE, generator=torch.Generator().manual_seed(0))
    names = ["on_maps", "on_tokens"]
    masks = weight_masks({n: net.get_parameter(f"{n}.weight").detach().abs() for n in names}, dict.fromkeys(names, 0.6))
    return net, images, masks


def test_output_curvature_of_a_linear_layer_on_maps_is_one_number_for_each_output():
    net, images, _ = _tokens()
    found = obs.output_curvature(net, images)
    assert {n: len(v) for n, v in found.items()} == {"stem": 8, "on_maps": 8, "on_tokens": 12, "head": 5}
    with torch.no_grad():  # an output of no use has none, though a row of the map with its number has
        net.get_submodule("on_tokens").weight[:, 3] = 0.0
    found = obs.output_curvature(net, images)
    assert float(found["on_maps"][3]) == 0.0
    assert bool((found["on_maps"][[0, 1, 2, 4, 5, 6, 7]] > 0).any())


def test_layers_too_large_for_obs_saliency_keep_their_masks_and_that_is_said(monkeypatch, caplog):
    net, images, masks = _tokens()
    monkeypatch.setattr(obs, "MOST_WORK", 0)
    chosen = obs.chosen_masks(net, masks, images)
    assert all(torch.equal(chosen[n], masks[n]) for n in masks)
    assert all(f"{n}: too large for OBS saliency" in caplog.text for n in masks if not masks[n].all())


def test_connections_of_linear_layers_on_tokens_and_maps_are_chosen_and_reconstructed():
    net, images, masks = _tokens()
    chosen = obs.chosen_masks(net, masks, images)
    assert any(not torch.equal(chosen[n], masks[n]) for n in masks)
    assert all(int(chosen[n].sum()) == int(masks[n].sum()) for n in masks)
    plain = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.items():
            plain.get_parameter(f"{name}.weight").mul_(mask)
        lost = [float((plain(images) - net(images)).square().mean())]
        for which in (masks, chosen):
            found = sequential_masked(net, which, images)
            assert all((found.get_parameter(f"{n}.weight")[~m.bool()] == 0).all() for n, m in which.items())
            lost.append(float((found(images) - net(images)).square().mean()))
    assert lost[1] < 0.7 * lost[0]
    assert lost[2] < lost[1]


def test_dearest_keeps_connections_where_they_cost_most():
    costs = {"a": torch.tensor([[9.0, 8.0, 1.0, 7.0]]), "b": torch.tensor([[2.0, 0.5], [0.1, 6.0]])}
    assert dearest(costs, 0.5) == {"a": 3, "b": 1}
