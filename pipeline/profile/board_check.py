"""Describes a board and what it lacks, for `edge-compress devices check`."""

from __future__ import annotations

from ... import targets
from ...devices import leases
from ...devices.board import Board
from ...devices.health import describe, lines, noise_floor, noise_line
from ..errors import UnavailableError


def check(board: Board) -> tuple[list[str], list[str]]:
    """A board's description with its noise floor, and what prevents building and measuring for its targets.

    A board that lacks nothing is taken back into its class after earlier failures.

    Raises:
        DeviceError: it cannot be reached, or does not answer.
        InputError: a template without an address.
    """
    lacking = _missing(board)
    found = describe(board)
    shown = list(lines(board, found))
    if found.why_not:
        lacking.append(found.why_not)
    if not lacking:
        try:
            shown.append(noise_line(*noise_floor(board)))
        except UnavailableError as error:
            shown.append(f"{'noise floor':11} not measured: {error}")
        if board.address:
            leases.forgive(board)
    return shown, lacking


def _missing(board: Board) -> list[str]:
    found = []
    for name in board.targets:
        if name not in targets.names():
            found.append(f"{name}: unknown target in this version")
        elif reason := targets.load(name).missing():
            found.append(f"{name}: {reason}")
    return found
