"""The HTML pages as a user has them, in headless Chromium: no error, no network, nothing that axe-core finds fault with.

Needs Chromium (`apt-get install chromium`), Node and `make browser`; skipped with the reason where one is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_compress.pipeline.report.front import point_of
from edge_compress.pipeline.report.pages import to_html
from edge_compress.pipeline.report.run_comparison import to_html as comparison
from edge_compress.pipeline.signature import FileTensor, Metric
from edge_compress.pipeline.types import FileRef, Kind, Verdict
from fake_run import fake_results, fake_target, fake_timing, to_report
from PIL import Image

ROOT = Path(__file__).parents[2]
LOOK = Path(__file__).with_name("look.mjs")
MODULES = Path(os.environ.get("EDGE_COMPRESS_BROWSER", ROOT / "build" / "browser"))
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


def missing() -> str:
    """Why the pages cannot be looked at here."""
    if not CHROMIUM:
        return "Chromium is not installed"
    if not shutil.which("node"):
        return "Node is not installed"
    absent = [name for name in ("axe-core", "playwright-core") if not (MODULES / "node_modules" / name).is_dir()]
    return f"{' and '.join(absent)} not in {MODULES}: make browser" if absent else ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing")


def look(page: Path) -> dict[str, Any]:
    """What look.mjs found. Screenshots go where EDGE_COMPRESS_SCREENSHOTS says."""
    shots = os.environ.get("EDGE_COMPRESS_SCREENSHOTS")
    command = ["node", str(LOOK), CHROMIUM, str(page), *([str(Path(shots) / page.stem)] if shots else [])]
    done = subprocess.run(command, cwd=MODULES, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _comparison() -> str:
    slower = fake_target(Kind.EMULATED, verdict=Verdict(False, ("latency: not measured on a device (kind emulated)",)))
    board = dataclasses.replace(slower, latency=fake_timing(Kind.EMULATED))
    plan = fake_results().plan
    other = dataclasses.replace(plan, kept={**plan.kept, "conv1": (0, 1, 2), "layer1.0.conv1": (0,)})
    runs = [
        ("one", fake_results(evaluations=5)),
        ("a run with <b>a long name</b> & more", fake_results(evaluations=5, plan=other)),
        ("emulated", fake_results(evaluations=5, targets={"x86": fake_target(), "jetson": board})),
        ("deeper", fake_results(blocks=9, evaluations=5)),
    ]
    return comparison([(name, to_report(results)) for name, results in runs])


def _failed() -> str:
    verdict = Verdict(False, ("accuracy: top-1 fell by 2.00 points, at most 1 allowed",))
    return to_html(to_report(fake_results(targets={"x86": fake_target(verdict=verdict)})))


def _budgets() -> str:
    target = fake_target()
    assert target.artifact is not None
    assert target.accuracy is not None
    sides = {"inputs": (FileTensor("input", (1, 3, 32, 32), "NCHW"),), "outputs": (FileTensor("logits", (1, 10)),)}
    accuracy = dataclasses.replace(
        target.accuracy, classes={"cat": (500, 460, 440, 25), "a class with a long name": (10, 10, 4, 6)}
    )
    target = dataclasses.replace(target, artifact=dataclasses.replace(target.artifact, **sides), accuracy=accuracy)
    report = to_report(fake_results(targets={"x86": target}))
    points = [point_of(report, "x86", budget, f"budgets/{budget}", budget == "0.3") for budget in ("0.7", "0.5", "0.3")]
    return to_html(dataclasses.replace(report, front=tuple(points)))


def _detection(folder: Path) -> str:
    """A detector's report: its metric, several outputs, pictures with boxes, and a phone's file with quantised tensors."""
    outputs = tuple(FileTensor(f"scale_{k}", (1, 16, 40 >> k, 40 >> k), "", "int8", "steps", 0.05, 3) for k in range(3))
    target = fake_target()
    assert target.artifact is not None
    assert target.accuracy is not None
    inputs = (FileTensor("images", (1, 320, 320, 3), "NHWC", "int8", "pixel - 128", 1.0, -128),)
    artifact = dataclasses.replace(target.artifact, target="phone", format="tflite", inputs=inputs, outputs=outputs)
    accuracy = dataclasses.replace(target.accuracy, confused=(), classes={})
    files = []
    for name, shade in (("dense", 90), ("artifact", 160)):
        Image.new("RGB", (320, 320), (shade, shade, 60)).save(folder / f"{name}.png")
        content = (folder / f"{name}.png").read_bytes()
        files.append(FileRef(f"{name}.png", hashlib.sha256(content).hexdigest(), len(content)))
    target = dataclasses.replace(target, artifact=artifact, accuracy=accuracy, pictures=((files[0], files[1]),))
    report = to_report(fake_results(targets={"phone": target}))
    data = dataclasses.replace(report.data, classes=(), image_shape=())
    return to_html(dataclasses.replace(report, metric=Metric("mAP@50", "%"), data=data), folder)


PAGES: dict[str, Callable[[Path], str]] = {
    "budgets": lambda _: _budgets(),
    "detection": _detection,
    "report": lambda _: to_html(to_report(fake_results(blocks=9, evaluations=200))),
    "failed": lambda _: _failed(),
    "comparison": lambda _: _comparison(),
}


@pytest.fixture(scope="module", params=PAGES)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    page = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    page.write_text(PAGES[request.param](page.parent), encoding="utf-8")
    return look(page) | {"name": request.param, "bytes": page.stat().st_size}


def test_a_page_loads_without_an_error_and_without_network(seen: dict[str, Any]) -> None:
    assert seen["console"] == []
    assert seen["requests"] == []
    assert seen["bytes"] <= 1_500_000


VIEWS = ("phone", "desk", "dark", "night")  # night: the phone in the dark


def test_axe_finds_no_fault_on_a_phone_on_a_desk_and_in_the_dark(seen: dict[str, Any]) -> None:
    assert {name: view["violations"] for name, view in seen["views"].items()} == {name: [] for name in VIEWS}


def test_no_page_is_wider_than_the_phone(seen: dict[str, Any]) -> None:
    assert {name: view["overflow"] for name, view in seen["views"].items()} == dict.fromkeys(VIEWS, 0)


def test_the_tab_key_reaches_every_section_and_every_wide_table_and_shows_where_it_is(seen: dict[str, Any]) -> None:
    stops = seen["stops"]
    assert all(stop["outline"] != "none" and stop["inside"] for stop in stops)
    assert sum(stop["tag"] == "A" for stop in stops) >= 3
    assert sum(stop["tag"] == "DIV" for stop in stops) >= 2


def test_a_screen_reader_is_given_landmarks_headings_and_tables(seen: dict[str, Any]) -> None:
    text = seen["read"]
    for landmark in ("- banner:", "- main:", '- navigation "Sections":', "- contentinfo:"):
        assert landmark in text
    assert text.count("[level=1]") == 1
    assert 'table "' in text
    assert 'img "' in text  # plots have names


def test_it_can_be_printed(seen: dict[str, Any]) -> None:
    assert seen["pdf"] > 10_000


def test_the_comparison_reads_as_it_should(tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    page.write_text(_comparison(), encoding="utf-8")
    text = look(page)["read"]
    assert 'heading "4 runs compared" [level=1]' in text
    assert "4 of 5 artifacts passed their gates." in text
    assert "a run with <b>a long name</b> & more" in text  # as text, not as markup
    assert 'columnheader "median latency, ms"' in text
    assert "2.31× (emulated)" in text
    assert "Not drawn, for lack of a measured latency: emulated (jetson) (latency emulated)" in text
    assert 'rowheader "conv1"' in text
    assert "3/16" in text
