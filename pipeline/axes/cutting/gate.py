"""The proof that the labels were understood: the cut network answers as the full one with zeros in place of what was cut.

Units of every group go at once: every second one, and then another share of each group, from one end, which forwards that only
keep their proportions do not survive. Where the answers differ, or the cut network does not run, sizes held by `forward` are
corrected first; then the groups at fault are found by halving the list, locked and named, and the rest goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import BuildError, InputError, described, first_line
from ..capture import larger_batch, run
from ..coupling import Coupling
from ..types import Group
from .comparison import TOLERANCE, cast, relative_difference
from .sizes import TIMES, SizedCalls, holds_sizes, record
from .sound_blocks import with_sound_blocks
from .surgery import cut, zeroed
from .training import training_fault

SHARES = (0.25, 0.65, 0.4)  # of a group's units that go, from one of its ends


@dataclass(frozen=True)
class Checked:
    """A coupling of which every group that is not locked passed, and how it was cut."""

    coupling: Coupling
    sized: Mapping[str, SizedCalls]
    difference: float | None  # largest, of the outputs' range; None where there was nothing to cut
    passed: bool
    remark: str = ""


def check(coupling: Coupling) -> Checked:
    """Cut units of every group under two plans, and leave every block out; lock those that fail."""
    with enlivened(coupling.walk.captured.module):
        coupling = with_sound_blocks(coupling)
        names = [g.name for g in coupling.open_groups()]
        return _check(coupling, names) if names else Checked(coupling, {}, None, True)


def _check(coupling: Coupling, names: list[str]) -> Checked:
    gate = _Gate(coupling)
    difference, why = gate.worst(names)
    if difference is None or difference > TOLERANCE or gate.holds_sizes(names):
        gate.sized = record(coupling.walk.captured, coupling.walk.values)
        gate.narrow_sizes(names)
        difference, why = gate.worst(names)
    failed: dict[str, str] = {}
    for stricter in (None, gate.take_larger_batch, gate.take_training):
        if stricter is not None:
            if not names or not stricter(names):
                continue
            difference, why = gate.worst(names)
        while names and (difference is None or difference > TOLERANCE):
            part = next(part for part in gate.parts(names) if not gate.passes(part))
            failed |= gate.search(part, why)
            names = [n for n in names if n not in failed]
            difference, why = gate.worst(names) if names else (None, "")
    coupling = coupling.lock(failed) if failed else coupling
    passed = not names or (difference is not None and difference <= TOLERANCE)
    return Checked(coupling, gate.sized, difference, passed, why)


def half(group: Group) -> list[int]:
    """Every second unit of a group."""
    return list(range(1, len(group.units), 2))


def uneven(group: Group, number: int) -> list[int]:
    """The first or the last units of a group: another share of them for each group of a network, by its number."""
    count = len(group.units)
    gone = min(max(round(SHARES[number % len(SHARES)] * count), 1), count - 1)
    return list(range(gone) if number % 2 else range(count - gone, count))


@contextmanager
def enlivened(module: nn.Module) -> Iterator[None]:
    """Random values where a parameter has the same value everywhere (zeros, ones, layer scale), put back at the end.

    A branch that is multiplied by zero, or by 1e-6, would pass any test.
    """
    generator = torch.Generator().manual_seed(0)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.min() != tensor.max():
                continue
            before.append((tensor, tensor.clone()))
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            value = float(tensor.flatten()[0])
            if "bias" in name or "running_mean" in name:
                tensor.add_((noise - 0.5) * 0.2)
            else:
                tensor.copy_((noise * 0.5 + 0.5) * (value if abs(value) > 0.1 else 0.4))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in before:
                tensor.copy_(old)


def _worst(tried: Iterable[tuple[float | None, str]]) -> tuple[float | None, str]:
    """The largest of some differences; the first that is too large, or of a network that does not run, ends the trials."""
    largest = 0.0
    for found, why in tried:
        if found is None or found > TOLERANCE:
            return found, why
        largest = max(largest, found)
    return largest, ""


class _Gate:
    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.sized: Mapping[str, SizedCalls] = {}
        self.groups = {g.name: g for g in coupling.groups}
        self.numbers = {g.name: k for k, g in enumerate(coupling.groups)}
        self.example = coupling.walk.captured.example
        self.training = False  # whether the cut network has to run in training mode too

    def plans(self, names: list[str]) -> Iterator[dict[str, list[int]]]:
        """What is removed of these groups, one plan after the other."""
        yield {n: half(self.groups[n]) for n in names}
        yield {n: uneven(self.groups[n], self.numbers[n]) for n in names}

    def holds_sizes(self, names: list[str]) -> bool:
        """Whether the network without some units of these groups runs, but holds sizes of the full one."""
        return any(
            holds_sizes(self.coupling, self.coupling.gone(plan), cut(self.coupling, plan, shared=True))
            for plan in self.plans(names)
        )

    def take_larger_batch(self, names: list[str]) -> bool:
        """Compares on more samples than the example's from here on: a corrected size may follow their number.

        Returns False where no size is corrected, nothing was cut, or the full network takes no other number.
        """
        if not self.sized or not names:
            return False
        example = larger_batch(self.example, TIMES)
        try:
            run(self.coupling.walk.captured.module, example, in_steps=True)
        except Exception:  # the user's forward, on a batch it was not written for
            return False
        self.example = example
        return True

    def take_training(self, names: list[str]) -> bool:
        """Runs the cut network in training mode as well from here on. Returns False where it runs."""
        self.training = True
        plans = (plan for part in self.parts(names) for plan in self.plans(part))
        return any(training_fault(self.coupling, plan, self.sized, self.example) for plan in plans)

    def parts(self, names: list[str]) -> list[list[str]]:
        """What is cut together: all groups; and where one number counts queries' and values' dimensions, each of these alone."""
        alone = [[n for n in names if self.groups[n].kind == kind] for kind in ("head_dim", "value_dim")]
        return [names, *(alone if all(alone) else [])]

    def worst(self, names: list[str]) -> tuple[float | None, str]:
        """The largest difference of the parts, see `difference`; that of the first part which does not run."""
        return _worst(map(self.difference, self.parts(names)))

    def passes(self, names: list[str]) -> bool:
        """Whether cut and zeroed are the same for these groups at once."""
        found, _ = self.difference(names)
        return found is not None and found <= TOLERANCE

    def difference(self, names: list[str]) -> tuple[float | None, str]:
        """(largest difference between cut and zeroed, "") or (None, why the cut network does not run)."""
        return _worst(map(self._difference, self.plans(names)))

    def _difference(self, plan: dict[str, list[int]]) -> tuple[float | None, str]:
        found, why = self._once(plan, None)
        if found is not None and found > TOLERANCE:  # a deep network in single precision can differ by rounding alone
            try:
                found, why = self._once(plan, torch.float64)
            except InputError:  # a forward that makes float32 tensors of its own
                return found, f"cut and zeroed differ by {found:.2g} in float32, and forward does not run in float64"
        return found, why or (f"cut and zeroed differ by {found:.2g}" if found is not None and found > TOLERANCE else "")

    def _once(self, plan: dict[str, list[int]], dtype: torch.dtype | None) -> tuple[float | None, str]:
        example = cast(self.example, dtype)
        try:
            expected = run(zeroed(self.coupling, plan, dtype, shared=dtype is None), example, in_steps=True)
        except Exception as error:
            what = "the network does not run on the example inputs"
            raise InputError(what, found=described(error)) from error
        try:
            small = cut(self.coupling, plan, self.sized, shared=dtype is None)
            found = run(small.to(dtype) if dtype else small, example)
            del small  # before there is another copy
        except BuildError as error:
            return None, str(error)
        except Exception as error:  # the user's forward on sizes it does not expect
            return None, f"forward holds sizes: {first_line(error)}"
        if any(t.isnan().any() for t in expected) and not any(t.isnan().any() for t in found):
            # a vector divides, and its zeros gave NaN; where its units are read nowhere else, zeros in the weights say the same
            expected = run(zeroed(self.coupling, plan, dtype, vectors=False, shared=dtype is None), example, in_steps=True)
        if [t.shape for t in found] != [t.shape for t in expected]:
            return None, "the outputs changed their shape"
        fault = training_fault(self.coupling, plan, self.sized, self.example) if self.training and dtype is None else ""
        return (None, fault) if fault else (relative_difference(found, expected), "")

    def narrow_sizes(self, names: list[str]) -> None:
        """Correct calls only in modules whose own forward makes them, so that the others stay of the user's very class."""
        gone = self.coupling.gone({n: uneven(self.groups[n], self.numbers[n]) for n in names})
        kept: dict[str, SizedCalls] = {}
        for name, calls in self.sized.items():
            if any(calls.under(self.coupling, gone)):
                kept[name] = calls
        inner = {n for n in kept if not any(m != n and m.startswith(f"{n}." if n else "") for m in kept)}
        covered = {n: sum(c is not None for c in kept[n].under(self.coupling, gone)) for n in kept}
        result = {n: kept[n] for n in inner}
        for n in sorted(set(kept) - inner, key=len, reverse=True):
            below = sum(covered[m] for m in result if m.startswith(f"{n}." if n else ""))
            if covered[n] > below:  # it makes such calls itself: then it corrects those of the modules below it as well
                result = {m: c for m, c in result.items() if not m.startswith(f"{n}." if n else "")}
                result[n] = kept[n]
        self.sized = result

    def search(self, names: list[str], why: str) -> dict[str, str]:
        """The groups that fail, found by halving; groups of like modules are tried as one first."""
        alike: dict[tuple[Any, ...], list[str]] = {}
        for name in names:
            alike.setdefault(self._signature(name), []).append(name)
        failed: dict[str, str] = {}
        sets = list(alike.values())

        def halve(part: list[list[str]], reason: str) -> None:
            if len(part) == 1 and (len(part[0]) == 1 or not self.passes(part[0][:1])):
                first, rest = part[0][:1], part[0][1:]
                failed.update(dict.fromkeys(first, reason))
                if not rest or self.passes(rest):
                    return
                if not self.passes(rest[:1]):
                    failed.update(dict.fromkeys(rest, reason))
                    return
                part = [rest]
            part = part if len(part) > 1 else [[name] for name in part[0]]
            for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                difference, reason = self.difference([name for names in half for name in names])
                if difference is None or difference > TOLERANCE:
                    halve(half, reason)

        halve(sets, why)
        rest = [n for n in names if n not in failed]
        if rest and not self.passes(rest):  # some fail only together
            left = ([name for name in part if name not in failed] for part in sets)
            failed |= self._conflicting([part for part in left if part])
        return failed if failed else dict.fromkeys(names, why)

    def _conflicting(self, sets: list[list[str]]) -> dict[str, str]:
        """The groups that fail together with those accepted before them; head dimensions are tried last."""
        stay: list[str] = []
        failed: dict[str, str] = {}
        queue = sorted(sets, key=lambda part: self.groups[part[0]].kind.endswith("_dim"))
        while queue:
            part = queue.pop(0)
            difference, reason = self.difference([*stay, *part])
            if difference is not None and difference <= TOLERANCE:
                stay += part
            elif len(part) > 1 and self.passes([*stay, part[0]]):
                queue = [[name] for name in part] + queue
            else:
                failed |= dict.fromkeys(part, f"beside others that can be removed, {reason}")
        return failed

    def _signature(self, name: str) -> tuple[Any, ...]:
        module = self.coupling.walk.captured.module
        group = self.groups[name]
        parts = []
        for s in group.units[0].slices:
            holder = s.parameter.rpartition(".")[0]
            above = holder.rpartition(".")[0]
            parts.append((type(module.get_submodule(above)).__name__, holder.rpartition(".")[2] if above else "", s.axis))
        return (group.kind, tuple(dict.fromkeys(parts)))
