"""What benchmarks of image classifiers share: answers to a split, what can be cut, and candidates of a search over units."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from edge_compress.pipeline.axes.capture import capture
from edge_compress.pipeline.axes.coupling import Coupling, couple
from edge_compress.pipeline.axes.cutting.gate import check
from edge_compress.pipeline.axes.types import Unit
from edge_compress.pipeline.build.dense_baseline import CONVOLUTIONS
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.data.splits import Split
from edge_compress.pipeline.evaluate.evaluation_context import Bench, open_bench
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.task.load import Loaded
from edge_compress.pipeline.task.samples import ImageSamples
from edge_compress.pipeline.task.task import artifact_predictor, batches_of
from edge_compress.pipeline.types import Preprocess
from edge_compress.targets.base import FloatArray, Interface, Runner, Target


def answers(target: Target, run: Runner, split: Split, prep: Preprocess) -> FloatArray:
    """Logits (N, classes) of every image of a split, by an artifact of a target."""
    predict = artifact_predictor(target, run)
    return np.concatenate([predict(batch)[0].numpy() for batch in batches_of(ImageSamples(split, prep))])


def coupling_of(loaded: Loaded) -> Coupling:
    """What can be cut from a loaded network; the captured network is `walk.captured.module`."""
    return check(couple(capture(loaded.module, loaded.example))).coupling


def units_of(coupling: Coupling) -> dict[str, tuple[Unit, ...]]:
    """Group -> its units, of the groups whose removal makes the network cheaper."""
    return {group.name: tuple(group.units) for group in coupling.paying_groups()}


def units_way(config: Config, loaded: Loaded, target: Target) -> Units:
    """The product's search over units of a loaded network, by the config's score and seed."""
    return Units(loaded.module, loaded.example, loaded.subject.signature, target.limits, config.score, config.seed)


def int8_bench(config: Config, loaded: Loaded, way: Units, target: Target, work: Path) -> AbstractContextManager[Bench]:
    """What int8 candidates are judged with; finished evaluations and measured latencies are kept in `work`."""
    assert loaded.images is not None  # an image classifier
    return open_bench(
        config,
        loaded,
        target,
        Precision.INT8,
        work / "evaluations.jsonl",
        probed=way.prober,
        baseline=target.baseline(way.net, Interface(way.signature, loaded.images.info.classes)),
        form=CONVOLUTIONS,
        latencies=work / "latency",
    )
