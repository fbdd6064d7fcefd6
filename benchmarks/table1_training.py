"""The methods of the table with training: what each one prunes, and when. All train equally long, with the same teacher.

The user gives a trained network, so that is where every method starts, and what the lottery tickets are rewound to (as for
pretrained networks in Chen et al. 2020, arXiv 2007.12223): there is no earlier checkpoint to go back to.

Equally long means in all: lottery tickets find their masks by training, and what that takes is missing in the end. The rows that
end in `-long` are outside of this rule, for a table of their own: tickets with all the rounds of the literature before they train
as long as the others, and AMP-HASA trained as long as the iterative tickets are in all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from edge_compress.pipeline.finetune.training import FinetuneSettings, Remask, Step, batches, finetune
from edge_compress.pipeline.network.compute import fast_bfloat16
from edge_compress.pipeline.score.mask_knobs import selections
from edge_compress.pipeline.score.masks import removed_count, weight_masks
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import image_data
from edge_compress.pipeline.types import Epoch
from table1_bench import Bench, Masks, Pruned
from table1_methods import ONE_SHOT, one_shot
from torch import Tensor, nn

REGROWN = 0.2  # share of a layer's weights that sparse momentum moves in the first epoch; falls along a line to 0
MOMENTUM = 0.9  # of the gradient's running mean
MOMENTUM_BATCHES = 20  # the running mean is taken over
TICKET_RATE = 0.2  # share of what is left that a round of iterative magnitude pruning removes, in the literature
SEARCHING = 0.4  # share of all epochs that a ticket's mask may take
ROUND_EPOCHS = 1  # of training in a round

Scores = Mapping[str, Tensor]


@dataclass(frozen=True)
class Training:
    """How long and where."""

    epochs: int
    folder: Path  # checkpoints: an interrupted training goes on from the last epoch
    tell: Callable[[float, str], None]  # share done, what is worth knowing


def trained(bench: Bench, start: Pruned, training: Training, name: str, remask: Remask | None = None) -> nn.Module:
    """A network trained under its masks (Adam, cosine, the dense network as its teacher), and BatchNorm re-estimated."""
    folder = training.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    student = copy.deepcopy(start.net)
    masks = parameters({**selections(student), **start.masks})

    def tell(event: Step | Epoch) -> None:
        if isinstance(event, Step):
            training.tell(event.step / event.steps, f"loss {event.loss:.3f}")

    settings = FinetuneSettings(training.epochs, bench.seed, autocast=fast_bfloat16(bench.device), device=bench.device)
    samples = image_data(bench.data, bench.prep)
    finetune(
        student, bench.teacher, samples, Classification(), settings, folder=folder, masks=masks, remask=remask, progress=tell
    )
    bench.restore(student)
    return student


def fine_tuned(method: str) -> Callable[[Bench, float, Training], nn.Module]:
    """Prune without training, then train under the masks."""

    def run(bench: Bench, sparsity: float, training: Training) -> nn.Module:
        return trained(bench, one_shot(bench, method, sparsity), training, "finetune")

    return run


def sparse_momentum(bench: Bench, sparsity: float, training: Training) -> nn.Module:
    """Dettmers & Zettlemoyer 2019 (arXiv 1907.04840): after each epoch the smallest weights of each layer move.

    Freed places are shared out over the layers by the mean momentum of their weights, and filled where the momentum of missing
    weights is largest. The momentum is the gradient's running mean over 20 batches at the epoch's end: the optimizer has none
    for weights that are missing. It starts from uniform magnitude masks of the trained network.
    """
    start = one_shot(bench, "magnitude-uniform", sparsity)

    def remask(epoch: int, student: nn.Module) -> dict[str, Tensor]:
        weights = {name: student.get_parameter(f"{name}.weight").detach() for name in start.masks}
        moved = REGROWN * (1.0 - epoch / training.epochs)
        masks = redistribute(weights, momentum(bench, student, list(weights), epoch), moved)
        return parameters({**selections(bench.net), **masks})

    return trained(bench, start, training, "finetune", remask)


def momentum(bench: Bench, student: nn.Module, layers: list[str], epoch: int) -> dict[str, Tensor]:
    """The gradient's running mean by layer, missing weights included; nothing of the student changes."""
    settings, device = FinetuneSettings(1, bench.seed), next(student.parameters()).device
    found = {name: torch.zeros_like(student.get_parameter(f"{name}.weight")) for name in layers}
    train = image_data(bench.data, bench.prep).train
    for turn, (batch,) in enumerate(batches(train, settings, 10_000 + epoch)):
        if turn == MOMENTUM_BATCHES:
            break
        loss = F.cross_entropy(student(batch.inputs.to(device)), batch.targets.to(device))
        wanted = [student.get_parameter(f"{name}.weight") for name in layers]
        for name, gradient in zip(layers, torch.autograd.grad(loss, wanted), strict=True):
            found[name].mul_(MOMENTUM).add_(gradient, alpha=1.0 - MOMENTUM)
    return found


def redistribute(weights: Scores, momenta: Scores, share: float) -> Masks:
    """Masks after one step of sparse momentum; as many connections stay as before.

    Args:
        weights: layer -> weight, 0 where it is missing.
        momenta: layer -> mean gradient.
        share: of each layer's weights that are freed, the smallest.

    Returns:
        Layer -> bool, True stays.
    """
    masks = {name: (weight != 0).contiguous() for name, weight in weights.items()}  # in training weights lie channels last
    freed = {}
    for name, weight in weights.items():
        freed[name] = removed_count(int(masks[name].sum()), share)
        smallest = torch.where(masks[name], weight.abs(), torch.inf).flatten().topk(freed[name], largest=False).indices
        masks[name].view(-1)[smallest] = False
    # A layer's part is its mean momentum over the weights it has.
    mean = {n: float(momenta[n].abs()[weights[n] != 0].mean()) if bool((weights[n] != 0).any()) else 0.0 for n in weights}
    left = sum(freed.values())
    room = {name: int((~mask).sum()) for name, mask in masks.items()}
    grown = dict.fromkeys(masks, 0)
    while left > 0:
        open_ = {name: mean[name] for name in masks if room[name] > grown[name]}
        total = sum(open_.values())
        parts = {name: (value / total if total > 0 else 1.0 / len(open_)) * left for name, value in open_.items()}
        before = left
        for name, part in parts.items():
            more = min(int(part), room[name] - grown[name])
            grown[name] += more
            left -= more
        if left == before:  # less than one for each: to the layers with the largest parts
            for name in sorted(parts, key=lambda n: -parts[n])[:left]:
                grown[name] += 1
                left -= 1
    for name, mask in masks.items():
        candidates = torch.where(mask, -1.0, momenta[name].abs()).flatten()
        mask.view(-1)[candidates.topk(grown[name]).indices] = True
    return masks


def ticket_one_shot(bench: Bench, sparsity: float, training: Training) -> nn.Module:
    """Frankle & Carbin 2019, one-shot: train dense, prune by magnitude over all layers, rewind what stays, train."""
    searching = searching_epochs(training.epochs)
    return _ticket_one_shot(bench, sparsity, training, searching, training.epochs - searching)


def ticket_one_shot_long(bench: Bench, sparsity: float, training: Training) -> nn.Module:
    """The same, trained twice as long: dense, and then again."""
    return _ticket_one_shot(bench, sparsity, training, training.epochs, training.epochs)


def _ticket_one_shot(bench: Bench, sparsity: float, training: Training, searching: int, epochs: int) -> nn.Module:
    whole = {name: torch.ones_like(w, dtype=torch.bool) for name, w in bench.weights.items()}
    shared = Training(searching, training.folder.parent, training.tell)
    dense = trained(bench, Pruned(copy.deepcopy(bench.net), whole), shared, f"lottery-dense-{searching}-seed{bench.seed}")
    masks = weight_masks(_magnitudes(bench, dense), sparsity)
    return trained(bench, Pruned(bench.masked(masks), masks), replace(training, epochs=epochs), "finetune")


def ticket_iterative(bench: Bench, sparsity: float, training: Training) -> nn.Module:
    """Frankle & Carbin 2019, iterative: rounds of an epoch, each of which takes an equal share of what is left; then train."""
    count = searching_epochs(training.epochs) // ROUND_EPOCHS
    reached = [1.0 - (1.0 - sparsity) ** ((i + 1) / count) for i in range(count)]
    return _ticket_iterative(bench, reached, training, training.folder, training.epochs - count * ROUND_EPOCHS)


def ticket_iterative_long(bench: Bench, sparsity: float, training: Training) -> nn.Module:
    """The same with rounds that take a fifth of what is left, on top of the epochs of all.

    Rounds are shared by all sparsities; the last one takes what the sparsity asks for.
    """
    place = training.folder.parent / f"lottery-seed{bench.seed}"
    return _ticket_iterative(bench, list(rounds(sparsity)), training, place, training.epochs)


def _ticket_iterative(bench: Bench, reached: list[float], training: Training, place: Path, epochs: int) -> nn.Module:
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in bench.weights.items()}
    short = Training(ROUND_EPOCHS, place, training.tell)
    for number, share in enumerate(reached):
        state = trained(bench, Pruned(bench.masked(masks), masks), short, f"round-{number}")
        magnitudes = {name: torch.where(masks[name], w, -1.0) for name, w in _magnitudes(bench, state).items()}
        masks = weight_masks(magnitudes, share)
    return trained(bench, Pruned(bench.masked(masks), masks), replace(training, epochs=epochs), "finetune")


def searching_epochs(epochs: int) -> int:
    """Of all epochs, those a ticket's mask is found in."""
    return min(max(round(SEARCHING * epochs), ROUND_EPOCHS), epochs)


def rounds(sparsity: float) -> Iterator[float]:
    """Sparsities after each round of iterative magnitude pruning as in the literature, the last one as asked for."""
    left = 1.0
    while left * (1.0 - TICKET_RATE) > 1.0 - sparsity + 1e-9:
        left *= 1.0 - TICKET_RATE
        yield 1.0 - left
    yield sparsity


def as_long_as_tickets(bench: Bench, sparsity: float, training: Training) -> nn.Module:
    """AMP-HASA, trained for the epochs that iterative tickets take with all their rounds."""
    epochs = total_epochs("amp-hasa-long", sparsity, training.epochs)
    return trained(bench, one_shot(bench, "amp-hasa", sparsity), replace(training, epochs=epochs), "finetune")


def total_epochs(method: str, sparsity: float, epochs: int) -> int:
    """Of a row of the table, all its training counted."""
    if method not in LONGER:
        return epochs
    return 2 * epochs if method == "lottery-one-shot-long" else epochs + ROUND_EPOCHS * len(list(rounds(sparsity)))


def parameters(masks: Masks) -> dict[str, Tensor]:
    """Masks by parameter, as training wants them."""
    return {f"{name}.weight": mask for name, mask in masks.items()}


def _magnitudes(bench: Bench, net: nn.Module) -> dict[str, Tensor]:
    return {name: net.get_parameter(f"{name}.weight").detach().abs() for name in bench.weights}


FINE_TUNED: dict[str, Callable[[Bench, float, Training], nn.Module]] = {
    **{name: fine_tuned(name) for name in ONE_SHOT},
    "sparse-momentum": sparse_momentum,
    "lottery-one-shot": ticket_one_shot,
    "lottery-iterative": ticket_iterative,
}
LONGER: dict[str, Callable[[Bench, float, Training], nn.Module]] = {
    "lottery-one-shot-long": ticket_one_shot_long,
    "lottery-iterative-long": ticket_iterative_long,
    "amp-hasa-long": as_long_as_tickets,
}
