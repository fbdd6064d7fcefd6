"""How a call ends: its exit code, and one line on stderr where it failed."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import click

from ..errors import EdgeCompressError, InputError, UnavailableError, printable

_PLACE = (  # what the user can put right by naming another file or folder
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO),
)
_ENDED = (signal.SIGTERM, signal.SIGHUP)


def ended(call: Callable[[], int]) -> int:
    """Returns the exit code of a call; an error that is the user's to mend is one line on stderr, a bug keeps its traceback.

    A signal to end is handled like Ctrl-C: folders are left in order, locks are released.
    """
    for number in _ENDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and that is to stay so
            signal.signal(number, _interrupt)
    _open_standard_streams()
    try:
        code = call()
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk or a reader that has gone shows here
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
        return _failed("the memory of this machine is used up", UnavailableError.exit_code)
    except OSError as error:
        return _failed(_told(error), InputError.exit_code if error.errno in _PLACE else UnavailableError.exit_code)


def _told(error: OSError) -> str:
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else str(error.filename)
        return f"{name}: {error.strerror or error}"
    if isinstance(error, BrokenPipeError) or error.errno == errno.ENOSPC:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter fails on it once more at its end
        return f"the output could not be written: {error.strerror}"
    return str(error) or type(error).__name__


def _failed(text: str, code: int) -> int:
    try:
        click.echo(f"edge-compress: {printable(' '.join(text.split()))}", err=True)
    except OSError:  # nobody reads stderr
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code


def _interrupt(number: int, frame: object) -> NoReturn:
    for each in _ENDED:
        signal.signal(each, signal.SIG_IGN)  # one is enough: what is being put in order is not broken off by the next
    raise KeyboardInterrupt


def _open_standard_streams() -> None:
    """A closed stdin, stdout or stderr leads nowhere; else the next file that is opened would take its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
