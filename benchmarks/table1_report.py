"""The table as Markdown, and as a plot."""

from __future__ import annotations

import io
import statistics
from collections import defaultdict
from typing import Any

REGIMES = {"one-shot": "One-shot: no training", "fine-tuned": "Fine-tuned"}
Table = dict[str, Any]


def to_markdown(table: Table) -> str:
    """Top-1 in percent by method and sparsity: mean, and half the range over seeds where there are several."""
    lines = [f"Dense: {table['dense']['top1']:.2f} %." if table["dense"] else "", "", f"`{table['command']}`", ""]
    for regime, title in REGIMES.items():
        rows = [r for r in table["rows"] if r["regime"] == regime and r["sparsity"] > 0]
        if not rows:
            continue
        found = grouped(rows)
        sparsities = sorted({r["sparsity"] for r in rows})
        seeds = len({r["seed"] for r in rows})
        trained = f", {table['settings']['epochs']} epochs" if regime == "fine-tuned" else ""
        lines += [f"## {title}{trained}, {seeds} seed{'s' if seeds > 1 else ''}", ""]
        lines += ["| top-1, % | " + " | ".join(f"{s:g} %" for s in sparsities) + " |", "|---" * (len(sparsities) + 1) + "|"]
        for method in dict.fromkeys(r["method"] for r in rows):
            lines.append(f"| {method} | " + " | ".join(_cell(found.get((method, s), []), seeds) for s in sparsities) + " |")
        lines.append("")
    lines += [*_remarks(table), ""]
    return "\n".join(lines)


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[float]]:
    """(method, sparsity) -> top-1 of every seed."""
    found = defaultdict(list)
    for row in rows:
        found[row["method"], row["sparsity"]].append(row["top1"])
    return dict(found)


def _cell(values: list[float], seeds: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    spread = "" if len(values) == 1 else f" ± {(max(values) - min(values)) / 2:.2f}"
    return mean + spread + ("" if len(values) == seeds else f" ({len(values)})")


def _remarks(table: Table) -> list[str]:
    rows = [r for r in table["rows"] if r["sparsity"] > 0]
    if not rows:
        return []
    millions, ratio = rows[0]["macs"] / 1e6, rows[0]["latency_ratio"]
    return [
        "MACs saved: none. ONNX Runtime stores the zeros of a mask densely and computes with them, so every row needs the dense "
        f"{millions:.1f} million (`macs_nonzero` is what a sparse runtime would need), and has the latency of the dense "
        f"structure: measured once, float against itself, a ratio of {ratio:.3f}.",
        "",
        "`±` is half the range over seeds; in brackets the number of seeds, where it is not all of them. `seed` is the published "
        "formula, sign included, with the best lambda above 0 (0 is `magnitude`). Lottery tickets are rewound to the given "
        "weights; the epochs in which their masks are found count, but for rows that end in `-long` (`epochs` has them).",
    ]


def to_svg(table: Table) -> str:
    """Top-1 over sparsity, a panel for each regime; bands are the range over seeds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    regimes = [name for name in REGIMES if any(r["regime"] == name and r["sparsity"] > 0 for r in table["rows"])]
    with mpl.rc_context({"svg.hashsalt": "table1", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * max(len(regimes), 1), 4.2), layout="constrained")
        for i, regime in enumerate(regimes):
            axes = figure.add_subplot(1, len(regimes), i + 1)
            rows = [r for r in table["rows"] if r["regime"] == regime and r["sparsity"] > 0]
            found = grouped(rows)
            for n, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
                at = sorted(s for m, s in found if m == method)
                values = [found[method, s] for s in at]
                ours = method == "amp-hasa"
                colour = "black" if ours else f"C{n % 10}"
                axes.plot(
                    at, [statistics.fmean(v) for v in values], "o-", ms=3, lw=2.2 if ours else 1.2, color=colour, label=method
                )
                axes.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
            if table["dense"]:
                axes.axhline(table["dense"]["top1"], color="0.5", lw=1, ls="--", label="dense")
            axes.set(title=REGIMES[regime], xlabel="sparsity, % of weights", ylabel="top-1, %")
            axes.legend(frameon=False, fontsize=7)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
