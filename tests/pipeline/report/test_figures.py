"""The plots' numbers as tables, of figures at their limits."""

from __future__ import annotations

import dataclasses

from edge_compress.devices.measure.usage import LayerTime, Usage
from edge_compress.pipeline.report.figures import confusion_table, layer_table, removed_table
from edge_compress.pipeline.report.pages import to_html, to_markdown
from fake_run import fake_results, to_report


def test_layers_that_took_no_time_are_listed_without_a_division_by_zero() -> None:
    report = to_report(fake_results(evaluations=2))
    usage = Usage(1, 1, tuple(LayerTime(f"layer{k}", "Conv", 0.0) for k in range(10)))
    report = dataclasses.replace(report, targets={"x86": dataclasses.replace(report.targets["x86"], usage=usage)})
    rows = layer_table(report, "x86").rows
    assert rows[0] == ("layer0", "Conv", "0.000", "0.00")
    assert rows[-1][0] == "2 others"


def test_the_largest_removals_are_those_that_save_most_with_what_they_had_of_the_score() -> None:
    results = fake_results(evaluations=2)
    report = to_report(results)
    rows = removed_table(report).rows
    saved = {
        k.name: s[level] for k, s, level in zip(results.knobs, results.search.savings, results.search.best.levels, strict=True)
    }
    gone = [k for k in report.pruned.knobs if k.kept < k.size and not k.block and saved[k.name] > 0]
    gone.sort(key=lambda k: -saved[k.name])
    assert [row[0] for row in rows] == [k.name for k in gone[:5]]
    first = gone[0]
    assert rows[0][2] == f"{100 * saved[first.name]:.2f}"
    assert removed_table(report).head[2].endswith(" (estimated)")  # read from the latency table
    assert removed_table(report).caption == f"The 5 removals that save most, of {len(gone)}"
    channel = next(k for k in gone[:5] if k.kind == "channel")
    (row,) = (row for row in rows if row[0] == channel.name)
    assert row[1] == f"{channel.size - channel.kept} of {channel.size}"
    assert row[3] == f"{100 * sum(results.ranking.shares[channel.name][channel.kept :]):.2f}"


def test_removals_are_not_ranked_where_an_older_run_did_not_keep_what_they_save() -> None:
    results = fake_results(evaluations=2)
    report = to_report(dataclasses.replace(results, search=dataclasses.replace(results.search, savings=())))
    assert removed_table(report).rows == ()


def test_confusions_and_settings_have_their_tables_on_both_pages() -> None:
    report = to_report(fake_results(evaluations=2))
    assert confusion_table(report, "x86").rows == (("cat as dog", "71", "90"), ("ship as deer", "0", "3"))
    for page in (to_html(report), to_markdown(report)):
        for text in ("cat as dog", "governor", "removals that save most"):
            assert text in page, text
    folded = to_html(report).partition("<summary>x86: settings of the measurement</summary>")
    assert "governor" in folded[2]
    assert "governor" not in folded[0]  # raw keys are folded away
