"""ExecuTorch on phones and boards: one .pte file for its XNNPACK backend, int8 or float, batch 1.

The file takes what the network takes. What is measured on this machine is this machine's ExecuTorch, not a phone's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipeline.errors import BuildError, UnavailableError, install_hint
from ..pipeline.options import Pattern, Precision
from ..pipeline.signature import Signature
from ..pipeline.types import Artifact
from .base import BuildRequest, Converted, Infer, Interface, Limits, Runner, Structure, Target, artifact_bytes
from .onnx.target import taken

if TYPE_CHECKING:
    from torch import fx, nn

    from ..calibration.ranges import Range
    from .onnx.int8 import Recipe

EXTRA = {"executorch": "executorch", "torchao": "torchao"}


class ExecuTorch(Target):
    """The target, see `targets.base.Target`."""

    name = "executorch"
    runtime = "executorch"
    packages = ("executorch", "torchao")  # whose versions the report names
    int8_may_be_slower = True  # on x86 without VNNI
    limits = Limits(
        channel_multiple=8,
        precisions=(Precision.INT8, Precision.FP32),
        patterns=(Pattern.CHANNEL, Pattern.WEIGHT, Pattern.TWO_FOUR),  # the last two are stored zeros: they buy no time here
    )

    def missing(self) -> str | None:
        """Why artifacts cannot be built here; None when they can."""
        absent = [package for module, package in EXTRA.items() if find_spec(module) is None]
        return f"packages are missing ({', '.join(absent)}): {install_hint(self.name)}" if absent else None

    def baseline(self, module: nn.Module, interface: Interface) -> bytes:
        """The float file of a dense network, see `targets.base.Target`."""
        self.require()
        from .pte.lowering import exported, lowered, one_sample

        return lowered(exported(module, interface.signature), one_sample(interface.signature))[0]

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.pte` and `baseline.pte` into the request's folder; see `Target.build`."""
        self.require(request.precision)
        from .pte.lowering import exported, lowered, one_sample
        from .pte.run import sides_of

        converted = Converted(exported(request.module, request.signature))
        if request.precision is Precision.INT8:
            converted = _int8(converted.network, request)
        data, left = lowered(converted.network, one_sample(request.signature))
        names = ", ".join(f"{number} {name}" for name, number in sorted(left.items()))
        portable = f"operators that XNNPACK leaves to portable kernels: {names or 'none'}"
        own = "its latency is that of the machine it was measured on, not a phone's"
        sides = sides_of(request.signature, request.mean, request.std)
        notes = (taken(request.signature, request.classes), portable, own)
        return self.artifact(request, converted, data, "pte", sides, *notes, portable=str(left.total()))

    @contextmanager
    def runner(self, path: Path, threads: int = 1) -> Iterator[Runner]:
        """The artifact in ExecuTorch on the CPU, in the threads of its own pool; see `Target.runner`. Its package needs torch."""
        if find_spec("executorch") is None:
            raise UnavailableError("executorch is not installed", do=install_hint(self.name))
        from .pte.run import predictor

        yield predictor(artifact_bytes(path), name=Path(path).name)

    @contextmanager
    def runner_through(self, path: Path, infer: Infer) -> Iterator[Runner]:
        """The artifact on another machine, see `targets.base.Elsewhere`; its inputs are read from the file by ExecuTorch here."""
        from .pte.run import predictor

        yield predictor(artifact_bytes(path), name=Path(path).name, infer=infer)

    def prober(self, module: nn.Module, signature: Signature, precision: Precision) -> PteProber:
        """Latency models of candidates; see `Target.prober`."""
        self.require()
        return PteProber(module, signature, precision)


class PteProber:
    """A network, converted; candidates are converted one by one: nothing cuts a .pte file."""

    def __init__(self, module: nn.Module, signature: Signature, precision: Precision) -> None:
        from ..calibration.ranges import ranges
        from .onnx.prober import stand_ins
        from .pte.int8 import collect, quantize
        from .pte.lowering import exported, lowered, one_sample

        network, example = exported(module, signature), one_sample(signature)
        if precision is Precision.INT8:
            network = quantize(network, example, ranges(collect(network, example, [stand_ins(signature)]), "min-max"))
        self._file = lowered(network, example)[0]

    def candidate(self, structure: Structure) -> bytes:
        """The network's file in the artifact's precision.

        Raises:
            BuildError: another structure than the network's own is asked for.
        """
        if structure.widths or structure.removed:
            raise BuildError("a .pte file is not cut by its layers", found=structure.key())
        return self._file


def _int8(network: fx.GraphModule, request: BuildRequest) -> Converted[fx.GraphModule]:
    """The int8 graph that costs least on the search split, in ExecuTorch on this machine."""
    from .int8_choice import Int8Format, choose_int8
    from .pte.int8 import collect, float_layers, quantize
    from .pte.lowering import exported, lowered, one_sample
    from .pte.run import predictor

    example = one_sample(request.signature)

    def quantized(graph: fx.GraphModule, found: Mapping[str, Range], recipe: Recipe) -> fx.GraphModule:
        return quantize(graph, example, found)

    how = Int8Format(
        activation_type="int8",
        export=lambda module: exported(module, request.signature),
        collect=lambda graph: collect(graph, example, request.calibration),
        quantize=quantized,
        load=lambda graph: predictor(lowered(graph, example)[0]),
    )
    chosen = choose_int8(network, request, how)
    left = float_layers(chosen.network)
    names = ", ".join(f"{number} {name}" for name, number in sorted(left.items()))
    return replace(chosen, notes=(*chosen.notes, f"layers that stay in float: {names}")) if left else chosen


TARGET = ExecuTorch()
