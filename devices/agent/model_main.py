"""The process that holds a runtime and some models: it answers what the agent hands on to it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
from typing import Any

from . import tensors
from .frames import Channel, Gone, Refusal
from .runtimes import started
from .runtimes.base import Runtime
from .sampling import pairs, warm_up


def answer_requests(channel: Channel) -> None:
    """Answer until the agent is gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the agent
    gc.disable()  # it would run in the middle of a sample
    models: dict[int, Runtime] = {}
    while True:
        try:
            request, payload = channel.receive()
        except Gone:
            return
        try:
            answer, data = _answer(models, request, payload)
            channel.send(dict(answer, ok=True), data)
        except Refusal as refusal:
            channel.send({"ok": False, "kind": refusal.kind, "error": str(refusal)})


def _answer(models: dict[int, Runtime], request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    op = request["op"]
    if op == "runtime":
        return {"version": started(request["runtime"], request["package"]).version}, b""
    if op == "load":
        runtime = started(request["runtime"], request["package"])
        if request.get("affinity"):
            _pin(request["affinity"])
        runtime.load(request["path"], request["threads"])
        models[request["handle"]] = runtime
        return {"version": runtime.version, "inputs": runtime.inputs()}, b""
    if op == "run":
        return _outputs(models[request["handle"]], request["tensors"], payload)
    if op == "layers":
        return {"layers": models[request["handle"]].layers(request["runs"])}, b""
    if op == "unload":
        del models[request["handle"]]
        gc.collect()
        return {}, b""
    infers, seconds = [models[handle].infer for handle in request["handles"]], request["seconds"]
    if op == "warm":
        return warm_up(infers, request["floor_ns"], seconds, request["window"]), b""
    return pairs(infers, request["k"], request["rounds"], seconds, request["seed"]), b""


def _outputs(model: Runtime, heads: list[dict[str, Any]], payload: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        model.feed(tensors.unpacked(heads, payload))
    except tensors.SizeError as error:
        raise Refusal("request", f"input tensors of {error.expected} bytes, {error.found} came") from error
    heads, data = tensors.packed(model.outputs())
    return {"tensors": heads}, data


def _pin(cpus: list[int]) -> None:
    """Run on these CPUs only."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        known = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise Refusal("request", f"affinity {cpus}: {error.strerror}; this process may run on {known}") from error
