"""The plots' numbers as tables, of figures at their limits."""

from __future__ import annotations

import dataclasses

from edge_compress.devices.measure.usage import LayerTime, Usage
from edge_compress.pipeline.report.figures import layer_table
from fake_run import fake_results, to_report


def test_layers_that_took_no_time_are_listed_without_a_division_by_zero() -> None:
    report = to_report(fake_results(evaluations=2))
    usage = Usage(1, 1, tuple(LayerTime(f"layer{k}", "Conv", 0.0) for k in range(10)))
    report = dataclasses.replace(report, targets={"x86": dataclasses.replace(report.targets["x86"], usage=usage)})
    rows = layer_table(report, "x86").rows
    assert rows[0] == ("layer0", "Conv", "0.000", "0.00")
    assert rows[-1][0] == "2 others"
