"""Definition of a target: its limits as plain data, and the four questions the pipeline asks it.

A target is one module in this folder that binds `TARGET`. It is found by its file name; nothing else is edited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..pipeline.errors import BuildError, UnavailableError
from ..pipeline.files import atomic_write, file_ref
from ..pipeline.options import Pattern, Precision
from ..pipeline.signature import FileTensor, Signature
from ..pipeline.types import Artifact, Kind, Speedup

if TYPE_CHECKING:
    from torch import nn

FloatArray = NDArray[np.float32]
Arrays = NDArray[Any] | tuple[NDArray[Any], ...]  # one tensor, or several in the order of the signature; samples along axis 0
AS_GIVEN = "as the PyTorch network takes them"  # inputs of a file that normalises nothing
AS_RETURNED = "as the PyTorch network gives them"  # outputs of such a file
Network = TypeVar("Network")


@dataclass(frozen=True)
class Limits:
    """Limits of the target's kernels. The search never leaves these limits, so every plan can be built."""

    channel_multiple: int  # kept channel counts are multiples of this
    precisions: tuple[Precision, ...]  # best first
    patterns: tuple[Pattern, ...]  # best first: what buys latency there
    shared_multiple: int = 1  # what suits other targets of the same plan too; wide groups keep counts that are multiples of it

    def step(self, size: int) -> int:
        """The number that kept channel counts of a group of `size` channels are multiples of.

        Where the multiple that suits all targets would leave a group with less than its quarters to choose from, it is that of
        the target which is searched for.
        """
        return self.shared_multiple if size >= 4 * self.shared_multiple > 4 * self.channel_multiple else self.channel_multiple


def joint(targets: Sequence[Target]) -> Limits:
    """Limits that one plan keeps for several targets: the first one's, in wide groups with channel counts that suit them all."""
    multiple = math.lcm(*(target.limits.channel_multiple for target in targets))
    own = targets[0].limits
    return own if multiple == own.channel_multiple else replace(own, shared_multiple=multiple)


@dataclass(frozen=True)
class Structure:
    """Shape of a candidate, all that its latency depends on.

    The search counts units: group -> (units left, units), and names residual branches as its plans do. Files that are cut layer
    by layer are asked for: layer -> (inputs kept, outputs kept), and branches by the names of their last layers.
    """

    widths: Mapping[str, tuple[int, int]]
    removed: tuple[str, ...] = ()  # residual branches taken out

    def key(self) -> str:
        """A stable text that is equal for equal structures."""
        widths = ",".join(f"{n}:{i}>{o}" for n, (i, o) in sorted(self.widths.items()))
        return f"{widths}|{','.join(sorted(self.removed))}"


@dataclass(frozen=True)
class BuildRequest:
    """Inputs of a build."""

    module: nn.Module  # the pruned network, eval mode, BatchNorm in place
    baseline: bytes  # the dense float network's file, see `Target.baseline`
    signature: Signature
    classes: tuple[str, ...]  # () where the network is no classifier
    precision: Precision
    calibration: Sequence[Arrays]  # what artifacts take, see `Runner`: training split, augmented as the model was trained
    score: Callable[[Runner], float]  # on the search split, in the metric's unit; negated where less is better
    folder: Path  # files go here
    threads: int = 1
    unit: str = "%"  # of the score
    max_drop: float | None = 0.3  # what int8 may cost before more is tried, and it is said; None: 0.3 % of float's score
    mean: tuple[float, ...] = ()  # per channel, of pixels on [0, 1]: network input = (pixel / 255 - mean) / std
    std: tuple[float, ...] = ()  # a target may put this into the artifact; both empty: inputs stay as they are
    float_io: bool = False  # float input and output of an int8 artifact, where its format has int8 ones by default
    pattern: Pattern = Pattern.CHANNEL  # how the network was pruned
    rounded: Callable[[int], nn.Module] | None = None  # `module` with weights that are multiples of a row's largest over so many
    speedup: Callable[[Path, Path], Speedup] | None = None  # of the second file over the first, on the device; None: no device


@dataclass(frozen=True)
class Converted(Generic[Network]):
    """A network in its artifact's precision, and what a report says about it."""

    network: Network
    notes: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)  # the same, machine-readable
    choices: tuple[str, ...] = ()  # every int8 recipe that was tried, with its score


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of an artifact."""

    signature: Signature
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()  # see `BuildRequest`
    std: tuple[float, ...] = ()


def scaling_of(mean: Sequence[float], std: Sequence[float]) -> str:
    """The formula of a file's inputs that are normalised outside of it; without mean and std they are as the network's."""
    return f"(pixel / 255 - mean) / std, mean {list(mean)}, std {list(std)}" if mean else AS_GIVEN


class Runner(Protocol):
    """An artifact loaded in its own runtime."""

    def __call__(self, inputs: Arrays) -> Arrays:
        """The outputs for network inputs; for pixels (n, H, W, C) where the target `takes_pixels` and was given mean and std."""


def artifact_bytes(path: Path) -> bytes:
    """The content of an artifact's file.

    Raises:
        BuildError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise BuildError(f"{path.name} cannot be read", found="not a regular file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BuildError(f"{Path(path).name} cannot be read", found=error.strerror or str(error)) from error


# One inference somewhere else: tensors by name in, tensors by name out.
Infer = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


@runtime_checkable
class Elsewhere(Protocol):
    """A target whose artifacts another machine can run for this one: here images become tensors, and tensors logits."""

    def runner_through(self, path: Path, infer: Infer) -> AbstractContextManager[Runner]:
        """As `Target.runner`, with every inference made by `infer`, one sample each."""


class Prober(Protocol):
    """Cheap latency models of candidates."""

    def candidate(self, structure: Structure) -> bytes:
        """A model of this structure in the artifact's precision. Its weights mean nothing; its latency does.

        A target's own prober gives the network's file for an empty structure. For another it cuts that file layer by layer if it
        can; the search otherwise cuts the exported graph (ONNX) or the module.

        Raises:
            BuildError: the file cannot be cut so.
        """


@runtime_checkable
class Estimator(Protocol):
    """A prober that can say how a structure's latency would change where no device is there to be asked."""

    whole_s: float  # of the network as it was given, the products of attention too; for ratios only

    def estimate(self, structure: Structure) -> float:
        """Latency of this structure as a share of the dense one's in the same precision. An estimate, never a measurement."""


class Target(Protocol):
    """One runtime. Targets derive from this class: members with a value here are optional."""

    name: str
    limits: Limits
    runtime: str  # the agent's name for it, see devices/agent/runtimes/: "onnxruntime", ...
    packages: tuple[str, ...] = ()  # whose versions the report names, beside those of every run
    needs_device: bool = False  # whether the artifact is finished on the device it is for
    takes_pixels: bool = False  # artifacts that are given mean and std take stored pixels (n, H, W, C), not network inputs
    int8_may_be_slower: bool = False  # whether some processors it is for run int8 convolutions more slowly than float ones
    simulation: Kind = Kind.ESTIMATED  # of what `runner` answers without that device, where one is needed

    def missing(self) -> str | None:
        """Why artifacts cannot be built here, with what to install; None when they can."""

    def baseline(self, module: nn.Module, interface: Interface) -> bytes:
        """The file of a dense float network: what latencies are compared with. Arguments as in `BuildRequest`.

        Raises:
            UnavailableError, BuildError: as for `build`.
        """

    def build(self, request: BuildRequest) -> Artifact:
        """Write the artifact and its dense float baseline into `request.folder`.

        Paths in the returned FileRefs are relative to `request.folder`.

        Raises:
            UnavailableError: a package is missing.
            BuildError: the converter refused the model; the message names the layer where it can.
        """

    def runner(self, path: Path, threads: int = 1) -> AbstractContextManager[Runner]:
        """The artifact in its own runtime; it takes any number of inputs.

        Raises:
            UnavailableError: the runtime is missing.
            BuildError: the file cannot be read or loaded.
        """

    def prober(self, module: nn.Module, signature: Signature, precision: Precision) -> Prober:
        """Latency models for the search. `module` is the dense network in eval mode.

        Convolution and linear weights keep their module names (`layer1.0.conv1.weight`), BatchNorm is in place.

        Raises:
            UnavailableError, BuildError: as for `build`.
        """

    def require(self, precision: Precision | None = None) -> None:
        """Checks that artifacts of a precision can be built here.

        Raises:
            UnavailableError: they cannot, see `missing`.
            BuildError: not in this precision.
        """
        reason = self.missing()
        if reason:
            raise UnavailableError(f"the {self.name} target cannot build here", found=reason)
        if precision is not None and precision not in self.limits.precisions:
            able = ", ".join(self.limits.precisions)
            raise BuildError(f"the {self.name} target cannot build this precision", found=precision, expected=f"one of {able}")

    def artifact(
        self,
        request: BuildRequest,
        converted: Converted[Any],
        data: bytes,
        file_format: str,
        sides: tuple[tuple[FileTensor, ...], tuple[FileTensor, ...]],
        *notes: str,
        **options: str,
    ) -> Artifact:
        """Writes `model.FORMAT` (`data`) and `baseline.FORMAT` into the request's folder; returns their record.

        `sides`: the input and the output tensors of the file.
        """
        request.folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for name, content in (("model", data), ("baseline", request.baseline)):
            path = request.folder / f"{name}.{file_format}"
            atomic_write(path, content)
            files[name] = file_ref(path, request.folder)
        return Artifact(
            target=self.name,
            file=files["model"],
            format=file_format,
            precision=request.precision,
            input_name=sides[0][0].name,
            input_shape=sides[0][0].shape,
            notes=(*converted.notes, *notes),
            options=converted.options | options,
            baseline=files["baseline"],
            choices=converted.choices,
            inputs=sides[0],
            outputs=sides[1],
        )
