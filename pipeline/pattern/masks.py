"""Patterns `weight` and `2:4`: single connections are removed, as zeros in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...targets.base import Prober, Target
from ..axes.capture import Captured
from ..evaluate.evaluation_context import Bench
from ..evaluate.mask_evaluator import MaskEvaluator
from ..files import atomic_write, file_ref
from ..finetune.dynamic_masks import Remask, dynamic
from ..network.calling import Inputs
from ..network.compute import Compute
from ..options import Pattern, Precision
from ..reconstruct.memory import affordable, reduced, widest_activation
from ..reconstruct.optimal_brain_surgeon import chosen_masks
from ..reconstruct.sequential import sequential_masked
from ..run_folder import Stage
from ..score.connections import ConnectionScores
from ..score.mask_knobs import mask_knobs, masks_for, selections
from ..search.problem import Levels
from ..signature import Signature
from ..types import Plan, Sensitivity
from .base import Note, RankedEvaluator, layer_moments


class Masks:
    """Single connections go: zeros in place. They buy no latency where they are stored densely, so the budget is on density."""

    limits = "density"
    prunable_macs_share = None
    locked = ()
    finalists = 1  # of a mask's plans each would need its connections chosen again before it is reconstructed

    def __init__(
        self,
        captured: Captured,
        signature: Signature,
        pattern: Pattern,
        scores: ConnectionScores,
        root: Path,
        inputs: Callable[[], Tensor],
        compute: Compute,
    ) -> None:
        self.notes = captured.notes
        self.net, self.pattern, self.scores, self.root, self._inputs = captured.module, pattern, scores, root, inputs
        self._captured, self._compute, self._signature = captured, compute, signature
        self.knobs = mask_knobs(captured, pattern)
        self.widest = widest_activation(captured)

    def measures_precision(self, target: Target) -> bool:
        """Never: the budget is on density, not on latency."""
        return False

    def prober(self, target: Target, precision: Precision, note: Note) -> Prober:
        """The dense network's file: masks change no shape."""
        return target.prober(self.net, self._signature, precision)

    def evaluator(self, bench: Bench) -> RankedEvaluator:
        """See `evaluate.mask_evaluator`."""
        self.scores.keeps = bench.curvature
        moments = layer_moments(self.net, bench, self._compute)
        return MaskEvaluator(self._captured, self._signature, self.pattern, self.knobs, self.scores, moments, bench)

    def plan(self, levels: Levels, ranking: Sensitivity, before: Stage) -> Plan:
        """Which connections of each layer stay: uint8 masks by layer in `masks.safetensors`.

        With the pattern `weight` and the score `hasa` they are chosen by OBS saliency (`optimal_brain_surgeon.chosen_masks`),
        else they are the highest-scored ones.
        """
        stage = before.run.stage("masks", "4", {"levels": levels, "lambda": ranking.lambda_}, (before.key,))
        plan = stage.result(Plan)
        if plan is None:
            masks = masks_for(self.pattern, self.knobs, levels, self.scores.at(ranking.lambda_))
            if self.pattern is Pattern.WEIGHT and self.scores.name == "hasa":
                images = self._inputs()
                count = affordable(self.widest, len(images), self._compute.memory_bytes)
                if note := reduced("OBS saliency", count, len(images), self._compute.memory_bytes):
                    stage.note(note)
                with stage.noting():
                    masks = chosen_masks(self.net, masks, images[:count], fixed=selections(self.net), compute=self._compute)
            path = stage.folder / "masks.safetensors"
            atomic_write(path, save({name: mask.to(torch.uint8).contiguous() for name, mask in masks.items()}))
            removed = {k.name: 1.0 - k.kept[level] / k.size for k, level in zip(self.knobs, levels, strict=True)}
            plan = Plan(self.pattern, self.scores.name, removed_share=removed, masks=file_ref(path, self.root))
            stage.finish(plan)
        return plan

    def solved(self, plan: Plan, inputs: Inputs) -> nn.Module:
        """See `sequential.sequential_masked`."""
        return sequential_masked(self.net, self._read(plan), inputs, fixed=selections(self.net), compute=self._compute)

    def blank(self, plan: Plan) -> nn.Module:
        """The dense network: masks change no shape."""
        return copy.deepcopy(self.net)

    def masks(self, plan: Plan) -> dict[str, Tensor]:
        """The plan's masks; layers that stand for zero padding keep their zeros too."""
        return {f"{name}.weight": mask for name, mask in (selections(self.net) | self._read(plan)).items()}

    def remask(self, plan: Plan, teacher: nn.Module, inputs: Inputs, epochs: int) -> Remask | None:
        """Smallest out, most wanted in; the layers that stand for zero padding keep theirs."""
        own, fixed = ({f"{name}.weight": mask for name, mask in m.items()} for m in (self._read(plan), selections(self.net)))
        return dynamic(own, fixed, teacher, inputs, epochs)

    def sparsity(self, dense: nn.Module, student: nn.Module) -> float:
        """Share of the dense network's parameters that are zero in the student."""
        own = {name for name, _ in dense.named_parameters()}  # without what stands for zero padding
        found = [p.detach() for name, p in student.named_parameters() if name in own]
        return sum(int((p == 0).sum()) for p in found) / sum(p.numel() for p in found)

    def remarks(self, runtime: str) -> tuple[str, ...]:
        """That zeros buy no latency, or on TensorRT that two of four may."""
        if runtime == "tensorrt" and self.pattern is Pattern.TWO_FOUR:
            return (
                *self.notes,
                "TensorRT has kernels for two of four; whether they are faster a board decides, kernel by kernel and for the"
                " whole network. The search did not count on it: every candidate has the latency of the dense structure, and the"
                " budget was on density.",
            )
        return (
            *self.notes,
            f"{runtime} stores the zeros of a mask densely, so they buy no latency: every candidate has the latency of the dense"
            " structure, measured once, and a speedup comes from the artifact's precision alone. The budget was on density.",
        )

    def _read(self, plan: Plan) -> dict[str, Tensor]:
        if plan.masks is None:
            raise ValueError("a plan without masks")
        return load_file(self.root / plan.masks.path)
