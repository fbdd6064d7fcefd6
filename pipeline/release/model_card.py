"""MODEL_CARD.md of a bundle: what the artifact is, what it was trained on, how good and how fast it is, and where that ends.

Sections after Mitchell et al. 2019, "Model cards for model reporting" (arXiv 1810.03993). All of it comes from the run's report.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..report.markdown import md_table
from ..report.rendering import render
from ..report.words import Json, Table, fixed, headline, masked, moment, tag
from .bundle import Number, numbers

# number in the manifest -> what it is called, decimals
_FIGURES = {
    "top1": ("Top-1 on the test split, %", 2),
    "drop": ("Top-1 lost against the dense network, points", 2),
    "agreement": ("Same class as the pruned PyTorch network, share", 4),
    "speedup": ("Speedup over the dense float model", 2),
    "artifact_p50": ("Median latency, ms", 3),
    "dense_p50": ("Median latency of the dense float model, ms", 3),
}


def model_card(report: Json, target: str, licenses: Sequence[str]) -> str:
    """The card of a target's artifact.

    Args:
        report: of the run.
        target: whose artifact it is.
        licenses: names of the licence files in the bundle.
    """
    found = numbers(report, target)
    result = report["targets"][target]
    return render(
        "model_card.md.jinja",
        target=target,
        model=report["model"]["name"],
        model_sha256=report["model"]["sha256"],
        passed=result["verdict"]["passed"],
        reasons=result["verdict"]["reasons"],
        sentence=headline(report, target).sentence,
        artifact=result["artifact"],
        latency=result["latency"],
        masked=masked(report),
        figures=_figures(found),
        protocols=[f"{n.name}: {n.protocol}" for n in found if n.name in ("top1", "drop", "speedup")],
        finished=moment(report["finished"]),
        tool=report["tool"]["version"],
        licenses=licenses,
        **{key: report[key] for key in ("data", "dense", "pruned", "preprocess", "notes", "seed")},
    )


def _figures(found: Sequence[Number]) -> list[str]:
    rows = tuple((_FIGURES[n.name][0], _value(n), f"{n.samples:,}", str(n.kind), n.device) for n in found)
    return md_table(Table("The artifact in its own runtime", ("", "value (95 % interval)", "n", "kind", "where"), rows))


def _value(number: Number) -> str:
    digits = _FIGURES[number.name][1]
    text = fixed(number.value, digits)
    if number.ci95 is not None:
        text += f" ({fixed(number.ci95[0], digits)} to {fixed(number.ci95[1], digits)})"
    return tag(text, number.kind)
