"""From a board's file to the device behind it, over the board's own transport."""

from __future__ import annotations

from ..pipeline.errors import InputError
from .board import Board
from .local import LocalDevice
from .phone.device import PhoneDevice
from .remote import RemoteDevice
from .tensorrt.device import TensorRtDevice
from .transport.adb import ADB_FOLDER, AdbTransport
from .transport.ssh import SSH_FOLDER, SshTransport


def open_board(board: Board) -> RemoteDevice:
    """The device a board's file describes.

    Raises:
        InputError: a template without an address.
    """
    return LocalDevice(board) if board.transport == "local" else open_remote(board)


def open_remote(board: Board) -> RemoteDevice:
    """The device of a board that is not this machine.

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
