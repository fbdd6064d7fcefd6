"""A bundle's manifest, of figures at their limits."""

from __future__ import annotations

import dataclasses
import json
import math

from edge_compress.pipeline.release.bundle import contradictions, manifest_of, to_bytes
from edge_compress.pipeline.signature import Metric
from fake_run import fake_results, to_report


def test_a_metric_that_came_to_nan_is_no_number_of_a_manifest() -> None:
    report = dataclasses.replace(to_report(fake_results(evaluations=2)), metric=Metric("F1", ""))
    target = report.targets["x86"]
    assert target.accuracy is not None
    accuracy = dataclasses.replace(target.accuracy, value=math.nan, drop=math.nan, drop_ci95=(math.nan, math.nan))
    report = dataclasses.replace(report, targets={"x86": dataclasses.replace(target, accuracy=accuracy)})
    manifest = manifest_of("bundle", report, "x86", {})
    names = {number["name"] for number in json.loads(to_bytes(manifest))["numbers"]}
    assert names == {"agreement", "speedup", "artifact_p50", "dense_p50"}
    assert not [text for text in contradictions(manifest, report) if "differs" in text]
