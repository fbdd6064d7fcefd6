"""Opens what `--device` names: a board by its name or file, or any free board of a class."""

from __future__ import annotations

import os
from collections.abc import Sequence

from . import board as boards
from .board import Board
from .cluster.ray_board import ADDRESS, RayBoard
from .device import Device
from .opening import open_board
from .pool import Pool

CLASS = "class:"


def named(text: str) -> tuple[Board, ...]:
    """The boards that a `--device` means: one by its name or file, or those of `class:NAME`.

    Raises:
        InputError, UnavailableError: see `boards.load` and `boards.of_class`.
    """
    return boards.of_class(text.removeprefix(CLASS)) if text.startswith(CLASS) else (boards.load(text),)


def open_named(text: str) -> Device:
    """The device that a `--device` means, not connected yet; the caller closes it.

    Raises:
        InputError: see `named` and `open_board`.
    """
    found = named(text)
    return open_pool(text, found) if text.startswith(CLASS) else open_board(found[0])


def open_pool(name: str, found: Sequence[Board]) -> Pool:
    """Any of several boards, of this machine's network or, where RAY_ADDRESS says one, of a Ray cluster."""
    return Pool(name, found, RayBoard if os.environ.get(ADDRESS) else open_board)
