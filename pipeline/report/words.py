"""`report.json` as words and tables, which the HTML and the Markdown report share.

Every number passes through `tag`: what was not measured is labelled where it appears.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ..types import Kind

Json = dict[str, Any]
DASH = "–"
_NB = "\u00a0"  # a number and its unit stay on one line
_NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?")
_QUALITY = {
    "noisy": "wall time ran well above CPU time, or the sessions disagreed by more than 10 %: the device was busy",
    "drift": "the dense baseline itself became slower or faster during the measurement: throttling or a changing load",
    "inconclusive": "the speedup's interval contains 1: neither faster nor slower could be shown",
}


@dataclass(frozen=True)
class Table:
    """A table of text; the first column heads its row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True  # all columns but the first are numbers


@dataclass(frozen=True)
class Headline:
    """What came of one target, in words."""

    target: str
    state: str  # "passed", "failed" or "not built"
    sentence: str
    figures: tuple[tuple[str, str, str], ...]  # (what, value, remark)
    reasons: tuple[str, ...]
    advice: tuple[str, ...]


def headline(report: Json, name: str) -> Headline:
    """The verdict on one target: a sentence, the figures behind it, what failed and what to do about it."""
    target = report["targets"][name]
    accuracy, latency, artifact = target["accuracy"], target["latency"], target["artifact"]
    passed = target["verdict"]["passed"]
    state = {"not_built": "not built", "failed": "failed"}.get(target["status"], "passed" if passed else "failed")
    parts, figures = [], []
    if latency["kind"] != Kind.NONE:
        speedup = tag(f"{fixed(latency['speedup']['median'])}×", latency["kind"])
        low, high = latency["speedup"]["ci95"]
        interval = aside(f"95 % interval {fixed(low)} to {fixed(high)}", latency["kind"])
        parts.append(f"runs {speedup} as fast as the dense float model ({interval})")
        figures.append(("Speedup", speedup, interval))
    if accuracy["kind"] != Kind.NONE:
        drop, before, after = accuracy["drop_pp"], report["dense"]["top1"], accuracy["top1"]
        change = tag(f"{fixed(abs(drop))} points", accuracy["kind"])
        span = aside(f"{fixed(before)} → {fixed(after)} %", accuracy["kind"])
        parts.append(f"{'loses' if drop >= 0 else 'gains'} {change} of top-1 accuracy ({span})")
        figures.append(("Accuracy lost" if drop >= 0 else "Accuracy gained", change, span))
    if artifact is not None:
        before_bytes = (artifact["baseline"] or report["dense"])["size_bytes"]
        sizes = f"{size(before_bytes)} → {size(artifact['size_bytes'])}"
        ratio = before_bytes / max(artifact["size_bytes"], 1)
        change = f"{fixed(ratio, 1)}× smaller" if ratio >= 1 else f"{fixed(1 / ratio, 1)}× larger"
        parts.append(f"is {change} ({sizes})")
        figures.append(("Size", change, sizes))
    if parts:
        sentence = f"The {artifact['precision'] if artifact else ''} artifact {', '.join(parts[:-1])}"
        sentence = " ".join(f"{sentence}{' and ' if parts[1:] else ' '}{parts[-1]}.".split())
    else:
        sentence = "There is no artifact." if artifact is None else "The artifact was built, but nothing is known about it."
    if artifact is not None and latency["kind"] == Kind.NONE:
        sentence += " Its latency is not known: no device has run it."
    return Headline(name, state, sentence, tuple(figures), tuple(target["verdict"]["reasons"]), _advice(report, target, state))


def _advice(report: Json, target: Json, state: str) -> tuple[str, ...]:
    """What the user can do about a target that did not pass."""
    if state == "passed":
        return ()
    if state == "not built":
        return ("`edge-compress devices` lists the devices, `edge-compress devices check NAME` says what is missing on one.",)
    gates, accuracy, latency = report["gates"], target["accuracy"], target["latency"]
    advice = []
    if accuracy["kind"] != Kind.NONE and accuracy["drop_pp"] > gates["max_accuracy_drop"]:
        if report["dense"]["top1"] - report["pruned"]["top1"] <= gates["max_accuracy_drop"]:
            advice.append(
                "The pruned network itself is within the limit, the conversion is not: try `--precision fp32` or `fp16`."
            )
        else:
            advice.append("Train longer (`--finetune-epochs`) or prune less (a higher `--latency-budget`).")
        advice.append(f"Or accept the loss: `--max-accuracy-drop {math.ceil(accuracy['drop_pp'] * 10) / 10:g}`.")
    if latency["kind"] != Kind.NONE and latency["speedup"]["ci95"][0] < gates["min_speedup"]:
        if latency["quality"]:
            advice.append("The device was not quiet: measure again with nothing else running on it.")
        if masked(report):
            advice.append("This runtime stores the zeros of a mask densely, so they buy no latency: use `--pattern channel`.")
        else:
            if latency["speedup"]["median"] >= gates["min_speedup"]:
                advice.append("The median reaches the speedup asked for, its interval does not: prune a little more.")
            advice.append("Prune more: a lower `--latency-budget`; what it costs in accuracy shows in the first plot.")
    return tuple(advice) or ("Mend the cause and run the same command again: finished stages are kept.",)


def masked(report: Json) -> bool:
    """Whether connections were masked, under a budget on density; else channels went, under one on latency."""
    return report["pruned"]["search"]["best"].get("density") is not None


def verdict_line(report: Json) -> str:
    """The run in a few words, for the top of the page."""
    names = list(report["targets"])
    states = [headline(report, name).state for name in names]
    if len(names) != 1:
        return f"{states.count('passed')} of {len(names)} targets passed" if names else "No target was asked for"
    said = {"passed": "All gates passed", "failed": "Failed", "not built": "Not built"}
    return f"{said[states[0]]} on {names[0]}"


def comparison(report: Json, name: str) -> Table:
    """Dense, pruned and artifact side by side."""
    dense, pruned, target = report["dense"], report["pruned"], report["targets"][name]
    accuracy, latency, artifact = target["accuracy"], target["latency"], target["artifact"]
    has_accuracy, has_latency = accuracy["kind"] != Kind.NONE, latency["kind"] != Kind.NONE
    top1 = tag(fixed(accuracy["top1"]), accuracy["kind"]) if has_accuracy else DASH
    rows = [
        ("Top-1 on the test split, %", fixed(dense["top1"]), fixed(pruned["top1"]), top1),
        ("Parameters", count(dense["params"]), count(pruned["params"]), "as pruned" if artifact else DASH),
        ("MACs", count(dense["macs"]), count(pruned["macs"]), "as pruned" if artifact else DASH),
    ]
    if masked(report):
        rows.append(("Parameters that are zero, %", DASH, fixed(100 * pruned["sparsity"]), DASH))
    before = ((artifact or {}).get("baseline") or dense)["size_bytes"]
    rows.append(("Size", size(before), size(pruned["state"]["size_bytes"]), size(artifact["size_bytes"]) if artifact else DASH))
    if has_latency:
        kind = latency["kind"]
        for q in ("p50", "p90", "p99"):
            values = [tag(millis(latency[side][f"{q}_ms"]), kind) for side in ("dense", "artifact")]
            rows.append((tag(f"Latency {q}, ms", kind), values[0], DASH, values[1]))
        low, high = latency["speedup"]["ci95"]
        speedup = tag(f"{fixed(latency['speedup']['median'])} ({fixed(low)} to {fixed(high)})", kind)
        rows.append((tag("Speedup (95 % interval)", kind), DASH, DASH, speedup))
    if has_accuracy:
        low, high = accuracy["drop_ci95_pp"]
        drop = f"{fixed(accuracy['drop_pp'])} ({fixed(low)} to {fixed(high)})"
        rows.append(
            ("Accuracy lost, points (95 % interval)", DASH, fixed(dense["top1"] - pruned["top1"]), tag(drop, accuracy["kind"]))
        )
        rows.append(
            ("Same class as the pruned network, %", DASH, DASH, tag(fixed(100 * accuracy["agreement"]), accuracy["kind"]))
        )
    return Table(f"{name}: dense, pruned and artifact", ("", "dense float", "pruned, PyTorch", "artifact"), tuple(rows))


def how_measured(report: Json, name: str) -> Table | None:
    """Device, protocol and quality of one target's latency; `None` without a latency."""
    latency, accuracy = report["targets"][name]["latency"], report["targets"][name]["accuracy"]
    rows: list[tuple[str, ...]] = []
    if latency["kind"] != Kind.NONE:
        kind = latency["kind"]
        rows += [
            ("Device", latency["device"]),
            ("Kind of the latencies", kind),
            ("Threads", str(latency["threads"])),
            *_baseline(latency.get("baseline"), kind),
            ("Noise floor", tag(f"{100 * latency['noise_floor']:.1f} % (the baseline against itself)", kind)),
        ]
        if kind != Kind.ESTIMATED:  # an estimate was read from a table: nothing ran
            protocol = "dense and artifact interleaved in pairs, in fresh processes; interval from a two-level bootstrap"
            rows += [("Protocol", protocol), ("Sessions", f"{latency['sessions']} processes, {latency['pairs']} pairs")]
            rows += [(f"Quality: {flag}", _QUALITY.get(flag, flag)) for flag in latency["quality"]] or [("Quality", "quiet")]
        rows += [(k, tag(v, kind) if _NUMBER.fullmatch(v) else v) for k, v in sorted(latency["environment"].items())]
    seen = report["targets"][name].get("on_device")
    if seen is not None:
        same, there, here = (fixed(v) for v in (100 * seen["agreement"], seen["top1"], seen["here_top1"]))
        text = f"{same} % of {seen['samples']} test images get the class they get here; top-1 of these {there} %, here {here} %"
        rows.append((f"Answers on {seen['device']}", tag(text, seen["kind"])))
    if accuracy["kind"] != Kind.NONE:
        where = "the file's arithmetic in another runtime" if accuracy["kind"] == Kind.ESTIMATED else "the artifact's own runtime"
        rows.append(("Accuracy", f"{accuracy['samples']:,} test images in {where} ({accuracy['kind']})"))
    return Table(f"{name}: how it was measured", ("", "value"), tuple(rows), numeric=False) if rows else None


def _baseline(form: Json | None, kind: str) -> tuple[tuple[str, str], ...]:
    """The form of the dense network that latencies are compared with; none in older reports."""
    if form is None:
        return ()
    text = f"the dense float network {form['form']}" if not form["other"] else form["form"]
    if form["speedup"] is not None:
        low, high = form["speedup"]["ci95"]
        faster = f"{fixed(form['speedup']['median'])} times as fast as {form['other']}"
        text += f", the faster of two forms: {tag(f'{faster} (95 % interval {fixed(low)} to {fixed(high)})', kind)}"
    return (("Dense baseline", text),)


def conversion(report: Json, name: str) -> Table | None:
    """What was chosen for the artifact and what else was tried; `None` without an artifact."""
    artifact = report["targets"][name]["artifact"]
    if artifact is None:
        return None
    rows = [
        ("File", artifact["path"]),
        ("SHA-256", artifact["sha256"]),
        ("Format", f"{artifact['format']}, {artifact['precision']}"),
    ]
    rows += sorted(artifact["options"].items())
    rows += [("Chosen", n) for n in artifact["notes"]] + [("Also tried", c) for c in artifact["choices"]]
    return Table(f"{name}: how it was converted", ("", "value"), tuple(rows), numeric=False)


def environment(report: Json) -> tuple[Table, ...]:
    """The run itself: what went in, how long each stage took, which versions."""
    data, search, gates = report["data"], report["pruned"]["search"], report["gates"]
    splits = ", ".join(f"{name} {data['splits'][name]:,}" for name in ("train", "search", "test"))
    pruned = report["pruned"]
    how = "zero" if masked(report) else "gone"
    removed = f"{pruned['pattern']}, score {pruned['score']}, {100 * pruned['sparsity']:.1f} % of the weights {how}"
    if masked(report):
        budget = ("Density budget", f"{gates['density_budget']:g} of the connections: the zeros of a mask buy no latency")
    else:
        budget = ("Latency budget", f"{gates['latency_budget']:g} of the dense float model")
    rows = (
        ("Model", report["model"]["name"]),
        ("Model SHA-256", report["model"]["sha256"]),
        ("Data", data["name"]),
        ("Data SHA-256", data["sha256"]),
        ("Images", f"{splits}; {len(data['classes'])} classes; {'×'.join(str(n) for n in data['image_shape'])}"),
        ("Gates", _gates(gates)),
        budget,
        ("Pruned", removed),
        ("Search", f"{search['method']}, {search['evaluations']:,} candidates in {seconds(search['seconds'])}"),
        *latencies(search),
        *_finalists(search),
        ("Seed", str(report["seed"])),
        ("Run", f"{moment(report['started'])} to {moment(report['finished'])}"),
        *(("Note", note) for note in [*search["notes"], *report["notes"]]),
    )
    stages = tuple((name, seconds(s)) for name, s in report["stage_seconds"].items())
    packages = tuple(sorted({"edge-compress": report["tool"]["version"], **report["tool"]["packages"]}.items()))
    tables = (
        Table("The run", ("", "value"), rows, numeric=False),
        Table("Time by stage", ("Stage", "time"), stages),
        Table("Versions", ("Package", "version"), packages),
    )
    return tuple(t for t in tables if t.rows)


def _gates(gates: Json) -> str:
    limit = gates.get("max_size_bytes")
    text = f"accuracy lost at most {gates['max_accuracy_drop']:g} points, speedup at least {gates['min_speedup']:g}×"
    return text if limit is None else f"{text}, at most {limit:,} bytes"


def latencies(search: Json) -> tuple[tuple[str, str], ...]:
    """How many latencies the search had from the device, and how good the table is that it estimates others from."""
    if search["best"]["latency_kind"] == Kind.ESTIMATED:
        return (("Latencies", "estimated, none measured: there was no board to search on"),)
    fresh, error = search.get("latency_measured") or 0, search.get("table_error")
    reused = search.get("latency_reused") or 0
    if not fresh + reused:
        return ()
    rows = [("Latencies", f"{fresh:,} measured for the search, {reused:,} measured by an earlier run on this device")]
    if error is not None:
        text = f"median error {100 * error:.1f} % against the measured candidates that several knobs make"
        rows.append(("Latency table (estimated)", text))
    return tuple(rows)


def _finalists(search: Json) -> tuple[tuple[str, str], ...]:
    """What the search's best plans were worth once their layers were solved one after another; none in older reports."""
    found = search.get("finalists") or []
    shares = [f"{100 * f['accuracy']:.1f} → {100 * f['solved']:.1f} %{' (taken)' if f['taken'] else ''}" for f in found]
    return (("Best plans, solved whole (float)", ", ".join(shares)),) if shares else ()


def kept_table(report: Json) -> Table:
    """What stays of every group of channels, or of every layer's connections."""
    rows = tuple(
        (
            k["name"],
            "removed with its block" if k["block"] else k["kind"],
            str(k["size"]),
            str(k["kept"]),
            f"{100 * k['share']:.0f}",
        )
        for k in report["pruned"]["knobs"]
    )
    if masked(report):
        return Table("Kept connections per layer", ("Layer", "kind", "dense", "kept", "kept, %"), rows)
    return Table("Kept units per group", ("Group", "kind", "dense", "kept", "kept, %"), rows)


def finetune_table(report: Json) -> Table:
    """The fine-tuning history."""
    rows = tuple(
        (str(e["epoch"]), fixed(e["loss"], 4), fixed(e["search_top1"]), seconds(e["seconds"]))
        for e in report["pruned"]["finetune"]
    )
    return Table("Fine-tuning by epoch", ("Epoch", "loss", "top-1 on the search split, %", "time"), rows)


def tag(text: str, kind: str) -> str:
    """The text with its kind, where that is not `measured`."""
    return text if kind == Kind.MEASURED or text == DASH else f"{text} ({kind})"


def aside(text: str, kind: str) -> str:
    """The same where the text stands in parentheses or apart."""
    return text if kind == Kind.MEASURED else f"{text}, {kind}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where there is none."""
    return DASH if value is None else f"{value:,.{digits}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent."""
    return DASH if share is None else fixed(100.0 * share)


def millis(value: float) -> str:
    """Milliseconds, to three digits or so."""
    return f"{value:,.{3 if value < 1 else 2 if value < 100 else 0}f}"


def count(value: int) -> str:
    """A count; millions from one million on."""
    return f"{value / 1e6:,.2f}{_NB}M" if value >= 1e6 else f"{value:,}"


def size(value: int) -> str:
    """Bytes as kB or MB (powers of ten)."""
    return f"{value / 1e6:,.2f}{_NB}MB" if value >= 1e6 else f"{value / 1e3:,.1f}{_NB}kB"


def moment(iso: str) -> str:
    """An ISO 8601 time for people."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 120:
        return f"{value:,.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 120 else f"{minutes} min {seconds} s"
