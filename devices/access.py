"""Which device a board's file, or a class of boards, stands for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..pipeline.errors import InputError
from . import board as boards
from .board import Board
from .device import Device
from .local import LocalDevice
from .phone.device import PhoneDevice
from .pool import Pool
from .ray_boards import ADDRESS, RayBoard
from .remote import RemoteDevice
from .tensorrt.device import TensorRtDevice
from .transport.adb import ADB_FOLDER, AdbTransport
from .transport.ssh import SSH_FOLDER, SshTransport

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
    if os.environ.get(ADDRESS):
        return Pool(name, found, RayBoard)
    return Pool(name, found, open_remote)


def open_board(board: Board) -> LocalDevice | RemoteDevice:
    """The device a board's file describes.

    Raises:
        InputError: a template without an address.
    """
    return LocalDevice(board.name, board.affinity) if board.transport == "local" else open_remote(board)


def open_remote(board: Board) -> RemoteDevice:
    """The same of a board that is not this machine, over its own transport.

    Raises:
        InputError: a template without an address.
        ValueError: a board that needs no transport.
    """
    if board.transport not in ("ssh", "adb"):
        raise ValueError(f"transport {board.transport!r} is not remote")
    if not board.address:
        raise InputError(
            f"board {board.name}",
            found="a template without an address",
            expected="`address` in its file",
            do=f"copy {board.file} to your own folder of devices under another name and add it",
        )
    if board.transport == "ssh":
        transport = SshTransport(board.name, board.address, board.folder or SSH_FOLDER)
        if board.benchmark_model:
            return PhoneDevice(board, transport)
        return (TensorRtDevice if board.runtime == "tensorrt" else RemoteDevice)(board, transport)
    adb = AdbTransport(board.name, board.address, board.folder or ADB_FOLDER)
    return PhoneDevice(board, adb) if board.benchmark_model else RemoteDevice(board, adb)
