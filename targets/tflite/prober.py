"""Latency models of candidates for LiteRT: the dense network, converted once, and what is cut from its file."""

from __future__ import annotations

import copy
from functools import cached_property

import numpy as np
import torch
from torch import nn

from ...calibration.ranges import ranges
from ...pipeline.options import Precision
from ...pipeline.signature import Signature
from ..base import FloatArray, Structure
from ..stand_ins import stand_ins
from .convert import convert
from .edit import cut
from .file import read, write
from .int8 import collect, quantize, with_int8_weights
from .layers import layer_names


class TfliteProber:
    """The dense network, converted once; candidates are cut from the file.

    In half precision candidates are float: the runtime unpacks the weights when it loads them and runs the same kernels.
    """

    def __init__(self, module: nn.Module, signature: Signature, precision: Precision, pixels: bool) -> None:
        # latency does not depend on the normalisation, nor on the ranges below
        half = (0.5,) * signature.inputs[0].shape[0] if pixels else ()
        self.network, weights = convert(distinct(module), signature, half, half)
        self._model = read(self.network)
        self._float, self._weights = self._model, weights
        if precision is Precision.INT8:
            inputs = _pixels(signature) if pixels else stand_ins(signature)
            self._model = read(quantize(self.network, ranges(collect(self.network, [inputs]), "min-max")))
        elif precision is Precision.DYNAMIC:
            self._model = read(with_int8_weights(self.network))

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return layer_names(self._float, self._weights)

    def candidate(self, structure: Structure) -> bytes:
        """A model of this structure in the artifact's precision.

        Raises:
            BuildError: a layer that the structure names is not found in the converted network.
        """
        if not structure.widths and not structure.removed:  # a network that was cut before it came here
            return write(self._model)
        return write(cut(self._model, self._names, structure))


def _pixels(signature: Signature) -> FloatArray:
    channels, height, width = signature.image_shape
    return np.random.default_rng(0).integers(0, 256, (4, height, width, channels)).astype(np.float32)


def distinct(module: nn.Module) -> nn.Module:
    """A copy in which no two layers have equal weights, so that each is found in the converted network."""
    same = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in same.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                noise = torch.rand(layer.weight.shape, generator=generator) - 0.5
                layer.weight.add_(noise * (0.01 / layer.weight[0].numel() ** 0.5))
    return same
