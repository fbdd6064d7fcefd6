"""Notes on sets of samples that memory bounds."""

from __future__ import annotations

from ..build.artifact import CALIBRATION_SAMPLES
from ..evaluate.evaluation_context import REWARD_SAMPLES
from ..evaluate.reward_samples import judged_at_once
from ..network.compute import Compute
from ..reconstruct.memory import reduced
from ..task.load import Loaded
from ..task.samples import SCORING_SAMPLES, SET_BYTES, held_at_once


def fewer_samples(loaded: Loaded, compute: Compute) -> list[str]:
    """Sentences for the report on sets that are bounded because of their samples' size; none where all are as large as usual."""
    train, search = loaded.data.train, loaded.data.search
    found = [
        (what, held_at_once(train, wanted), min(wanted, len(train)), SET_BYTES)
        for what, wanted in (("Scoring", SCORING_SAMPLES), ("Calibration, if the artifact is int8,", CALIBRATION_SAMPLES))
    ]
    judged = judged_at_once(loaded, REWARD_SAMPLES, compute)
    found.append(("The evaluation of candidates", judged, min(REWARD_SAMPLES, len(search)), compute.fixed_bytes))
    return [note for given in found if (note := reduced(*given))]
