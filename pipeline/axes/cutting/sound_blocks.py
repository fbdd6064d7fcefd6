"""Which residual branches can be left out, and in what form: the network answers as with zeros in their places.

Usually the module that ends a branch gives way to a single zero. Where `forward` permutes what the branch gives or adds to it in
place, zeros of its shape stand for it; where `forward` looks at the branch's other modules, these stay, unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ...errors import first_line
from ..capture import numbers_in, run
from ..coupling import Coupling
from ..program import Program
from ..types import Block
from .comparison import TOLERANCE, relative_difference
from .surgery import cut
from .training import training_fault


def _with_full_zeros(block: Block) -> Block:
    return replace(block, full=bool(block.shape))


def _with_unused_modules(block: Block) -> Block:
    return replace(block, modules=block.modules[-1:], unused=block.modules[:-1])


FORMS: tuple[Callable[[Block], Block], ...] = (
    lambda block: block,
    _with_full_zeros,
    _with_unused_modules,
    lambda block: _with_full_zeros(_with_unused_modules(block)),
)
FORMS_FOR_ALL = 2  # the first ones, without modules that stay


def with_sound_blocks(coupling: Coupling) -> Coupling:
    """The coupling with the blocks that can be left out, each in its form; the others are locked, with the reason."""
    locked = {b.name: "no module of its own gives its value" for b in coupling.blocks if not b.modules}
    trials = _Trials(replace(coupling, blocks=tuple(b for b in coupling.blocks if b.modules)))
    sound: list[Block] = []
    every = trials.coupling.blocks
    for form in FORMS[:FORMS_FOR_ALL]:  # stochastic depth, for one, reads the shape in every block whose rate is not 0
        if not trials.fault(tuple(map(form, every))):
            return replace(coupling, blocks=tuple(map(form, every)), locked_blocks=locked)
    for kind in trials.kinds():
        found, faults = trials.sound(kind)
        sound += found
        locked |= faults
    order = {b.name: k for k, b in enumerate(every)}
    return replace(coupling, blocks=tuple(sorted(sound, key=lambda b: order[b.name])), locked_blocks=locked)


class _Trials:
    """Trials of a network without some of its blocks; what was tried is not tried again."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self._faults: dict[tuple[Block, ...], str] = {(): ""}

    def kinds(self) -> list[tuple[Block, ...]]:
        """Blocks by their modules: of the same classes, their names equal but for numbers."""
        kinds: dict[tuple[tuple[type, str], ...], list[Block]] = {}
        for block in self.coupling.blocks:
            places = [re.sub(r"\d+", "#", name) for name in block.modules]  # token and channel mixing may be of one class
            classes = [type(self.coupling.walk.captured.module.get_submodule(name)) for name in block.modules]
            kinds.setdefault(tuple(zip(classes, places, strict=True)), []).append(block)
        return list(map(tuple, kinds.values()))

    def sound(self, blocks: tuple[Block, ...]) -> tuple[list[Block], dict[str, str]]:
        """Those of some blocks of one kind that can be left out, in their forms, and why the others cannot.

        All in one form if that does, else found by halving. Where the first and the last of four or more fail by themselves, all
        are assumed to.
        """
        for k, form in enumerate(FORMS):
            if k >= FORMS_FOR_ALL and len(blocks) > 1 and any(self._plainly(b) for b in (blocks[0], blocks[-1])):
                break  # modules that stay cost memory: only in those blocks that need it
            changed = tuple(map(form, blocks))
            if not self.fault(changed):
                return list(changed), {}
        if len(blocks) == 1:
            why = self.fault((FORMS[-1](blocks[0]),))
            return [], {blocks[0].name: f"without it the network is not that with zeros in its place: {why}"}
        if len(blocks) > 3:
            first, last = self.sound(blocks[:1])[1], self.sound(blocks[-1:])[1]
            if first and last:
                like = f"not tried by itself, but as {blocks[0].name}, which is of the same kind: {first[blocks[0].name]}"
                return [], {b.name: like for b in blocks} | first | last
        middle = len(blocks) // 2
        (left, faults), (right, others) = self.sound(blocks[:middle]), self.sound(blocks[middle:])
        return left + right, faults | others

    def _plainly(self, block: Block) -> bool:
        """Whether a block can be left out with all of its modules."""
        return any(not self.fault((form(block),)) for form in FORMS[:FORMS_FOR_ALL])

    def fault(self, blocks: tuple[Block, ...]) -> str:
        """How the network without these blocks differs from that with zeros in their places; "" where it does not."""
        if blocks not in self._faults:
            changed = {b.name: b for b in blocks}
            trial = replace(self.coupling, blocks=tuple(changed.get(b.name, b) for b in self.coupling.blocks))
            self._faults[blocks] = _fault(trial, blocks)
        return self._faults[blocks]


def _fault(coupling: Coupling, blocks: tuple[Block, ...]) -> str:
    captured = coupling.walk.captured
    program = Program(captured.module, captured)
    places = {b.branch for b in blocks}
    with torch.no_grad():
        for k, node in enumerate(program.nodes[:-1]):
            if node.op == "call_function":
                value = program.value(node)
                program.env[node] = torch.zeros_like(value) if node.name in places else value
                program.drop(k)
        expected = numbers_in(program.outputs())
    plan = {b.name: [0] for b in blocks}
    try:
        found = run(cut(coupling, plan, shared=True), captured.example)
        if [t.shape for t in found] != [t.shape for t in expected]:
            return "the outputs change their shape"
        difference = relative_difference(found, expected)
    except Exception as error:  # the user's forward, given what it does not expect
        return first_line(error)
    return f"{difference:.2g}" if difference > TOLERANCE else training_fault(coupling, plan, {}, captured.example)
