"""Frames over two file descriptors, and the three ways in which a request ends without an answer."""

from __future__ import annotations

import errno
import json
import math
import os
import select
import struct
import time
from typing import Any

MAGIC = b"\0edge-compress agent 1\n"  # before the first frame: what a login shell prints comes earlier and is skipped
_HEAD = struct.Struct(">II")
_MOST_HEADER, MOST_PAYLOAD = 64 << 20, 1 << 30  # bytes


class Refusal(Exception):
    """A request that cannot be done; `kind` is one of those in the package's docstring."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(" ".join(text.split())[:1000])


class Gone(Exception):
    """The other end of a channel closed it."""


class Late(Exception):
    """A deadline passed."""


class Channel:
    """Frames over two file descriptors. Deadlines are times of `time.monotonic`; None waits for ever."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self._held = bytearray()
        os.set_blocking(sink, False)

    def send(self, header: dict[str, Any], payload: bytes = b"", deadline: float | None = None) -> None:
        """Write one frame.

        Raises:
            Gone, Late: it could not be written, or not all of it.
        """
        head = json.dumps(header).encode()
        left = memoryview(_HEAD.pack(len(head), len(payload)) + head + payload)
        poll = select.poll()
        poll.register(self.sink, select.POLLOUT)
        while left:
            self._wait(poll, deadline)
            try:
                left = left[os.write(self.sink, left[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Gone(error.strerror) from error

    def receive(
        self, deadline: float | None = None, watch: Channel | None = None, most: int = MOST_PAYLOAD
    ) -> tuple[dict[str, Any], bytes]:
        """Read one frame: (header, payload), the payload of at most `most` bytes.

        It is an `OSError` when the channel `watch` closes in the meantime.

        Raises:
            Gone: the stream ended; its text says whether inside a frame.
            Late: the deadline passed.
        """
        self._fill(_HEAD.size, deadline, watch)
        sizes = _HEAD.unpack(self._held[: _HEAD.size])
        if sizes[0] > _MOST_HEADER or sizes[1] > most:
            raise Gone("bytes that are no frame came")
        self._fill(_HEAD.size + sum(sizes), deadline, watch)
        middle, end = _HEAD.size + sizes[0], _HEAD.size + sum(sizes)
        head, payload = bytes(self._held[_HEAD.size : middle]), bytes(self._held[middle:end])
        del self._held[:end]
        try:
            header = json.loads(head)
        except (ValueError, RecursionError) as error:
            raise Gone("bytes that are no frame came") from error
        if not isinstance(header, dict):
            raise Gone("bytes that are no frame came")
        return header, payload

    def skip_to(self, mark: bytes, deadline: float | None) -> None:
        """Drop what comes before `mark`, and `mark`; the errors of `receive`."""
        while mark not in self._held:
            if len(self._held) > 1 << 20:
                raise Gone("a megabyte came that is not the agent's")
            self._fill(len(self._held) + 1, deadline, None)
        del self._held[: self._held.index(mark) + len(mark)]

    def _fill(self, count: int, deadline: float | None, watch: Channel | None) -> None:
        if len(self._held) >= count:
            return
        poll = select.poll()
        poll.register(self.source, select.POLLIN)
        if watch is not None:
            poll.register(watch.source, select.POLLIN)
        while len(self._held) < count:
            ready = self._wait(poll, deadline)
            if watch is not None and watch.source in ready and not watch._read():
                raise OSError(errno.EPIPE, "the host has gone")
            if self.source in ready and not self._read():
                raise Gone("in the middle of a frame" if self._held else "")

    def _read(self) -> int:
        chunk = os.read(self.source, 1 << 20)
        self._held += chunk
        return len(chunk)

    @staticmethod
    def _wait(poll: select.poll, deadline: float | None) -> list[int]:
        left = None if deadline is None else deadline - time.monotonic()
        found = [] if left is not None and left <= 0 else poll.poll(None if left is None else math.ceil(left * 1000))
        if not found:
            raise Late
        return [descriptor for descriptor, _ in found]


def own_channel() -> Channel:
    """Stdin and a copy of stdout; what libraries print goes to stderr, or it would end up among the frames."""
    sink = os.dup(1)
    os.dup2(2, 1)
    return Channel(0, sink)


def failure_kind(kind: str, error: Exception) -> str:
    """`kind`, or "memory" where what a runtime raised means that memory ran out."""
    text = str(error).lower()
    return "memory" if isinstance(error, MemoryError) or "bad_alloc" in text or "failed to allocate memory" in text else kind
