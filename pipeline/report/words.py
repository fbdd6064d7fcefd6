"""Sentences and tables of a report, for its HTML and its Markdown page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..signature import TOP1
from ..types import DenseForm, Kind, Speedup
from ..verify.gates import Allowed, drop_complaint, speedup_complaint
from .format import DASH, Table, aside, bare, count, fixed, interval, labelled, millis, moment, points, seconds, size, tag
from .report import Report, Search, TargetReport

_QUALITY = {
    "noisy": "wall time ran well above CPU time, or the sessions disagreed by more than 10 %: the device was busy",
    "drift": "the dense baseline itself became slower or faster during the measurement: throttling or a changing load",
    "inconclusive": "the speedup's interval contains 1: neither faster nor slower could be shown",
}


@dataclass(frozen=True)
class Headline:
    """Verdict, sentence and figures of one target."""

    target: str
    state: str  # "passed", "failed" or "not built"
    sentence: str
    figures: tuple[tuple[str, str, str], ...]  # (what, value, remark)
    reasons: tuple[str, ...]
    advice: tuple[str, ...]


def verdict_line(report: Report) -> str:
    """The run in a few words, for the top of the page, with what weakens it: test images cut from others, flagged latencies."""
    states = [_state(target) for target in report.targets.values()]
    flags = dict.fromkeys(flag for target in report.targets.values() for flag in _flags(target))
    caveats = [] if report.data.test_given else [f"test {things(report)} held out from the training data"]
    caveats += [f"latency measurement flagged: {', '.join(flags)}"] if flags else []
    but = f" ({'; '.join(caveats)})" if caveats else ""
    if len(states) != 1:
        return f"{states.count('passed')} of {len(states)} targets passed{but}" if states else "No target was asked for"
    said = {"passed": "All gates passed", "failed": "Failed", "not built": "Not built"}
    return f"{said[states[0]]} on {next(iter(report.targets))}{but}"


def headline(report: Report, name: str) -> Headline:
    """The verdict on one target: a sentence, the figures behind it, what failed and what to do about it."""
    target = report.targets[name]
    accuracy, latency, artifact = target.accuracy, target.latency, target.artifact
    parts, figures = [], []
    if latency is not None:
        speedup = tag(f"{fixed(latency.speedup.median)}×", latency.kind)
        span = aside(f"95 % interval {interval(latency.speedup.ci95)}", latency.kind)
        runs = f"runs {speedup} as fast as the dense float model ({span})"
        figures.append(("Speedup", speedup, span))
        for precision, gain in target.gains:
            times, span = f"{fixed(gain.median)}×", f"95 % interval {interval(gain.ci95)}"
            runs += f", {times} as fast as the dense network in {precision} ({span})"
            figures.append((f"Speedup over {precision} alone", times, span))
        parts.append(runs)
    if accuracy is not None:
        metric = report.metric
        change = tag(points(metric, abs(accuracy.drop)), accuracy.kind)
        on = "" if accuracy.samples == report.data.splits.test else f" on {accuracy.samples:,} test {things(report)}"
        span = aside(f"{bare(metric, accuracy.dense_value)} → {metric.shown(accuracy.value)}{on}", accuracy.kind)
        lost = accuracy.drop >= 0
        of = "top-1 accuracy" if metric == TOP1 else metric.name
        parts.append(f"{'loses' if lost else 'gains'} {change} of {of} ({span})")
        figures.append(("Accuracy lost" if lost else "Accuracy gained", change, span))
    if artifact is not None:
        before = artifact.baseline.size_bytes if artifact.baseline else report.dense.size_bytes
        sizes = f"{size(before)} → {size(artifact.size_bytes)}"
        ratio = before / max(artifact.size_bytes, 1)
        change = f"{fixed(ratio, 1)}× smaller" if ratio >= 1 else f"{fixed(1 / ratio, 1)}× larger"
        parts.append(f"is {change} ({sizes})")
        figures.append(("Size", change, sizes))
    if parts:
        sentence = f"The {artifact.precision if artifact else ''} artifact {', '.join(parts[:-1])}"
        sentence = " ".join(f"{sentence}{' and ' if parts[1:] else ' '}{parts[-1]}.".split())
    else:
        sentence = "There is no artifact." if artifact is None else "The artifact was built, but nothing is known about it."
    if artifact is not None and latency is None:
        sentence += " Its latency is not known: no device has run it."
    if accuracy is not None and not report.data.test_given:
        sentence += f" The test {things(report)} are from the training data: optimistic if the network was trained on them."
    if flags := _flags(target):
        sentence += f" The latency measurement was flagged: {', '.join(flags)}."
    return Headline(name, _state(target), sentence, tuple(figures), target.verdict.reasons, _advice(report, target))


def dense_and_artifact(report: Report, name: str) -> Table:
    """Dense network, pruned network and artifact side by side."""
    dense, pruned, target = report.dense, report.pruned, report.targets[name]
    accuracy, latency, artifact, alone = target.accuracy, target.latency, target.artifact, target.alone
    same = "as pruned" if artifact else DASH
    kind = latency.kind if latency else Kind.NONE
    rows: list[tuple[str, ...]] = [
        (
            _capital(labelled(report.metric, " on the test split")),
            bare(report.metric, dense.value),
            tag(bare(report.metric, alone.value), alone.kind) if alone else DASH,
            bare(report.metric, pruned.value),
            _value(report, target),
        ),
        ("Parameters", count(dense.params), "as dense", count(pruned.params), same),
        ("MACs", count(dense.macs), "as dense", count(pruned.macs), same),
    ]
    if report.masked:
        rows.append(("Parameters that are zero, %", DASH, DASH, fixed(100 * pruned.sparsity), DASH))
    before = artifact.baseline.size_bytes if artifact and artifact.baseline else dense.size_bytes
    sizes = before, alone.size_bytes if alone else None, pruned.state.size_bytes, artifact.size_bytes if artifact else None
    rows.append(("Size", *(DASH if value is None else size(value) for value in sizes)))
    if latency is not None:
        for q in ("p50", "p90", "p99"):
            values = [tag(millis(getattr(side, f"{q}_ms")), latency.kind) for side in (latency.dense, latency.artifact)]
            rows.append((tag(f"Latency {q}, ms", latency.kind), values[0], DASH, DASH, values[1]))
        speedup = tag(_with_interval(latency.speedup), latency.kind)
        quantised = _with_interval(alone.speedup) if alone and alone.speedup else DASH
        rows.append((tag("Speedup over dense float (95 % interval)", latency.kind), DASH, quantised, DASH, speedup))
    for precision, gain in target.gains:
        rows.append((f"Speedup over {precision} alone (95 % interval)", DASH, DASH, DASH, _with_interval(gain)))
    if target.usage is not None:
        peaks = (tag(f"{value / 1e6:.0f}", kind) for value in (target.usage.dense_peak_rss_bytes, target.usage.peak_rss_bytes))
        rows.append((tag("Peak memory with the runtime, MB", kind), next(peaks), DASH, DASH, next(peaks)))
    if accuracy is not None:
        ends = DASH if accuracy.drop_ci95 is None else interval(accuracy.drop_ci95)
        drop = tag(f"{bare(report.metric, accuracy.drop)} ({ends})", accuracy.kind)
        agreement = tag(fixed(100 * accuracy.agreement), accuracy.kind)
        lost = report.metric.drop(dense.value, pruned.value)
        unit = "points" if report.metric.unit == "%" else report.metric.unit or report.metric.name
        quantised = DASH if alone is None else tag(bare(report.metric, report.metric.drop(dense.value, alone.value)), alone.kind)
        rows.append((f"Accuracy lost, {unit} (95 % interval)", DASH, quantised, bare(report.metric, lost), drop))
        agreed = "Same class as" if report.metric == TOP1 else "Agreement with"
        rows.append((f"{agreed} the pruned network, %", DASH, DASH, DASH, agreement))
    head = ("", "dense float", f"dense {alone.precision if alone else ''}", "pruned, PyTorch", "artifact")
    shown = [i for i in range(len(head)) if i != 2 or alone is not None]
    columns = tuple(tuple(row[i] for i in shown) for row in (head, *rows))
    return Table(f"{name}: dense, pruned and artifact", columns[0], columns[1:])


def how_measured(report: Report, name: str) -> Table | None:
    """Device, protocol and quality of one target's figures; `None` where it has none."""
    target = report.targets[name]
    latency, accuracy, seen = target.latency, target.accuracy, target.on_device
    rows: list[tuple[str, ...]] = []
    if latency is not None:
        kind = latency.kind
        rows += [
            ("Device", latency.device),
            ("Kind of the latencies", kind),
            ("Threads", str(latency.threads)),
            *_baseline(target.dense_form, kind),
            ("Noise floor", tag(f"{100 * latency.noise_floor:.1f} % (the baseline against itself)", kind)),
        ]
        if kind != Kind.ESTIMATED:  # an estimate was read from a table: nothing ran
            protocol = "dense and artifact interleaved in pairs, in fresh processes; interval from a two-level bootstrap"
            rows += [("Protocol", protocol), ("Sessions", f"{latency.sessions} processes, {latency.pairs} pairs")]
            rows += [(f"Quality: {flag}", _QUALITY.get(flag, flag)) for flag in latency.quality] or [("Quality", "quiet")]
    if seen is not None:
        metric, same = report.metric, fixed(100 * seen.agreement)
        if metric == TOP1:
            text = f"the same class as on this machine for {same} % of {seen.samples} test images; "
        else:
            text = f"the outputs for {seen.samples} test samples agree with this machine's by {same} %; "
        text += f"{metric.name} {metric.shown(seen.value)}, here {metric.shown(seen.here_value)}"
        rows.append((f"Answers on {seen.device}", tag(text, seen.kind)))
    if accuracy is not None:
        where = "the file's arithmetic in another runtime" if accuracy.kind == Kind.ESTIMATED else "the artifact's own runtime"
        rows.append(("Accuracy", f"{accuracy.samples:,} test {things(report)} in {where} ({accuracy.kind})"))
        rows.append(("Interval of the accuracy lost", accuracy.interval))
    return Table(f"{name}: how it was measured", ("", "value"), tuple(rows), numeric=False) if rows else None


def _baseline(form: DenseForm | None, kind: str) -> tuple[tuple[str, str], ...]:
    """The form of the dense network that latencies are compared with; nothing in older reports."""
    if form is None:
        return ()
    if not form.other:
        return (("Dense baseline", form.form),)
    text = form.form
    if form.speedup is not None:
        ratio, ends = fixed(form.speedup.median), interval(form.speedup.ci95)
        faster = f"{ratio} times as fast as the other, {form.other} (95 % interval {ends})"
        text += f", the faster of two forms: {tag(faster, kind)}"
    return (("Dense baseline", text),)


def conversion(report: Report, name: str) -> Table | None:
    """What was chosen for the artifact and what else was tried; `None` without an artifact."""
    artifact = report.targets[name].artifact
    if artifact is None:
        return None
    rows = [("File", artifact.path), ("SHA-256", artifact.sha256), ("Format", f"{artifact.format}, {artifact.precision}")]
    rows += sorted(artifact.options.items())
    rows += [("Chosen", n) for n in artifact.notes] + [("Also tried", c) for c in artifact.choices]
    return Table(f"{name}: how it was converted", ("", "value"), tuple(rows), numeric=False)


def environment(report: Report) -> tuple[Table, ...]:
    """The run itself: what went in, how long each stage took, which versions."""
    data, pruned, search, gates = report.data, report.pruned, report.pruned.search, report.gates
    splits = ", ".join(f"{name} {images:,}" for name, images in vars(data.splits).items())
    if report.masked:
        budget = ("Density budget", f"{gates.density_budget:g} of the connections: the zeros of a mask give no speedup")
    else:
        budget = ("Latency budget", f"{gates.latency_budget:g} of the dense float model")
    removed = f"{100 * pruned.sparsity:.1f} % of the weights {'zero' if report.masked else 'removed'}"
    rows = (
        ("Model", report.model.name),
        ("Model SHA-256", report.model.sha256),
        ("Data", data.name),
        ("Data SHA-256", data.sha256),
        _samples(report, splits),
        ("Gates", _gates(report)),
        budget,
        ("Pruned", f"{pruned.pattern}, score {pruned.score}, {removed}"),
        *_prunable(pruned.prunable_macs_share),
        ("Search", f"{search.method}, {search.evaluations:,} candidates in {seconds(search.seconds)}"),
        *_latencies(search),
        *_finalists(search),
        ("Seed", str(report.seed)),
        ("Run", f"{moment(report.started)} to {moment(report.finished)}"),
        *(("Note", note) for note in (*search.notes, *report.notes)),
    )
    stages = tuple((name, seconds(s)) for name, s in report.stage_seconds.items())
    packages = tuple(sorted({"edge-compress": report.tool.version, **report.tool.packages}.items()))
    tables = (
        Table("The run", ("", "value"), rows, numeric=False),
        Table("Time by stage", ("Stage", "time"), stages),
        Table("Versions", ("Package", "version"), packages),
    )
    return tuple(t for t in tables if t.rows)


def _with_interval(speedup: Speedup) -> str:
    return f"{fixed(speedup.median)} ({interval(speedup.ci95)})"


def _state(target: TargetReport) -> str:
    passed = "passed" if target.verdict.passed else "failed"
    return {"not_built": "not built", "failed": "failed"}.get(target.status, passed)


def _flags(target: TargetReport) -> tuple[str, ...]:
    return target.latency.quality if target.latency else ()


def things(report: Report) -> str:
    """What the samples of a data set are called."""
    return "images" if report.data.image_shape else "samples"


def _capital(text: str) -> str:
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]  # mAP stays mAP


def _samples(report: Report, splits: str) -> tuple[str, str]:
    data = report.data
    if not data.image_shape:
        return "Samples", splits
    return "Images", f"{splits}; {len(data.classes)} classes; {'×'.join(str(n) for n in data.image_shape)}"


def _value(report: Report, target: TargetReport) -> str:
    """The artifact's value; where it was asked for fewer samples than the networks, with the dense network's on the same."""
    accuracy = target.accuracy
    if accuracy is None:
        return DASH
    text = tag(bare(report.metric, accuracy.value), accuracy.kind)
    if accuracy.samples == report.data.splits.test:
        return text
    dense = bare(report.metric, accuracy.dense_value)
    return f"{text} on {accuracy.samples:,} {things(report)}, of which the dense network has {dense}"


def _advice(report: Report, target: TargetReport) -> tuple[str, ...]:
    """What the user can do about a target that did not pass."""
    state, gates, accuracy, latency = _state(target), report.gates, target.accuracy, target.latency
    if state == "passed":
        return ()
    if state == "not built":
        return ("`edge-compress devices` lists the devices; `edge-compress devices check NAME` shows what one lacks.",)
    advice = []
    limits = Allowed(report.metric, gates.max_accuracy_drop, gates.min_speedup)
    if accuracy is not None and drop_complaint(accuracy, limits):
        if report.metric.drop(report.dense.value, report.pruned.value) <= gates.max_accuracy_drop:
            advice.append(
                "The pruned network itself is within the limit, the conversion is not: try `--precision fp32` or `fp16`."
            )
        else:
            advice.append("Fine-tune longer (`--finetune-epochs`) or prune less (a higher `--latency-budget`).")
        if math.isfinite(accuracy.drop):
            advice.append(f"Or accept the loss: `--max-drop {math.ceil(accuracy.drop * 10) / 10:g}`.")
    if latency is not None and latency.kind == Kind.MEASURED and speedup_complaint(latency, gates.min_speedup):
        if latency.quality:
            advice.append("The device was not quiet: measure again with nothing else running on it.")
        if report.masked:
            advice.append("This runtime stores the zeros of a mask densely, so they give no speedup: use `--pattern channel`.")
        else:
            if latency.speedup.median >= gates.min_speedup:
                advice.append("The median reaches the required speedup, its interval does not: prune a little more.")
            advice.append("Prune more (a lower `--latency-budget`); the first plot shows what that costs in accuracy.")
    return tuple(advice) or ("Fix the cause and re-run the same command: finished stages are kept.",)


def _gates(report: Report) -> str:
    gates, metric = report.gates, report.metric
    most = f"{gates.max_accuracy_drop:.3g} points" if metric.unit == "%" else metric.shown(gates.max_accuracy_drop)
    text = f"accuracy lost at most {most}, speedup at least {gates.min_speedup:g}×"
    return text if gates.max_size_bytes is None else f"{text}, at most {gates.max_size_bytes:,} bytes"


def _prunable(share: float | None) -> tuple[tuple[str, str], ...]:
    """How much of the dense network can be pruned at all; nothing for masks and in older reports."""
    text = f"{100 * (share or 0.0):.1f} % of the dense network's MACs get cheaper when channels are removed"
    return () if share is None else (("Prunable", text),)


def _latencies(search: Search) -> tuple[tuple[str, str], ...]:
    """How many latencies the search had from the device, and how accurate the table is that it estimates others from."""
    if search.best.latency_kind == Kind.ESTIMATED:
        return (("Latencies", "estimated, none measured: there was no board to search on"),)
    fresh, reused, error = search.latency_measured, search.latency_reused, search.table_error
    if not fresh + reused:
        return ()
    rows = [("Latencies", f"{fresh:,} measured for the search, {reused:,} measured by an earlier run on this device")]
    if error is not None:
        text = f"median error {100 * error:.1f} % against measured candidates that change several groups"
        rows.append(("Latency table (estimated)", text))
    return tuple(rows)


def _finalists(search: Search) -> tuple[tuple[str, str], ...]:
    """Accuracy of the search's best plans before and after sequential reconstruction; nothing in older reports."""
    shares = [f"{_share(f.accuracy)} → {_share(f.solved)} %{' (taken)' if f.taken else ''}" for f in search.finalists]
    return (("Best plans, after sequential reconstruction (float)", ", ".join(shares)),) if shares else ()


def _share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"
