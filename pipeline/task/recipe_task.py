"""The task of a recipe: its loss and metric, or distance and agreement to the dense network where it has none."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..network.calling import SAME, Inputs, Outputs, call, deviation, fresh
from ..signature import MOST_FIGURE, Metric, Signature
from .recipe import Recipe, Structure, deployed, network_of
from .recipe_data import Targets, copied
from .samples import Batch, Data
from .task import agreement, scaled_distance, signature_of

KEPT_BYTES = 512 << 20  # of outputs and targets that a judge keeps, for intervals
AGREEMENT = Metric("agreement", "%")
NOTHING = 1e-9  # a dense network's value that nothing is a share of
FLOOR = 1e-3  # a share below which it falls ever more slowly, and never to 0
EQUAL = 1e-4  # relative: a metric whose value is this close to the mean of its samples' values is that mean


class RecipeTask:
    """A recipe's way to judge and train a network. See `task.Task` for the members."""

    labelled = False

    def __init__(self, recipe: Recipe, structure: Structure) -> None:
        self.recipe, self._structure = recipe, structure
        self.compares = recipe.metric is None
        self._first = None if recipe.metric is None else self._made()  # is never fed
        self.metric = AGREEMENT if recipe.metric is None else _facts(recipe, self._first)

    @property
    def key(self) -> str:
        """See `task.Task`."""
        return self.recipe.digest

    def judge(self) -> RecipeJudge:
        """Feeds the recipe's metric; without one, counts how far the outputs agree with the dense network's."""
        return RecipeJudge(self)

    def training_loss(self, outputs: Outputs, targets: Any, dense: Outputs | None) -> Tensor:
        """The recipe's loss and the distance to the dense outputs; the distance alone where the recipe has none."""
        own = self.recipe.loss
        parts = [] if dense is None else [scaled_distance(outputs, dense)]
        if own is not None:
            with self.recipe.calling("loss()"):
                parts.append(own(self._structure.arranged(outputs), targets.collated))
            if not isinstance(parts[-1], Tensor) or parts[-1].numel() != 1:
                raise self.recipe.wrong("loss()", _shape(parts[-1]), "a scalar tensor")
        return torch.stack([part.reshape(()) for part in parts]).sum()

    def distance(self, outputs: Outputs, targets: Any, dense: Outputs | None) -> float:
        """See `task.scaled_distance`."""
        assert dense is not None  # the task is not `labelled`
        return float(scaled_distance(outputs, dense))

    def share(self, value: float, dense: float) -> float:
        """What is kept of the dense network's value: 1 is as good, and a worse value is always less, but above 0.

        Accuracies: value / dense, bent where it would reach 0. Errors: dense / value. Where the dense value is 0 there is no
        ratio: 1 / (1 + drop), in the metric's own unit.
        """
        if not math.isfinite(value):
            return 0.0
        worse = self.metric.drop(dense, value) / (abs(dense) if abs(dense) > NOTHING else 1.0)
        if worse <= 0.0:
            return min(1.0 - worse, 2.0)
        if (dense if self.metric.higher_is_better else -dense) <= NOTHING:  # it grows with how bad a network is
            return 1.0 / (1.0 + worse)
        return 1.0 - worse if worse <= 1.0 - FLOOR else FLOOR**2 / (worse - 1.0 + 2.0 * FLOOR)

    def new_metric(self) -> Any:
        """An object of its own from the recipe's `metric()`, with nothing in it."""
        found = self._made()
        if found is self._first:  # `metric()` always gives this one: two judges would count in it together
            with self.recipe.calling("metric()"):
                found = copy.deepcopy(found)
        with self.recipe.calling("metric().reset()"):
            found.reset()
        return found

    def _made(self) -> Any:
        assert self.recipe.metric is not None
        with self.recipe.calling("metric()"):
            found = self.recipe.metric()
        for name in ("update", "compute", "reset"):
            if not callable(getattr(found, name, None)):
                raise self.recipe.wrong("metric()", f"a {type(found).__name__} without {name}()", "update, compute and reset")
        return found

    def picture(self, batch: Batch, outputs: Outputs) -> NDArray[np.uint8] | None:
        """See `task.Task`."""
        if self.recipe.picture is None:
            return None
        given = copied((batch.inputs, self.arranged(outputs), batch.targets.collated))  # it may draw into them
        with self.recipe.calling("picture()"):
            found = np.asarray(self.recipe.picture(*given))
        if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3:
            raise self.recipe.wrong("picture()", f"{found.dtype} of shape {found.shape}", "uint8 of shape (H, W, 3)")
        return found

    def arranged(self, outputs: Outputs) -> Any:
        """Outputs as the recipe's functions know them."""
        return self._structure.arranged(outputs)


class RecipeJudge:
    """See `task.Judge`; the metric sees sample by sample what was answered."""

    def __init__(self, task: RecipeTask) -> None:
        self._task = task
        self._metric = None if task.compares else task.new_metric()
        self._agreed: list[NDArray[np.float64]] = []
        self._kept: list[tuple[Any, Any]] | None = []
        self._bytes = 0
        self._value: float | None = None
        self._each: NDArray[np.float64] | None = None

    def update(self, outputs: Outputs, batch: Batch, dense: Outputs | None = None) -> None:
        """See `task.Judge`."""
        if self._metric is None:
            assert dense is not None  # the task compares
            self._agreed.append(100.0 * agreement(outputs, dense).numpy())
            return
        targets: Targets = batch.targets
        for k, target in enumerate(targets.each):
            answered = self._task.arranged(tuple(output[k : k + 1] for output in outputs))
            with self._task.recipe.calling("metric().update()"):
                self._metric.update(*copied((answered, target)))  # it may work in place
            self._bytes += sum(t.nbytes for t in pytree.tree_leaves((answered, target)) if isinstance(t, Tensor))
            if self._kept is not None:
                self._kept.append((answered, target))
        if self._bytes > KEPT_BYTES:
            self._kept = None
        self._value = self._each = None

    def value(self) -> float:
        """See `task.Judge`."""
        if self._metric is None:
            return float(np.concatenate(self._agreed).mean())
        if self._value is None:
            self._value = self._computed(self._metric)
        return self._value

    def per_sample(self) -> NDArray[np.float64] | None:
        """See `task.Judge`; found by asking the metric for each sample alone."""
        if self._metric is None:
            return np.concatenate(self._agreed)
        if self._kept is None:
            return None
        if self._each is None:
            self._each = self._alone()
        mean = float(self._each.mean()) if len(self._each) else math.nan
        same = math.isfinite(mean) and abs(mean - self.value()) <= EQUAL * max(abs(mean), 1e-9)
        return self._each if same else None

    def over(self, picked: NDArray[np.int64]) -> float | None:
        """See `task.Judge`."""
        if self._metric is None:
            return float(np.concatenate(self._agreed)[picked].mean())
        if self._kept is None:
            return None
        return self._asked([self._kept[i] for i in picked.tolist()])

    def _alone(self) -> NDArray[np.float64]:
        assert self._kept is not None
        found = np.full(len(self._kept), np.nan)
        for k, pair in enumerate(self._kept):
            try:
                found[k] = self._asked([pair])
            except Exception:  # the user's code: a metric of pairs, or of a corpus, has no value for one sample
                return np.zeros(0)
            if not math.isfinite(found[k]):
                return np.zeros(0)
        return found

    def _asked(self, pairs: list[tuple[Any, Any]]) -> float:
        """The metric's value of some samples, by an object that has seen no others."""
        metric = self._task.new_metric()
        with self._task.recipe.calling("metric()"):
            for answered, target in pairs:
                metric.update(*copied((answered, target)))
            return _number(metric.compute())

    def _computed(self, metric: Any) -> float:
        recipe = self._task.recipe
        with recipe.calling("metric().compute()"):
            found = metric.compute()
        try:
            return _number(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise recipe.wrong("metric().compute()", type(found).__name__, "one number", "pick one of its figures") from error


def open_recipe(recipe: Recipe, data: Data) -> tuple[nn.Module, RecipeTask, Signature, Inputs]:
    """A recipe's deployed network, its task, its signature, and the inputs of two samples, all checked on these.

    Raises:
        InputError: a function fails or returns what cannot be used; the network is random, depends on the batch, or gives what is
            not finite.
    """
    module = network_of(recipe)
    probe = data.train.batch(np.arange(2))
    with torch.no_grad(), recipe.calling("model().forward"):
        raw = _raw(module, probe.inputs)
    if recipe.outputs is not None:
        with recipe.calling("outputs()"):
            raw = recipe.outputs(raw)
    found = Structure.of(raw)
    if found is None:
        function = "outputs()" if recipe.outputs is not None else "model().forward"
        raise recipe.wrong(function, f"a {type(raw).__name__} without tensors", "a tensor, or a tuple or dict of tensors")
    structure, outputs = found
    for name, tensor in zip(structure.names, outputs, strict=True):
        if tensor.ndim < 1 or len(tensor) != 2:
            raise recipe.wrong(f"output {name}", f"shape {tuple(tensor.shape)} for 2 samples", "the samples along axis 0")
        if not bool(torch.isfinite(tensor).all()):
            raise recipe.wrong(f"output {name}", "NaN or infinity", "finite numbers", "check the weights and the data")
    _scores(recipe, outputs)
    network = deployed(module, recipe.outputs)
    _steady(recipe, network, probe, structure, outputs)
    names = list(probe.inputs) if isinstance(probe.inputs, dict) else _positional(probe.inputs)
    signature = signature_of(probe.inputs, outputs, names, list(structure.names))
    task = RecipeTask(recipe, structure)
    task.picture(data.train.batch(np.arange(1)), tuple(output[:1] for output in outputs))  # what fails, fails before the work
    return network, task, signature, probe.inputs


def _scores(recipe: Recipe, outputs: Outputs) -> None:
    """Refuses outputs that nothing can be trained to, and those that the default metric cannot tell apart."""
    floating = [tensor for tensor in outputs if tensor.is_floating_point()]
    if not floating:
        kinds = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in outputs)
        do = "deploy scores, take argmax or a threshold in metric()"
        raise recipe.wrong("the outputs", kinds, "a floating-point output", do)
    if recipe.metric is None and all(tensor[0].numel() == 1 for tensor in floating):
        expected = "several, whose direction can be compared with the dense network's"
        raise recipe.wrong("the outputs", "one number for each sample and no metric()", expected, "give a metric()")


def _steady(recipe: Recipe, network: nn.Module, probe: Batch, structure: Structure, outputs: Outputs) -> None:
    """Refuses a network that draws random numbers, or whose answer for a sample depends on the others of its batch."""
    first = pytree.tree_map_only(Tensor, lambda t: t[:1], probe.inputs)
    with torch.no_grad(), recipe.calling("model().forward"):
        again, alone = call(network, probe.inputs), call(network, first)
    if len(alone) != len(outputs):
        raise recipe.wrong("model().forward", f"{len(alone)} outputs for one sample, {len(outputs)} for two", "a fixed number")
    for name, one, two, single in zip(structure.names, outputs, again, alone, strict=True):
        if one.shape != two.shape or deviation(one, two, one) > SAME:
            raise recipe.wrong(f"output {name}", "another answer to the same inputs", "the same every time", "no random numbers")
        if single.shape[1:] != one.shape[1:]:
            found = f"shape {tuple(single.shape[1:])} for one sample, {tuple(one.shape[1:])} for two"
            raise recipe.wrong(f"output {name}", found, "one shape")
        if deviation(one[:1], single, one) > SAME:
            raise recipe.wrong(f"output {name}", "an answer that depends on the other samples of the batch", "one sample each")


def _raw(module: nn.Module, inputs: Inputs) -> Any:
    inputs = fresh(inputs)
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _positional(inputs: Inputs) -> list[str]:
    return [f"input_{k}" for k in range(len(inputs))] if isinstance(inputs, tuple) else ["input"]


def _facts(recipe: Recipe, metric: Any) -> Metric:
    """Name, unit and direction of a metric; torchmetrics has the direction alone."""
    higher = getattr(metric, "higher_is_better", True)
    name, unit = getattr(metric, "name", None), getattr(metric, "unit", "")
    if not isinstance(higher, bool):  # torchmetrics: None where a metric has no direction of its own
        raise recipe.wrong("metric().higher_is_better", repr(higher), "True or False", "set higher_is_better")
    return Metric(str(name or type(metric).__name__), str(unit), higher)


def _number(value: Any) -> float:
    found = float(value.item() if isinstance(value, Tensor | np.ndarray) else value)
    return math.copysign(math.inf, found) if abs(found) > MOST_FIGURE else found


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
