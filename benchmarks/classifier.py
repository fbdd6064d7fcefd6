"""Answers of an image classifier's artifact to a split, for benchmarks that hold images and preprocessing apart."""

from __future__ import annotations

import numpy as np
from edge_compress.pipeline.data.splits import Split
from edge_compress.pipeline.task.samples import ImageSamples
from edge_compress.pipeline.task.task import artifact_predictor, batches_of
from edge_compress.pipeline.types import Preprocess
from edge_compress.targets.base import FloatArray, Runner, Target


def answers(target: Target, run: Runner, split: Split, prep: Preprocess) -> FloatArray:
    """Logits (N, classes) of every image of a split, by an artifact of a target."""
    predict = artifact_predictor(target, run)
    return np.concatenate([predict(batch)[0].numpy() for batch in batches_of(ImageSamples(split, prep))])
