"""Two real processes over gloo: what they compute together is what one computes, and where they differ it is noticed.

The processes start once and do everything; the tests read what they left.
"""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.splits import DataSet
from edge_compress.pipeline.errors import EdgeCompressError, InputError
from edge_compress.pipeline.finetune.dynamic_masks import dynamic
from edge_compress.pipeline.finetune.training import FinetuneSettings, Step, batches, finetune
from edge_compress.pipeline.finetune.world import ALONE, World
from edge_compress.pipeline.network.weights import digest_of
from edge_compress.pipeline.score.curvature import gauss_newton
from edge_compress.pipeline.score.masks import weight_masks
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import batches as unlabelled
from edge_compress.pipeline.task.samples import image_data, training_inputs
from edge_compress.pipeline.types import Epoch, Preprocess
from process_group import Ranks, SharedScores, opened
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREP = Preprocess((0.305,), (0.376,), "shift")
# odd numbers: the ranks' parts differ in size; the teacher knows nothing, and has little to say
HOW = FinetuneSettings(epochs=3, seed=4, learning_rate=5e-3, batch=63, search_samples=101)
TASK = Classification(distilled=0.1)
CONV = "3.weight"

Result = tuple[dict[str, Tensor], dict[str, Any]]


def _net(normalised: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        between = (lambda n: nn.BatchNorm2d(n)) if normalised else (lambda n: nn.Identity())
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), between(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), between(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1 if normalised else 0.0), nn.Linear(128, 10)),
        ).eval()


def _data() -> DataSet:
    data = load_data("digits", seed=0)
    return replace(data, train=data.train.head(321))


def _chosen(world: World, data: DataSet) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores, and masks of half of the connections."""
    inputs = training_inputs(image_data(data, PREP).train, 151, 0)
    scores = SharedScores(_net(True), inputs, "hasa", 0, world).at(1.0)
    return scores, weight_masks(scores, 0.5)


def _trained(
    world: World, data: DataSet, masks: dict[str, Tensor], folder: Path, *, normalised: bool, stop: int = 0, **changed: Any
) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """With BatchNorm and dropout the masks are exchanged too; without, they stay: then two processes do what one does."""
    folder.mkdir(exist_ok=True)
    net = _net(normalised)
    student, own = copy.deepcopy(net), {f"{name}.weight": mask for name, mask in masks.items()}
    remask = dynamic(own, {}, net, training_inputs(image_data(data, PREP).train, 99, 5), HOW.epochs) if normalised else None

    def progress(event: Step | Epoch) -> None:
        if stop and isinstance(event, Step) and event.step == stop:
            raise KeyboardInterrupt

    how = replace(HOW, **changed)
    history = finetune(
        student,
        net,
        image_data(data, PREP),
        TASK,
        how,
        folder=folder,
        masks=own,
        remask=remask,
        progress=progress,
        world=world,
    )
    return student, history


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except EdgeCompressError as error:
        return str(error)
    return "nothing"


def _process(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    data, tensors, facts = _data(), {}, {}
    with opened("cpu") as world:
        facts["world"] = [world.rank, world.size]
        scores, masks = _chosen(world, data)
        tensors |= {f"score/{k}": v for k, v in scores.items()} | {f"mask/{k}": v for k, v in masks.items()}
        facts["same"] = _error(lambda: world.agree("masks", masks))
        other = {k: ~v if rank == 1 and k == "3" else v for k, v in masks.items()}
        facts["other"] = _error(lambda: world.agree("masks", other))
        facts["trained with other"] = _error(lambda: _trained(world, data, other, folder / "o", normalised=False, epochs=1))
        facts["own folder"] = _error(lambda: _own_folders(world, data, masks, folder))
        facts["tiny batches"] = _error(lambda: _trained(world, data, masks, folder / "t", normalised=False, batch=3))
        facts["drift"] = _error(lambda: _drifted(world, data, masks, folder / "d"))
        runs = {"plain": False, "whole": True}
        for name, normalised in runs.items():
            student, history = _trained(world, data, masks, folder / name, normalised=normalised)
            tensors |= {f"{name}/{k}": v for k, v in student.state_dict().items()}
            facts[name] = [[e.loss, e.search_value] for e in history]
        try:
            _trained(world, data, masks, folder / "cut", normalised=True, stop=9)  # in the second epoch
        except KeyboardInterrupt:
            facts["stopped"] = load_file(folder / "cut" / "finetune.safetensors")["student/1.num_batches_tracked"].item()
        steps = []
        student, history = _resumed(world, data, masks, folder / "cut", steps)
        facts |= {"cut": [[e.loss, e.search_value] for e in history], "steps": steps}
        tensors |= {f"cut/{k}": v for k, v in student.state_dict().items()}
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(facts))


def _resumed(
    world: World, data: DataSet, masks: dict[str, Tensor], folder: Path, steps: list[int]
) -> tuple[nn.Module, tuple[Epoch, ...]]:
    """Called again; `steps` gets those that were done."""
    net = _net(True)
    student, own = copy.deepcopy(net), {f"{name}.weight": mask for name, mask in masks.items()}
    remask = dynamic(own, {}, net, training_inputs(image_data(data, PREP).train, 99, 5), HOW.epochs)
    note = lambda event: steps.append(event.step) if isinstance(event, Step) else None  # noqa: E731
    done = finetune(
        student,
        net,
        image_data(data, PREP),
        TASK,
        HOW,
        folder=folder,
        masks=own,
        remask=remask,
        progress=note,
        world=world,
    )
    return student, done


def _own_folders(world: World, data: DataSet, masks: dict[str, Tensor], folder: Path) -> None:
    """Each rank keeps its checkpoint in a folder of its own, which only rank 0 writes to."""
    for _ in range(2):
        _trained(world, data, masks, folder / f"own{world.rank}", normalised=False, epochs=1)


def _drifted(world: World, data: DataSet, masks: dict[str, Tensor], folder: Path) -> None:
    """One rank's weight is moved in the middle of an epoch."""
    folder.mkdir(exist_ok=True)
    student = _net(False)

    def push(event: Step | Epoch) -> None:
        if isinstance(event, Step) and event.step == 2 and world.rank == 1:
            student[0].weight.data[0, 0, 0, 0] += 1e-6  # type: ignore[index, union-attr]

    finetune(student, None, image_data(data, PREP), TASK, replace(HOW, epochs=1), folder=folder, progress=push, world=world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (made, port), nprocs=2)  # type: ignore[no-untyped-call]
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Result]:
    return [(load_file(folder / f"{r}.safetensors"), json.loads((folder / f"{r}.json").read_text())) for r in (0, 1)]


def test_both_ranks_end_with_the_same_scores_masks_and_weights(ranks: list[Result]) -> None:
    (first, facts), (second, others) = ranks
    assert [facts["world"], others["world"]] == [[0, 2], [1, 2]]
    assert set(first) == set(second)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert any(k.startswith("whole/") and "running_var" in k for k in first)
    assert all(facts[name] == others[name] for name in ("plain", "whole", "cut"))


def test_curvature_over_ranks_is_that_over_all_images(ranks: list[Result]) -> None:
    data = _data()
    scores, masks = _chosen(ALONE, data)
    for name, value in scores.items():
        assert torch.allclose(ranks[0][0][f"score/{name}"], value, rtol=1e-4, atol=1e-12), name
        assert (ranks[0][0][f"mask/{name}"] == masks[name]).float().mean() > 0.99
    part, _ = _chosen(ALONE, replace(data, train=data.train.head(75)))  # half of the images say something else
    assert not torch.allclose(ranks[0][0]["score/3"], part["3"], rtol=1e-2)


def test_two_processes_train_as_one_does(ranks: list[Result], tmp_path: Path) -> None:
    tensors, facts = ranks[0]
    masks = {k.removeprefix("mask/"): v for k, v in tensors.items() if k.startswith("mask/")}
    student, history = _trained(ALONE, _data(), masks, tmp_path, normalised=False)
    assert [e.loss for e in history] == pytest.approx([loss for loss, _ in facts["plain"]], rel=1e-3)
    assert [e.search_value for e in history] == pytest.approx([top1 for _, top1 in facts["plain"]], abs=1.1)
    start = _net(False).state_dict()
    for name, value in student.state_dict().items():
        moved, off = (value - start[name]).abs().mean(), (value - tensors[f"plain/{name}"]).abs().mean()
        assert off < 1e-2 * moved, name


def test_masks_are_kept_and_the_network_learns(ranks: list[Result]) -> None:
    tensors, facts = ranks[0]
    masks = {k.removeprefix("mask/"): v for k, v in tensors.items() if k.startswith("mask/")}
    for name, mask in masks.items():
        assert not tensors[f"plain/{name}.weight"][~mask].any()
        weight = tensors[f"whole/{name}.weight"]
        assert int((weight != 0).sum()) <= int(mask.sum())  # exchanged, as many
    assert any(bool(tensors[f"whole/{name}.weight"][~mask].any()) for name, mask in masks.items())
    assert facts["whole"][-1][0] < 0.9 * facts["whole"][0][0]


def test_a_call_that_was_stopped_goes_on_from_rank_0s_checkpoint(ranks: list[Result]) -> None:
    tensors, facts = ranks[0]
    assert facts["stopped"] == 6  # batches of the first epoch
    assert facts["steps"] == ranks[1][1]["steps"] == list(range(7, 19))
    assert facts["cut"] == facts["whole"]
    whole = {k.removeprefix("whole/"): v for k, v in tensors.items() if k.startswith("whole/")}
    assert all(torch.equal(v, tensors[f"cut/{k}"]) for k, v in whole.items())


def test_ranks_that_differ_are_named_on_all(ranks: list[Result]) -> None:
    for _, facts in ranks:
        assert facts["same"] == "nothing"
        assert "differ in their masks: found rank 1 unlike rank 0" in facts["other"]
        assert "differ in their training" in facts["trained with other"]
        assert "differ in their weights" in facts["drift"]
        assert "differ in their checkpoint" in facts["own folder"]
        assert "3 images, expected at least 2 for each of 2 processes" in facts["tiny batches"]


def test_the_ranks_batches_are_one_processs_batch() -> None:
    data = _data()
    whole = [(b.inputs, b.targets) for (b,) in batches(image_data(data, PREP).train, HOW, 2)]
    parts = [
        [(b.inputs, b.targets) for (b,) in batches(image_data(data, PREP).train, HOW, 2, Ranks(rank, 3))] for rank in range(3)
    ]
    for i, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([part[i][0] for part in parts]))
        assert torch.equal(labels, torch.cat([part[i][1] for part in parts]))


def test_a_share_of_the_images_gets_its_own_signs() -> None:
    net, inputs = _net(True), torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for draws in (1, 2):
        whole = gauss_newton(net, unlabelled(inputs), draws=draws, seed=3)
        head = gauss_newton(net, unlabelled(inputs[:4]), draws=draws, seed=3)
        tail = gauss_newton(net, unlabelled(inputs[4:]), draws=draws, seed=3, skip=4)
        for name, value in whole.items():
            assert torch.allclose((4 * head[name] + 3 * tail[name]) / 7, value, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_all_positions_once_in_order(size: int) -> None:
    shares = [Ranks(rank, size).share(20) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_images_than_processes_are_refused() -> None:
    assert ALONE.share(0) == range(0)
    with pytest.raises(InputError, match="2 images, expected at least 1 for each of 3"):
        Ranks(1, 3).share(2)


def test_alone_nothing_is_opened_and_nothing_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    net, value = _net(True), torch.rand(3)
    with opened("cpu") as world:
        assert world == ALONE
        assert not torch.distributed.is_initialized()
        assert world.mean({"a": value}, 5)["a"] is value
        assert world.parallel(net) is net
        before = digest_of(net.state_dict())
        world.average_buffers(net)
        assert digest_of(net.state_dict()) == before


@pytest.mark.parametrize("given", [{"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "many"}])
def test_half_an_environment_is_refused(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="start with torchrun"), opened("cpu"):
        pass
