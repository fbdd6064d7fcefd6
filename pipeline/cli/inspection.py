"""The command `inspect`. Imports only what `--help` needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from .output import echo, loading, stdout_kept_clean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from ..axes.inspect import Inspection

MOST_VALUES = 2**27  # in one input
SHOWN = 10  # groups and locked operations that the text names; --json has all


@click.command("inspect")
@click.option(
    "--model",
    metavar="SPEC",
    help="digits-resnet, torchvision:NAME, timm:NAME, FILE.py:FACTORY or package.module:FACTORY.  [default: digits-resnet]",
)
@click.option(
    "--weights", type=click.Path(path_type=Path), metavar="FILE", help="State dict.  [default: the network's initial weights]"
)
@click.option(
    "--checkpoint-key",
    metavar="NAME",
    help="Name of the state dict to take from a file of several.  [default: as in `compress`: averaged weights first]",
)
@click.option(
    "--image-size", type=click.IntRange(1, 4096), metavar="PIXELS", help="Height and width.  [default: the model's own, else 224]"
)
@click.option("--input-shape", metavar="C,H,W", help="Shape of one input, instead of --image-size, such as 1,28,28.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE.py",
    help="Instead of --model: calls its model() and datasets(), and tries loss and metric on a few samples.",
)
@click.option("--json", "as_json", is_flag=True, help="Print only the inspection, as JSON, on stdout.")
def inspect(
    model: str | None,
    weights: Path | None,
    checkpoint_key: str | None,
    image_size: int | None,
    input_shape: str | None,
    recipe: Path | None,
    as_json: bool,
) -> int:
    """Show what can be pruned of a network, what is locked, and why.

    Needs no device; with --model no data and no weights either. The share is that of the network's multiply-accumulates in
    operations that get cheaper when units of some group (channels, MLP units, heads, ...) are removed. It is proven on the
    network itself: half of the units of every group are removed, and the outputs compared with those of the same units set to
    zero.

    \b
    Examples:
      edge-compress inspect --model timm:vit_tiny_patch16_224
      edge-compress inspect --model net.py:detector --input-shape 3,320,320 --json
      edge-compress inspect --recipe recipe.py
          also checks shapes, determinism in eval mode, the loss, and the metric on a few samples
    """  # noqa: D301
    if recipe is not None and (model or weights or image_size or input_shape):
        raise InputError("--recipe with --model, --weights, --image-size or --input-shape", expected="the recipe alone")
    if checkpoint_key is not None and weights is None:
        raise InputError("--checkpoint-key without --weights", expected="the file that it is in", do="give --weights")
    shape = _shape(input_shape) if input_shape is not None else None
    if shape is not None and image_size is not None:
        raise InputError("--input-shape with --image-size", expected="one of them", do="leave one out")
    loading()
    with stdout_kept_clean():
        import torch

        from ..axes.inspect import inspect as inspected
        from ..task.models import example_shape, initial_network

        told: list[str] = []
        if recipe is not None:
            network, example, told = _opened(recipe)
            found = inspected(network, example, recipe.name)
        else:
            model = "digits-resnet" if model is None else model
            found_shape = shape or example_shape(model, image_size)
            network = initial_network(model, weights, channels=found_shape[0], checkpoint_key=checkpoint_key, told=told.append)
            generator = torch.Generator().manual_seed(0)
            found = inspected(network, torch.rand(1, *found_shape, generator=generator), model)
    echo(json.dumps(found.to_json(), indent=1) if as_json else "\n".join((*told, *_lines(found))))
    return 0


def _opened(file: Path) -> tuple[nn.Module, Any, list[str]]:
    """A recipe's network, inputs of one sample, and what was found when its functions were tried on a few samples."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from ..run.recipe_check import checked
    from ..task.recipe import read_recipe
    from ..task.recipe_data import data_of
    from ..task.recipe_task import open_recipe

    recipe = read_recipe(file)
    data = data_of(recipe, 0)
    network, task, signature, probe = open_recipe(recipe, data)
    example = pytree.tree_map_only(Tensor, lambda tensor: tensor[:1], probe)
    return network, example, checked(network, task, signature, data)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError("--input-shape", found=repr(text), expected="three numbers C,H,W, such as 3,224,224") from error
    if min(channels, height, width) < 1 or channels * height * width > MOST_VALUES:
        expected = f"numbers above 0, and at most {MOST_VALUES:,} values in all"
        raise InputError("--input-shape", found=repr(text)[:80], expected=expected)
    return channels, height, width


def _lines(found: Inspection) -> Iterator[str]:
    """The inspection as text."""
    yield f"{found.model}: {found.parameters:,} parameters, {found.macs:,} multiply-accumulates"
    yield f"prunable: {100 * found.prunable_macs_share:.1f} % of the multiply-accumulates, in {len(found.groups)} groups"
    groups = sorted(found.groups, key=lambda g: -g.macs_share)
    for group in groups[:SHOWN]:
        yield f"  {group.name}: {group.units} units ({group.kind}), {100 * group.macs_share:.1f} %"
    if len(groups) > SHOWN:
        yield f"  ... and {len(groups) - SHOWN} more; --json has all"
    locked = sorted(found.locked, key=lambda entry: -entry.macs_share)
    if locked:
        yield f"locked: {100 * (1 - found.prunable_macs_share):.1f} %"
    for entry in locked[:SHOWN]:
        yield f"  {entry.module or entry.operation} ({entry.operation}), {100 * entry.macs_share:.1f} %: {entry.reason}"
    if len(locked) > SHOWN:
        yield f"  ... and {len(locked) - SHOWN} more; --json has all"
    for note in found.notes:
        yield f"note: {note}"
    if found.equivalence.tried:
        said = "equal" if found.equivalence.passed else "NOT equal"
        yield (
            f"equivalence: half of every group removed and set to zero answer {said}, largest difference"
            f" {found.equivalence.largest_relative_difference:.1e} of the outputs' range"
        )
    else:
        yield "equivalence: not tried, nothing can be removed"
