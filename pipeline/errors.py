"""What can go wrong, as one tree; the command line turns each into one line on stderr and an exit code.

    EdgeCompressError
    |-- InputError        2  the user's input is wrong: a file, an option, a data set, a model
    |-- UnavailableError  3  something needed is not here: a package, a board, a GPU
    |-- DeviceError       4  a device failed while it was in use
    |-- BuildError        1  the converter or the runtime refused the pruned model
    `-- VerifyError       1  an artifact is not what its record says

A gate that fails is no exception: the run ends with its report and exit code 1. 130 is an interrupt.
Anything that is not in this tree is a bug and keeps its traceback.
"""

from __future__ import annotations


class EdgeCompressError(Exception):
    """Base of every error meant for the user.

    Args:
        what: what is wrong, with the name of the file, option or layer.
        found: what was there.
        expected: what would have been right.
        do: what the user can do about it.
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


class InputError(EdgeCompressError):
    """The user's input is wrong (a file, an option, a data set, a model)."""

    exit_code = 2


class UnavailableError(EdgeCompressError):
    """Something needed is not on this machine (a package, a board, a GPU)."""

    exit_code = 3


class DeviceError(EdgeCompressError):
    """A device failed while it was in use."""

    exit_code = 4


class BuildError(EdgeCompressError):
    """A converter or a runtime refused the model."""


class VerifyError(EdgeCompressError):
    """An artifact is not what its record says it is."""


def deepest_cause(error: BaseException) -> str:
    """What lies under an error, in one line: converters and exporters wrap what the user needs in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
