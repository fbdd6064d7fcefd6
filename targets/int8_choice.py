"""Chooses an int8 recipe on the search split: activation ranges, weight bit-width, rounding, and layers left in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic

from torch import nn

from ..calibration.ranges import METHODS, Histogram, Range, ranges
from ..pipeline.errors import BuildError, InputError
from .base import BuildRequest, Converted, Network, Runner
from .onnx.int8 import STEPS, Recipe

MAX_SHARE = 0.003  # of float's score: what int8 may cost where a metric has a unit of its own
SAME = 1 / 15  # of what int8 may cost: recipes that score this close are equal, and the simpler one is taken


@dataclass(frozen=True)
class Int8Format(Generic[Network]):
    """A target's way to make int8 networks, and the choices it has."""

    activation_type: str
    export: Callable[[nn.Module], Network]
    collect: Callable[[Network], Mapping[str, Histogram]]  # of a float network's activations on the calibration images
    quantize: Callable[[Network, Mapping[str, Range], Recipe], Network]
    load: Callable[[Network], Runner]
    weight_bits: tuple[int, ...] = (8,)
    ends: tuple[str, tuple[str, ...]] = ("", ())  # first layer, and the last one of each output, which may stay in float


def choose_int8(network: Network, request: BuildRequest, how: Int8Format[Network]) -> Converted[Network]:
    """The int8 network that costs least on the search split.

    The weight bit-width is settled with min-max ranges, then the other range methods are tried with it. If int8 still costs more
    than allowed, see `Trials.escalate`.

    Raises:
        BuildError: the metric of the float network, or of every int8 recipe, is NaN.
    """
    float_score = request.score(how.load(network))
    if math.isnan(float_score):
        raise BuildError("the float network's score on the search split", found="nan", expected="a number")

    def shown(value: float) -> str:
        return (
            f"{abs(value):.2f} %" if request.unit == "%" else f"{abs(value):.4g} {request.unit}".rstrip()
        )  # of metrics of which less is better, scores are negated

    most = MAX_SHARE * abs(float_score) if request.max_drop is None else request.max_drop
    trials = Trials(network, request, how, SAME * most)
    first, *others = METHODS
    for bits in how.weight_bits:
        trials.score(Recipe(first, bits))
    bits = trials.best().weight_bits
    for method in others:
        trials.score(Recipe(method, bits))
    trials.escalate(float_score - most)
    best = trials.best()
    score = trials.scores[best]
    if score == -math.inf:
        raise BuildError("the score of every int8 network on the search split is NaN", do="try --precision fp32")
    notes = [f"int8: {best}, chosen on the search split ({shown(score)} against {shown(float_score)} in float)"]
    if float_score - score > most:
        lost = float_score - score
        cost = f"{lost:.2f} points" if request.unit == "%" else f"{lost:.3g} {request.unit}".rstrip()
        notes.append(f"int8 costs {cost} on the search split, more than the {most:.2g} aimed at")
    notes += trials.notes
    options = {
        "ranges": best.ranges,
        "weight_bits": str(best.weight_bits),
        "rounding": "compensated" if best.compensated else "nearest",
        "activation_type": how.activation_type,
        "excluded": ",".join(best.float_layers),
    }
    choices = (f"float: {shown(float_score)}", *(f"{recipe}: {shown(value)}" for recipe, value in trials.scores.items()))
    return Converted(trials.model(best), tuple(notes), options, choices)


class Trials(Generic[Network]):
    """Recipes in the order they were tried: simpler before more involved."""

    def __init__(self, network: Network, request: BuildRequest, how: Int8Format[Network], same: float) -> None:
        self.scores: dict[Recipe, float] = {}
        self.notes: list[str] = []
        self._request, self._how, self._same = request, how, same
        self._networks = {0: network}  # weight bits -> the float network with weights rounded for them; 0: as they were
        self._seen: dict[int, Mapping[str, Histogram]] = {}  # by the same key

    def model(self, recipe: Recipe) -> Network:
        """The int8 network of a recipe."""
        bits = recipe.weight_bits if recipe.compensated else 0
        if bits not in self._networks:
            assert self._request.rounded is not None  # escalate
            self._networks[bits] = self._how.export(self._request.rounded(STEPS[bits]))
        if bits not in self._seen:
            self._seen[bits] = self._how.collect(self._networks[bits])
        return self._how.quantize(self._networks[bits], ranges(self._seen[bits], recipe.ranges), recipe)

    def score(self, recipe: Recipe) -> None:
        """Note a recipe's score on the search split; NaN counts as -inf."""
        found = self._request.score(self._how.load(self.model(recipe)))
        self.scores[recipe] = -math.inf if math.isnan(found) else found

    def best(self) -> Recipe:
        """The first of those that are as good as the best."""
        return next(recipe for recipe, value in self.scores.items() if value >= max(self.scores.values()) - self._same)

    def escalate(self, allowed: float) -> None:
        """Try GPTQ rounding, then the last and the first layer in float, until the score is at least `allowed`."""
        if self.scores[self.best()] >= allowed:
            return
        if self._request.rounded is not None:
            try:
                self.score(replace(self.best(), compensated=True))
            except InputError as error:
                self.notes.append(f"int8: rounding by GPTQ was left out: {error}")
        chosen = self.best()
        first, last = self._how.ends
        for extra in (last, (first,), (first, *last)) if last and last != (first,) else ():
            if self.scores[self.best()] >= allowed:
                return
            self.score(replace(chosen, float_layers=tuple(dict.fromkeys(extra))))
