"""Int8 recipes of one network scored on the search split, whatever the target's int8 looks like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import onnx

from ...calibration.ranges import Histogram, Range, collect, ranges
from ..base import SAME_PP, BuildRequest, FloatArray, Runner
from .export import export_float
from .int8 import STEPS, Recipe

Quantize = Callable[[onnx.ModelProto, Mapping[str, Range], Recipe], onnx.ModelProto]


class Trials:
    """Recipes in the order they were tried: simpler before more involved.

    Args:
        network: float.
        request: its calibration images and its score are used.
        quantize: makes the int8 network of a recipe.
        load: runs a serialised network.
    """

    def __init__(
        self, network: onnx.ModelProto, request: BuildRequest, quantize: Quantize, load: Callable[[bytes, int], Runner]
    ) -> None:
        self.network, self.request = network, request
        self.top1: dict[Recipe, float] = {}
        self._quantize, self._load = quantize, load
        self._rounded: dict[int, onnx.ModelProto] = {}  # weight bits -> the network with weights that they can hold
        self._ranges: dict[tuple[str, int], dict[str, Range]] = {}  # by method and bits; 0 where weights are as they were

    def model(self, recipe: Recipe) -> onnx.ModelProto:
        """The int8 network of a recipe."""
        network = self._network(recipe)
        key = recipe.ranges, recipe.weight_bits if recipe.compensated else 0
        if key not in self._ranges:
            self._ranges[key] = ranges(histograms(network, self.request), recipe.ranges)
        return self._quantize(network, self._ranges[key], recipe)

    def _network(self, recipe: Recipe) -> onnx.ModelProto:
        if not recipe.compensated:
            return self.network
        bits, request = recipe.weight_bits, self.request
        if bits not in self._rounded:
            assert request.rounded is not None  # escalate
            self._rounded[bits] = export_float(request.rounded(STEPS[bits]), request.image_shape)
        return self._rounded[bits]

    def escalate(self, allowed: float, ends: tuple[str, str]) -> None:
        """What is left to try where int8 costs too much: weights rounded together, then the last and the first layer in float.

        Args:
            allowed: top-1, percent, from which on nothing more is tried.
            ends: the first and the last layer.
        """
        chosen, (first, last) = self.best(), ends
        if self.top1[chosen] >= allowed:
            return
        if self.request.rounded is not None:
            self.score(replace(chosen, compensated=True))
        chosen = self.best()
        for extra in ((last,), (first,), (first, last)) if first != last else ():
            if self.top1[self.best()] >= allowed:
                return
            self.score(replace(chosen, float_layers=extra))

    def score(self, recipe: Recipe) -> None:
        """Note a recipe's top-1, percent, on the search split."""
        data = self.model(recipe).SerializeToString()
        self.top1[recipe] = self.request.score(self._load(data, self.request.threads))

    def best(self) -> Recipe:
        """The first of those that are as good as the best."""
        return next(recipe for recipe, top1 in self.top1.items() if top1 >= max(self.top1.values()) - SAME_PP)


def histograms(network: onnx.ModelProto, request: BuildRequest) -> Mapping[str, Histogram]:
    """Counts of a float network's activations on the calibration images.

    The last ones are kept: targets that are built from one network in one run share them.
    """
    return _collected(network.SerializeToString(deterministic=True), _Images(request.calibration), request.threads)


@lru_cache(maxsize=1)
def _collected(network: bytes, images: _Images, threads: int) -> Mapping[str, Histogram]:
    return collect(onnx.load_model_from_string(network), images.arrays, threads=threads)


class _Images:
    """Arrays that are equal when their bytes are."""

    def __init__(self, arrays: Sequence[FloatArray]) -> None:
        self.arrays = arrays
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(repr(array.shape).encode())
            digest.update(array.tobytes())
        self._digest = digest.hexdigest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Images) and other._digest == self._digest
