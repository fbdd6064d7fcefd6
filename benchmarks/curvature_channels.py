"""Scores of channels beside what they foretell: the loss with each channel alone removed.

The loss is judged on training images varied as in training, in float, without compensation and without new BatchNorm statistics.
A network sure of its training images has next to no loss there, so that few images decide, and which of them were looked at
matters as much as the score: scores are made on the first half of the images (at most `CURVATURE_IMAGES`), and "unseen" compares
them with the losses on the other half alone. `oracle` is what the losses themselves, on one half, say of those on the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import units_of
from curvature_cost import batches
from edge_compress.pipeline.axes.coupling import Coupling
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.network.exact_mode import weight_layers
from edge_compress.pipeline.network.weights import digest_of
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.score import criteria as hasa
from edge_compress.pipeline.score import curvature
from edge_compress.pipeline.score.ranking import CURVATURE_IMAGES, UnitScores
from edge_compress.pipeline.score.removal import TEMPERATURE, removal_curvature
from oracles import CHUNK, leave_one_out, logit_changes
from safetensors.torch import load_file, save
from scipy.stats import spearmanr
from torch import Tensor

Values = Mapping[str, Tensor]  # layer or group -> values
Row = dict[str, object]


def agreement(found: Values, exact: Values) -> tuple[float, float]:
    """Spearman's coefficient within layers or groups (their mean) and pooled."""
    within = [float(spearmanr(found[n].flatten(), exact[n].flatten()).statistic) for n in exact]
    pooled = spearmanr(*(torch.cat([values[n].double().flatten() for n in exact]) for values in (found, exact)))
    return statistics.mean(within), float(pooled.statistic)


def unit_estimates(coupling: Coupling, inputs: Tensor, labels: Tensor) -> Iterator[tuple[str, Values]]:
    """Scores of all units by name: the product's at every lambda, and what they were chosen among."""
    net, units = coupling.walk.captured.module, units_of(coupling)
    ours = UnitScores(net, units, inputs, "hasa", 0)
    yield from ((f"hasa, lambda {lam}", ours.at(lam)) for lam in ours.grid())
    published = UnitScores(net, units, inputs, "published", 0)
    yield from ((f"seed, lambda {lam:.3g}", published.at(lam)) for lam in published.grid()[2:4])
    yield from ((name, UnitScores(net, units, inputs, name, 0).at(0.0)) for name in ("magnitude", "random"))
    images = batches(inputs)
    for draws in (1, 2, 8):
        yield f"v'Gv, {draws} x signs", {g: v.cpu() for g, v in removal_curvature(net, units, images, draws).items()}
    yield from linearised(coupling, inputs, labels)
    weights = {name: layer.weight for name, layer in weight_layers(net).items()}
    diagonal = curvature.gauss_newton(net, images)
    for lam in (0.5, 1.0):
        scores = hasa.score("hasa", weights, diagonal, lam)
        yield f"sum over connections, lambda {lam}", {g: hasa.unit_scores(scores, of) for g, of in units.items()}


def linearised(coupling: Coupling, inputs: Tensor, labels: Tensor) -> Iterator[tuple[str, Values]]:
    """The loss and the divergence from the dense network, both with logits that fall along a straight line as the unit goes."""
    logits, falls = logit_changes(coupling, inputs)
    dense = F.cross_entropy(logits, labels)
    loss, divergence = {}, {}
    for group, fall in falls.items():
        without = logits[:, None] - fall  # (n, units, classes)
        target = labels[:, None].expand(without.shape[:2])
        loss[group] = (
            F.cross_entropy(without.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(0) - dense
        )
        whole, rest = (logits / TEMPERATURE).log_softmax(1)[:, None], (without / TEMPERATURE).log_softmax(2)
        divergence[group] = (whole.exp() * (whole - rest)).sum(2).mean(0)
    yield "loss, linearised logits", loss
    yield f"divergence at temperature {TEMPERATURE:g}, linearised logits", divergence


def losses_without(
    coupling: Coupling, inputs: Tensor, labels: Tensor, folder: Path, ui: Progress
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `leave_one_out`; kept in the folder, by what it depends on."""
    facts = {"inputs": inputs, "labels": labels, **coupling.walk.captured.module.state_dict()}
    units = units_of(coupling)
    path = folder / f"leave-one-out-{digest_of(facts)[:16]}.safetensors"
    if not path.is_file():
        with ui.bar("leave-one-channel-out", -(-len(inputs) // CHUNK) * sum(map(len, units.values()))) as bar:
            dense, without = leave_one_out(coupling, inputs, labels, bar.advance)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, save({"dense": dense, **{f"without {group}": losses for group, losses in without.items()}}))
    found = load_file(path)
    return found["dense"], {group: found[f"without {group}"] for group in units}


def channels_part(coupling: Coupling, inputs: Tensor, labels: Tensor, folder: Path, ui: Progress) -> dict[str, object]:
    """Scores beside the loss with each unit removed alone.

    Args:
        coupling: of the captured network.
        inputs: training images (n, C, H, W), augmented.
        labels: (n,).
        folder: where the losses are kept.
        ui: told of the work.
    """
    kinds = {group.name: "stream" if group.kind == "stream" else "inner" for group in coupling.groups}
    dense, without = losses_without(coupling, inputs, labels, folder, ui)
    seen = min(CURVATURE_IMAGES, len(inputs) // 2)

    def increase(part: slice) -> dict[str, Tensor]:
        return {group: losses[:, part].mean(1) - dense[part].mean() for group, losses in without.items()}

    whole, unseen = increase(slice(None)), increase(slice(seen, None))
    rows: list[Row] = []
    for name, found in unit_estimates(coupling, inputs[:seen], labels[:seen]):
        row: Row = {"score": name}
        for kind in ("inner", "stream"):
            chosen = {g: v for g, v in whole.items() if kinds[g] == kind}
            row[kind] = agreement(found, chosen)[0] if chosen else None
        row["within"], row["pooled"] = agreement(found, whole)
        row["unseen within"], row["unseen pooled"] = agreement(found, unseen)
        rows.append(row)
    within, pooled = agreement(increase(slice(seen)), unseen)
    return {
        "images": len(inputs),
        "scored_on": seen,
        "dense_loss": float(dense.mean()),
        "units": {g: [round(float(v), 6) for v in values] for g, values in whole.items()},
        "oracle": {"unseen within": within, "unseen pooled": pooled},
        "rows": rows,
    }
