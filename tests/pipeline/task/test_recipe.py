"""A recipe is checked function by function, and what it leaves out has a default that means something."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from edge_compress.pipeline.errors import InputError
from edge_compress.pipeline.evaluate.reward_samples import reward_samples
from edge_compress.pipeline.network.calling import call
from edge_compress.pipeline.task.load import load_recipe
from edge_compress.pipeline.task.recipe import Recipe, as_given, read_recipe
from edge_compress.pipeline.task.recipe_data import RecipeSamples, data_of
from edge_compress.pipeline.task.recipe_task import AGREEMENT, open_recipe
from edge_compress.pipeline.task.task import judged, scaled_distance, torch_predictor
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """Two inputs, and a dict of two outputs and something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 6)
        self.heads = nn.ModuleDict({"box": nn.Linear(6, 4), "score": nn.Linear(6, 2)})

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        x = torch.relu(self.a(left) + self.b(right))
        return {"box": self.heads["box"](x), "score": self.heads["score"](x), "note": "no tensor"}


class Pairs:
    """Samples with two inputs by name and a target."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.left, self.right = (torch.randn(count, n, generator=generator) for n in (4, 3))

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {"left": self.left[index], "right": self.right[index]}, index


class Last:
    """The mean of the targets whose box is positive first: a figure that is a mean over samples."""

    name, unit, higher_is_better = "positive boxes", "%", True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seen: list[float] = []

    def update(self, outputs: dict[str, Tensor], target: Tensor) -> None:
        assert set(outputs) == {"box", "score"}
        assert len(target) == len(outputs["box"])
        self.seen += (100.0 * (outputs["box"][:, 0] > 0)).tolist()

    def compute(self) -> float:
        return sum(self.seen) / len(self.seen)


def recipe(**changed: Any) -> Recipe:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return TwoHeads().eval()

    given: dict[str, Any] = {"model": model, "datasets": lambda: {"train": Pairs(40), "test": Pairs(30, 1)}}
    return Recipe(**(given | changed))


def opened(found: Recipe) -> Any:
    data = data_of(found, 0)
    return (*open_recipe(found, data), data)


def test_only_model_and_datasets_are_needed() -> None:
    network, task, signature, _, data = opened(recipe())
    assert [spec.name for spec in signature.inputs] == ["left", "right"]
    assert [(spec.name, spec.shape) for spec in signature.outputs] == [("box", (4,)), ("score", (2,))]
    assert signature.by_name
    assert task.metric == AGREEMENT
    judge = judged(task, data.test, torch_predictor(network), network)
    assert judge.value() == pytest.approx(100.0)
    other = TwoHeads().eval()
    worse = judged(task, data.test, lambda batch: tuple(other(**batch.inputs)[k].detach() for k in ("box", "score")), network)
    assert worse.value() < 90
    assert len(worse.per_sample()) == 30


def test_the_network_stays_of_the_users_class_and_gives_its_deployed_outputs() -> None:
    network, _, _, probe, _ = opened(recipe(outputs=lambda raw: raw["box"]))
    assert isinstance(network, TwoHeads)
    (box,) = call(network, probe)
    assert torch.equal(box, as_given(network)(**probe)["box"])
    assert type(as_given(network)) is TwoHeads
    assert set(network.state_dict()) == set(TwoHeads().state_dict())


def test_a_search_split_is_cut_from_the_training_samples_and_shares_none_with_them() -> None:
    data = data_of(recipe(), 0)
    assert (len(data.train), len(data.search), len(data.test)) == (32, 8, 30)
    seen = [set(split.batch(np.arange(len(split))).targets.collated.tolist()) for split in (data.train, data.search)]
    assert seen[0] | seen[1] == set(range(40))
    given = data_of(recipe(datasets=lambda: {"train": Pairs(40), "search": Pairs(9, 2), "test": Pairs(30)}), 0)
    assert (len(given.train), len(given.search)) == (40, 9)


def test_augmentation_repeats_with_its_generator_and_leaves_the_process_alone() -> None:
    def augment(inputs: dict[str, Tensor], target: int) -> tuple[dict[str, Tensor], int]:
        noise = float(torch.rand(())) + float(np.random.rand()) + random.random()
        return {name: value + noise for name, value in inputs.items()}, target

    train = data_of(recipe(augment=augment), 0).train
    torch.manual_seed(5)
    before = torch.rand(3)
    torch.manual_seed(5)
    one, two = (train.training_batch(np.arange(6), torch.Generator().manual_seed(1)).inputs["left"] for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.rand(3), before)
    plain = train.batch(np.arange(6)).inputs["left"]
    shift = (one - plain)[:, 0]
    assert len({round(float(s), 4) for s in shift}) == 6  # each sample its own
    part = train.training_batch(np.arange(2, 4), torch.Generator().manual_seed(1), whole=6, first=2).inputs["left"]
    assert torch.equal(part, one[2:4])


def test_functions_that_work_in_place_do_not_change_the_users_data() -> None:
    def augment(inputs: dict[str, Tensor], target: Any) -> tuple[Any, Any]:
        inputs["left"].mul_(0)
        return inputs, target

    pairs = Pairs(40)
    before = pairs.left.clone()
    data = data_of(recipe(augment=augment, datasets=lambda: {"train": pairs, "test": Pairs(30, 1)}), 0)
    batch = data.train.training_batch(np.arange(8), torch.Generator().manual_seed(0))
    assert not batch.inputs["left"].any()
    assert torch.equal(pairs.left, before)


def test_a_program_of_torchscript_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\(\): found a .*expected an nn.Module in Python"):
        opened(recipe(model=lambda: torch.jit.script(nn.Linear(2, 2)).eval()))


def test_a_metric_is_fed_sample_by_sample_with_what_was_answered() -> None:
    network, task, _, _, data = opened(recipe(metric=Last))
    assert (task.metric.name, task.metric.unit) == ("positive boxes", "%")
    judge = judged(task, data.test, torch_predictor(network), network)
    box = torch.cat([call(network, data.test.batch(np.arange(30)).inputs)[0]])[:, 0]
    assert judge.value() == pytest.approx(100 * float((box > 0).float().mean()))
    assert judge.per_sample().tolist() == (100.0 * (box > 0)).tolist()
    flipped = judged(task, data.test, lambda batch: tuple(-o for o in call(network, batch.inputs)), network)
    assert flipped.value() == pytest.approx(100 - judge.value())  # of the answers, not of the dense network
    assert judge.over(np.array([0, 0, 1])) == pytest.approx(judge.per_sample()[[0, 0, 1]].mean())


def test_a_figure_of_the_whole_set_has_no_values_of_single_samples() -> None:
    class Spread(Last):
        def compute(self) -> float:
            return max(self.seen) - min(self.seen)

    network, task, _, _, data = opened(recipe(metric=Spread))
    judge = judged(task, data.test, torch_predictor(network), network)
    assert judge.per_sample() is None
    assert judge.over(np.array([0, 0])) == 0.0


def test_a_loss_is_added_to_the_distance_from_the_dense_network() -> None:
    seen: list[Any] = []

    def loss(outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        seen.append(target)
        return outputs["score"].square().mean()

    network, task, _, _, data = opened(recipe(loss=loss))
    batch = data.train.batch(np.arange(4))
    outputs = tuple(output.detach() for output in call(network, batch.inputs))
    alone = task.training_loss(outputs, batch.targets, None)
    assert float(alone) == pytest.approx(float(outputs[1].square().mean()))
    assert float(task.training_loss(outputs, batch.targets, outputs)) == pytest.approx(float(alone))  # a distance of 0
    moved = tuple(o + 1 for o in outputs)
    assert float(task.training_loss(outputs, batch.targets, moved)) > float(alone)
    assert torch.equal(seen[0], batch.targets.collated)
    plain = opened(recipe())[1]
    assert float(plain.training_loss(outputs, batch.targets, outputs)) == 0.0


class Noisy(TwoHeads):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {"box": super().forward(left, right)["box"] + torch.rand(1)}


class Mixing(TwoHeads):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {"box": super().forward(left - left.mean(0), right)["box"]}


class Growing(TwoHeads):
    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        box = super().forward(left, right)["box"]
        return (box,) * len(left)


class Broken(TwoHeads):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {"box": super().forward(left, right)["box"] / 0}


class Refusing(Pairs):
    def __getitem__(self, index: int) -> Any:
        if index == 25:
            raise OSError("a photograph is gone")
        return super().__getitem__(index)


def of(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: kind().eval()


def with_train(train: Any) -> Callable[[], Any]:
    return lambda: {"train": train, "test": Pairs(30)}


def no_metric(value: Any = None, **methods: Any) -> Callable[[], Any]:
    return lambda: type("Odd", (Last,), {"compute": lambda self: value, **methods})()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": lambda: 3}, r"model\(\): found a int, expected an nn.Module"),
        ({"model": TwoHeads}, r"model\(\): found a network in training mode, expected eval mode"),
        ({"model": lambda: TwoHeads().eval().to("meta")}, r"model\(\): found a.weight, a tensor on the meta device"),
        (
            {"model": lambda: torch.export.export(nn.Linear(4, 2).eval(), (torch.ones(1, 4),)).module()},
            r"model\(\): found an exported program, .*return the module it was exported from",
        ),
        ({"model": lambda: TwoHeads().eval().half()}, r"model\(\): found half-precision weights"),
        ({"model": lambda: 1 / 0}, r"model\(\): found ZeroDivisionError"),
        ({"model": of(Noisy)}, "output box: found another answer to the same inputs"),
        ({"model": of(Mixing)}, "output box: found an answer that depends on the other samples"),
        ({"model": of(Growing)}, r"model\(\).forward: found 1 outputs for one sample, 2 for two"),
        ({"model": of(Broken)}, "output box: found NaN or infinity"),
        ({"model": of(nn.Identity)}, r"model\(\).forward: found TypeError"),
        ({"datasets": lambda: [1]}, r"datasets\(\): found a list"),
        (
            {"datasets": lambda: {"train": Pairs(40), "test": Pairs(30), "val": Pairs(9)}},
            r"datasets\(\): found a data set 'val', expected 'train', 'test', 'search': a validation set is 'search'",
        ),
        ({"datasets": lambda: {"train": Pairs(40)}}, r"datasets\(\): found 'train', expected a data set 'test'"),
        ({"datasets": with_train(iter([1]))}, r"datasets\(\)\['train'\]: found a list_iterator, expected a map-style data set"),
        ({"datasets": with_train(Pairs(4))}, r"datasets\(\)\['train'\]: found 4 samples, expected at least 10"),
        ({"datasets": with_train([1] * 20)}, r"datasets\(\)\['train'\]\[\d+\]: found int, expected \(inputs, target\)"),
        ({"datasets": with_train([({"left": torch.zeros(4)}, object())] * 20)}, r"datasets\(\)\['train'\]: found TypeError"),
        ({"collate": lambda samples: (3, None)}, r"collate\(\): found int"),
        ({"outputs": lambda raw: raw["mask"]}, r"outputs\(\): found KeyError: 'mask'"),
        ({"outputs": lambda raw: raw["note"]}, r"outputs\(\): found a str without tensors"),
        ({"outputs": lambda raw: raw["box"].mean()}, r"output output: found shape \(\) for 2 samples"),
        ({"picture": lambda inputs, outputs, target: 1 / 0}, r"picture\(\): found ZeroDivisionError"),
        ({"picture": lambda inputs, outputs, target: np.zeros((4, 4))}, r"picture\(\): found float64 of shape \(4, 4\)"),
        ({"metric": lambda: 3}, r"metric\(\): found a int without update\(\)"),
        ({"metric": lambda: 1 / 0}, r"metric\(\): found ZeroDivisionError"),
    ],
)
def test_a_bad_recipe_is_one_line_with_the_functions_name(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        opened(recipe(**changed))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (no_metric("many"), r"metric\(\).compute\(\): found str, expected one number"),
        (no_metric(update=lambda self, outputs, target: 1 / 0), r"metric\(\).update\(\): found ZeroDivisionError"),
        (no_metric(compute=lambda self: 1 / 0), r"metric\(\).compute\(\): found ZeroDivisionError"),
    ],
)
def test_a_metric_that_fails_is_named(metric: Any, says: str) -> None:
    network, task, _, _, data = opened(recipe(metric=metric))
    with pytest.raises(InputError, match=says):
        judged(task, data.test, torch_predictor(network), network).value()


def test_a_figure_that_no_plot_can_show_counts_as_infinite() -> None:
    network, task, _, _, data = opened(recipe(metric=no_metric(-1e305)))
    assert judged(task, data.test, torch_predictor(network), network).value() == -math.inf


def test_a_metric_without_a_value_for_the_dense_network_is_named_before_the_search() -> None:
    network, task, signature, _, data = opened(recipe(metric=no_metric(float("nan"))))
    subject = SimpleNamespace(signature=signature)
    example = data.train.batch(np.arange(1)).inputs
    loaded = cast(Any, SimpleNamespace(data=data, task=task, module=network, subject=subject, example=example))
    with pytest.raises(InputError, match="the metric positive boxes of the dense network, on the search split: found nan"):
        reward_samples(loaded, 20, 0)


def test_outputs_that_are_others_in_train_mode_are_named() -> None:
    with pytest.raises(InputError, match=r"model\(\).forward: found 2 outputs in train mode, 1 in eval mode"):
        scaled_distance((torch.ones(1, 2),) * 2, (torch.ones(1, 2),))


def test_a_loss_that_is_no_scalar_is_named() -> None:
    network, task, _, _, data = opened(recipe(loss=lambda outputs, target: outputs["box"]))
    batch = data.train.batch(np.arange(4))
    with pytest.raises(InputError, match=r"loss\(\): found shape \(4, 4\), expected a scalar tensor"):
        task.training_loss(call(network, batch.inputs), batch.targets, None)


def test_a_sample_that_fails_is_named_by_its_number() -> None:
    with pytest.raises(InputError, match=r"datasets\(\)\['train'\]\[25\]: found OSError: a photograph is gone"):
        data_of(recipe(datasets=with_train(Refusing(40))), 0).train.batch(np.arange(32))


def test_a_file_without_a_function_says_which(tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"
    with pytest.raises(InputError, match="no such file"):
        read_recipe(file)
    file.write_text("def model():\n    return 1\n")
    with pytest.raises(InputError, match=r"no function datasets\(\)"):
        read_recipe(file)
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="cannot be imported"):
        read_recipe(file)


def test_a_file_finds_the_modules_beside_it_even_when_its_functions_run(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("SIZE = 12\n")
    file = tmp_path / "own_recipe.py"
    file.write_text(
        "import torch\n"
        "def model():\n    from beside_it import SIZE\n    return torch.nn.Linear(4, SIZE).eval()\n"
        "def datasets():\n    d = [(torch.ones(4) * i, None) for i in range(20)]\n    return {'train': d, 'test': d}\n"
    )
    found = read_recipe(file)
    _, _, signature, _, data = opened(found)
    assert signature.outputs[0].shape == (12,)
    assert data.test.batch(np.arange(3)).targets.collated is None
    before = found.digest
    (tmp_path / "another.py").write_text("SIZE = 1\n")
    assert read_recipe(file).digest == before  # what it does not import is not its own
    (tmp_path / "beside_it.py").write_text("SIZE = 13\n")
    changed = read_recipe(file).digest
    file.write_text(file.read_text() + "# changed\n")
    assert len({before, changed, read_recipe(file).digest}) == 3


def test_a_changed_label_changes_the_digest_of_the_data() -> None:
    labels = np.arange(20) % 3

    def model() -> nn.Module:
        return nn.Linear(4, 3).eval()

    def datasets() -> dict[str, Any]:
        samples = [(torch.ones(4), label) for label in labels]
        return {"train": samples, "test": samples}

    recipe = Recipe(model, datasets)
    before = data_of(recipe, 0).test.digest
    assert data_of(recipe, 0).test.digest == before
    labels[7] += 1
    assert data_of(recipe, 0).test.digest != before


def test_recipes_of_one_module_with_other_functions_differ() -> None:
    def model() -> nn.Module:
        return nn.Linear(4, 3).eval()

    def datasets() -> dict[str, Any]:
        return {}

    def loss_a(outputs: Any, target: Any) -> Tensor:
        return torch.as_tensor(outputs - target).sum()

    def loss_b(outputs: Any, target: Any) -> Tensor:
        return torch.as_tensor(outputs + target).sum()

    one, same, other = (Recipe(model, datasets, loss=loss).digest for loss in (loss_a, loss_a, loss_b))
    assert one == same != other


def test_large_samples_are_told_apart_by_some_and_the_report_says_so() -> None:
    class Large:
        def __len__(self) -> int:
            return 200

        def __getitem__(self, index: int) -> tuple[Tensor, None]:
            return torch.full((1, 512, 512), float(index)), None

    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, stride=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()

    def datasets() -> dict[str, Any]:
        return {"train": Large(), "test": Large()}

    found = load_recipe(Recipe(model, datasets), 0)
    split = found.data.test
    assert isinstance(split, RecipeSamples)
    assert len(split.digested) == 64
    assert split.held() is not split  # 200 of them are kept in memory
    assert "of its 400 samples" in " ".join(found.notes)


def test_inputs_by_name_come_in_one_order_in_every_split() -> None:
    class Two(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids - mask

    def samples(*names: str) -> list[tuple[dict[str, Tensor], None]]:
        return [({name: torch.full((2,), float(len(name))) for name in names}, None) for _ in range(20)]

    data = data_of(Recipe(lambda: Two().eval(), lambda: {"train": samples("ids", "mask"), "test": samples("mask", "ids")}), 0)
    assert list(data.train.batch(np.arange(2)).inputs) == list(data.test.batch(np.arange(2)).inputs) == ["ids", "mask"]
    other = data_of(Recipe(lambda: Two().eval(), lambda: {"train": samples("ids", "mask"), "test": samples("ids")}), 0)
    other.train.batch(np.arange(2))
    with pytest.raises(InputError, match="those of the others: ids, mask"):
        other.test.batch(np.arange(2))


def test_a_recipe_object_used_again_is_told_apart_by_what_its_functions_hold_now() -> None:
    weights = [1.0]

    def loss(outputs: Any, target: Any) -> Tensor:
        return weights[0] * torch.as_tensor(outputs).sum()

    def model() -> nn.Module:
        return nn.Linear(4, 3).eval()

    samples = [(torch.ones(4), None) for _ in range(20)]
    recipe = Recipe(model, lambda: {"train": samples, "test": samples}, loss=loss)
    before, same = (load_recipe(recipe, 0).subject.code for _ in range(2))
    weights[0] = 2.0
    assert before == same != load_recipe(recipe, 0).subject.code
