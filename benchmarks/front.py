r"""Accuracy of an image classifier against measured latency, at several budgets: edge-compress beside what else there is.

    pip install torch-pruning==1.6.1
    python benchmarks/front.py --model resnet_cifar.py:resnet20 --weights resnet20.pt --data npz:cifar.npz \
        --work runs/front20 --out benchmarks/results/front-resnet20.json

Methods, each with the same images, the same fine-tuning (at both of the product's learning rates, the one better on the search
split; the dense network as teacher), BatchNorm re-estimated, and the same int8 build:

- edge-compress: the search on measured latency, its best plans reconstructed sequentially, the best on the search split selected.
- edge-compress by MACs: the same, the budget on multiply-accumulates: at most as many as the plan above has.
- uniform widths: the same scores and reconstruction, one ratio for all layers, the lowest within the latency budget by the table.
- Torch-Pruning, by group magnitude (L2) and by Taylor importance (256 images): global, at most as many multiply-accumulates,
  widths rounded to multiples of 8.

Beside them the dense network in float and int8 (and in OpenVINO with NNCF's int8 where `pip install openvino nncf` was done), and
smaller dense networks in int8 (`--smaller resnet_cifar.py:resnet20=resnet20.pt`).
All files are timed interleaved in fresh processes, see `interleaved.py`. Top-1 accuracy is measured on the artifacts, on the
test split. Finished cells are kept in `--work`, so that the benchmark resumes.
"""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from batchnorm_statistics import reestimate_on
from channels import ByMacs, best_trained, built, solver, torch_pruning
from classifier import answers, int8_bench, units_way
from edge_compress import targets
from edge_compress.devices.local import describe
from edge_compress.devices.measure.stats import two_level_bootstrap
from edge_compress.pipeline import config as settings
from edge_compress.pipeline.evaluate.unit_evaluator import UnitEvaluator
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.pattern.finalists import judge_on, play_off
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.search.knapsack import evenly
from edge_compress.pipeline.search.problem import TOLERANCE, Evaluator, SearchSettings
from edge_compress.pipeline.search.search import search
from edge_compress.pipeline.task.inference import top1
from edge_compress.pipeline.task.samples import scoring_inputs
from edge_compress.targets.base import Interface
from interleaved import openvino_files, sessions_of
from table1 import loaded_for, relative
from torch import nn

METHODS = ("edge-compress", "edge-compress by MACs", "uniform widths", "Torch-Pruning L2", "Torch-Pruning Taylor")
DENSE = ("dense float", "dense int8")
TAYLOR_IMAGES = 256
HELP = (__doc__ or "").replace("\n\n    pip", "\n\n\b\n    pip").replace("\n\n- edge", "\n\n\b\n- edge")


@dataclass(frozen=True)
class Cell:
    """One point of the front."""

    method: str
    budget: float  # share of the dense float latency that the search was given
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.method.replace(' ', '-')}-{self.budget:g}-{self.epochs}-seed{self.seed}"


class Seed:
    """What all methods of one seed share, and the networks they make."""

    def __init__(self, flags: dict[str, Any], seed: int, evaluations: int, work: Path, ui: Progress) -> None:
        self.flags, self.config = flags, settings.load(None, {"targets": ("x86",), "seed": seed, **flags})
        torch.manual_seed(seed)
        work.mkdir(parents=True, exist_ok=True)
        self.seed, self.evaluations, self.work, self.ui = seed, evaluations, work / f"seed{seed}", ui
        self.work.mkdir(exist_ok=True)
        self.loaded, self.target = loaded_for(flags, seed, work), targets.load("x86")
        assert self.loaded.images is not None  # an image classifier
        self.way = units_way(self.config, self.loaded, self.target)
        self.inputs = scoring_inputs(self.loaded.data.train, seed)
        self.shape = self.loaded.images.info.image_shape

    def networks(self, budget: float, methods: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
        """Each method's network at one budget, without training. The MACs of the first one are what the others get."""
        with int8_bench(self.config, self.loaded, self.way, self.target, self.work) as bench:
            evaluator = self.way.evaluator(bench)
            assert isinstance(evaluator, UnitEvaluator)
            ranking = evaluator.rank(None)
            evaluator.follow(ranking)
            dense = self.way.checked.coupling.macs

            solved = solver(self.way, ranking, bench.inputs)

            def found(asked: Evaluator, method: str, share: float, limits: str = "latency") -> nn.Module:
                how = SearchSettings(method, self.evaluations, share, seed=self.seed, limits=limits)
                with self.ui.bar(f"{method} at {share:.3f}", self.evaluations) as bar:
                    result = search(asked, how, lambda c, _: bar.advance(1, f"{c.accuracy:.3f} at {c.spent:.3f}"))
                for note in result.notes:
                    self.ui.say(f"{method} at {share:.3f}: {note}")
                _, _, net = play_off(result.finalists, how, solved, judge_on(self.loaded, len(self.loaded.data.search)))
                return net

            def uniform() -> nn.Module:
                levels = evenly(self.way.knobs, evaluator.latency_estimate, budget)
                if levels is None:
                    raise click.ClickException(f"no uniform ratio is within {budget:g} of the latency")
                return solved(evaluator.evaluate(levels))

            first = found(evaluator, str(self.config.search), budget)
            macs = cost_of(first, torch.zeros(1, *self.shape)).macs
            whole = cost_of(self.way.net, torch.zeros(1, *self.shape)).macs
            make: dict[str, Callable[[], nn.Module]] = {
                METHODS[0]: lambda: first,
                METHODS[1]: lambda: found(
                    ByMacs(evaluator, dense), str(self.config.search), macs / whole / (1 + TOLERANCE), "density"
                ),
                METHODS[2]: uniform,
                METHODS[3]: lambda: self._torch_pruning(macs, taylor=False),
                METHODS[4]: lambda: self._torch_pruning(macs, taylor=True),
            }
            for name in methods:
                yield name, make[name]()

    def _torch_pruning(self, macs: int, *, taylor: bool) -> nn.Module:
        last = [name for name, module in self.way.net.named_modules() if isinstance(module, nn.Linear)][-1]
        images = np.arange(min(TAYLOR_IMAGES, len(self.loaded.data.train)))
        batch = self.loaded.data.train.training_batch(images, torch.Generator().manual_seed(self.seed))

        def loss(net: nn.Module) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(net(batch.inputs), torch.as_tensor(batch.targets).long())

        net = torch_pruning(self.way.net, self.shape, macs, last, loss if taylor else None, round_to=8)
        reestimate_on(net, torch.split(self.inputs, 250))
        return net

    def finished(self, cell: Cell, net: nn.Module) -> dict[str, Any]:
        """A network trained and built: the cell's row, and its file in the work folder."""
        start, student = time.monotonic(), net
        if cell.epochs:
            student, _ = best_trained(net, self.loaded, cell.epochs, self.seed, self.work / cell.name, self.ui)
        path, _ = built(self.loaded, self.target, student, self.work / cell.name, self.seed)
        cost = cost_of(student, torch.zeros(1, *self.shape))
        row = {"method": cell.method, "budget": cell.budget, "epochs": cell.epochs, "seed": cell.seed, "macs": cost.macs}
        row |= {"params": cost.params, "bytes": path.stat().st_size, "top1": self.top1(path)}
        return row | {"file": path.relative_to(self.work.parent).as_posix(), "seconds": round(time.monotonic() - start, 1)}

    def top1(self, path: Path) -> float:
        """Of an artifact on the test split, per cent."""
        assert self.loaded.images is not None
        test = self.loaded.images.test
        with self.target.runner(path) as predict:
            return top1(answers(self.target, predict, test, self.loaded.subject.preprocess), test.labels)

    def dense_files(self, smaller: tuple[str, ...]) -> dict[str, tuple[str, Path]]:
        """The dense network, and smaller ones in int8: row -> (runtime, file)."""
        assert self.loaded.images is not None
        int8, _ = built(self.loaded, self.target, self.way.net, self.work / "dense", self.seed)
        plain = self.work / "dense" / "float.onnx"  # in the form that budgets are shares of
        plain.write_bytes(self.target.baseline(self.way.net, Interface(self.way.signature, self.loaded.images.info.classes)))
        found = {DENSE[0]: ("onnxruntime", plain), DENSE[1]: ("onnxruntime", int8)}
        found |= openvino_files(plain, self.inputs[:500].numpy(), self.work)
        for pair in smaller:
            name, model, weights = parsed(pair)
            own = loaded_for(self.flags | {"model": model, "weights": weights}, self.seed, self.work)
            if own.subject.preprocess != self.loaded.subject.preprocess:
                raise click.UsageError(f"--smaller {pair}: its preprocessing is another than the dense network's")
            file, _ = built(own, self.target, own.module, self.work / f"dense-{name}", self.seed)
            found[f"{name} int8, dense"] = ("onnxruntime", file)
        return found


def parsed(pair: str) -> tuple[str, str, str]:
    """The function's name, the model and its weights in `resnet_cifar.py:resnet20=resnet20.pt`.

    Raises:
        UsageError: it has not this form, or the file is not there.
    """
    model, equals, weights = pair.partition("=")
    if not equals or not Path(weights).is_file():
        raise click.UsageError(f"--smaller {pair}: give MODEL=WEIGHTS, such as resnet_cifar.py:resnet20=resnet20.pt, a file")
    return model.rpartition(":")[2], model, weights


def timed(rows: list[dict[str, Any]], dense: dict[str, tuple[str, Path]], work: Path, image: Any) -> list[dict[str, Any]]:
    """Rows with their latency, beside the dense network in float and in int8; the dense network's own rows come first."""
    files = dense | {str(i): ("onnxruntime", work / row["file"]) for i, row in enumerate(rows)}
    taken = sessions_of(files, image)

    def speed(name: str) -> dict[str, Any]:
        told = {"p50_ms": float(np.median(np.concatenate([s[name] for s in taken])))}
        for base in DENSE:
            median, low, high = two_level_bootstrap([np.array(s[base]) / np.array(s[name]) for s in taken], seed=0)
            told |= {f"over {base}": {"median": median, "ci95": [low, high]}}
        return told

    own = [{"method": name, **speed(name)} for name in dense]
    return own + [row | speed(str(i)) for i, row in enumerate(rows)]


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A table: per method, epochs and budget the speedups and top-1, means over seeds; `±` is half the range over seeds."""
    lines = ["| method | epochs | budget | over dense float | over dense int8 | MACs, M | top-1, % |", "|---" * 7 + "|"]
    places = dict.fromkeys((r["epochs"], r["budget"], r["method"]) for r in rows if "budget" in r)
    for row in (r for r in rows if "budget" not in r):
        cells = [row["method"], "", "", *(f"{row[f'over {b}']['median']:.2f}" for b in DENSE), ""]
        cells.append(f"{row['top1']:.2f}" if "top1" in row else "-")
        lines.append(f"| {' | '.join(cells)} |")
    for epochs, budget, method in sorted(places, key=lambda p: (p[0], -p[1])):
        some = [r for r in rows if (r.get("epochs"), r.get("budget"), r["method"]) == (epochs, budget, method)]
        values = [r["top1"] for r in some]
        spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
        speeds = [f"{np.mean([r[f'over {base}']['median'] for r in some]):.2f}" for base in DENSE]
        cells = [method, str(epochs), f"{budget:g}", *speeds, f"{np.mean([r['macs'] for r in some]) / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {np.mean(values):.2f}{spread} |")
    return "\n".join(lines) + "\n"


def to_svg(rows: list[dict[str, Any]]) -> str:
    """Top-1 over measured latency, a panel for each number of epochs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    epochs = sorted({r["epochs"] for r in rows if "epochs" in r})
    with mpl.rc_context(
        {"svg.hashsalt": "front", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(5.2 * len(epochs), 4.2), layout="constrained")
        for i, count in enumerate(epochs):
            axes = figure.add_subplot(1, len(epochs), i + 1)
            for n, method in enumerate(METHODS):
                own = [r for r in rows if (r["method"], r.get("epochs")) == (method, count)]
                seeds = [[r for r in own if r["budget"] == budget] for budget in sorted({r["budget"] for r in own})]
                some = [tuple(float(np.mean([r[key] for r in each])) for key in ("p50_ms", "top1")) for each in seeds]
                if some:
                    style = {"color": "black", "lw": 2.2} if n == 0 else {"color": f"C{n}", "lw": 1.2}
                    axes.plot(*zip(*some, strict=True), "o-", ms=3, label=method, **style)
            for row in (r for r in rows if "budget" not in r and "top1" in r):
                axes.plot(row["p50_ms"], row["top1"], "x", color="0.4")
                axes.annotate(row["method"], (row["p50_ms"], row["top1"]), fontsize=7, ha="right", va="bottom")
            axes.set(
                title="one-shot" if not count else f"{count} epoch{'s' if count > 1 else ''}",
                xlabel="latency, ms",
                ylabel="top-1, %",
            )
            axes.legend(frameon=False, fontsize=7)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", default="digits-resnet", help="As for edge-compress.")
@click.option("--weights", default=None, help="As for edge-compress.")
@click.option("--data", default="digits", help="As for edge-compress.")
@click.option("--budgets", default="0.6,0.5,0.42,0.34,0.27", help="Latency budgets, shares of the dense float latency.")
@click.option("--epochs", default="0,2,10", help="Of training; 0 is one-shot.")
@click.option("--seeds", default="0,1,2", help="Of images, search and training; those after the first for edge-compress alone.")
@click.option("--evaluations", default=100, help="Of a search.")
@click.option("--methods", default=",".join(METHODS), help="Rows.")
@click.option("--smaller", multiple=True, metavar="MODEL=WEIGHTS", help="A smaller dense network, measured beside; repeatable.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of finished cells, answers and files.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON to write; a table and a plot go beside it.")
def main(
    budgets: str,
    epochs: str,
    seeds: str,
    evaluations: int,
    methods: str,
    smaller: tuple[str, ...],
    work: Path,
    out: Path,
    **subject: str | None,
) -> None:
    """Fill the cells, time all files together, write."""
    names = tuple(methods.split(","))
    if len({parsed(pair)[0] for pair in smaller}) < len(smaller):
        raise click.UsageError("--smaller: two networks have one name")
    if unknown := set(names) - set(METHODS):
        raise click.UsageError(f"--methods: {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}")
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=root).stdout.strip()
    same = {"commit": commit, "evaluations": evaluations, **{k: relative(v) for k, v in subject.items() if v is not None}}
    ui, rows, kept = Progress(), [], work / "cells.json"
    work.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {"settings": same, "cells": {}}
    if content["settings"] != same:
        raise click.UsageError(f"--work {work}: made with {content['settings']}; name another folder")
    done: dict[str, dict[str, Any]] = content["cells"]
    first: Seed | None = None
    for number, seed in enumerate(int(s) for s in seeds.split(",")):
        shared = Seed({k: v for k, v in subject.items() if v is not None}, seed, evaluations, work, ui)
        first = first or shared
        for budget in (float(b) for b in budgets.split(",")):
            asked = names if number == 0 else tuple(n for n in names if n == METHODS[0])
            cells = [Cell(m, budget, int(e), seed) for m in asked for e in epochs.split(",")]
            missing = {c.method for c in cells if c.name not in done}
            for method, net in shared.networks(budget, tuple(m for m in asked if m in missing)) if missing else ():
                for cell in (c for c in cells if c.method == method and c.name not in done):
                    done[cell.name] = shared.finished(cell, net)
                    atomic_write(kept, json.dumps(content, indent=1))
                    ui.say(f"{cell.name}: {done[cell.name]['top1']:.2f} %, {done[cell.name]['macs'] / 1e6:.1f} M MACs")
            rows += [done[c.name] for c in cells]
    assert first is not None  # one seed at least
    dense = first.dense_files(smaller)
    table = timed(rows, dense, work, first.inputs[:1].numpy())
    for row in table[: len(dense)]:
        if dense[row["method"]][0] == "onnxruntime":
            row["top1"] = first.top1(dense[row["method"]][1])
    record = {
        "command": shlex.join(["python", "benchmarks/front.py", *map(relative, sys.argv[1:])]),
        "settings": same,
        "commit": commit,
        "processor": describe("onnxruntime")["cpu"],
        "kind": "measured",
        "rows": table,
    }
    atomic_write(out, json.dumps(record, indent=1) + "\n")
    atomic_write(out.with_suffix(".md"), to_markdown(table))
    atomic_write(out.with_suffix(".svg"), to_svg(table))
    click.echo(to_markdown(table))


if __name__ == "__main__":
    main()
