"""The report: the contract's keys, re-rendering from JSON alone, honest kinds, escaping, a page that stands by itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.options import Pattern
from edge_compress.pipeline.report import pages
from edge_compress.pipeline.report.report import decode, encode, read_report, to_text
from edge_compress.pipeline.types import Accuracy, DenseForm, Kind, Knob, Plan, Speedup, TargetResult, Timing, Verdict
from fake_run import RunResults, fake_results, fake_target, fake_timing
from fake_run import to_report as collected

# The tests go through report.json both ways, as every page of a finished run does.


def to_report(results: RunResults) -> dict[str, Any]:
    return encode(collected(results))


def to_html(report: dict[str, Any]) -> str:
    return pages.to_html(decode(report))


def to_markdown(report: dict[str, Any]) -> str:
    return pages.to_markdown(decode(report))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return to_report(fake_results())


@pytest.fixture(scope="module")
def html(report: dict[str, Any]) -> str:
    return to_html(report)


@pytest.fixture
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words alone: drawing takes most of a page's time."""
    monkeypatch.setattr(pages, "figures", lambda report: ())


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def numbers_in(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers_in(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers_in(v)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


# --- report.json ------------------------------------------------------------------------------------------------------


def test_report_has_every_key_of_the_contract(report: dict[str, Any]) -> None:
    assert report["schema"] == 1
    assert report["tool"]["version"] == "0.1.0"
    assert report["tool"]["packages"]["torch"] == "2.14.1"
    assert report["model"] == {"name": "nets.py:resnet20", "sha256": "34" * 32}
    assert report["data"]["splits"] == {"train": 45_000, "search": 5_000, "test": 5_000}
    assert report["data"]["name"] == "npz:cifar10.npz"
    assert report["data"]["sha256"] == "12" * 32
    assert report["seed"] == 0
    assert {"top1": 91.8, "params": 272_474, "macs": 40_813_184, "size_bytes": 1_103_365}.items() <= report["dense"].items()
    expected = {"top1": 91.24, "params": 98_210, "macs": 15_310_000, "sparsity": 0.6396, "pattern": "channel", "score": "hasa"}
    assert expected.items() <= report["pruned"].items()
    assert {"method": "ppo", "evaluations": 60, "seconds": 141.3}.items() <= report["pruned"]["search"].items()
    x86 = report["targets"]["x86"]
    assert x86["status"] == "ok"
    artifact = {
        "path": "artifacts/x86/model.onnx",
        "sha256": "ab" * 32,
        "size_bytes": 181_403,
        "format": "onnx",
        "precision": "int8",
    }
    assert artifact.items() <= x86["artifact"].items()
    assert {"top1": 91.18, "drop": 0.62, "agreement": 0.9874, "samples": 5000, "kind": "measured"}.items() <= x86[
        "accuracy"
    ].items()
    assert {"device": "local (x86-64, 2 cores)", "kind": "measured", "noise_floor": 0.0072}.items() <= x86["latency"].items()
    assert x86["latency"]["dense"] == {"p50_ms": 1.0371, "p90_ms": 1.1173, "p99_ms": 1.2191}
    assert x86["latency"]["artifact"]["p50_ms"] == 0.4491
    assert x86["latency"]["speedup"] == {"median": 2.3119, "ci95": [2.2473, 2.3817]}
    assert x86["verdict"] == {"passed": True, "reasons": []}


def test_report_keeps_every_candidate_with_its_reward_and_names_the_chosen_one(report: dict[str, Any]) -> None:
    search, results = report["pruned"]["search"], fake_results()
    assert [c["reward"] for c in search["tried"]] == list(results.search.rewards)
    assert [tuple(c["levels"]) for c in search["tried"]] == [c.levels for c in results.search.tried]
    assert tuple(search["tried"][search["best_index"]]["levels"]) == results.search.best.levels


def test_kept_shares_follow_the_plan_and_removed_blocks_take_their_layers_along(report: dict[str, Any]) -> None:
    knobs = {k["name"]: k for k in report["pruned"]["knobs"]}
    plan = fake_results().plan
    assert knobs["layer1.0.conv1"]["kept"] == len(plan.kept["layer1.0.conv1"])
    assert knobs["layer1.0.conv1"]["block"] is None
    assert (knobs["layer1.1.conv1"]["kept"], knobs["layer1.1.conv1"]["block"]) == (0, "block:layer1.1.conv2")
    assert knobs["block:layer1.1.conv2"]["kept"] == 0
    assert knobs["block:layer1.0.conv2"]["kept"] == 1


def test_kept_shares_of_a_weight_pattern_come_from_its_removed_shares() -> None:
    plan = Plan(Pattern.WEIGHT, "hasa", removed_share={"fc": 0.75})
    knobs = (Knob("fc", "channel", 200, (200, 50)),)
    assert to_report(fake_results(plan=plan, knobs=knobs))["pruned"]["knobs"][0]["kept"] == 50


def test_report_is_strict_json_even_where_a_loss_or_reward_is_not_finite() -> None:
    results = fake_results()
    broken = dataclasses.replace(results.search.tried[0], loss=math.nan)
    search = dataclasses.replace(
        results.search, tried=(broken, *results.search.tried[1:]), rewards=(-math.inf, *results.search.rewards[1:])
    )
    report = to_report(dataclasses.replace(results, search=search))
    text = json.dumps(report, allow_nan=False)
    assert report["pruned"]["search"]["tried"][0]["reward"] is None
    assert "nan" not in to_html(json.loads(text)).lower().replace("name", "")
    assert to_markdown(json.loads(text))


def test_a_report_read_back_renders_the_same_bytes(report: dict[str, Any], html: str) -> None:
    again = json.loads(json.dumps(report))
    assert again == report
    assert to_html(again) == html
    assert to_markdown(again) == to_markdown(report)


def test_all_targets_must_pass_for_the_run_to_pass(report: dict[str, Any]) -> None:
    assert report["passed"] is True
    failed = fake_target(verdict=Verdict(False, ("too slow",)))
    assert to_report(fake_results(targets={"a": fake_target(), "b": failed}))["passed"] is False
    assert to_report(fake_results(targets={}))["passed"] is False


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [None, fake_timing(Kind.NONE)], ids=["missing", "none"])
def test_a_latency_of_kind_none_carries_no_number_anywhere(latency: Timing | None) -> None:
    report = to_report(fake_results(targets={"jetson": fake_target(latency=latency)}))
    found = report["targets"]["jetson"]["latency"]
    assert found["kind"] == "none"
    assert {"device", "dense", "artifact", "speedup", "noise_floor"} <= set(found)
    assert numbers_in(found) == []
    html = to_html(report)
    for text in (html, to_markdown(report)):
        for number in ("2.31", "2.25", "2.38", "1.04", "0.449", "0.7 %"):
            assert number not in re.sub(r"<svg.*?</svg>|<details>.*?</details>", "", text, flags=re.DOTALL)
        assert "Its latency is not known" in text
    assert 'id="figure-latency-0"' not in html


def test_candidates_without_a_latency_carry_none_and_are_not_drawn() -> None:
    report = to_report(fake_results(kind=Kind.NONE))
    assert {c["latency_ratio"] for c in report["pruned"]["search"]["tried"]} == {None}
    html = to_html(report)
    assert 'id="figure-tradeoff"' not in html
    assert 'id="figure-learning"' in html


@pytest.mark.parametrize("kind", [Kind.ESTIMATED, Kind.EMULATED])
def test_numbers_that_were_not_measured_say_so_wherever_they_appear(kind: Kind) -> None:
    report = to_report(fake_results(evaluations=20, kind=kind))
    text = " ".join(" ".join(Page(to_html(report)).text).split())
    for document in (text, to_markdown(report)):
        for number in (r"2\.31", r"2\.25 to 2\.38", r"1\.04", r"1\.12", r"0\.449", r"0\.484", r"0\.538", r"0\.7 %"):
            places = [m.end() for m in re.finditer(rf"(?<![\d.]){number}(?![\d])", document)]
            assert places, f"{number} is not in the document"
            for place in places:
                assert re.match(rf"[^.]{{0,12}}(\(|, ){kind}|.{{0,50}}\({kind}\)", document[place:]), document[
                    max(0, place - 60) : place + 60
                ]
    ratios = [f"{c['latency_ratio']:.3f}" for c in report["pruned"]["search"]["tried"]]
    assert all(f"{ratio} ({kind})" in text for ratio in ratios)
    assert "candidate (measured)" not in text


@pytest.mark.parametrize(("kind", "told"), [(Kind.MEASURED, True), (Kind.EMULATED, True), (Kind.ESTIMATED, False)])
def test_an_estimate_is_not_said_to_have_been_timed(kind: Kind, told: bool) -> None:
    timing = fake_timing(kind, environment={"baseline_drift": "+0.0123"})
    text = to_markdown(to_report(fake_results(targets={"x86": fake_target(latency=timing)})))
    assert ("interleaved in pairs" in text) is told
    assert ("5 processes, 1500 pairs" in text) is told
    assert ("| quiet |" in text) is told
    assert ("| +0.0123 |" in text) is (kind is Kind.MEASURED)


def test_measured_numbers_carry_no_label_that_says_otherwise(html: str) -> None:
    text = re.sub(r'<section aria-labelledby="terms">.*', "", html, flags=re.DOTALL)
    text, cut = re.subn(r'<div class="card">(?:(?!<div class="card">).)*units removed.*?</table>', "", text, flags=re.DOTALL)
    assert cut == 1  # what a removal alone saves is read from the latency table
    assert "estimated" not in text
    assert "emulated" not in text


def test_an_emulated_accuracy_is_labelled() -> None:
    accuracy = Accuracy(90.37, 1.43, 0.981, 5000, Kind.EMULATED, 91.8, (1.0, 1.8))
    text = to_markdown(to_report(fake_results(targets={"phone": fake_target(accuracy=accuracy)})))
    for number in ("90.37", "1.43"):
        for found in re.finditer(re.escape(number), text):
            assert "emulated)" in text[found.end() : found.end() + 30]


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_verdict_is_a_sentence_with_speedup_interval_loss_and_size(report: dict[str, Any], html: str) -> None:
    sentence = (
        "The int8 artifact runs 2.31× as fast as the dense float model (95 % interval 2.25 to 2.38), "
        "loses 0.62 points of top-1 accuracy (91.80 → 91.18 %) and is 6.1× smaller (1.10 MB → 181.4 kB)."
    )
    assert sentence in html.replace("\u00a0", " ")
    assert sentence in to_markdown(report)
    assert "<h1>All gates passed on x86</h1>" in html


@pytest.mark.usefixtures("_no_plots")
def test_a_failed_gate_is_told_with_its_reason_and_what_to_do() -> None:
    reason = "the speedup's interval reaches down to 0.97, asked for was 1.0"
    timing = fake_timing(speedup=Speedup(1.04, (0.97, 1.11)), quality=("noisy", "inconclusive"))
    target = fake_target(latency=timing, verdict=Verdict(False, (reason,)))
    report = to_report(fake_results(targets={"x86": target}))
    html = to_html(report)
    assert "<h1>Failed on x86 (latency measurement flagged: noisy, inconclusive)</h1>" in html
    assert reason.replace("'", "&#39;") in html
    assert "<code>--latency-budget</code>" in html
    assert "measure again with nothing else running" in html
    assert "the device was busy" in html
    assert reason in to_markdown(report)


@pytest.mark.usefixtures("_no_plots")
def test_the_dense_baseline_is_named_with_what_its_other_form_takes() -> None:
    form = DenseForm("with its shortcuts as convolutions", "as given", Speedup(1.08, (1.05, 1.11)))
    artifact = dataclasses.replace(fake_target().artifact, dense_form=form)  # type: ignore[type-var]
    report = to_report(fake_results(targets={"x86": fake_target(artifact=artifact)}))
    assert report["targets"]["x86"]["latency"]["baseline"]["other"] == "as given"
    told = "with its shortcuts as convolutions, the faster of two forms: 1.08 times as fast as the other, as given"
    for text in (to_html(report), to_markdown(report)):
        assert told in text
    assert decode(report).targets["x86"].dense_form == form


@pytest.mark.usefixtures("_no_plots")
def test_a_verdict_that_rests_on_a_noisy_measurement_says_so() -> None:
    noisy = to_report(fake_results(targets={"x86": fake_target(latency=fake_timing(quality=("noisy", "drift")))}))
    for document in (to_html(noisy), to_markdown(noisy)):
        assert "All gates passed on x86 (latency measurement flagged: noisy, drift)" in document
        assert "The latency measurement was flagged: noisy, drift." in document
    assert "flagged" not in to_markdown(to_report(fake_results()))


@pytest.mark.usefixtures("_no_plots")
def test_a_verdict_on_test_images_that_the_network_may_have_seen_says_so() -> None:
    found = fake_results()
    cut = dataclasses.replace(found.subject, data=dataclasses.replace(found.subject.data, test_given=False))
    report = to_report(dataclasses.replace(found, subject=cut))
    told = "The test images are from the training data: optimistic if the network was trained on them."
    for document in (to_html(report), to_markdown(report)):
        assert "All gates passed on x86 (test images held out from the training data)" in document
        assert told in document
    (line, *_) = pages.summary(decode(report), Path("runs/mine"))
    assert line.endswith(told)
    noisy = fake_target(latency=fake_timing(quality=("noisy",)))
    both = to_markdown(to_report(dataclasses.replace(found, subject=cut, targets={"x86": noisy, "phone": noisy})))
    assert "2 of 2 targets passed (test images held out from the training data; latency measurement flagged: noisy)" in both
    assert told not in to_markdown(to_report(found))
    assert "held out" not in to_markdown(to_report(found))


@pytest.mark.usefixtures("_no_plots")
def test_before_and_after_are_of_the_same_images_where_an_engine_was_asked_for_a_part() -> None:
    accuracy = Accuracy(90.0, 0.0, 0.98, 100, Kind.MEASURED, 90.0, (-3.7, 3.7))
    for document in (to_html, to_markdown):
        text = document(to_report(fake_results(targets={"jetson": fake_target(accuracy=accuracy)})))
        assert "loses 0.00 points of top-1 accuracy (90.00 → 90.00 % on 100 test images)" in text
        assert "90.00 on 100 images, of which the dense network has 90.00" in text
        assert "91.80 → 90.00" not in text


@pytest.mark.usefixtures("_no_plots")
def test_advice_tells_a_loss_of_the_conversion_from_a_loss_of_the_pruning() -> None:
    lossy = fake_target(accuracy=Accuracy(89.3, 2.5, 0.93, 5000, Kind.MEASURED, 91.8), verdict=Verdict(False, ("loses 2.50",)))
    assert "--precision fp32" in to_html(to_report(fake_results(targets={"x86": lossy})))
    html = to_html(to_report(fake_results(targets={"x86": lossy}, pruned_value=89.4)))
    assert "--precision fp32" not in html
    assert "--finetune-epochs" in html
    assert "--max-drop 2.5" in html  # of classifiers too: a recipe's run refuses --max-accuracy-drop


@pytest.mark.usefixtures("_no_plots")
def test_targets_that_were_not_built_are_neither_passed_nor_failed() -> None:
    absent = TargetResult("not_built", Verdict(False, ("TensorRT is not installed here",)))
    html = to_html(to_report(fake_results(targets={"x86": fake_target(), "jetson": absent})))
    assert "<h1>1 of 2 targets passed</h1>" in html
    assert "TensorRT is not installed here" in html
    assert 'class="card verdict not-built"' in html


# --- escaping ---------------------------------------------------------------------------------------------------------


HOSTILE = "<script>alert('$x_1$')</script>|`[a](b)`"


def hostile_report() -> dict[str, Any]:
    results = fake_results(evaluations=5)
    subject = dataclasses.replace(
        results.subject, model=HOSTILE, data=dataclasses.replace(results.subject.data, name=HOSTILE, classes=(HOSTILE, "b"))
    )
    timing = fake_timing(device=HOSTILE, quality=(HOSTILE,), environment={HOSTILE: HOSTILE})
    artifact = dataclasses.replace(fake_target().artifact, notes=(HOSTILE,), choices=(HOSTILE,))  # type: ignore[type-var]
    target = fake_target(latency=timing, artifact=artifact, verdict=Verdict(False, (HOSTILE,)))
    knobs = (Knob(HOSTILE, "channel", 16, (16, 8)),)
    return to_report(
        dataclasses.replace(
            results,
            subject=subject,
            knobs=knobs,
            plan=Plan(Pattern.CHANNEL, HOSTILE, {HOSTILE: tuple(range(8))}),
            targets={HOSTILE: target},
            notes=(HOSTILE,),
            command=f"edge-compress --model '{HOSTILE}' ```",
        )
    )


def test_hostile_names_are_text_in_the_page_and_in_its_plots() -> None:
    page = Page(to_html(hostile_report()))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "img", "a b"})
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert sum(HOSTILE in text for text in page.text) >= 8


def test_hostile_names_are_text_in_markdown_and_break_no_table() -> None:
    text = to_markdown(hostile_report())
    body, _, command = text.partition("The command:")
    assert "<script>" not in body
    tables = re.findall(r"(?:^\|.*\n)+", body, flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
    assert "````sh" in command, "a fence inside the command must not close the block"


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_stands_by_itself_without_scripts_and_without_the_network(html: str) -> None:
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for name in ("href", "src", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "default-src 'none'" in html


def test_page_has_landmarks_headings_in_order_and_ids_that_are_unique_and_found(html: str) -> None:
    page = Page(html)
    tags = [tag for tag, _ in page.tags]
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert tags.count(landmark) == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = {str(attrs["href"])[1:] for _, attrs in page.tags if str(attrs.get("href")).startswith("#")}
    wanted |= {word for _, attrs in page.tags for word in (attrs.get("aria-labelledby") or "").split()}
    assert wanted <= set(ids)


def test_every_table_has_a_caption_and_scoped_headers_and_every_plot_its_numbers(html: str) -> None:
    tables = re.findall(r"<table.*?</table>", html, flags=re.DOTALL)
    assert len(tables) > 8
    for table in tables:
        assert "<caption>" in table
        assert not re.search(r"<th(?! scope)[ >]", table)
    found = re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    names = [re.search(r'id="figure-([\w-]+)"', f).group(1) for f in found]  # type: ignore[union-attr]
    assert names == ["tradeoff", "kept", "learning", "latency-0", "finetune"]
    for figure in found:
        assert all(part in figure for part in ("<svg", "<title", "<desc", "<figcaption", "<details", "<table"))


def test_a_long_search_stays_within_a_megabyte_and_a_half_and_shows_the_chosen_candidate() -> None:
    report = to_report(fake_results(blocks=9, evaluations=6000))
    html = to_html(report)
    assert len(html.encode()) < 1_500_000
    chosen = report["pruned"]["search"]["best_index"] + 1
    assert f'<th scope="row">{chosen} (chosen)</th>' in html
    assert "of 6,000, evenly spaced" in html
    assert len(report["pruned"]["search"]["tried"]) == 6000


def test_a_run_without_fine_tuning_or_knobs_has_a_page_without_those_plots() -> None:
    results = fake_results()
    bare = dataclasses.replace(
        results, knobs=(), checkpoint=dataclasses.replace(results.checkpoint, history=()), stage_seconds={}
    )
    html = to_html(to_report(bare))
    assert 'id="figure-finetune"' not in html
    assert 'id="figure-kept"' not in html
    assert to_markdown(to_report(bare))


def test_the_page_says_how_many_latencies_were_measured_and_how_good_the_table_is() -> None:
    results = fake_results()
    counted = dataclasses.replace(results.search, latency_measured=140, latency_reused=60, table_error=0.0312)
    text = to_markdown(to_report(dataclasses.replace(results, search=counted)))
    assert "140 measured for the search, 60 measured by an earlier run on this device" in text
    assert "(estimated) | median error 3.1 % against measured candidates" in text
    none = dataclasses.replace(results.search, latency_measured=0, latency_reused=0, table_error=None)
    bare = to_markdown(to_report(dataclasses.replace(results, search=none)))
    assert "| Latencies |" in text
    assert not any(row in bare for row in ("| Latencies |", "| Latency table"))


def test_a_size_limit_stands_with_the_gates_and_is_not_spoken_of_without_one() -> None:
    limited = to_report(fake_results(max_size_bytes=98_496))
    assert limited["gates"]["max_size_bytes"] == 98_496
    assert "at most 98,496 bytes" in to_markdown(limited)
    free = to_report(fake_results())
    assert free["gates"]["max_size_bytes"] is None
    assert "at most 98,496 bytes" not in to_markdown(free)


def test_how_much_of_the_network_can_be_pruned_is_in_the_report_and_on_its_pages() -> None:
    report = to_report(fake_results(prunable_macs_share=0.8743))
    assert report["pruned"]["prunable_macs_share"] == 0.8743
    for page in (to_html(report), to_markdown(report)):
        assert "87.4 % of the dense network" in page
    masked = to_report(fake_results(prunable_macs_share=None))
    assert masked["pruned"]["prunable_macs_share"] is None
    assert "get cheaper when channels" not in to_markdown(masked)
    older = json.loads(json.dumps(report))
    del older["pruned"]["prunable_macs_share"]
    assert decode(older).pruned.prunable_macs_share is None


def test_a_report_whose_figures_were_changed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    whole = to_text(collected(fake_results()))
    file.write_text(whole)
    assert read_report(file) == decode(json.loads(whole))
    changed = json.loads(whole)
    changed["targets"]["x86"]["accuracy"]["agreement"] -= 0.1
    file.write_text(json.dumps(changed))
    with pytest.raises(InputError, match="its own SHA-256 says"):
        read_report(file)
    del changed["sha256"]  # as in a report of an earlier version
    file.write_text(json.dumps(changed))
    assert read_report(file).targets["x86"].accuracy != decode(json.loads(whole)).targets["x86"].accuracy
