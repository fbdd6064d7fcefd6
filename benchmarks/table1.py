r"""AMP-HASA beside its baselines: the paper's Table 1 for a model and data of yours.

    python benchmarks/table1.py --model resnet_cifar.py:resnet20 --weights resnet20.pt --data npz:cifar.npz \
        --regime one-shot --out benchmarks/results/table1-resnet20.json

Methods x sparsities x regimes x seeds. One-shot: no gradient step on the weights; every method gets the same 2,000 training
images, varied as in training, and BatchNorm statistics taken on them. Fine-tuned: the one-shot network trained under its mask,
equally long for all, the search for a lottery ticket included. What is tuned is tuned on the search split; the test split is
read once for each row.

FILE.json gets every row as soon as it is done, and the same command resumes where it stopped; beside it are FILE.md and FILE.svg.
Two processes with other --seeds may fill one file at the same time, one thread each (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import table1_report
import torch
from edge_compress.pipeline.config import load
from edge_compress.pipeline.errors import EdgeCompressError, InputError
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.finetune.digits import train_digits
from edge_compress.pipeline.network.compute import accelerator
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.progress import Bar, Progress
from edge_compress.pipeline.reconstruct import optimal_brain_surgeon as obs
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.task.load import Loaded, load_subject
from filelock import FileLock
from safetensors.torch import load_file, save
from table1_bench import Bench, Masks
from table1_methods import ONE_SHOT, one_shot
from table1_training import FINE_TUNED, LONGER, Training, total_epochs
from torch import nn

DENSE = "dense"
REGIMES = ("one-shot", "fine-tuned")
METHODS = (DENSE, *dict.fromkeys((*ONE_SHOT, *FINE_TUNED)))
TRAINED = FINE_TUNED | LONGER
KNOWN = (*METHODS, *LONGER)
DIGITS_EPOCHS = 8  # of the embedded network
QUICK_EVALUATIONS, QUICK_ROUND = 8, 0.6  # few and coarse

HELP = (__doc__ or "").replace("\n\n    python", "\n\n\b\n    python")  # the command keeps its lines

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One row of the table, to be filled."""

    method: str
    regime: str
    sparsity: float  # percent; 0 for the dense network
    seed: int


class Table:
    """The JSON file: rows are added one by one, each written at once; other processes may add rows of theirs.

    Raises:
        InputError: the file holds another table.
    """

    def __init__(self, path: Path, command: str, settings: dict[str, Any]) -> None:
        self.path, self.command = path, command
        self.content: dict[str, Any] = {"command": command, "settings": settings, "dense": {}, "rows": []}
        self.folder = path.with_suffix(".work")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "table.lock")
        self._read()

    def _read(self) -> None:
        """What is in the file by now."""
        if not self.path.is_file():
            return
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            same = known["settings"] == self.content["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--out {self.path}", found="no table of this benchmark", do="name another file") from error
        if not same:
            do = "name another file, or repeat that command"
            raise InputError(f"--out {self.path}", found=f"rows of another command: {known['command']}", do=do)
        self.content = {**known, "command": self.command}

    def has(self, cell: Cell) -> bool:
        """Whether the row is there."""
        return any((r["method"], r["regime"], r["sparsity"], r["seed"]) == _key(cell) for r in self.content["rows"])

    def add(self, cell: Cell, values: Row) -> None:
        """Keep a finished row."""
        names = ("method", "regime", "sparsity", "seed")
        row = dict(zip(names, _key(cell), strict=True)) | values
        with self._lock:
            self._read()
            if cell.method == DENSE:
                self.content["dense"] = {"top1": values["top1"], "macs": values["macs"]}
            order = {name: i for i, name in enumerate(KNOWN)}
            rows = [*self.content["rows"], row]
            self.content["rows"] = sorted(
                rows, key=lambda r: (r["regime"] != REGIMES[0], order[r["method"]], r["sparsity"], r["seed"])
            )
            self.write()

    def finish(self) -> None:
        """Write once more: the command that asked for all of this stands in the file, and its words are today's."""
        with self._lock:
            self._read()
            self.write()

    def write(self) -> None:
        """JSON, Markdown and plot, each whole or not at all."""
        atomic_write(self.path, json.dumps(self.content, indent=1) + "\n")
        atomic_write(self.path.with_suffix(".md"), table1_report.to_markdown(self.content))
        atomic_write(self.path.with_suffix(".svg"), table1_report.to_svg(self.content))


def cells(
    methods: tuple[str, ...], regimes: tuple[str, ...], sparsities: tuple[float, ...], seeds: tuple[int, ...]
) -> Iterator[Cell]:
    """The rows asked for, seed after seed so that one bench is alive at a time. The dense network has one for each seed."""
    for seed in seeds:
        if DENSE in methods:
            yield Cell(DENSE, REGIMES[0], 0.0, seed)
        for regime in regimes:
            known = ONE_SHOT if regime == REGIMES[0] else TRAINED
            for sparsity in sparsities:
                for method in methods:
                    if method in known:
                        yield Cell(method, regime, sparsity, seed)


def loaded_for(flags: dict[str, Any], seed: int, folder: Path) -> Loaded:
    """The trained subject; the embedded network is trained once, with seed 0, and kept in the folder."""
    loaded = load_subject(load(None, {"targets": ("x86",), "seed": seed, **flags}))
    if loaded.untrained:
        path = folder / "digits.safetensors"
        if not path.is_file():
            first = load_subject(load(None, {"targets": ("x86",), "seed": 0, **flags}))
            train_digits(first.module, first.images, first.subject.preprocess, 0, epochs=DIGITS_EPOCHS)
            atomic_write(path, save({k: v.contiguous() for k, v in first.module.state_dict().items()}))
        loaded.module.load_state_dict(load_file(path))
        loaded.module.eval()
    return loaded


def measured(bench: Bench, net: nn.Module, masks: Masks) -> Row:
    """What every row has: accuracy on the test split, the cost, and how sparse the network really is."""
    macs = cost_of(net, torch.zeros(1, *bench.shape)).macs
    sizes = {name: w.numel() for name, w in bench.weights.items()}
    left = {name: int((net.get_parameter(f"{name}.weight") != 0).sum()) for name in sizes}
    test = bench.data.test
    return {
        "top1": top1(logits(net, test, bench.prep, layout=bench.layout), test.labels),  # a processor's float32, no GPU's TF32
        "macs": macs,  # zeros are computed like any other number: nothing is saved in this runtime
        "macs_nonzero": macs_nonzero(net, bench.shape),
        "latency_ratio": bench.latency_ratio,
        "zeros": 100.0 * (1.0 - sum(left.values()) / sum(sizes.values())),
    }


def named(device: str) -> str:
    """What a torch device is called."""
    return torch.cuda.get_device_name(device) if device == "cuda" else device


def macs_nonzero(net: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates with a weight that is not zero, one image (C, H, W)."""
    total = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        total += int((layer.weight != 0).sum()) * (output.numel() // len(layer.weight))

    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.inference_mode():
        net(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return total


def fill(cell: Cell, bench: Bench, folder: Path, epochs: int, bar: Bar) -> Row:
    """One row."""
    start = time.monotonic()
    share, facts = cell.sparsity / 100.0, Row()
    net: nn.Module
    if cell.method == DENSE:
        net, masks = bench.net, {}
    elif cell.regime == REGIMES[0]:
        found = one_shot(bench, cell.method, share)
        net, masks, facts = found.net, found.masks, dict(found.facts)
    else:
        place = folder / f"{cell.method}-{cell.sparsity:g}-seed{cell.seed}"
        training = Training(
            epochs, place, lambda done, text: bar.advance(0, f"{cell.method} {cell.sparsity:g} %: {done:.0%}, {text}")
        )
        net, masks = TRAINED[cell.method](bench, share, training), {}
        facts = {"epochs": total_epochs(cell.method, share, epochs), "trained_on": named(bench.device)}
    return {**measured(bench, net, masks), **facts, "seconds": round(time.monotonic() - start, 1)}


@click.command(
    help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120, "show_default": True}
)
@click.option("--model", default="digits-resnet", metavar="SPEC", help="As for edge-compress.")
@click.option("--weights", default=None, metavar="FILE", help="As for edge-compress.")
@click.option("--data", default="digits", metavar="SPEC", help="As for edge-compress.")
@click.option(
    "--sparsity", default="50,70,80,90,95", metavar="PERCENTS", help="Share of all convolution and linear weights that go."
)
@click.option("--methods", default=",".join(METHODS), metavar="NAMES", help=f"Rows. Longer training: {', '.join(LONGER)}.")
@click.option("--regime", default=",".join(REGIMES), metavar="NAMES", help="Without training, with training, or both.")
@click.option("--seeds", default="0,1,2", metavar="NUMBERS", help="Of the images, their variation, drawn labels and searches.")
@click.option("--accelerator", default="auto", metavar="NAME", help="As for edge-compress; networks are trained on it.")
@click.option("--epochs", default=5, help="Of training in the regime fine-tuned, the same for all (Adam, learning rate 0.001).")
@click.option("--evaluations", default=60, help="Of the search that sets how much each layer loses, for each sparsity.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE.json", help="The table; what exists is kept."
)
@click.option("--quick", is_flag=True, help="Digits, two sparsities, one seed, one-shot: minutes.")
def main(out: Path, quick: bool, epochs: int, evaluations: int, **given: Any) -> None:
    """Fill the table."""
    if quick:
        given |= {"model": "digits-resnet", "weights": None, "data": "digits"}
        given |= {"sparsity": "80,95", "seeds": "0", "regime": REGIMES[0]}
        evaluations = min(evaluations, QUICK_EVALUATIONS)
    subject = {name: given[name] for name in ("model", "weights", "data") if given[name] is not None}
    settings = {
        **{n: relative(v) for n, v in subject.items()},
        "epochs": epochs,
        "evaluations": evaluations,
        "round_share": QUICK_ROUND if quick else obs.ROUND,
    }
    ui = Progress()
    try:
        methods, regimes = (_names(given[n], known, n) for n, known in (("methods", KNOWN), ("regime", REGIMES)))
        sparsities, seeds = _numbers(given["sparsity"]), tuple(int(s) for s in _numbers(given["seeds"]))
        table = Table(out, shlex.join(["python", *map(relative, sys.argv)]), settings)
        missing = [cell for cell in cells(methods, regimes, sparsities, seeds) if not table.has(cell)]
        _fill_all(table, missing, subject | {"accelerator": given["accelerator"]}, ui)
        table.finish()
    except EdgeCompressError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table1_report.to_markdown(table.content))


def _fill_all(table: Table, missing: list[Cell], flags: dict[str, Any], ui: Progress) -> None:
    settings, folder, bench = table.content["settings"], table.folder, None
    device = accelerator(load(None, {"targets": ("x86",), **flags}))
    with ui.bar("table", len(missing)) as bar:
        for cell in missing:
            if bench is None or bench.seed != cell.seed:
                loaded = loaded_for(flags, cell.seed, folder)
                evaluations, share = settings["evaluations"], settings["round_share"]
                bench = Bench(loaded, cell.seed, folder, evaluations, lambda text: bar.advance(0, text), share, device)
            row = fill(cell, bench, folder, settings["epochs"], bar)
            table.add(cell, row)
            name = f"{cell.method}, {cell.regime}, {cell.sparsity:g} %, seed {cell.seed}"
            ui.say(f"{name}: {row['top1']:.2f} % in {row['seconds']:.0f} s")
            bar.advance(1)


def _key(cell: Cell) -> tuple[str, str, float, int]:
    return cell.method, cell.regime, cell.sparsity, cell.seed


def relative(argument: str) -> str:
    """An argument without this machine's folders: an absolute path becomes its last part, also in `npz:/data/file.npz`."""
    return re.sub(r"(^|[:=])/(?:[^/:]*/)*", r"\1", argument)


def _names(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in chosen:
        if name not in known:
            raise InputError(f"--{option}", found=repr(name), expected=f"some of {', '.join(known)}")
    return chosen


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError("a list of numbers", found=repr(text), expected="numbers with commas between them") from error


if __name__ == "__main__":
    main()
