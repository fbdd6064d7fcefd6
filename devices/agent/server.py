"""The agent itself: it answers requests one after another, keeps files by their digest and models in processes of their own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from .board import describe_board, digest_of, peak_rss
from .frames import Channel, Gone, Late, Refusal
from .model_process import ModelProcess
from .runtimes import RUNTIMES

GRACE_S = 5.0  # after a request's deadline, until the agent terminates itself


class Agent:
    """Answers requests; `folder` keeps files by their digest."""

    def __init__(self, channel: Channel, folder: Path) -> None:
        self.channel, self.folder = channel, folder
        self.models: dict[int, ModelProcess] = {}  # by handle; those that are timed together share a process
        self.count = 0
        self.verified: set[str] = set()

    def serve(self, idle_s: float) -> bool:
        """Answer until told to quit (True), until the host has gone, or until nothing has come for `idle_s` seconds."""
        try:
            while True:
                signal.setitimer(signal.ITIMER_REAL, idle_s + GRACE_S)
                request, payload = self.channel.receive(time.monotonic() + idle_s)
                if request["op"] == "quit":
                    return True
                left = float(request.get("deadline_s", 30.0))
                # SIGALRM ends this process whatever it is stuck in, a write to a dead link too
                signal.setitimer(signal.ITIMER_REAL, left + 2 * GRACE_S)
                deadline = time.monotonic() + left
                try:
                    answer, data = self._answer(request, payload, deadline)
                except Refusal as refusal:
                    answer, data = {"ok": False, "kind": refusal.kind, "error": str(refusal)}, b""
                self.channel.send(dict({"ok": True}, **answer), data, deadline + GRACE_S)
        except (Gone, Late, OSError):
            return False  # no peer to report to
        finally:
            for process in self.models.values():
                process.close()

    def _answer(self, request: dict[str, Any], payload: bytes, deadline: float) -> tuple[dict[str, Any], bytes]:
        op = request["op"]
        if op == "hello":
            return describe_board(self.folder), b""
        if op == "ping":
            return {}, b""
        if op == "has":
            return {"has": self._has(request["sha256"])}, b""
        if op == "put":
            return self._put(request, payload), b""
        if op == "drop":
            self.verified.discard(request["sha256"])
            with contextlib.suppress(OSError):
                self._path(request["sha256"]).unlink()
            return {}, b""
        if op == "runtime":
            process, answer = self._first_that_works(request, deadline)
            process.close()
            return dict(answer, package=process.package), b""
        if op == "load":
            return self._load(request, deadline), b""
        if op in ("run", "layers"):
            return self._process(request["handle"]).ask(request, payload, deadline)
        if op == "memory":
            return {"peak_rss_bytes": peak_rss(self._process(request["handle"]).process.pid)}, b""
        if op in ("warm", "pairs"):
            return self._timed(request, deadline), b""
        if op == "unload":
            self._unload(request, deadline)
            return {}, b""
        raise Refusal("request", f"no such request: {op}")

    def _has(self, sha256: str) -> bool:
        path = self._path(sha256)
        if sha256 not in self.verified and path.is_file() and digest_of(path) == sha256:
            self.verified.add(sha256)
        return sha256 in self.verified and path.is_file()

    def _path(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise Refusal("request", f"no SHA-256: {sha256!r}")
        return self.folder / sha256

    def _put(self, request: dict[str, Any], payload: bytes) -> dict[str, Any]:
        path, size, offset = self._path(request["sha256"]), request["size"], request["offset"]
        part = path.with_suffix(".part")
        free = shutil.disk_usage(str(self.folder)).free
        if offset == 0 and free < size:
            raise Refusal("disk", f"{free} bytes free in {self.folder}, {size} needed")
        try:
            with part.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(payload)
                file.truncate()
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise Refusal("disk", f"{error.strerror} in {self.folder}") from error
        if offset + len(payload) < size:
            return {"done": False}
        if digest_of(part) != request["sha256"]:
            part.unlink()
            raise Refusal("request", "the file that came has another digest than was said")
        part.replace(path)
        self.verified.add(request["sha256"])
        return {"done": True}

    def _load(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        if not self._has(request["sha256"]):
            raise Refusal("request", "no such file was put: {}".format(request["sha256"]))
        self.count += 1
        request = dict(request, path=str(self._path(request["sha256"])), handle=self.count)
        if request.get("beside"):
            process = self._process(request["beside"])
            answer, _ = process.ask(dict(request, package=process.package), b"", deadline)
        else:
            process, answer = self._first_that_works(request, deadline)
        self.models[self.count] = process
        return dict(answer, handle=self.count, pid=process.process.pid, package=process.package)

    def _first_that_works(self, request: dict[str, Any], deadline: float) -> tuple[ModelProcess, dict[str, Any]]:
        """A new process in which one of the runtime's packages did what is asked: one that imports may still not work."""
        refusals = []
        for package in RUNTIMES.get(request["runtime"], ()):
            process = ModelProcess(self.channel, package)
            try:
                answer, _ = process.ask(dict(request, package=package), b"", deadline)
            except Refusal as refusal:
                process.close()
                if refusal.kind in ("request", "deadline"):
                    raise
                refusals.append(refusal)
            except BaseException:
                process.close()
                raise
            else:
                return process, answer
        if not refusals:
            raise Refusal("runtime", "{}: this agent runs {}".format(request["runtime"], ", ".join(RUNTIMES)))
        told = [refusal for refusal in refusals if refusal.kind != "runtime"]
        raise told[0] if told else Refusal("runtime", "; ".join(map(str, refusals)))

    def _unload(self, request: dict[str, Any], deadline: float) -> None:
        """Its process ends with the last of its models."""
        process = self._process(request["handle"])
        del self.models[request["handle"]]
        if process in self.models.values():
            process.ask(request, b"", deadline)
        else:
            process.close()

    def _timed(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Samples of some models, taken by their process; see sampling.py."""
        processes = [self._process(handle) for handle in request["handles"]]
        if any(process is not processes[0] for process in processes):
            raise Refusal("request", "models that were not loaded beside one another")
        answer, _ = processes[0].ask(request, b"", deadline)
        return dict(answer, peak_rss_bytes=peak_rss(processes[0].process.pid))

    def _process(self, handle: int) -> ModelProcess:
        process = self.models.get(handle)
        if process is None:
            raise Refusal("request", f"no such model: {handle}")
        return process
