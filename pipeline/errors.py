"""The errors meant for the user; the command line turns each into one line on stderr and an exit code.

    EdgeCompressError
    |-- InputError        2  the user's input is wrong: a file, an option, a data set, a model
    |-- UnavailableError  3  something needed is missing: a package, a board, a GPU
    |-- DeviceError       4  a device failed while it was in use
    |-- BuildError        1  the converter or the runtime refused the model
    `-- VerifyError       1  a check failed: an artifact or a bundle does not match its record

Exit code 1 is a negative verdict. In a run, a failed gate or a refused model leaves a report that says which; `verify` and
`release` name the failed check on stderr. 130 is an interrupt. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = (errno.ENOSPC, errno.EDQUOT)


class EdgeCompressError(Exception):
    """Base of every error meant for the user.

    Args:
        what: what is wrong, with the name of the file, option or layer.
        found: what was found.
        expected: what was expected.
        do: what the user can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, found: str = "", expected: str = "", do: str = "") -> None:
        self.what, self.found, self.expected, self.do = what, found, expected, do
        parts = [what]
        if found:
            parts.append(f"found {found}")
        if expected:
            parts.append(f"expected {expected}")
        text = ": ".join([parts[0], ", ".join(parts[1:])]) if len(parts) > 1 else what
        super().__init__(" ".join(f"{text}; {do}".split()) if do else " ".join(text.split()))

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show in place of a traceback: one line, as the command line does."""
        return [f"{type(self).__name__}: {self}"]


class InputError(EdgeCompressError):
    """The user's input is wrong (a file, an option, a data set, a model)."""

    exit_code = 2


class UnavailableError(EdgeCompressError):
    """Something needed is missing (a package, a board, a GPU)."""

    exit_code = 3


class DeviceError(EdgeCompressError):
    """A device failed while it was in use."""

    exit_code = 4


class BuildError(EdgeCompressError):
    """The converter or the runtime refused the model."""


class VerifyError(EdgeCompressError):
    """A check failed: an artifact or a bundle does not match its record."""


@contextmanager
def importing(package: str, do: str) -> Iterator[None]:
    """Makes a package that is absent, or built for another version of what it needs, one line.

    Packages that take seconds and that most runs do not need are imported where they are used, under this.

    Raises:
        UnavailableError: the package cannot be imported.
    """
    try:
        yield
    except Exception as error:  # a build for another PyTorch raises RuntimeError, OSError or AttributeError
        raise UnavailableError(f"the package {package} cannot be imported", found=described(error), do=do) from error


def deepest_cause(error: BaseException) -> str:
    """Returns the root cause of an error in one line: converters and exporters bury it under a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return brief(error)


def brief(error: BaseException) -> str:
    """Returns the type and the first line of the text of an error of foreign code."""
    return _named(error, _first_line(error))


def first_line(error: BaseException) -> str:
    """Returns the first line of the text of an error of foreign code, at most 160 characters; its type where it has no text."""
    return _first_line(error)[:160] or type(error).__name__


def described(error: BaseException) -> str:
    """Returns the type and the text of an error of foreign code in one line of at most some 300 characters."""
    return _named(error, _text_of(error))


def _named(error: BaseException, text: str) -> str:
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}".rstrip(": ")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in _text_of(error).splitlines() if line.strip()), "")


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # its own __str__ fails
        return ""


def printable(text: str) -> str:
    """Returns the text with control characters and undecodable bytes escaped, safe to print on a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def shown(value: object) -> str:
    """The start of a value's `repr`; settings and board files may hold numbers and tables that Python refuses to print."""
    try:
        return repr(value)[:200]
    except (ValueError, RecursionError):  # an integer of thousands of digits, a table of thousands of levels
        return "a value of thousands of digits or levels"


def install_hint(extra: str) -> str:
    """What to do for want of an optional part of edge-compress, by the name of its extra."""
    return f"in edge-compress's checkout, run: pip install -c constraints.txt '.[{extra}]'"


def says_full(error: BaseException) -> bool:
    """Tells whether an error, or one of its causes, is a full disk; C++ and Rust libraries say so only in their text."""
    seen: BaseException | None = error
    while seen is not None:
        if (isinstance(seen, OSError) and seen.errno in _FULL) or os.strerror(errno.ENOSPC).lower() in str(seen).lower():
            return True
        seen = seen.__cause__ or seen.__context__
    return False
