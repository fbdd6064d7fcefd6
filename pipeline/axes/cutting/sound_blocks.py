"""Which residual branches can be left out, and in what form: the network answers as with zeros in their places.

Usually the module that ends a branch gives way to a single zero. Where `forward` permutes what the branch gives or adds to it in
place, zeros of its shape stand for it; where `forward` looks at the branch's other modules, these stay, unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..capture import numbers_in, run
from ..coupling import Coupling
from ..program import Program
from ..types import Block
from .comparison import TOLERANCE, first_line, relative_difference
from .surgery import cut
from .training import training_fault


def _with_full_zeros(block: Block) -> Block:
    return replace(block, full=bool(block.shape))


def _with_unused_modules(block: Block) -> Block:
    every = (*block.unused, *block.modules)
    return replace(block, modules=every[-1:], unused=every[:-1])


FORMS: tuple[Callable[[Block], Block], ...] = (
    lambda block: block,
    _with_full_zeros,
    _with_unused_modules,
    lambda block: _with_full_zeros(_with_unused_modules(block)),
)


def with_sound_blocks(coupling: Coupling) -> Coupling:
    """The coupling with the blocks that can be left out, each in its form; the others are locked, with the reason."""
    locked = {b.name: "no module of its own gives its value" for b in coupling.blocks if not b.modules}
    coupling = replace(coupling, blocks=tuple(b for b in coupling.blocks if b.modules))
    for form in FORMS[:2]:  # stochastic depth, for one, reads the shape in every block whose rate is not 0
        trial = replace(coupling, blocks=tuple(form(b) for b in coupling.blocks))
        if not _difference(trial, trial.blocks):
            return replace(trial, locked_blocks=locked)
    sound: dict[str, Block] = {}
    for kind in _kinds(coupling):
        found, why = _sound(coupling, kind)
        sound |= {b.name: b for b in found}
        locked |= why
    stay = tuple(sound[b.name] for b in coupling.blocks if b.name in sound)
    return replace(coupling, blocks=stay, locked_blocks=locked)


def _kinds(coupling: Coupling) -> list[list[Block]]:
    """Blocks by their modules: of the same classes, their names equal but for numbers."""
    kinds: dict[tuple[tuple[type, str], ...], list[Block]] = {}
    for block in coupling.blocks:
        places = [re.sub(r"\d+", "#", name) for name in block.modules]  # token and channel mixing may be of one class
        classes = [type(coupling.walk.captured.module.get_submodule(name)) for name in block.modules]
        kinds.setdefault(tuple(zip(classes, places, strict=True)), []).append(block)
    return list(kinds.values())


def _sound(coupling: Coupling, blocks: Sequence[Block]) -> tuple[list[Block], dict[str, str]]:
    """Those of some blocks of one kind that can be left out, in the first form that does for all of them; why the others cannot.

    Found by halving. Where the first and the last block fail by themselves, all are taken to.
    """
    why = ""
    for form in FORMS:
        changed = {b.name: form(b) for b in blocks}
        trial = replace(coupling, blocks=tuple(changed.get(b.name, b) for b in coupling.blocks))
        why = _difference(trial, tuple(changed.values()))
        if not why:
            return list(changed.values()), {}
    if len(blocks) == 1:
        return [], {blocks[0].name: f"without it the network is not that with zeros in its place: {why}"}
    (first, fault), (last, other) = (_sound(coupling, blocks[k : k + 1 or None]) for k in (0, -1))
    if not first and not last:
        like = f"not tried by itself, but as {blocks[0].name}, which is of the same kind: {fault[blocks[0].name]}"
        return [], {b.name: like for b in blocks} | fault | other
    middle = len(blocks) // 2
    (one, no), (two, none) = _sound(coupling, blocks[:middle]), _sound(coupling, blocks[middle:])
    return one + two, no | none


def _difference(coupling: Coupling, blocks: tuple[Block, ...]) -> str:
    """How the network without these blocks differs from that with zeros in their places; "" where it does not."""
    if not blocks:
        return ""
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
    try:
        found = run(cut(coupling, {b.name: [0] for b in blocks}, lent=True), captured.example)
        if [t.shape for t in found] != [t.shape for t in expected]:
            return "the outputs change their shape"
        difference = relative_difference(found, expected)
    except Exception as error:  # the user's forward, given what it does not expect
        return first_line(error)
    if difference > TOLERANCE:
        return f"{difference:.2g}"
    return training_fault(coupling, {b.name: [0] for b in blocks}, {}, captured.example)
