r"""How good and how dear the estimators of curvature are, and how well the scores of channels foretell what removal costs.

    python benchmarks/curvature.py --model resnet_cifar.py:resnet20 --weights resnet20.pt --data npz:cifar.npz \
        --out benchmarks/results/curvature.json

Four parts, each written into the same file when it is done and left as it is by a call with other `--parts`:

    hessian   a network of a few hundred weights on scikit-learn's digits, float64: every estimator beside the second difference
              of the loss, one connection at a time
    fisher    the embedded digits network: the same beside the exact Gauss-Newton diagonal, from the gradients of every class
    channels  the given model: scores of channels beside the loss with each channel alone removed (see curvature_channels)
    cost      the given model: processor time of each whole-model estimate beside plain gradients (forward and backward) of the
              same images, interleaved; and peak memory beside a training step's, each in a fresh process

Spearman's coefficient: "within" is the mean over layers or groups, "pooled" ranks all connections or units together. Costs count
gradients of all images: one is a forward and a backward pass, a forward pass alone a third.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import finite_differences
import torch
import torch.nn.functional as F
from classifier import coupling_of, units_of
from curvature_channels import agreement, channels_part
from curvature_cost import Work, gradients, memory, of_connections, of_differences, of_units, ratio, times, training_step
from edge_compress.pipeline import config as settings
from edge_compress.pipeline.axes.coupling import Coupling
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.digits import MEAN, STD, DigitsResNet
from edge_compress.pipeline.data.splits import DataSet
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.finetune.digits import EPOCHS, train_digits
from edge_compress.pipeline.network.exact_mode import Batch, weight_layers
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.score import curvature
from edge_compress.pipeline.score.ranking import CURVATURE_IMAGES
from edge_compress.pipeline.task.load import load_subject
from edge_compress.pipeline.task.samples import image_data, training_inputs
from edge_compress.pipeline.types import Preprocess
from oracles import exact_gauss_newton, second_differences
from torch import Tensor, fx, nn

PARTS = ("hessian", "fisher", "channels", "cost")
DIGITS = Preprocess(MEAN, STD, "shift")
Values = Mapping[str, Tensor]  # layer or group -> values
Row = dict[str, object]


def by_labels(net: nn.Module, images: list[Batch], draws: int, seed: int) -> dict[str, Tensor]:
    """The Gauss-Newton diagonal from labels drawn from the network instead of random signs: one gradient of all images a draw."""
    torch.manual_seed(seed)
    total: dict[str, Tensor] = {}
    for _ in range(draws):
        with torch.no_grad():
            drawn = [(x, torch.multinomial(net(x).softmax(1), 1).squeeze(1)) for x, _ in images]
        for name, found in curvature.gauss_newton(net, drawn, empirical=True).items():
            total[name] = total.get(name, 0) + found / draws
    return total


def estimators(
    net: nn.Module, images: list[Batch], seeds: int, probes: Sequence[int]
) -> Iterator[tuple[str, float, list[Values]]]:
    """Of every estimator its name, its cost in gradients of all images, and its estimates, one for each seed."""
    layers, draws = weight_layers(net), (1, 4, 16)
    for count in probes:
        found: list[Values] = [
            finite_differences.gradient_difference(net, images, count, seed=s) for s in range(seeds if count < 64 else 1)
        ]
        yield f"gradient difference, {count} probes", 2.0 * count, found
    found = [finite_differences.gradient_difference(net, images, 16, seed=s, absolute=True) for s in range(seeds)]
    yield "mean of |v Hv|, 16 probes", 32.0, found
    for count in draws:
        yield (
            f"Gauss-Newton, {count} x signs",
            (1 + 2 * count) / 3,
            [curvature.gauss_newton(net, images, count, s) for s in range(seeds)],
        )
    for count in draws:
        yield f"Gauss-Newton, {count} x labels", (1 + 2 * count) / 3, [by_labels(net, images, count, s) for s in range(seeds)]
    yield "empirical Fisher", 1.0, [curvature.gauss_newton(net, images, empirical=True)]
    local = curvature.local_hessian(net, images)
    yield "layer-local Hessian", 1 / 3, [{n: finite_differences.local_diagonal(h, layers[n].weight) for n, h in local.items()}]
    yield "magnitude", 0.0, [{n: layer.weight.detach().abs() for n, layer in layers.items()}]


def against(exact: Values, net: nn.Module, images: list[Batch], seeds: int, probes: Sequence[int]) -> list[Row]:
    """One row for each estimator; means over seeds."""
    rows: list[Row] = []
    for name, cost, drawn in estimators(net, images, seeds, probes):
        within, pooled = (statistics.mean(values) for values in zip(*(agreement(found, exact) for found in drawn), strict=True))
        rows.append({"estimator": name, "gradients": cost, "seeds": len(drawn), "within": within, "pooled": pooled})
    return rows


def tiny_network(data: DataSet, steps: int) -> nn.Module:
    """A smooth network (its Hessian is not its Gauss-Newton matrix) of 644 weights, trained on the digits; float64, eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ELU()),
            *(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ELU()),
            *(nn.Flatten(), nn.Linear(32, 10)),
        ).train()
    inputs, labels = (
        training_inputs(image_data(data, DIGITS).train, len(data.train), 0),
        torch.from_numpy(data.train.labels.copy()),
    )
    optimizer, generator = torch.optim.Adam(net.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(0, len(labels), (128,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
    return net.double().eval()


def hessian_part(quick: bool, ui: Progress) -> dict[str, object]:
    """Estimators beside second differences of the loss."""
    data = load_data("digits", seed=0)
    count = 100 if quick else 1000
    net = tiny_network(data, 100 if quick else 1000)
    images = [
        (training_inputs(image_data(data, DIGITS).train, count, 1).double(), torch.from_numpy(data.train.labels[:count].copy()))
    ]
    ui.say("second differences ...")
    exact = second_differences(net, images[0])
    weights = sum(h.numel() for h in exact.values())
    return {"images": count, "weights": weights, "rows": against(exact, net, images, 1 if quick else 5, (1, 4, 16, 64, 256))}


def fisher_part(quick: bool, ui: Progress) -> dict[str, object]:
    """Estimators beside the exact Gauss-Newton diagonal."""
    data = load_data("digits", seed=0)
    count, net = (4 if quick else 100), DigitsResNet()
    with ui.bar("training the digits network", EPOCHS) as bar:
        train_digits(net, data, DIGITS, 0, epochs=1 if quick else EPOCHS, progress=lambda epoch: bar.advance())
    images = [(training_inputs(image_data(data, DIGITS).train, count, 1), torch.from_numpy(data.train.labels[:count].copy()))]
    with ui.bar("exact Gauss-Newton", count) as bar:
        exact = exact_gauss_newton(net, images[0][0], bar.advance)
    weights = sum(h.numel() for h in exact.values())
    return {
        "images": count,
        "weights": weights,
        "rows": against(exact, net, images, 1 if quick else 3, (1,) if quick else (1, 4, 16, 64)),
    }


def cost_part(coupling: Coupling, inputs: Tensor, quick: bool, ui: Progress) -> dict[str, object]:
    """Time and memory of whole-model estimates."""
    # torch's own layers alone: the fresh processes cannot import a user's file
    net = fx.symbolic_trace(coupling.walk.captured.module)
    works: dict[str, Work] = {
        "gradients": gradients,
        "Gauss-Newton": of_connections,
        "v'Gv of units": partial(of_units, units_of(coupling)),
        "gradient difference": of_differences,
    }
    rounds = 2 if quick else 9
    with ui.bar("time", rounds + 1) as bar:
        taken = times(net, inputs, works, rounds, bar.advance)
    held = memory(net, inputs, {"training step": training_step, **works})
    rows: list[Row] = []
    for name in works:
        counted = 2 if name == "gradient difference" else 1
        middle, low, high = (value / counted for value in ratio(taken, name, "gradients"))
        growth = held[name]["increase_mib"] / held["training step"]["increase_mib"]
        rows.append(
            {
                "work": name,
                "gradients": counted,
                "time_ratio": middle,
                "quartiles": [low, high],
                "memory_ratio": growth,
                **held[name],
            }
        )
    return {"images": len(inputs), "rounds": rounds, "training_step": held["training step"], "rows": rows}


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    lines = ["| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
    for row in rows:
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in (row[key] for key in keys))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--model", default="digits-resnet", show_default=True, help="As in edge-compress.")
@click.option("--weights", default=None, help="As in edge-compress.")
@click.option("--data", default="digits", show_default=True, help="As in edge-compress.")
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Which of them.")
@click.option("--images", default=2000, show_default=True, help="Training images that removals are judged on.")
@click.option("--quick", is_flag=True, help="Few images and seeds: shows that it works, not what is better.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON to write.")
def main(model: str, weights: str | None, data: str, parts: str, images: int, quick: bool, out: Path) -> None:
    """Run the parts."""
    chosen = parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise click.UsageError(f"--parts: {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    ui = Progress()
    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    work: dict[str, Callable[[], dict[str, object]]] = {
        "hessian": lambda: hessian_part(quick, ui),
        "fisher": lambda: fisher_part(quick, ui),
    }
    if {"channels", "cost"} & set(chosen):
        loaded = load_subject(settings.load(None, {"targets": ("x86",), "model": model, "weights": weights, "data": data}))
        if loaded.untrained:
            ui.say("training the digits network ...")
            train_digits(loaded.module, loaded.images, loaded.subject.preprocess, 0, epochs=1 if quick else EPOCHS)
        coupling = coupling_of(loaded)
        count = 20 if quick else max(images, CURVATURE_IMAGES)
        inputs = training_inputs(image_data(loaded.images, loaded.subject.preprocess).train, count, 0)
        labels = torch.from_numpy(loaded.images.train.labels[: len(inputs)].copy())
        work["channels"] = lambda: channels_part(coupling, inputs[:images], labels[:images], out.with_suffix(".work"), ui)
        work["cost"] = lambda: cost_part(coupling, inputs[: 10 if quick else 300], quick, ui)
    for part in chosen:
        ui.say(f"{part} ...")
        found = {"command": shlex.join(["python", "benchmarks/curvature.py", *sys.argv[1:]]), **work[part]()}
        report[part] = found
        atomic_write(out, json.dumps(report, indent=1) + "\n")
        click.echo(f"\n{part}, {found['images']} images\n\n{table(found['rows'])}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
