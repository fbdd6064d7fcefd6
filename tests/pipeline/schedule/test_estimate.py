"""The estimate counts what a run does, and --max-minutes takes as much as fits."""

from __future__ import annotations

import pytest
import torch
from edge_compress.pipeline.config import Config
from edge_compress.pipeline.schedule.estimate import Paces, estimate, fitted, timed, told
from edge_compress.pipeline.task.load import Loaded, load_recipe
from edge_compress.pipeline.task.recipe import Recipe
from edge_compress.pipeline.types import Knob
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn


def loaded(width: int = 4, samples: int = 400) -> Loaded:
    def split(count: int) -> list[tuple[Tensor, None]]:
        return [(torch.full((width,), float(i)), None) for i in range(count)]

    datasets = {"train": split(samples), "search": split(50), "test": split(100)}
    return load_recipe(Recipe(lambda: nn.Linear(width, 3).eval(), lambda: datasets), 0)


SMALL = loaded()
KNOBS = (Knob("a", "channel", 32, (32, 24, 16)),)


def expected(config: Config) -> dict[str, float]:
    return estimate(Paces(0.01, 2.0), SMALL, KNOBS, config, 1)


def test_every_stage_grows_with_what_it_does() -> None:
    few, many = (
        expected(Config(("x86",), evaluations=50, finetune_epochs=2)),
        expected(Config(("x86",), evaluations=100, finetune_epochs=4)),
    )
    assert many["search"] == pytest.approx(2 * few["search"])
    assert many["fine-tuning"] == pytest.approx(2 * few["fine-tuning"])
    assert few["fine-tuning"] == pytest.approx(2 * (13 * 2.0 + 50 * 0.01))  # 13 batches of 32, then the search split
    assert {name for name in few if few[name] == many[name]} == {
        "scoring",
        "reconstruction",
        "learning rate",
        "build",
        "verification",
    }


def test_a_training_that_is_long_enough_has_a_learning_rate_search_first() -> None:
    short, long = expected(Config(("x86",), finetune_epochs=61)), expected(Config(("x86",), finetune_epochs=62))
    assert short["learning rate"] == 0.0
    assert long["learning rate"] == pytest.approx(3 * (40 * 2.0 + 2 * 50 * 0.01))


def test_scoring_and_reconstruction_use_no_more_samples_than_there_are() -> None:
    config = Config(("x86",))
    few, more, most = (estimate(Paces(0.01, 2.0), loaded(samples=n), (), config, 1) for n in (200, 400, 4000))
    assert more["scoring"] == pytest.approx(2 * few["scoring"])
    assert more["reconstruction"] - few["reconstruction"] == pytest.approx(4 * 4 * 200 * 0.01)
    assert most["reconstruction"] - few["reconstruction"] == pytest.approx(4 * 4 * 800 * 0.01)


@given(st.floats(0.1, 1000.0), st.integers(1, 400), st.integers(0, 60))
def test_what_fits_is_left_alone_and_what_does_not_is_reduced_to_the_time_there_is(
    minutes: float, count: int, epochs: int
) -> None:
    given_config = Config(("x86",), evaluations=count, finetune_epochs=epochs)
    found = fitted(given_config, expected, minutes)
    assert found.evaluations <= count
    assert found.finetune_epochs <= epochs
    if sum(expected(given_config).values()) <= 60 * minutes:
        assert found == given_config
    elif found.evaluations > 20 and found.finetune_epochs > 1:
        assert sum(expected(found).values()) <= 60 * minutes
        more = fitted(given_config, expected, 1.05 * minutes + 60)
        assert (more.evaluations, more.finetune_epochs) > (found.evaluations, 0)  # what there is time for is used
    assert found.evaluations >= min(20, count)
    assert found.finetune_epochs >= min(1, epochs)


def test_paces_are_timed_and_leave_the_network_as_it_was() -> None:
    network = loaded(width=256)
    before = network.module.weight.clone()
    found = timed(network)
    assert 0 < found.forward < found.step
    assert torch.equal(before, network.module.weight)
    assert not network.module.training
    assert network.module.weight.grad is None


def test_the_line_names_the_stages_that_take_most() -> None:
    text = told({"search": 1320.0, "fine-tuning": 600.0, "build": 10.0, "verification": 350.0})
    assert text == "about 38 min from here: search 22 min, fine-tuning 10 min, verification 6 min (estimated)"


def test_options_that_fit_stay_the_very_same() -> None:
    config = Config(("x86",), max_minutes=1e6, evaluations=30)
    assert fitted(config, expected, 1e6) is config
