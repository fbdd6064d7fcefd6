"""Maps exceptions to exit codes, with a one-line error message on stderr."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import click

from ..errors import EdgeCompressError, InputError, UnavailableError
from .output import echo

_PLACE = (  # errors that another path fixes
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO),
)
_ENDED = (signal.SIGTERM, signal.SIGHUP)


def exit_code_of(call: Callable[[], int]) -> int:
    """Returns the exit code of a call. Expected errors print one line on stderr; unexpected exceptions keep their traceback.

    SIGTERM and SIGHUP are handled like Ctrl-C: cleanup runs and locks are released.
    """
    for number in _ENDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP: keep that
            signal.signal(number, _interrupt)
    _open_standard_streams()
    try:
        code = call()
        if sys.stdout is not None:
            sys.stdout.flush()  # raises on a full disk or a closed pipe
        return code
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except click.ClickException as error:
        return _failed(f"{error.format_message().rstrip('.')}; see edge-compress --help", error.exit_code)
    except EdgeCompressError as error:
        return _failed(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _failed("interrupted; run the same command again to resume", 130)
    except MemoryError:
        return _failed("out of memory", UnavailableError.exit_code)
    except ImportError as error:  # of a library that does not fit in the memory, or whose build does not fit the machine
        if (error.name or "").startswith("edge_compress"):
            raise
        return _failed(f"a package cannot be loaded: {error}", UnavailableError.exit_code)
    except OSError as error:
        return _failed(_told(error), InputError.exit_code if error.errno in _PLACE else UnavailableError.exit_code)


def _told(error: OSError) -> str:
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else str(error.filename)
        return f"{name}: {error.strerror or error}"
    if isinstance(error, BrokenPipeError) or error.errno == errno.ENOSPC:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter raises again at shutdown
        return f"the output could not be written: {error.strerror}"
    return str(error) or type(error).__name__


def _failed(text: str, code: int) -> int:
    try:
        echo(f"edge-compress: {' '.join(text.split())}", err=True)
    except OSError:  # stderr is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code


def _interrupt(number: int, frame: object) -> NoReturn:
    for each in _ENDED:
        signal.signal(each, signal.SIG_IGN)  # further signals must not interrupt the cleanup
    raise KeyboardInterrupt


def _open_standard_streams() -> None:
    """Opens the null device in place of a closed stdin, stdout or stderr, or the next file opened would get its descriptor."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, this one
