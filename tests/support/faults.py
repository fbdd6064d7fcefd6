"""What tests of faults share: one line within a time, and work that begins later."""

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from edge_compress.pipeline.errors import DeviceError


@contextlib.contextmanager
def one_line(what: str, within_s: float, error: type[Exception] = DeviceError) -> Iterator[None]:
    """What is done inside fails in time, with one line that says so and what to do."""
    started = time.monotonic()
    with pytest.raises(error, match=what) as caught:
        yield
    took = time.monotonic() - started
    print(f"{took:.1f} s: {caught.value}")
    assert took < within_s
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
    assert "; " in str(caught.value)


@contextlib.contextmanager
def later(seconds: float, work) -> Iterator[None]:
    """Do something while what is inside runs; its own failure is not lost."""
    failed: list[BaseException] = []

    def go() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    timer = threading.Timer(seconds, go)
    timer.start()
    try:
        yield
    finally:
        timer.join()
        assert not failed, failed
