"""A recipe's metric that is NaN or infinite: the run's report can be read, and its pages drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.report import pages
from edge_compress.pipeline.report.report import Report, decode, encode
from edge_compress.pipeline.signature import Metric
from edge_compress.pipeline.types import Accuracy, Epoch, Kind, OnDevice, Unpruned
from fake_run import fake_results, to_report

PERPLEXITY = Metric("perplexity", "", higher_is_better=False)


def through_json(report: Report) -> Report:
    return decode(json.loads(json.dumps(encode(report), allow_nan=False)))


def with_metric() -> Report:
    return dataclasses.replace(to_report(fake_results()), metric=PERPLEXITY)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_report_with_a_value_that_json_cannot_hold_is_read_back_with_nan(value: float) -> None:
    report = with_metric()
    accuracy = Accuracy(value, value, value, 50, Kind.MEASURED, value, (value, value))
    on_device = OnDevice("board", Kind.MEASURED, "1.0", 5, 1.0, value, value, value)
    target = dataclasses.replace(
        report.targets["x86"],
        accuracy=accuracy,
        on_device=on_device,
        unpruned=Unpruned(Precision.INT8, value, Kind.MEASURED, 10),
    )
    broken = dataclasses.replace(
        report,
        gates=dataclasses.replace(report.gates, max_accuracy_drop=value),  # a share of the dense network's value
        dense=dataclasses.replace(report.dense, value=value, search_value=None),
        pruned=dataclasses.replace(report.pruned, value=value, finetune=(Epoch(1, value, value, 1.0),)),
        targets={"x86": target},
    )
    found = through_json(broken)
    kept = found.targets["x86"]
    assert kept.accuracy is not None
    assert kept.on_device is not None
    assert kept.unpruned is not None
    assert kept.accuracy.drop_ci95 is not None
    numbers: list[Any] = [kept.accuracy.value, kept.accuracy.drop, kept.accuracy.agreement, kept.accuracy.dense_value]
    numbers += [*kept.accuracy.drop_ci95, kept.on_device.value, kept.on_device.here_value, kept.on_device.largest_difference]
    numbers += [found.gates.max_accuracy_drop, kept.unpruned.value, found.dense.value, found.pruned.value]
    numbers += [found.pruned.finetune[0].loss, found.pruned.finetune[0].search_value]
    assert all(math.isnan(number) for number in numbers)
    assert found.dense.search_value is None  # not known is not NaN
    assert encode(found) == encode(broken)


def test_an_accuracy_that_is_not_known_is_still_none() -> None:
    report = with_metric()
    target = dataclasses.replace(report.targets["x86"], accuracy=None, latency=None)
    found = through_json(dataclasses.replace(report, targets={"x86": target}))
    assert (found.targets["x86"].accuracy, found.targets["x86"].latency) == (None, None)


def test_the_pages_of_a_network_that_came_to_nan_have_dashes() -> None:
    report = with_metric()
    epochs = tuple(Epoch(k, math.nan, math.nan, 1.0) for k in (1, 2))
    report = through_json(dataclasses.replace(report, pruned=dataclasses.replace(report.pruned, value=math.nan, finetune=epochs)))
    assert "<svg" in pages.to_html(report)
    assert "| 1 | – | – |" in pages.to_markdown(report)
