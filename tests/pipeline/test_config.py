"""The configuration: what wins over what, what is refused, and that a written one reads back the same."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from edge_compress import targets
from edge_compress.pipeline.config import Config, differences, load, to_toml
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.options import Accelerator, Augment, Budget, MaskMode, Pattern, Precision, Reward, Score, SearchMethod
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

FLAGS: dict[str, object] = {"targets": ("x86",)}


@pytest.fixture(autouse=True)
def _two_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "names", lambda: ("phone", "x86"))


def written(folder: Path, text: str) -> Path:
    file = folder / "edge-compress.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_are_those_of_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(None, FLAGS)
    assert config == Config(
        targets=("x86",),
        model="digits-resnet",
        data="digits",
        device="local",
        latency_budget=(Budget(ratio=0.5),),
        max_accuracy_drop=1.0,
        min_speedup=1.0,
        reward="hard",
        alpha=1.0,
        beta=1.0,
        lambda_=None,
        score="hasa",
        search="ppo",
        evaluations=60,
        finetune_epochs=8,
        mask="fixed",
        seed=0,
        accelerator="auto",
        out=tmp_path / "runs" / "digits-resnet-x86",
    )
    other = load(None, {**FLAGS, "data": "npz:a.npz"})
    assert (other.evaluations, other.finetune_epochs) == (200, 15)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, 'target = "x86"\nseed = 3\nevaluations = 50\nlatency-budget = "8ms"\nlambda = 0.5')
    config = load(file, {"seed": 4, "evaluations": None, "targets": (), "lambda_": "auto"})
    assert (config.seed, config.evaluations, config.latency_budget, config.lambda_) == (4, 50, (Budget(ms=8.0),), None)


def test_paths_in_a_file_are_relative_to_the_file_and_in_flags_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = written(
        tmp_path,
        'target = ["x86"]\nmodel = "net.py:small"\nweights = "../net.pt"\ndata = "npz:sets/a.npz"\n'
        'out = "runs/a"\ndevice = "b.toml"',
    )
    config = load(file, {})
    assert config.model == f"{tmp_path}/net.py:small"
    assert config.weights == tmp_path.parent / "net.pt"
    assert config.data == f"npz:{tmp_path}/sets/a.npz"
    assert config.out == tmp_path / "runs" / "a"
    assert config.device == str(tmp_path / "b.toml")
    flags = load(file, {"model": "net.py:small", "data": "torchvision:CIFAR10:sets"})
    assert (flags.model, flags.data) == (f"{tmp_path}/elsewhere/net.py:small", f"torchvision:CIFAR10:{tmp_path}/elsewhere/sets")
    assert load(file, {"model": "timm:resnet18", "data": "digits"}).model == "timm:resnet18"
    assert load(file, {"model": "package.module:factory"}).model == "package.module:factory"


@pytest.mark.parametrize(
    ("key", "hint"),
    [("sede", "'seed'"), ("latency_budget", "'latency-budget'"), ("targets", "'target'"), ("xyzzy", "max-accuracy-drop")],
)
def test_an_unknown_key_is_refused_by_name_with_what_was_meant(tmp_path: Path, key: str, hint: str) -> None:
    file = written(tmp_path, f'target = "x86"\n{key} = 1')
    with pytest.raises(InputError) as caught:
        load(file, {})
    assert str(file) in str(caught.value)
    assert repr(key) in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "seed = 1.5",
        "seed = true",
        "seed = -1",
        'seed = "1"',
        "evaluations = 0",
        "finetune-epochs = -1",
        "threads = 0",
        "alpha = nan",
        "beta = -1",
        'alpha = "1"',
        f"alpha = 1{'0' * 400}",
        "max-accuracy-drop = 101",
        "min-speedup = inf",
        "lambda = -1",
        'lambda = "off"',
        "learning-rate = 0",
        'learning-rate = "high"',
        'score = "best"',
        'search = "grid"',
        'pattern = "4:8"',
        'precision = "int4"',
        'accelerator = "tpu"',
        "json = 1",
        "weights = 3",
        "checkpoint-key = 3",
        "exif-orientation = 1",
        'model = ""',
        'model = "a\\u0000b"',
        "mean = []",
        'mean = ["a"]',
        "mean = 0.5",
        "std = [0.0]",
        "std = [1e-320]",
        "mean = [1e39]",
        "seed = 0x" + "f" * 5000,
        "image-size = 0",
        "augment = 1",
        "[seed]\nseed = 1",
        "latency-budget = true",
    ],
)
def test_a_wrong_value_is_one_line_that_names_file_and_key(tmp_path: Path, line: str) -> None:
    file = written(tmp_path, f'target = "x86"\n{line}')
    with pytest.raises(InputError) as caught:
        load(file, {})
    key = line.strip("[").partition("]")[0].partition(" ")[0]
    assert f"{file}: {key}" in str(caught.value)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["0", "-0.5", "1.5", "nan", "inf", "0ms", "-8ms", "nanms", "infms", "1e308ms", "ms", "", "8 s", "150%", "50%ms", "half"],
)
def test_a_budget_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--latency-budget"):
        load(None, {**FLAGS, "latency_budget": text})


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Budget(ratio=0.5)),
        ("50%", Budget(ratio=0.5)),
        ("1", Budget(ratio=1.0)),
        ("8ms", Budget(ms=8.0)),
        (" 1.5 ms ", Budget(ms=1.5)),
    ],
)
def test_a_budget_is_a_share_or_milliseconds(text: str, budget: Budget) -> None:
    assert load(None, {**FLAGS, "latency_budget": text}).latency_budget == (budget,)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("given", ["0.7,0.5, 8ms", [0.7, 0.5, "8ms"], "0.7,0.5,8ms,0.5"])
def test_several_budgets_are_a_list_or_text_with_commas_and_count_once(given: object) -> None:
    config = load(None, {**FLAGS, "latency_budget": given})
    assert config.latency_budget == (Budget(ratio=0.7), Budget(ratio=0.5), Budget(ms=8.0))


@pytest.mark.parametrize("given", ["0.5,", "0.7;0.5", [], "0.5,2"])
def test_several_budgets_of_which_one_means_nothing_are_refused(given: object) -> None:
    with pytest.raises(InputError, match="latency-budget"):
        load(None, {**FLAGS, "latency_budget": given} if given else {"targets": ("x86",), "latency_budget": ["x"]})


def test_mean_and_std_have_to_fit_each_other() -> None:
    config = load(None, {**FLAGS, "mean": "0.5,0.4,0.3", "std": "0.2, 0.2, 0.2"})
    assert (config.mean, config.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    with pytest.raises(InputError, match="a mean of 3 and a deviation of 1 channels"):
        load(None, {**FLAGS, "mean": "0.5,0.4,0.3", "std": "0.2"})


def test_no_target_and_an_unknown_target_are_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no target: expected --target phone\|x86"):
        load(None, {"targets": ()})
    for flags, file in (({"targets": ("arm",)}, None), ({}, written(tmp_path, 'target = "arm"'))):
        with pytest.raises(InputError, match=r"'arm'.*phone or x86"):
            load(file, flags)
    assert load(None, {"targets": ("x86", "phone", "x86")}).targets == ("x86", "phone")


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", b'target = "x86"\ntarget = "x86"'])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.toml is not TOML"):
        load(file, {})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load(path, {})


def test_what_is_printed_and_where_it_is_computed_may_change_within_a_run_and_nothing_else() -> None:
    one = load(None, FLAGS)
    elsewhere = dataclasses.replace(one, out=Path("/elsewhere"), json=True, require_artifact=True)
    assert differences(one, dataclasses.replace(elsewhere, accelerator=Accelerator.CPU)) == ()  # begun on a GPU, goes on here
    assert differences(one, dataclasses.replace(one, seed=1, lambda_=0.1)) == ("lambda", "seed")


def test_the_scores_on_offer_are_those_that_are_computed() -> None:
    from edge_compress.pipeline.score.criteria import SCORES

    assert set(SCORES) == set(Score)


def test_the_published_formula_still_answers_to_its_old_name(tmp_path: Path) -> None:
    for flags, file in (({**FLAGS, "score": "seed"}, None), (FLAGS, written(tmp_path, 'score = "seed"'))):
        assert load(file, flags).score is Score.PUBLISHED
    assert load(None, {**FLAGS, "score": "published"}).score is Score.PUBLISHED


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
file_names = words.map(lambda text: text.replace("/", "-")).filter(lambda text: text not in (".", ".."))
paths = st.builds(lambda parts: Path("/").joinpath(*parts), st.lists(file_names, min_size=1, max_size=3))
positive = st.floats(min_value=0, max_value=1e6, exclude_min=True)
weights = st.floats(min_value=0, max_value=1e6)
each = st.floats(1e-6, 1e6)
channels = st.one_of(st.none(), st.tuples(each, each, each))
budgets = st.one_of(
    st.builds(Budget, ratio=st.floats(0, 1, exclude_min=True)),
    st.builds(Budget, ms=st.floats(0, 1e6, exclude_min=True)),
)
configs = st.builds(
    Config,
    targets=st.sampled_from([("x86",), ("phone", "x86"), ("x86", "phone")]),
    model=st.one_of(st.just("digits-resnet"), st.just("timm:resnet18"), paths.map(lambda p: f"{p}.py:factory")),
    weights=paths,
    checkpoint_key=st.one_of(st.none(), words),
    data=st.one_of(st.just("digits"), paths.map(lambda p: f"npz:{p}"), paths.map(lambda p: f"torchvision:CIFAR10:{p}")),
    mean=channels,
    std=channels,
    augment=st.sampled_from([None, *Augment]),
    image_size=st.one_of(st.none(), st.integers(4, 4096)),
    exif_orientation=st.booleans(),
    class_order=st.one_of(st.sampled_from(["text", "natural"]), paths.map(str)),
    device=st.one_of(st.just("local"), paths.map(lambda p: f"{p}.toml")),
    pattern=st.sampled_from([None, *Pattern]),
    precision=st.sampled_from([None, *Precision]),
    latency_budget=st.lists(budgets, min_size=1, max_size=3, unique=True).map(tuple),
    max_accuracy_drop=st.floats(0, 100),
    min_speedup=weights,
    reward=st.sampled_from(list(Reward)),
    alpha=weights,
    beta=weights,
    lambda_=st.one_of(st.none(), weights),
    learning_rate=st.one_of(st.none(), st.floats(1e-9, 1.0)),
    score=st.sampled_from(list(Score)),
    search=st.sampled_from(list(SearchMethod)),
    evaluations=st.integers(1, 10**6),
    finetune_epochs=st.integers(0, 10**6),
    mask=st.sampled_from(list(MaskMode)),
    seed=st.integers(0, 2**31 - 1),
    accelerator=st.sampled_from(list(Accelerator)),
    threads=st.integers(1, 64),
    out=paths,
    json=st.booleans(),
    require_artifact=st.booleans(),
    accept_chance=st.booleans(),
)


@given(config=configs)
@hypothesis_settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_written_configuration_reads_back_the_same(tmp_path: Path, config: Config) -> None:
    text = to_toml(config)
    assert load(written(tmp_path, text), {}) == config
    assert all(not (isinstance(v, float) and math.isnan(v)) for v in tomllib.loads(text).values())


@pytest.mark.parametrize(("text", "bytes_"), [("98496", 98_496), ("500kB", 500_000), ("1.5MB", 1_500_000), (" 2 MB ", 2_000_000)])
def test_a_size_is_bytes_or_has_a_unit(text: str, bytes_: int) -> None:
    assert load(None, {**FLAGS, "max_size": text}).max_size == bytes_
    assert load(None, {**FLAGS, "max_size": bytes_}).max_size == bytes_


@pytest.mark.parametrize("text", ["0", "-5", "half", "1TB", "nan", "kB", "0.4", "1e999", "1e30MB", "9223372036854775808"])
def test_a_size_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--max-size.*98496, or 500kB"):
        load(None, {**FLAGS, "max_size": text})


@pytest.mark.parametrize(("text", "expected"), [("4GB", 4 * 10**9), ("512MB", 512 * 10**6)])
def test_memory_is_a_size_of_some_hundreds_of_megabytes_at_least(text: str, expected: int) -> None:
    assert load(None, {"targets": ("x86",), "max_memory": text}).max_memory == expected
    with pytest.raises(InputError, match="at least 256MB"):
        load(None, {"targets": ("x86",), "max_memory": "100MB"})
    with pytest.raises(InputError, match="such as 4GB"):
        load(None, {"targets": ("x86",), "max_memory": "much"})


@pytest.mark.parametrize("content", [b"x = " + b"[" * 3000, b"seed = " + b"9" * 5000])
def test_a_file_that_is_too_deep_or_has_numbers_without_end_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.toml is not TOML"):
        load(file, {})


@pytest.mark.parametrize(
    "flags",
    [
        {"out": "{}/x"},
        {"model": "{}/net.py:f"},
        {"weights": "{}/net.pt"},
        {"recipe": "{}/recipe.py"},
        {"data": "npz:{}/x.npz"},
        {"data": "imagefolder:{}"},
        {"data": "torchvision:CIFAR10:{}/x"},
        {"data": "{}/data.py:f"},
        {"device": "{}/board.toml"},
        {"class_order": "{}/names.txt"},
    ],
    ids=lambda flags: " ".join(map(":".join, flags.items())),
)
def test_the_home_of_nobody_is_refused(flags: dict[str, str]) -> None:
    given = {name: value.format("~nobody-of-this-name") for name, value in flags.items()}
    with pytest.raises(InputError, match=r"--[a-z-]+: found .*~nobody.*expected the home folder of a user of this machine"):
        load(None, {"targets": ("x86",), **given})


BYTES = os.fsdecode(b"odd\xff")  # a name that is no UTF-8


@pytest.mark.parametrize("given", [{}, {"out": "x"}, {"model": "net.py:f"}, {"weights": "net.pt"}, {"data": "npz:x.npz"}])
def test_a_working_folder_whose_name_cannot_be_written_is_refused_at_once(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / BYTES).mkdir()
    monkeypatch.chdir(tmp_path / BYTES)
    with pytest.raises(InputError, match=rf"--{next(iter(given), 'out')}: found .*odd\\udcff.*, expected UTF-8 text; rename it"):
        load(None, FLAGS | given)
    assert load(None, FLAGS | {"out": str(tmp_path / "x")}).out == tmp_path / "x"


def test_a_name_that_the_locale_cannot_read_is_refused_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(InputError, match="expected UTF-8 text; set PYTHONUTF8=1: names are read as ascii in this locale"):
        load(
            None,
            FLAGS | {"out": os.fsdecode("Größe".encode()).encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")},
        )


def test_a_key_of_a_checkpoint_needs_the_checkpoint() -> None:
    assert load(None, FLAGS | {"weights": "net.pt", "checkpoint_key": "state_dict"}).checkpoint_key == "state_dict"
    with pytest.raises(InputError, match="--checkpoint-key without --weights"):
        load(None, FLAGS | {"checkpoint_key": "state_dict"})


def test_what_is_read_otherwise_makes_another_run() -> None:
    one = load(None, FLAGS | {"weights": "net.pt"})
    other = dataclasses.replace(one, checkpoint_key="state_dict", exif_orientation=True)
    assert differences(one, other) == ("checkpoint-key", "exif-orientation")
    for name, value in (("checkpoint_key", "state_dict"), ("exif_orientation", True)):
        with pytest.raises(InputError, match="a recipe brings its own model and data"):
            load(None, FLAGS | {"recipe": "recipe.py", name: value})


def test_a_setting_thousands_of_levels_deep_is_one_line(tmp_path: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(InputError) as caught:
        load(None, {**FLAGS, "threads": deep})
    assert "\n" not in str(caught.value)
