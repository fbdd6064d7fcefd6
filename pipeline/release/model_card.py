"""Writes MODEL_CARD.md: what the artifact is, what it was trained on, its accuracy and latency, and their limits.

Sections after Mitchell et al. 2019, "Model cards for model reporting" (arXiv 1810.03993). All of it comes from the run's report.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..report.format import Table, fixed, interval, md_table, moment, render, tag
from ..report.pages import to_use
from ..report.report import Report
from ..report.words import headline
from ..signature import Metric
from .bundle import Number, numbers

# number in the manifest -> what it is called, decimals
_FIGURES = {
    "agreement": ("Agreement with the pruned PyTorch network, share", 4),
    "speedup": ("Speedup over the dense float model", 2),
    "artifact_p50": ("Median latency, ms", 3),
    "dense_p50": ("Median latency of the dense float model, ms", 3),
}


def model_card(report: Report, target: str, licenses: Sequence[str]) -> str:
    """The card of a target's artifact; `licenses` are names of the licence files in the bundle."""
    found = numbers(report, target)
    return render(
        "model_card.md.jinja",
        target=target,
        report=report,
        result=report.targets[target],
        sentence=headline(report, target).sentence,
        figures=_figures(found, report.metric),
        protocols=[f"{n.name}: {n.protocol}" for n in found if n.name in ("top1", "value", "drop", "speedup")],
        finished=moment(report.finished),
        licenses=licenses,
        use=to_use(report, target),
    )


def _figures(found: Sequence[Number], metric: Metric) -> list[str]:
    name = metric.name[:1].upper() + metric.name[1:]
    of_test = f"{name} on the test split{f', {metric.unit}' if metric.unit else ''}"
    lost = f"{name} lost against the dense network{', points' if metric.unit == '%' else ''}"
    named = {**_FIGURES, "top1": (of_test, 2), "value": (of_test, 2 if metric.unit else 4), "drop": (lost, 2)}
    rows = tuple((named[n.name][0], _value(n, named[n.name][1]), f"{n.samples:,}", str(n.kind), n.device) for n in found)
    return md_table(Table("The artifact in its own runtime", ("", "value (95 % interval)", "n", "kind", "where"), rows))


def _value(number: Number, digits: int) -> str:
    text = fixed(number.value, digits)
    if number.ci95 is not None:
        text += f" ({interval(number.ci95, digits)})"
    return tag(text, number.kind)
