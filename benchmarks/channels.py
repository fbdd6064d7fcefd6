r"""Channel pruning beside Torch-Pruning (`pip install torch-pruning`): the same MACs, the same images, the same epochs.

    python benchmarks/channels.py --model resnet_cifar.py:resnet20 --weights resnet20.pt --data npz:cifar.npz \
        --work runs/channels20 --out benchmarks/results/channels-resnet20.json

Theirs: global group magnitude in small steps until the MACs are as few as asked for, on the network whose zero-padded shortcuts
are convolutions (on the other one it misaligns them), then BatchNorm statistics on 2,000 training images. Ours: a search under
the same MACs as wall, its best few plans solved layer after layer on the same images, the same statistics, and of these the best
on the search split: a search judges plans whose layers are solved each by itself, which foretells the answers of a network
without one of its blocks poorly. Both are then trained with the product's fine-tuning, the dense network as teacher, at each of
its two learning rates; the one that is better on the search split is taken. Both are built as int8 artifacts and timed against
each other and against the dense float network, interleaved. Top-1 is of the PyTorch networks on the test split, read twice for
each.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch
from batchnorm_statistics import reestimate_on
from classifier import answers, int8_bench, units_way
from edge_compress import targets
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline import config as settings
from edge_compress.pipeline.evaluate.unit_evaluator import UnitEvaluator
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.finetune.training import BOLD, GENTLE, FinetuneSettings, Step, finetune
from edge_compress.pipeline.network.compute import fast_bfloat16
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.pattern.finalists import judge_on, play_off
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.progress import Progress
from edge_compress.pipeline.reconstruct.gptq import round_weights
from edge_compress.pipeline.search.problem import Evaluator, Levels, SearchSettings
from edge_compress.pipeline.search.search import search
from edge_compress.pipeline.search.search_log import best_first
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.task.load import Loaded, load_subject
from edge_compress.pipeline.task.samples import calibration_set, scoring_inputs
from edge_compress.pipeline.types import Candidate, Epoch, Finalist, Knob, Sensitivity
from edge_compress.targets.base import BuildRequest, Interface, Target
from torch import nn

FINALISTS = 12  # plans of the search that are solved layer after layer before one is taken
STEPS = 400  # of Torch-Pruning, each with importances recomputed
HELP = (__doc__ or "").replace("\n\n    python", "\n\n\b\n    python")


@dataclass(frozen=True)
class Row:
    """What one tool made of the network."""

    tool: str
    macs: int
    params: int
    one_shot_top1: float  # percent, test split, no gradient step
    top1: float  # after the epochs
    learning_rate: float  # of the two the better one on the search split
    artifact_top1: float  # int8, in its own runtime


class ByMacs(Evaluator):
    """An evaluator of units whose budget is on MACs: exact, and free to ask for.

    `Candidate.density` carries the share of the dense network's MACs.
    """

    def __init__(self, inner: UnitEvaluator, dense_macs: int) -> None:
        self._inner, self._dense = inner, dense_macs

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The inner evaluator's."""
        return self._inner.knobs

    def evaluate(self, levels: Levels) -> Candidate:
        """The inner evaluator's answer with the share of MACs."""
        return replace(self._inner.evaluate(levels), density=self.latency_estimate(levels))

    def latency_estimate(self, levels: Levels) -> float:
        """Share of the dense network's MACs."""
        inner = self._inner
        return inner.macs(inner.structure(inner.plan(levels))) / self._dense


def torch_pruning(
    net: nn.Module,
    shape: tuple[int, int, int],
    macs: int,
    last: str,
    loss: Callable[[nn.Module], torch.Tensor] | None = None,
    round_to: int | None = None,
) -> nn.Module:
    """Torch-Pruning's global pruning down to this many MACs, by group magnitude; by Taylor importance where a loss is given.

    `last` is the classifier, which keeps its outputs; widths are multiples of `round_to`. Of attention with fused projections
    (`qkv` and `num_heads`, as timm names them) the heads' widths are pruned, and every head stays.
    """
    import torch_pruning as tp

    small = copy.deepcopy(net)
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            small,
            torch.zeros(1, *shape),
            importance=tp.importance.GroupMagnitudeImportance(p=2) if loss is None else tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[small.get_submodule(last)],
            round_to=round_to,
            num_heads={m.qkv: m.num_heads for m in small.modules() if hasattr(m, "qkv")},
            prune_head_dims=True,
        )
        for step in range(STEPS + 1):
            if cost_of(small, torch.zeros(1, *shape)).macs <= macs:
                break
            if step == STEPS:
                raise click.ClickException(f"Torch-Pruning does not get down to {macs:,} MACs")
            if loss is not None:
                small.zero_grad()
                loss(small).backward()  # type: ignore[no-untyped-call]
            pruner.step()
    return small.eval()


def ours(
    config: settings.Config, loaded: Loaded, way: Units, target: Target, macs: int, evaluations: int, work: Path, ui: Progress
) -> tuple[nn.Module, dict[str, object]]:
    """The plan with the best one-shot accuracy under a wall of MACs, solved layer after layer; and what was decided.

    The accuracy that decides is the solved network's own, on the images of the search split that the fine-tuning is judged by.
    """
    dense = way.checked.coupling.macs
    with int8_bench(config, loaded, way, target, work) as bench:
        evaluator = way.evaluator(bench)
        assert isinstance(evaluator, UnitEvaluator)
        ranking = evaluator.rank(None)
        evaluator.follow(ranking)
        how = SearchSettings("ppo", evaluations, macs / dense, seed=config.seed, limits="density")
        with ui.bar("search", evaluations) as bar:

            def tell(candidate: Candidate, reward: float) -> None:
                bar.advance(1, f"accuracy {candidate.accuracy:.3f} at {candidate.spent:.2f} of the MACs")

            found = search(ByMacs(evaluator, dense), how, tell)

        solved = solver(way, ranking, bench.inputs)
        allowed = [c for c in best_first(found.tried, how) if c.cost.macs <= macs][:FINALISTS]
        with ui.bar("finalists", len(allowed)) as bar:

            def say(done: Finalist) -> None:
                bar.advance(1, f"{100 * done.candidate.accuracy:.1f} %, reconstructed {100 * done.accuracy:.2f} %")

            finalists, taken, net = play_off(allowed, how, solved, judge_on(loaded, len(loaded.data.search)), say)
    return net, {
        "lambda": ranking.lambda_,
        "kept": {k.name: k.kept[level] for k, level in zip(way.knobs, finalists[taken].candidate.levels, strict=True)},
        # in the search, and after sequential reconstruction; percent of the search split
        "finalists": [[100.0 * f.candidate.accuracy, 100.0 * f.accuracy] for f in finalists],
        "search_value": 100.0 * finalists[taken].accuracy,
    }


def trained(net: nn.Module, loaded: Loaded, how: FinetuneSettings, folder: Path, ui: Progress) -> tuple[nn.Module, float]:
    """The network after the product's fine-tuning, and its accuracy on the search split."""
    folder.mkdir(parents=True, exist_ok=True)
    student = copy.deepcopy(net)
    with ui.bar(f"training {folder.name}", how.epochs * -(-len(loaded.data.train) // how.batch)) as bar:

        def tell(event: Step | Epoch) -> None:
            if isinstance(event, Step):
                bar.advance(1, f"loss {event.loss:.3f}")

        history = finetune(student, loaded.module, loaded.data, loaded.task, how, folder=folder, progress=tell)
    return student, max(epoch.search_value for epoch in history)


def best_trained(net: nn.Module, loaded: Loaded, epochs: int, seed: int, stem: Path, ui: Progress) -> tuple[nn.Module, float]:
    """The network trained at each of the product's two learning rates, the better one on the search split, and its rate."""
    ways = [FinetuneSettings(epochs, seed, rate, autocast=fast_bfloat16("cpu")) for rate in (GENTLE, BOLD)]
    folders = [stem.with_name(f"{stem.name}-{how.learning_rate:g}") for how in ways]
    tries = [(*trained(net, loaded, how, folder, ui), how.learning_rate) for how, folder in zip(ways, folders, strict=True)]
    student, _, rate = max(tries, key=lambda found: found[1])
    return student, rate


def solver(way: Units, ranking: Sensitivity, inputs: torch.Tensor) -> Callable[[Candidate], nn.Module]:
    """Returns what makes a candidate's network: reconstructed sequentially on these inputs, BatchNorm re-estimated on them."""

    def solved(candidate: Candidate) -> nn.Module:
        net = way.solved(way.plan_for(candidate.levels, ranking.order), inputs)
        reestimate_on(net, torch.split(inputs, 250))
        return net

    return solved


def built(loaded: Loaded, target: Target, module: nn.Module, folder: Path, seed: int) -> tuple[Path, Path]:
    """The int8 artifact and the dense float baseline."""
    data, prep = loaded.images, loaded.subject.preprocess
    folder.mkdir(parents=True, exist_ok=True)
    calibration = calibration_set(loaded.data.train, target, 500, seed + 2)
    request = BuildRequest(
        module=module,
        baseline=target.baseline(loaded.module, Interface(image_signature(data.info.image_shape), data.info.classes)),
        signature=image_signature(data.info.image_shape),
        classes=data.info.classes,
        precision=Precision.INT8,
        calibration=calibration,
        rounded=partial(round_weights, module, calibration),
        score=lambda predict: top1(answers(target, predict, data.search, prep), data.search.labels),
        folder=folder,
    )
    artifact = target.build(request)
    assert artifact.baseline is not None  # every target builds one
    return folder / artifact.file.path, folder / artifact.baseline.path


def speedups(theirs: Path, mine: Path, dense: Path, seed: int) -> Iterator[tuple[str, dict[str, object]]]:
    """How much faster the second of each pair is."""
    for name, (slow, fast) in {
        "edge-compress over torch-pruning": (theirs, mine),
        "torch-pruning over dense float": (dense, theirs),
        "edge-compress over dense float": (dense, mine),
    }.items():
        timing = LocalDevice().measure(slow, fast, TimingSettings(seed=seed))
        yield name, {"kind": str(timing.kind), "quality": list(timing.quality), **asdict(timing.speedup)}


@click.command(help=HELP)
@click.option("--model", default="digits-resnet", show_default=True, help="As in edge-compress.")
@click.option("--weights", default=None, help="As in edge-compress.")
@click.option("--data", default="digits", show_default=True, help="As in edge-compress.")
@click.option("--fewer", default=2.09, show_default=True, help="How many times fewer MACs.")
@click.option("--epochs", default=2, show_default=True, help="Of training, for both.")
@click.option("--evaluations", default=200, show_default=True, help="Of our search.")
@click.option("--seed", default=0, show_default=True, help="Of images, search and training.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of kept answers, checkpoints and artifacts.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON to write.")
def main(
    model: str, weights: str | None, data: str, fewer: float, epochs: int, evaluations: int, seed: int, work: Path, out: Path
) -> None:
    """Run both tools."""
    config = settings.load(None, {"targets": ("x86",), "model": model, "weights": weights, "data": data, "seed": seed})
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    ui, loaded, target = Progress(), load_subject(config), targets.load("x86")
    shape, prep, test = loaded.images.info.image_shape, loaded.subject.preprocess, loaded.images.test
    way = units_way(config, loaded, target)
    macs = int(cost_of(way.net, torch.zeros(1, *shape)).macs / fewer)
    last = [name for name, module in way.net.named_modules() if isinstance(module, nn.Linear)][-1]
    ui.say("torch-pruning ...")
    theirs = torch_pruning(way.net, shape, macs, last)
    reestimate_on(theirs, torch.split(scoring_inputs(loaded.data.train, seed), 250))
    mine, facts = ours(config, loaded, way, target, macs, evaluations, work, ui)
    rows, files, dense = [], {}, work
    for tool, net in (("torch-pruning", theirs), ("edge-compress", mine)):
        before = top1(logits(net, test, prep), test.labels)
        student, rate = best_trained(net, loaded, epochs, seed, work / tool, ui)
        after = top1(logits(student, test, prep), test.labels)
        files[tool], dense = built(loaded, target, student, work / tool / "artifact", seed)
        with target.runner(files[tool]) as predict:
            artifact = top1(answers(target, predict, test, prep), test.labels)
        cost = cost_of(student, torch.zeros(1, *shape))
        rows.append(Row(tool, cost.macs, cost.params, before, after, rate, artifact))
        ui.say(f"{tool}: {cost.macs / 1e6:.1f} M MACs, {before:.2f} % one-shot, {after:.2f} % trained, {artifact:.2f} % int8")
    report = {
        "command": shlex.join(["python", "benchmarks/channels.py", *sys.argv[1:]]),
        "dense": {
            "top1": top1(logits(loaded.module, test, prep), test.labels),
            "macs": cost_of(loaded.module, torch.zeros(1, *shape)).macs,
        },
        "epochs": epochs,
        "samples": len(test),
        "rows": [asdict(row) for row in rows],
        "plan": facts,
        "speedup": dict(speedups(files["torch-pruning"], files["edge-compress"], dense, seed)),
    }
    atomic_write(out, json.dumps(report, indent=1) + "\n")
    ui.say(json.dumps(report["speedup"]))


if __name__ == "__main__":
    main()
