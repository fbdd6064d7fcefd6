from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.data.datasets import load_data
from edge_compress.pipeline.data.splits import ArraySource, DataSet, Split
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.finetune import training as module_under_test
from edge_compress.pipeline.finetune.training import (
    BOLD,
    CHECKPOINT,
    GENTLE,
    FinetuneSettings,
    Step,
    ahead,
    batch_for,
    batches,
    finetune,
    learning_rate,
    learning_rate_for,
)
from edge_compress.pipeline.network.memory_layout import fastest_layout
from edge_compress.pipeline.task.classification import Classification, distillation_loss
from edge_compress.pipeline.task.inference import logits, top1
from edge_compress.pipeline.task.samples import ImageSamples, image_data
from edge_compress.pipeline.types import Epoch, Preprocess
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor, nn

PREP = Preprocess((0.305,), (0.376,), "shift")
FEW = FinetuneSettings(epochs=3, seed=4, learning_rate=5e-3, batch=64, weight_decay=0.01, search_samples=100)
CONV = "3.weight"  # the second convolution's


def _net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10)),
        ).eval()


@pytest.fixture(scope="module")
def data() -> DataSet:
    return load_data("digits", seed=0)


@pytest.fixture(scope="module")
def few(data: DataSet) -> DataSet:
    return replace(data, train=data.train.head(320))


@pytest.fixture(scope="module")
def teacher(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    net = _net()
    finetune(
        net, None, image_data(data, PREP), Classification(), replace(FEW, epochs=8), folder=tmp_path_factory.mktemp("teacher")
    )
    return net


def _accuracy(net: nn.Module, data: DataSet) -> float:
    return top1(logits(net, data.test, PREP), data.test.labels)


def _largest(weight: Tensor, share: float) -> Tensor:
    """1 where the weight is among the largest."""
    return (weight.abs() > weight.abs().flatten().quantile(1 - share)).to(torch.uint8)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


def _when(condition: Callable[[Step | Epoch], bool]) -> Callable[[Step | Epoch], None]:
    def stop(event: Step | Epoch) -> None:
        if condition(event):
            raise KeyboardInterrupt

    return stop


def _at(step: int) -> Callable[[Step | Epoch], None]:
    return _when(lambda e: isinstance(e, Step) and e.step == step)


def _without_times(history: tuple[Epoch, ...]) -> list[Epoch]:
    return [replace(e, seconds=0.0) for e in history]


def test_a_pruned_network_learns_its_task_again(teacher: nn.Module, data: DataSet, tmp_path: Path) -> None:
    student = copy.deepcopy(teacher)
    masks = {CONV: _largest(student.get_parameter(CONV), 0.1)}
    student.get_parameter(CONV).data.mul_(masks[CONV])
    one_shot = _accuracy(student, data)
    history = finetune(student, teacher, image_data(data, PREP), Classification(), FEW, folder=tmp_path, masks=masks)
    assert one_shot < 75
    assert _accuracy(student, data) > max(85, one_shot + 15)
    assert [e.epoch for e in history] == [1, 2, 3]
    assert history[-1].loss < history[0].loss
    assert not any(m.training for m in student.modules())


def test_a_network_without_a_teacher_learns_from_labels(teacher: nn.Module, data: DataSet) -> None:
    assert _accuracy(_net(), data) < 25
    assert _accuracy(teacher, data) > 88  # trained by finetune alone


def test_the_teacher_alone_teaches_where_labels_say_nothing(teacher: nn.Module, data: DataSet, tmp_path: Path) -> None:
    images = data.train.read(np.arange(len(data.train)))
    labels = np.random.default_rng(0).integers(0, 10, len(images))
    lost = replace(data, train=Split(ArraySource(images, labels), np.arange(len(images))))
    with_teacher, alone = _net(1), _net(1)
    how = replace(FEW, epochs=4)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    finetune(with_teacher, teacher, image_data(lost, PREP), Classification(), how, folder=tmp_path / "a")
    finetune(alone, None, image_data(lost, PREP), Classification(), how, folder=tmp_path / "b")
    assert _accuracy(with_teacher, data) > 75
    assert _accuracy(alone, data) < 40


def test_teacher_and_student_see_the_same_varied_images(teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    student = _net()
    given: list[Tensor] = []
    varied: list[Tensor] = []

    def note_student(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if module.training:  # not those of the search split
            varied.append(inputs[0])

    hooks = [
        teacher.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].clone()) if inputs[0].any() else None),
        student.register_forward_pre_hook(note_student),
    ]
    before = copy.deepcopy(teacher.state_dict())
    finetune(student, teacher, image_data(few, PREP), Classification(), replace(FEW, epochs=2), folder=tmp_path)
    for hook in hooks:
        hook.remove()
    assert len(given) == len(varied) == 10
    assert all(torch.equal(a, b) for a, b in zip(given, varied, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


class _OneLayoutOnly(nn.Module):
    """Its `view` refuses channels-last features, and it normalises its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x.mul_(0.5)))
        return self.fc(x.view(len(x), 512))  # type: ignore[no-any-return]


@pytest.mark.parametrize("own", [False, True], ids=["any-layout", "one-layout"])
def test_images_come_in_the_layout_the_network_can_take(own: bool, few: DataSet, tmp_path: Path) -> None:
    student = _OneLayoutOnly() if own else _net()
    layouts = set()
    student.register_forward_pre_hook(
        lambda module, inputs: layouts.add(inputs[0].stride()[1]) if module.training else None  # of the channels
    )
    wide = replace(_two_channels(few), info=replace(few.info, image_shape=(2, 8, 8))) if not own else few
    if not own:
        student[0] = nn.Conv2d(2, 16, 3, padding=1, bias=False)  # type: ignore[index, operator]
    prep = PREP if own else Preprocess(PREP.mean * 2, PREP.std * 2, "shift")
    history = finetune(student, None, image_data(wide, prep), Classification(), FEW, folder=tmp_path)
    assert layouts == ({64} if own else {1})
    assert history[-1].loss < history[0].loss
    assert all(p.is_contiguous() for p in student.parameters())


def _two_channels(data: DataSet) -> DataSet:
    images = np.repeat(data.train.read(np.arange(len(data.train))), 2, axis=3)
    split = Split(ArraySource(images, data.train.labels), np.arange(len(images)))
    return replace(data, train=split, search=split)


def test_a_teacher_that_changes_its_input_does_not_change_the_students(few: DataSet, tmp_path: Path) -> None:
    seen: list[float] = []
    student = _net()
    student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].min().item()) if module.training else None)
    finetune(student, _OneLayoutOnly(), image_data(few, PREP), Classification(), replace(FEW, epochs=1), folder=tmp_path)
    assert seen == pytest.approx([-0.305 / 0.376] * 5)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    student, kinds = _net(), set()
    student[3].register_forward_hook(  # type: ignore[index, operator]
        lambda module, _, output: kinds.add(output.dtype) if module.training else None
    )
    history = finetune(student, teacher, image_data(few, PREP), Classification(), replace(FEW, autocast=True), folder=tmp_path)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert history[-1].loss < history[0].loss


def test_masked_weights_and_their_moments_stay_exactly_zero(teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    student = copy.deepcopy(teacher)
    mask = _largest(student.get_parameter(CONV), 0.5)
    weights: list[Tensor] = []
    note = lambda event: weights.append(student.get_parameter(CONV).detach().clone())  # noqa: E731
    finetune(student, teacher, image_data(few, PREP), Classification(), FEW, folder=tmp_path, masks={CONV: mask}, progress=note)
    assert len(weights) == 18  # 15 steps and 3 epochs
    assert all(bool((w[mask == 0] == 0).all()) and bool((w[mask == 1] != 0).all()) for w in [*weights, student[3].weight])  # type: ignore[index]
    kept = load_file(tmp_path / CHECKPOINT)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not kept[f"adam/{CONV}/{moment}"][mask == 0].any()
        assert kept[f"adam/{CONV}/{moment}"][mask == 1].any()


def test_a_mask_chosen_anew_frees_weights_from_zero_and_removes_others(teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    student = copy.deepcopy(teacher)
    first = torch.zeros(32, 16, 3, 3)
    first[:16] = 1
    calls: list[int] = []
    started: list[Tensor] = []

    def remask(epoch: int, net: nn.Module) -> dict[str, Tensor]:
        calls.append(epoch)
        assert not net.training
        return {CONV: 1 - first if epoch == 1 else first}

    def note(event: Step | Epoch) -> None:
        if isinstance(event, Epoch):
            started.append(student.get_parameter(CONV).detach().clone())

    finetune(
        student,
        teacher,
        image_data(few, PREP),
        Classification(),
        FEW,
        folder=tmp_path,
        masks={CONV: first},
        remask=remask,
        progress=note,
    )
    assert calls == [1, 2]  # after the last epoch nobody would train what comes back
    assert not started[0].any()  # swapped: what was kept is removed, what comes back starts at 0
    assert not started[1].any()
    assert started[2][:16].any()  # it has learnt since
    assert not started[2][16:].any()
    assert not load_file(tmp_path / CHECKPOINT)[f"adam/{CONV}/exp_avg"][16:].any()


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(_at(2), id="in-the-first-epoch"),
        pytest.param(_at(8), id="in-the-second-epoch"),
        pytest.param(_when(lambda e: isinstance(e, Epoch) and e.epoch == 2), id="between-epochs"),
        pytest.param(_at(15), id="at-the-last-step"),
        pytest.param(_when(lambda e: isinstance(e, Epoch) and e.epoch == 3), id="after-the-last-epoch"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_interrupted_training_ends_with_the_same_bits(
    stop: Callable[[Step | Epoch], None], dynamic: bool, teacher: nn.Module, few: DataSet, tmp_path: Path
) -> None:
    def remask(epoch: int, net: nn.Module) -> dict[str, Tensor]:
        return {CONV: _largest(net.get_parameter("4.weight"), 0.5)[:, None, None, None].expand(32, 16, 3, 3).roll(epoch, 0)}

    def run(folder: Path, progress: Callable[[Step | Epoch], None] | None = None) -> tuple[nn.Module, tuple[Epoch, ...]]:
        folder.mkdir(exist_ok=True)
        student = copy.deepcopy(teacher)
        masks = {CONV: _largest(student.get_parameter(CONV), 0.5)}
        chosen: dict[str, Any] = {"masks": masks, "remask": remask if dynamic else None, "progress": progress}
        return student, finetune(student, teacher, image_data(few, PREP), Classification(), FEW, folder=folder, **chosen)

    whole, history = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop)
    torch.rand(3)  # another process has another random state
    resumed, again = run(tmp_path / "cut")
    assert _equal(whole, resumed)
    assert _without_times(again) == _without_times(history)
    ends = [load_file(tmp_path / name / CHECKPOINT) for name in ("whole", "cut")]
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())  # the optimizer's state too


def test_a_training_goes_on_on_another_device(teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    """As from a machine with a GPU to one without: here to the same processor under another name."""
    history = finetune(copy.deepcopy(teacher), teacher, image_data(few, PREP), Classification(), FEW, folder=tmp_path)
    events: list[Step | Epoch] = []
    there = replace(FEW, device="cpu:0")
    assert (
        finetune(
            copy.deepcopy(teacher),
            teacher,
            image_data(few, PREP),
            Classification(),
            there,
            folder=tmp_path,
            progress=events.append,
        )
        == history
    )
    assert events == []


def test_finished_training_is_not_run_again(teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    events: list[Step | Epoch] = []
    first, second = copy.deepcopy(teacher), copy.deepcopy(teacher)
    history = finetune(first, teacher, image_data(few, PREP), Classification(), FEW, folder=tmp_path)
    assert (
        finetune(second, teacher, image_data(few, PREP), Classification(), FEW, folder=tmp_path, progress=events.append)
        == history
    )
    assert events == []
    assert _equal(first, second)


@pytest.mark.parametrize("change", ["settings", "student", "teacher", "no teacher", "preprocess", "data", "masks", "remask"])
def test_a_checkpoint_of_other_work_is_not_used(change: str, teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    notes: list[str] = []

    def run(folder: Path, change: str, progress: Callable[[Step | Epoch], None] | None = None) -> nn.Module:
        student = _net(7 if change == "student" else 0)
        with torch.no_grad():
            other = copy.deepcopy(teacher)
            other.get_parameter(CONV).mul_(0.9)
        guide = {"teacher": other, "no teacher": None}.get(change, teacher)
        how = replace(FEW, epochs=2, learning_rate=1e-3 if change == "settings" else 5e-3)
        prep = replace(PREP, augment="none") if change == "preprocess" else PREP
        used = replace(few, train=Split(few.train.source, few.train.indices[::-1])) if change == "data" else few
        masks = {CONV: torch.ones(32, 16, 3, 3)} if change == "masks" else None
        remask = (lambda epoch, net: {}) if change == "remask" else None
        told = {"progress": progress, "note": notes.append}
        finetune(student, guide, image_data(used, prep), Classification(), how, folder=folder, masks=masks, remask=remask, **told)
        return student

    (tmp_path / "own").mkdir(), (tmp_path / "used").mkdir()
    run(tmp_path / "used", "nothing")
    events: list[Step | Epoch] = []
    student = run(tmp_path / "used", change, events.append)
    assert len(events) == 12
    assert _equal(student, run(tmp_path / "own", change))
    of_checkpoint = [note for note in notes if "checkpoint" in note]
    assert of_checkpoint == [f"the checkpoint {CHECKPOINT} is of another training; this one started from its first epoch"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "record", "deep"])
def test_a_damaged_checkpoint_is_made_again(damage: str, teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    how, first, second = replace(FEW, epochs=2), _net(), _net()
    history = finetune(first, teacher, image_data(few, PREP), Classification(), how, folder=tmp_path)
    file = tmp_path / CHECKPOINT
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-100] ^= 255
    elif damage == "record":
        content = content.replace(b"best_value", b"best_valve")
    deep = save({"x": torch.zeros(1)}, {"training": "[" * 100_000})
    file.write_bytes({"cut": content[:5000], "empty": b"", "deep": deep}.get(damage, content))
    notes: list[str] = []
    again = finetune(second, teacher, image_data(few, PREP), Classification(), how, folder=tmp_path, note=notes.append)
    assert _without_times(again) == _without_times(history)
    assert _equal(first, second)
    (note,) = notes
    assert note.startswith(f"the checkpoint {CHECKPOINT} is damaged (")
    assert note.endswith("training started again from its first epoch")
    third = _net()
    finetune(third, teacher, image_data(few, PREP), Classification(), how, folder=tmp_path, note=notes.append)
    assert _equal(third, first)
    assert notes == [note]  # what was made again is used without a word


def test_a_checkpoint_holds_no_pickle(few: DataSet, tmp_path: Path) -> None:
    finetune(_net(), None, image_data(few, PREP), Classification(), replace(FEW, epochs=1), folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    content = (tmp_path / CHECKPOINT).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["training"])["history"][0]["epoch"] == 1
    assert set(load_file(tmp_path / CHECKPOINT)) >= {f"best/{CONV}", f"adam/{CONV}/step", "student/1.running_mean"}


@pytest.mark.parametrize(
    ("measured", "best"), [((50.0, 70.0, 70.0, 60.0), 3), ((90.0, 70.0, 70.0, 60.0), 1), ((1.0, 2.0, 3.0, 4.0), 4)]
)
def test_the_epoch_best_on_the_search_split_is_kept_and_of_equal_ones_the_later(
    measured: tuple[float, ...], best: int, few: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, states = iter((0.5, *measured)), []  # the first before training
    monkeypatch.setattr(module_under_test, "judged", lambda *_: SimpleNamespace(value=lambda: next(values)))
    student = _net()

    def note(event: Step | Epoch) -> None:
        if isinstance(event, Epoch):
            states.append(copy.deepcopy(student.state_dict()))

    history = finetune(
        student, None, image_data(few, PREP), Classification(), replace(FEW, epochs=4), folder=tmp_path, progress=note
    )
    assert tuple(e.search_value for e in history) == measured
    assert all(torch.equal(v, states[best - 1][k]) for k, v in student.state_dict().items())
    assert not torch.equal(states[0][CONV], states[1][CONV])


def test_reported_accuracy_is_of_the_search_split_and_its_first_images(few: DataSet, tmp_path: Path) -> None:
    student = _net()
    history = finetune(
        student, None, image_data(few, PREP), Classification(), replace(FEW, epochs=1, search_samples=60), folder=tmp_path
    )
    head = few.search.head(60)
    assert history[0].search_value == top1(logits(student, head, PREP), head.labels)


def test_the_result_depends_on_the_seed_and_not_on_the_process(few: DataSet, tmp_path: Path) -> None:
    nets = []
    for i, seed in enumerate((4, 4, 5)):
        torch.manual_seed(i)  # the dropout layer draws from the process's state, unless it is fenced
        (tmp_path / str(i)).mkdir()
        state = torch.get_rng_state()
        nets.append(_net())
        finetune(
            nets[-1], None, image_data(few, PREP), Classification(), replace(FEW, epochs=1, seed=seed), folder=tmp_path / str(i)
        )
        assert torch.equal(torch.get_rng_state(), state)
    assert _equal(nets[0], nets[1])
    assert not _equal(nets[0], nets[2])


def test_no_epochs_only_apply_the_masks(few: DataSet, tmp_path: Path) -> None:
    student, mask = _net(), torch.zeros(32, 16, 3, 3)
    before = copy.deepcopy(student.state_dict())
    assert (
        finetune(
            student, None, image_data(few, PREP), Classification(), replace(FEW, epochs=0), folder=tmp_path, masks={CONV: mask}
        )
        == ()
    )
    assert not student.get_parameter(CONV).any()
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items() if k != CONV)


def test_a_loss_that_is_no_number_stops_with_advice(few: DataSet, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"diverged.*--learning-rate"):
        finetune(_net(), None, image_data(few, PREP), Classification(), replace(FEW, learning_rate=1e30), folder=tmp_path)


@pytest.mark.parametrize("mask", [{"nowhere": torch.ones(1)}, {CONV: torch.ones(32, 16)}])
def test_a_mask_that_fits_no_parameter_is_refused(mask: dict[str, Tensor], few: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mask of"):
        finetune(_net(), None, image_data(few, PREP), Classification(), FEW, folder=tmp_path, masks=mask)


def test_progress_counts_every_step_and_epoch(few: DataSet, tmp_path: Path) -> None:
    events: list[Step | Epoch] = []
    finetune(
        _net(), None, image_data(few, PREP), Classification(), replace(FEW, epochs=2), folder=tmp_path, progress=events.append
    )
    steps = [e for e in events if isinstance(e, Step)]
    assert [s.step for s in steps] == list(range(1, 11))
    assert steps[4].step / steps[4].steps == 0.5
    assert [type(e) for e in events].index(Epoch) == 5
    assert isinstance(events[-1], Epoch)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 2**31), st.integers(1, 99))
def test_an_epoch_is_every_image_once_in_even_batches(count: int, batch: int, seed: int, epoch: int) -> None:
    labels = np.arange(count)
    split = Split(ArraySource(np.zeros((count, 2, 2, 1), np.uint8), labels), labels)
    how = FinetuneSettings(epochs=99, seed=seed, batch=batch)
    samples = ImageSamples(split, PREP)
    found = [b.targets for (b,) in batches(samples, how, epoch)]
    sizes = [len(b) for b in found]
    assert sorted(torch.cat(found).tolist()) == labels.tolist()
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    assert all(torch.equal(a, b) for a, b in zip(found, (b.targets for (b,) in batches(samples, how, epoch)), strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 300), st.integers(4, 80), st.integers(4, 40), st.integers(1, 3))
def test_micro_batches_are_the_batch_in_parts_varied_as_in_the_whole(count: int, batch: int, micro: int, epoch: int) -> None:
    labels, rng = np.arange(count), np.random.default_rng(0)
    samples = ImageSamples(Split(ArraySource(rng.integers(0, 255, (count, 8, 8, 1), np.uint8), labels), labels), PREP)
    whole = FinetuneSettings(epochs=9, seed=1, batch=batch)
    for (one,), parts in zip(
        batches(samples, whole, epoch), batches(samples, replace(whole, micro_batch=micro), epoch), strict=True
    ):
        assert max(len(part.targets) for part in parts) <= micro
        assert torch.equal(torch.cat([part.targets for part in parts]), one.targets)
        assert torch.equal(torch.cat([part.inputs for part in parts]), one.inputs)


def test_accumulated_gradients_are_the_whole_batchs(few: DataSet, tmp_path_factory: pytest.TempPathFactory) -> None:
    ended = []
    for micro in (None, 16):
        net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
        sum(p.sum() for p in net.parameters()).backward()  # gradients that a network brings are no part of the training
        history = finetune(
            net,
            None,
            image_data(few, PREP),
            Classification(),
            replace(FEW, micro_batch=micro, learning_rate=1e-3),
            folder=tmp_path_factory.mktemp("training"),
        )
        ended.append((net.state_dict(), history[-1].loss))
    (whole, loss), (parts, partial) = ended
    assert partial == pytest.approx(loss, rel=1e-4)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=3e-4)


def test_micro_batches_of_unequal_size_give_the_mean_gradient_of_the_batch(
    few: DataSet, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []

    def kept(state: Any, rate: float) -> None:
        found.append(next(iter(state.parameters.values())).grad.clone())
        raise KeyboardInterrupt

    monkeypatch.setattr(module_under_test.TrainingState, "update", kept)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval()
    for micro in (None, 30):  # 64 samples in parts of 22, 21 and 21
        folder = tmp_path_factory.mktemp("training")
        with pytest.raises(KeyboardInterrupt):
            finetune(net, None, image_data(few, PREP), Classification(), replace(FEW, micro_batch=micro), folder=folder)
        net.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_epochs_differ_in_order_and_variation(few: DataSet) -> None:
    made = [next(batches(image_data(few, PREP).train, FEW, epoch)) for epoch in (1, 2, 1)]
    (a, la), (b, lb), (c, _) = ((batch.inputs, batch.targets) for (batch,) in made)
    assert not torch.equal(la, lb)
    assert not torch.equal(a, b)
    assert torch.equal(a, c)


def test_batches_made_ahead_are_the_same_and_their_errors_arrive(few: DataSet) -> None:
    train = image_data(few, PREP).train
    found = list(ahead(batches(train, FEW, 1)))
    assert len(found) == 5
    for (one,), (other,) in zip(found, batches(train, FEW, 1), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
    broken = ImageSamples(replace(few.train, indices=np.array([0, 10**6])), PREP)
    with pytest.raises(IndexError):
        list(ahead(batches(broken, FEW, 1)))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.floats(0, 0.5), st.floats(1e-5, 1.0))
def test_the_learning_rate_rises_to_its_peak_then_falls(steps: int, warmup: float, peak: float) -> None:
    how = FinetuneSettings(epochs=1, seed=0, learning_rate=peak, warmup=warmup)
    rates = [learning_rate(i, steps, how) for i in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(peak)
    assert all(0 < r <= peak * 1.000001 for r in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[top:]))
    if steps > 20:
        assert rates[-1] < 0.05 * peak


@pytest.mark.parametrize(("samples", "batch"), [(1_100, 32), (2_000, 32), (3_840, 64), (7_680, 128), (50_000, 128)])
def test_a_small_set_is_trained_in_smaller_batches(samples: int, batch: int) -> None:
    assert batch_for(samples) == batch


def test_the_loss_is_hintons() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(6)
    p, q = (torch.softmax(x / 3, 1) for x in (teacher, student))
    soft = (p * (p / q).log()).sum(1).mean()
    hard = -student.log_softmax(1)[range(6), labels].mean()
    torch.testing.assert_close(distillation_loss(student, teacher, labels, 0.7, 3.0), 0.3 * hard + 0.7 * 9 * soft)
    torch.testing.assert_close(distillation_loss(student, None, labels, 0.7, 3.0), hard)
    assert float(distillation_loss(teacher, teacher, labels, 1.0, 3.0)) == pytest.approx(0, abs=1e-12)


def test_a_narrow_strided_projection_is_trained_in_the_order_that_does_not_crash():
    """PyTorch's channels-last backward pass of such a layer corrupts memory on CPUs: a crash some hundred steps later."""
    narrow = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, stride=2))
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1, stride=2), nn.Conv2d(16, 8, 1))
    for networks, expected in (((narrow,), torch.contiguous_format), ((wide,), torch.channels_last)):
        with fastest_layout(networks, torch.zeros(2, 3, 8, 8), "cpu") as layout:
            assert layout is expected
            assert all(network[1].weight.is_contiguous(memory_format=expected) for network in networks)
    with fastest_layout((wide, narrow), torch.zeros(2, 3, 8, 8), "cpu") as layout:
        assert layout is torch.contiguous_format


def test_what_is_mostly_right_is_trained_gently_and_what_is_mostly_wrong_boldly():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    assert [learning_rate_for(share, net) for share in (0.0, 0.35, 0.5, 0.88, 1.0)] == [BOLD, BOLD, GENTLE, GENTLE, GENTLE]
    assert GENTLE < BOLD


@pytest.mark.parametrize("one_shot", [0.1, 0.9])
def test_a_network_without_batchnorm_is_trained_more_gently_still(one_shot: float):
    assert learning_rate_for(one_shot, nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))) < GENTLE


def test_training_that_only_makes_it_worse_leaves_the_network_as_it_was_and_says_so(
    teacher: nn.Module, few: DataSet, tmp_path: Path
) -> None:
    student, said = copy.deepcopy(teacher), []
    ruinous = replace(FEW, epochs=2, learning_rate=10.0, warmup=0.0)
    history = finetune(student, None, image_data(few, PREP), Classification(), ruinous, folder=tmp_path, note=said.append)
    assert len(history) == 2
    before = teacher.state_dict()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert said == ["No epoch of fine-tuning matched the network before it on the search split: the initial weights were kept."]


def test_frozen_statistics_stay_and_the_rest_learns(teacher: nn.Module, few: DataSet, tmp_path: Path) -> None:
    student, before = _net(), _net().state_dict()
    finetune(
        student, teacher, image_data(few, PREP), Classification(), replace(FEW, frozen_norms=True, epochs=8), folder=tmp_path
    )
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("running" in name for name in changed)
    assert CONV in changed
