r"""The full recipe of the paper: scores, thresholds by search, then training under masks that change, on one GPU or on many.

    torchrun --nproc-per-node 8 benchmarks/paper.py --config benchmarks/paper-resnet50.toml \
        --data imagefolder:imagenet --weights resnet50.pt --out runs/paper

The figures of the paper were not reproduced here: this recipe has been run on small stand-in images alone, on the CPU. What it
does on ImageNet is for whoever runs it to say.

Every process works on its share of the images; curvature, rewards and gradients are means over all of them, and masks and weights
are compared after each step that makes them. Without torchrun one process does it all. FOLDER gets paper.json, the masks and the
trained weights; the same command resumes, with the same number of processes. It has to be one folder for all machines.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import paper_allocation
import paper_recipe
import torch
from edge_compress.pipeline.axes.capture import Captured, capture
from edge_compress.pipeline.codec import to_json
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.data.splits import Split
from edge_compress.pipeline.errors import EdgeCompressError, InputError
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.finetune.dynamic_masks import dynamic
from edge_compress.pipeline.finetune.training import FinetuneSettings, Step, finetune
from edge_compress.pipeline.finetune.world import World
from edge_compress.pipeline.network.compute import fast_bfloat16
from edge_compress.pipeline.network.weights import digest_of
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.score.mask_knobs import selections
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.task.load import Loaded, load_subject
from edge_compress.pipeline.task.samples import image_data, training_inputs
from edge_compress.pipeline.types import Epoch, Preprocess
from paper_allocation import Masks
from paper_recipe import Recipe
from process_group import SharedScores, opened
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

REMASK_IMAGES = 500  # training images that the gradients of masked connections are taken on
REPORT, RECIPE, MASKS, WEIGHTS = "paper.json", "recipe.json", "masks.safetensors", "weights.safetensors"
HELP = (__doc__ or "").replace("\n\n    torchrun", "\n\n\b\n    torchrun")  # the command keeps its lines


def run(recipe: Recipe, config: Config, out: Path, world: World, ui: Progress) -> dict[str, Any]:
    """The whole recipe; what goes into the report. Every rank calls it, rank 0 writes files."""
    loaded = load_subject(config)
    if loaded.untrained:
        raise InputError("--weights", found="none", expected="the state dict of a trained network", do="train it first")
    data, prep = loaded.images, loaded.subject.preprocess
    claim(out, settings_of(recipe, config, loaded, world), world)
    captured = capture(loaded.module, loaded.example)
    net = captured.module.to(world.device)
    dense = accuracy(net, data.test, prep, world)
    ui.say(f"dense: {dense:.2f} %")
    masks, lam = masks_of(recipe, config, loaded, captured, out, world, ui)
    student = copy.deepcopy(net)
    paper_allocation.put(net, student, masks)
    history = train(recipe, config, loaded, net, student, masks, out, world, ui)
    found = {name: student.get_parameter(f"{name}.weight").detach() != 0 for name in masks}
    left, size = sum(int(m.sum()) for m in found.values()), sum(m.numel() for m in found.values())
    report = {
        "command": shlex.join(["python", *map(relative, sys.argv)]),
        "recipe": json.loads((out / RECIPE).read_text(encoding="utf-8")) if world.rank == 0 else {},
        "processes": world.size,
        "device": world.device,
        "torch": torch.__version__,
        "dense": {"top1": dense},
        "top1": accuracy(student, data.test, prep, world),
        "samples": len(data.test),
        "sparsity": 100.0 * (1.0 - left / size),
        "lambda": lam,
        "masks_sha256": {"start": digest_of(masks), "end": digest_of(found)},
        "epochs": to_json(history),
    }
    if world.rank == 0:
        atomic_write(out / WEIGHTS, save({k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}))
        atomic_write(out / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def settings_of(recipe: Recipe, config: Config, loaded: Loaded, world: World) -> dict[str, Any]:
    """All that the result depends on; without paths."""
    shared = {name: getattr(config, name) for name in paper_recipe.SHARED if name not in ("weights", "accelerator")}
    shared |= {"model": relative(config.model), "data": relative(config.data)}
    shared |= {"model_sha256": loaded.subject.model_sha256, "data_sha256": loaded.images.info.sha256, "processes": world.size}
    return json.loads(json.dumps(asdict(recipe) | shared))  # type: ignore[no-any-return] # as it is read back


def claim(out: Path, settings: dict[str, Any], world: World) -> None:
    """The folder is this recipe's from here on.

    Raises:
        InputError: it holds another one.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / RECIPE
    world.agree("settings", json.dumps(settings, sort_keys=True))
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    world.agree("output folder", json.dumps(known, sort_keys=True))  # all have looked before rank 0 writes
    if known is not None and known != settings:
        name = next(n for n in settings if n not in known or known[n] != settings[n])
        found, expected = f"a run with {name} {known.get(name)!r}", f"{settings[name]!r}"
        raise InputError(f"--out {out.name}", found=found, expected=expected, do="name another folder, or repeat that command")
    if known is None and world.rank == 0:
        atomic_write(path, json.dumps(settings, indent=1) + "\n")


def masks_of(
    recipe: Recipe, config: Config, loaded: Loaded, captured: Captured, out: Path, world: World, ui: Progress
) -> tuple[Masks, float]:
    """The masks to start from and the lambda of their scores: kept ones, or by search."""
    kept = read_masks(out / MASKS)
    world.agree("kept masks", {} if kept is None else kept[0])
    if kept is not None:
        return kept
    data, prep = loaded.images, loaded.subject.preprocess
    inputs = training_inputs(image_data(data, prep).train, recipe.images, config.seed)
    scores = SharedScores(captured.module, inputs, config.score, config.seed, world)
    how = (config.search, config.evaluations, config.seed)
    split = data.search.head(recipe.reward_images)
    with ui.stage("masks"):
        share, lam = recipe.sparsity / 100.0, config.lambda_
        masks, lam = paper_allocation.allocated(captured, scores, inputs, split, prep, share, how, lam, world, ui.say)
    if world.rank == 0:
        tensors = {name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}
        atomic_write(out / MASKS, save(tensors, {"lambda": json.dumps(lam)}))
    return masks, lam


def read_masks(path: Path) -> tuple[Masks, float] | None:
    """Masks and lambda as `masks_of` keeps them; None where there is no whole file."""
    try:
        with safe_open(path, "pt") as file:
            lam = float(json.loads(file.metadata()["lambda"]))
            return {key: file.get_tensor(key).bool() for key in file.keys()}, lam  # noqa: SIM118 - the file is no mapping
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def train(
    recipe: Recipe,
    config: Config,
    loaded: Loaded,
    net: nn.Module,
    student: nn.Module,
    masks: Masks,
    out: Path,
    world: World,
    ui: Progress,
) -> tuple[Epoch, ...]:
    """The masked network trained in place, its masks fixed or exchanged after each epoch."""
    data, prep = loaded.images, loaded.subject.preprocess
    how = FinetuneSettings(
        epochs=config.finetune_epochs,
        seed=config.seed,
        learning_rate=recipe.learning_rate,
        batch=recipe.batch,
        weight_decay=recipe.weight_decay,
        search_samples=recipe.reward_images,
        autocast=fast_bfloat16(world.device),
        device=world.device,
    )
    own, fixed = ({f"{name}.weight": m.to(world.device) for name, m in d.items()} for d in (masks, selections(net)))
    remask = None
    if config.mask == "dynamic":
        images = training_inputs(image_data(data, prep).train, REMASK_IMAGES, config.seed + 4)
        remask = dynamic(own, fixed, net, images, how.epochs)  # by each process, on the same images
    teacher = net if recipe.distill_weight > 0 else None
    with ui.bar("training", how.epochs * -(-len(data.train) // how.batch)) as bar:

        def tell(event: Step | Epoch) -> None:
            if isinstance(event, Epoch):
                ui.say(f"  epoch {event.epoch}: loss {event.loss:.3f}, top-1 on the search split {event.search_value:.2f}")
            else:
                bar.advance(1, f"loss {event.loss:.3f}")

        return finetune(
            student,
            teacher,
            image_data(data, prep),
            Classification(recipe.distill_weight),
            how,
            folder=out,
            masks=own | fixed,
            remask=remask,
            progress=tell,
            world=world,
        )


def accuracy(net: nn.Module, split: Split, prep: Preprocess, world: World) -> float:
    """Top-1 in percent over all images of a split, shared out."""
    share = world.share(len(split))
    own = replace(split, indices=split.indices[share.start : share.stop])
    return world.mean_of(top1(logits(net, own, prep, device=world.device), own.labels), len(own))


def relative(argument: str) -> str:
    """An argument without this machine's folders: an absolute path becomes its last part, also in `npz:/data/file.npz`."""
    return re.sub(r"(^|[:=])/(?:[^/:]*/)*", r"\1", argument)


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--config",
    "recipe_file",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.toml",
    help="The recipe; options win.",
)
@click.option("--model", metavar="SPEC", help="As for edge-compress.")
@click.option("--weights", metavar="FILE", help="Trained state dict, as for edge-compress.")
@click.option("--data", metavar="SPEC", help="As for edge-compress: imagefolder:DIR with train and val.")
@click.option("--sparsity", type=float, metavar="PERCENT", help="Share of all connections that go.")
@click.option("--finetune-epochs", type=int, metavar="COUNT", help="Of training.")
@click.option("--batch", type=int, metavar="COUNT", help="Images for each step, over all processes.")
@click.option("--learning-rate", type=float, metavar="RATE", help="Of Adam, at its highest.")
@click.option("--weight-decay", type=float, metavar="RATE", help="Decoupled.")
@click.option("--distill-weight", type=float, metavar="SHARE", help="Of the dense network's answers in the loss.")
@click.option("--images", type=int, metavar="COUNT", help="Training images for curvature and BatchNorm statistics.")
@click.option("--reward-images", type=int, metavar="COUNT", help="Of the search split, at most.")
@click.option("--evaluations", type=int, metavar="COUNT", help="Of the search.")
@click.option("--accelerator", metavar="NAME", help="auto, cpu or cuda.")
@click.option("--seed", type=int, metavar="NUMBER", help="Of images, search and training.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="Report, masks, weights, checkpoint."
)
def main(recipe_file: Path, out: Path, **given: Any) -> None:
    """Run the recipe."""
    try:
        recipe, config = paper_recipe.load(recipe_file, given)
        with opened(config.accelerator) as world:
            ui = Progress() if world.rank == 0 else Progress(io.StringIO())
            report = run(recipe, config, out, world, ui)
            ui.say(f"{report['top1']:.2f} % at {report['sparsity']:.2f} % sparsity, dense {report['dense']['top1']:.2f} %")
    except EdgeCompressError as error:
        rank = os.environ.get("RANK")
        click.echo(f"paper.py{f' (process {rank})' if rank else ''}: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
