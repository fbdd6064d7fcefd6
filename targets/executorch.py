"""ExecuTorch on phones and boards: one .pte file for its XNNPACK backend, int8 or float, batch 1.

The file takes what the network takes. What is measured on this machine is this machine's ExecuTorch, not a phone's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
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
    from torch import nn
    from torch.export import ExportedProgram

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
        from .pte.lowering import exported, lowered

        return lowered(exported(module, interface.signature))[0]

    def build(self, request: BuildRequest) -> Artifact:
        """Write `model.pte` and `baseline.pte` into the request's folder; see `Target.build`."""
        self.require(request.precision)
        from .pte.lowering import exported, lowered
        from .pte.run import sides_of

        converted = Converted(exported(request.module, request.signature))
        if request.precision is Precision.INT8:
            converted = _int8(converted.network, request)
        data, left = lowered(converted.network)
        portable = f"operators not delegated to XNNPACK, in portable kernels: {_listed(left) or 'none'}"
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
    """The network's .pte file; candidates are converted one by one, because a .pte file cannot be cut."""

    def __init__(self, module: nn.Module, signature: Signature, precision: Precision) -> None:
        import torch

        from ..calibration.ranges import samples
        from .pte.int8 import quantize
        from .pte.lowering import exported, lowered
        from .stand_ins import stand_ins

        network = exported(module, signature)
        if precision is Precision.INT8:
            (sample,) = samples([stand_ins(signature, 1)])  # latency does not depend on the ranges
            network = quantize(network, {}, tuple(map(torch.tensor, sample)))
        self._file = lowered(network)[0]

    def candidate(self, structure: Structure) -> bytes:
        """The network's file in the artifact's precision.

        Raises:
            BuildError: another structure than the network's own is asked for.
        """
        if structure.widths or structure.removed:
            raise BuildError("a .pte file is not cut by its layers", found=structure.key())
        return self._file


def _int8(network: ExportedProgram, request: BuildRequest) -> Converted[ExportedProgram]:
    """The int8 program that costs least on the search split, in ExecuTorch on this machine."""
    from .int8_choice import Int8Format, choose_int8
    from .pte.int8 import collect, float_layers, quantize
    from .pte.lowering import exported, lowered
    from .pte.run import predictor

    how = Int8Format(
        activation_type="int8",
        export=lambda module: exported(module, request.signature),
        collect=lambda program: collect(program, request.calibration),
        quantize=lambda program, found, recipe: quantize(program, found),
        load=lambda program: predictor(lowered(program)[0]),
    )
    chosen = choose_int8(network, request, how)
    left = float_layers(chosen.network)
    return replace(chosen, notes=(*chosen.notes, f"layers in float: {_listed(left)}")) if left else chosen


def _listed(counts: Counter[str]) -> str:
    """Names with their numbers, in alphabetical order."""
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))


TARGET = ExecuTorch()
