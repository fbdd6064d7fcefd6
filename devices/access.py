"""Opens what `--device` names: a board by its name or file, or any free board of a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..pipeline.errors import InputError
from . import board as boards
from .board import Board
from .cluster.ray_board import ADDRESS, RayBoard
from .device import Device
from .opening import open_board
from .pool import Pool
from .remote import RemoteDevice

CLASS = "class:"
_FOR_PEOPLE = ("notes", "source", "file")  # fields of a board that change nothing that is measured


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


def require_processors(text: str, threads: int, what: str = "--threads", do: str = "") -> None:
    """Refuses more threads than this process has processors where a `--device` means this machine.

    What is measured would be their waiting for each other. `what` the threads are and what to `do` are for the message. Boards
    elsewhere, a Ray cluster's included, have processors of their own.

    Raises:
        InputError: there are fewer processors; else see `named`.
    """
    if (text.startswith(CLASS) and os.environ.get(ADDRESS)) or all(board.transport != "local" for board in named(text)):
        return
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads > processors:
        found = f"{processors} processor{'s' if processors > 1 else ''} for this process"
        raise InputError(f"{what} {threads}", found=found, expected="no more threads", do=do)


def open_pool(name: str, found: Sequence[Board]) -> Pool:
    """Any of several boards, of this machine's network or, where RAY_ADDRESS says one, of a Ray cluster."""
    return Pool(name, found, RayBoard if os.environ.get(ADDRESS) else open_board)


def settings_of(device: Device | None) -> dict[str, Any]:
    """What the boards of a device are set to, by their files, for the settings of what is measured there; {} without a device.

    A board's file can be edited under the same name: another address, other processors, another power mode.
    """
    if isinstance(device, Pool):
        found: Sequence[Board] = device.boards
    else:
        found = [device.board] if isinstance(device, RemoteDevice | RayBoard) else []
    told = [{key: value for key, value in asdict(board).items() if key not in _FOR_PEOPLE} for board in found]
    return {"boards": told} if told else {}
