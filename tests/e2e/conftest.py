"""What the end-to-end tests share: networks trained once, one finished run, and the command line inside this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import user_net
from cli_runs import Finished, Workshop
from edge_compress.pipeline.cli.main import main
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.finetune.digits import train_digits
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.types import Preprocess
from safetensors.torch import save_file
from sklearn.datasets import load_digits

TRAINING_EPOCHS = 6


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Two networks trained on the digits, their weights in files, and the digits as an npz file."""
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    data = load_data("digits", seed=0)
    prep = Preprocess(user_net.MEAN, user_net.STD, "shift")
    for factory in (user_net.projected, user_net.padded):
        network = factory()
        train_digits(network, data, prep, seed=0, epochs=TRAINING_EPOCHS)
        assert top1(logits(network, data.search, prep), data.search.labels) > 95
        save_file(network.state_dict(), made.weights(factory.__name__))
        torch.save(network.state_dict(), made.weights(factory.__name__, ".pt"))
    scans, labels = load_digits(return_X_y=True)
    images = np.rint(scans.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    test = np.arange(len(labels)) % 5 == 0
    np.savez(
        made.npz,
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        classes=np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]),
    )
    return made


@pytest.fixture(scope="session")
def uninterrupted(workshop: Workshop) -> Path:
    """The folder of the session's usual run, gone through without a stop; tests copy it and leave it as it is."""
    folder = workshop.folder / "uninterrupted"
    finished = workshop.run([*workshop.arguments(folder), "--json"])
    (workshop.folder / "stdout").write_text(finished.out, encoding="utf-8")
    (workshop.folder / "stderr").write_text(finished.err, encoding="utf-8")
    assert finished.code == 0, finished.err
    return folder


@pytest.fixture
def here(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[list[str]], Finished]]:
    """The command line inside this process: quicker, and its parts can be replaced. The process is as before afterwards."""

    def call(arguments: list[str]) -> Finished:
        capfd.readouterr()
        code = main(arguments)
        return Finished(code, *capfd.readouterr())

    with workshop.inside(monkeypatch):
        yield call
