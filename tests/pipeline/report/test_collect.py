"""What a report says of the run it is of."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.network.compute import CPU
from edge_compress.pipeline.report.collect import header_of
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import ImageSamples
from edge_compress.pipeline.types import Kind, Preprocess
from edge_compress.pipeline.verify.references import Networks, References, accuracy_of
from fake_run import fake_results, fake_target, to_report
from torch import nn


@pytest.mark.parametrize(("own", "told"), [("edge-compress --seed 3", "edge-compress --seed 3"), ("", "edge-compress --seed 4")])
def test_the_command_is_the_callers_own_or_else_that_of_the_process(own: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/edge-compress", "--seed", "4"])
    loaded = SimpleNamespace(subject=fake_results().subject)
    run: Any = SimpleNamespace(command=own, loaded=loaded, config=SimpleNamespace(seed=3))
    assert header_of(run, [], datetime.now(UTC)).command == told


def test_a_class_that_the_artifact_never_answers_is_counted_and_in_the_reports_notes() -> None:
    data = load_data("digits", seed=0)
    test, picked = ImageSamples(data.test, Preprocess((0.3,), (0.4,), "none")), np.arange(200)
    batch = test.batch(picked)
    columns = torch.cat([batch.inputs.flatten(1), torch.ones(200, 1)], 1)
    solved = torch.linalg.lstsq(columns.double(), nn.functional.one_hot(batch.targets, 10).double(), driver="gelsd").solution
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    network[1].weight.data, network[1].bias.data = solved[:-1].T.float().contiguous(), solved[-1].float()
    with torch.no_grad():
        answers = network(batch.inputs)
    answers[:, 7] = -1e9
    loaded = SimpleNamespace(
        task=Classification(), module=network, data=SimpleNamespace(test=test), subject=SimpleNamespace(data=data.info)
    )
    run: Any = SimpleNamespace(loaded=loaded, compute=CPU)
    networks = Networks(References(90.0, 90.0, 90.0), network)
    accuracy = accuracy_of(run, (answers,), picked, networks, Kind.MEASURED)
    sevens = int((batch.targets == 7).sum())
    samples, dense, artifact, lost = accuracy.classes["7"]
    assert (samples, artifact, lost) == (sevens, 0, dense)
    assert dense > 0.7 * sevens
    assert sum(counts[0] for counts in accuracy.classes.values()) == 200
    notes = to_report(fake_results(evaluations=2, targets={"x86": fake_target(accuracy=accuracy)})).notes
    told = f"x86: class '7' lost most: {dense} of its {sevens} test samples were right, now 0"
    assert [note for note in notes if "lost most" in note] == [note for note in notes if note.startswith(told)] != []
