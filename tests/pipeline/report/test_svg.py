"""The plots: they show their data, the same data gives the same bytes, and they fit into any page."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from edge_compress.pipeline.report.plots import svg as plots
from edge_compress.pipeline.report.report import Kept
from edge_compress.pipeline.signature import MOST_FIGURE, TOP1
from edge_compress.pipeline.types import Epoch, Kind, Percentiles, Speedup, Timing
from hypothesis import given, settings
from hypothesis import strategies as st

POINTS = [plots.Point(0.3 + 0.05 * i, 60.0 + 3 * i, Kind.MEASURED) for i in range(8)]
BARS = [
    Kept("layer1.0.conv1", "channel", 16, 12, 0.75),
    Kept("conv1", "stream", 16, 8, 0.5),
    Kept("layer2.0.conv1", "channel", 32, 0, 0.0, "block:layer2.0.conv2"),
]
DENSE, ARTIFACT = tuple(1.0 + 0.001 * i for i in range(200)), tuple(0.4 + 0.001 * i for i in range(200))
HISTORY = [Epoch(1, 0.5, 80.0, 1.0), Epoch(3, 0.4, 90.0, 1.0)]

DRAW: dict[str, Callable[[plots.Label], str]] = {
    "tradeoff": lambda label: plots.tradeoff(POINTS, POINTS[2], plots.Point(1.0, 91.0, Kind.MEASURED), 0.5, label),
    "kept": lambda label: plots.kept_shares(BARS, label),
    "learning": lambda label: plots.learning_curve([0.1, 0.3, None, 0.2], range(4), label),
    "latency": lambda label: plots.latency_histogram(latency(DENSE, ARTIFACT), label),
    "finetune": lambda label: plots.finetuning(HISTORY, 91.0, TOP1, label),
}


def latency(dense: Sequence[float], artifact: Sequence[float], kind: Kind = Kind.MEASURED) -> Timing:
    sides = (Percentiles(samples[len(samples) // 2], samples[-1], samples[-1]) for samples in (dense, artifact))
    return Timing("board", kind, *sides, Speedup(2.0, (1.9, 2.1)), 0.01, 5, 100, 1, (), {}, tuple(dense), tuple(artifact))


def label(uid: str = "p") -> plots.Label:
    return plots.Label(uid, "A <title> & more", "What it <shows>.")


def texts(svg: str) -> str:
    return " | ".join(t.text or "" for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))


def drawn(svg: str, colour: str) -> int:
    """How many shapes have this colour of the page."""
    return len(re.findall(rf"<(?:path|use)[^>]*(?:fill|stroke): var\(--plot-{colour},", svg))


@functools.cache
def draw(name: str, uid: str = "p") -> str:
    return DRAW[name](label(uid))


def test_same_data_gives_the_same_bytes_whatever_was_drawn_before() -> None:
    for name in [*DRAW, *reversed(DRAW)]:
        assert DRAW[name](label()) == draw(name)


@pytest.mark.parametrize("name", DRAW)
def test_plot_is_well_formed_named_and_small(name: str) -> None:
    svg = draw(name)
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    space = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{space}title") == "A <title> & more"
    assert root.findtext(f"{space}desc") == "What it <shows>."
    assert {e.attrib["id"] for e in root.iter() if "id" in e.attrib} >= {"p-title", "p-desc"}
    assert len(svg) < 40_000
    assert "width=" not in svg.partition(">")[0], "the page sets the size"


@pytest.mark.parametrize("name", DRAW)
def test_ids_of_two_plots_never_meet_and_every_reference_is_found(name: str) -> None:
    one, two = (draw(name, uid) for uid in ("one", "two"))
    ids_of = [re.findall(r'\sid="([^"]+)"', svg) for svg in (one, two)]
    assert not set(ids_of[0]) & set(ids_of[1])
    assert len(ids_of[0]) == len(set(ids_of[0]))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', one)) <= set(ids_of[0])


@pytest.mark.parametrize("name", DRAW)
def test_colours_and_fonts_are_the_pages_own(name: str) -> None:
    svg = draw(name)
    assert "<style" not in svg, "a style sheet in an inline SVG reaches the whole page"
    assert not set(re.findall(r"(?<!,)#[0-9a-f]{6}\b", svg)), "a fixed colour does not follow the dark mode"
    assert "currentColor" in svg
    assert "DejaVu" not in svg
    assert "<text" in svg


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    before = dict(mpl.rcParams)
    for each in DRAW.values():
        each(label())
    assert dict(mpl.rcParams) == before


def test_tradeoff_draws_every_candidate_the_budget_and_the_chosen_one() -> None:
    svg = plots.tradeoff(POINTS, POINTS[2], None, 0.45, label())
    assert drawn(svg, "blue") == len(POINTS) + 1  # and one in the legend
    assert drawn(svg, "red") == 2
    assert "budget 0.45" in texts(svg)
    assert "| dense float" not in texts(svg)
    with_dense = plots.tradeoff(POINTS, POINTS[2], plots.Point(1.0, 91.0, Kind.MEASURED), 0.45, label())
    assert "| dense float" in texts(with_dense)
    assert drawn(plots.tradeoff(POINTS, None, None, 0.45, label()), "red") == 0


def test_tradeoff_names_each_kind_and_leaves_out_candidates_without_a_latency() -> None:
    mixed = [POINTS[0], plots.Point(0.4, 70.0, Kind.ESTIMATED), plots.Point(0.123, 71.0, Kind.NONE)]
    svg = plots.tradeoff(mixed, None, None, 0.5, label())
    assert "candidate (measured)" in texts(svg)
    assert "candidate (estimated)" in texts(svg)
    assert "none" not in texts(svg)
    assert drawn(svg, "blue") == 2 + 2


def test_kept_shares_show_names_counts_and_removed_blocks() -> None:
    svg = plots.kept_shares(BARS, label())
    for text in ("layer1.0.conv1", "12/16", "8/16", "block removed", "shortcut-coupled channels"):
        assert text in texts(svg)
    assert "0/32" not in texts(svg)


def test_kept_bars_are_as_long_as_the_share() -> None:
    def length(kept: int) -> float:
        svg = plots.kept_shares([Kept("a", "block", 16, kept, kept / 16), Kept("b", "block", 16, 16, 1.0)], label())
        bars = re.findall(r'<path d="([^"]+)"[^>]*style="fill: var\(--plot-blue', svg)
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", bars[0])]
        return max(xs) - min(xs)

    assert length(4) == pytest.approx(length(16) / 4, rel=1e-3)
    assert length(12) == pytest.approx(length(16) * 3 / 4, rel=1e-3)


def test_learning_curve_draws_the_positions_asked_for_and_marks_what_lies_lower() -> None:
    rewards = [0.5 + 0.01 * i for i in range(40)] + [-50.0]
    svg = plots.learning_curve(rewards, range(41), label())
    assert drawn(svg, "blue") == 41 + 2
    assert "far lower" in texts(svg)
    assert "−50" not in texts(svg), "one bad candidate must not flatten the curve"
    assert drawn(plots.learning_curve(rewards, range(0, 40, 10), label()), "blue") == 4 + 1


def test_reward_floor_cuts_penalties_and_nothing_that_was_learnt() -> None:
    feasible = [0.60, 0.62, 0.65, 0.7, 0.72, 0.71]
    assert plots.reward_floor([-1.5, -1.4, *feasible, -1.6]) == 0.60
    learning = [0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.71, 0.71, 0.72, 0.72]
    assert plots.reward_floor(learning) == 0.1
    assert plots.reward_floor([0.1, 0.2, 0.3, 5.0]) == 0.1, "one lucky reward hides no others"
    assert plots.reward_floor([0.5]) == 0.5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=30))
def test_best_so_far_never_falls_and_ends_at_the_highest(rewards: list[float | None]) -> None:
    best = plots.best_so_far(rewards)
    known = [b for b in best if b is not None]
    assert len(best) == len(rewards)
    assert known == sorted(known)
    highest = max((r for r in rewards if r is not None), default=None)
    assert (best[-1] if best else None) == highest


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.none() | st.floats(-1e3, 1e3), max_size=12),
    st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40),
)
def test_any_data_and_any_name_give_a_well_formed_plot(rewards: list[float | None], times: list[float], name: str) -> None:
    for svg in (
        plots.learning_curve(rewards, range(len(rewards)), label()),
        plots.latency_histogram(latency(times, times), label()),
        plots.kept_shares([Kept(name, "channel", 3, 1, 1 / 3)], label()),
    ):
        assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_latency_histogram_names_the_kind_and_both_medians() -> None:
    said = texts(plots.latency_histogram(latency(DENSE, ARTIFACT, Kind.EMULATED), label()))
    assert "dense: median 1.1 ms (emulated)" in said
    assert "artifact: median 0.5 ms (emulated)" in said
    assert "ms (emulated)" in said.rpartition("latency of one inference")[2]


def test_latency_axis_ends_at_the_slower_ones_99_percent_quantile() -> None:
    slow_once = (1.0,) * 999 + (100.0,)
    assert plots.axis_end(latency(slow_once, (0.5,) * 10)) == pytest.approx(1.0)


def test_finetuning_draws_each_epoch_and_the_dense_line() -> None:
    svg = plots.finetuning(HISTORY, 91.23, TOP1, label())
    assert len(re.findall(r"<use[^>]*--plot-blue", svg)) == 2 + 1
    assert "dense 91.23 %" in texts(svg)
    assert "dense" not in texts(plots.finetuning(HISTORY[:1], None, TOP1, label()))


def test_the_largest_numbers_of_a_report_are_drawn_without_a_warning() -> None:
    with plots.new_axes(100) as (figure, axes):
        axes.plot([0, MOST_FIGURE], [-MOST_FIGURE, MOST_FIGURE])
        assert plots.to_svg(figure, plots.Label("one", "title", "description")).startswith("<svg")
