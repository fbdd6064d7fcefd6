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
    """The device a board's file describes, not connected yet.

    Raises:
        InputError: a template without an address.
    """
    if board.transport == "local":
        return LocalDevice(board)
    if not board.address:
        what, found = f"board {board.name}", "a template without an address"
        do = f"copy {board.file} to ~/.config/edge-compress/devices/ under another name and add it"
        raise InputError(what, found=found, expected="`address` in its file", do=do)
    ssh = board.transport == "ssh"
    opened = SshTransport if ssh else AdbTransport
    transport = opened(board.name, board.address, board.folder or (SSH_FOLDER if ssh else ADB_FOLDER))
    if board.benchmark_model:
        return PhoneDevice(board, transport)
    return (TensorRtDevice if ssh and board.runtime == "tensorrt" else RemoteDevice)(board, transport)
