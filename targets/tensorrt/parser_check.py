"""NVIDIA's own parser and builder over a graph, without a GPU: TensorRT for RTX, the extra `[trt-check]`.

It is another product than a Jetson's TensorRT, with a newer parser, and it does not know Orin (SM 8.7). What it refuses,
TensorRT 10.3 refuses too; what it takes is not thereby proved for 10.3. Its engine is built to see that it can be, and thrown
away: no time comes from here. It runs in a process of its own, so that it takes nothing with it when it crashes.
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html, 2026-11.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...pipeline.errors import UnavailableError, install_hint

MODULE = "tensorrt_rtx_bindings"
ARCHITECTURE = "SM86"  # Ampere, as Orin is, whose own 8.7 it does not know
WORKSPACE_BYTES = 2 << 30
DEADLINE_S = 900.0


@dataclass(frozen=True)
class ParserVerdict:
    """Verdict of the parser and the builder."""

    version: str  # of TensorRT for RTX
    accepted: bool  # parsed, as one graph, without an unsupported node
    built: bool
    layers: int  # of the network it made; 0 where it did not
    engine_bytes: int
    messages: tuple[str, ...] = ()  # why not

    def __str__(self) -> str:
        by = f"TensorRT-RTX {self.version}"
        if self.accepted and self.built:
            return f"accepted by the parser of {by} ({self.layers} layers), engine built"
        why = f": {'; '.join(self.messages)}" if self.messages else ""
        return f"accepted by the parser of {by}, no engine built{why}" if self.accepted else f"refused by the parser of {by}{why}"


def missing() -> str | None:
    """Why the check cannot run here; None when it can."""
    if find_spec(MODULE) is None:
        return f"TensorRT-RTX is not installed (Linux x86_64; NVIDIA's own licence): {install_hint('trt-check')}"
    return None


def check(data: bytes, *, two_four: bool = False, deadline_s: float = DEADLINE_S) -> ParserVerdict:
    """The verdict of the parser on an ONNX file and, where it accepts it, of the builder; `two_four` allows sparse kernels.

    Raises:
        UnavailableError: it is not installed, does not start on this machine, crashed or took too long.
    """
    reason = missing()
    if reason:
        raise UnavailableError("the parser check", found=reason)
    with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
        model = Path(folder) / "model.onnx"
        model.write_bytes(data)
        request = json.dumps({"model": str(model), "two_four": two_four})
        command = [sys.executable, "-P", "-m", __name__, request]
        try:
            done = subprocess.run(command, capture_output=True, timeout=deadline_s, check=False, env=os.environ)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError("the parser check", found=f"no answer after {deadline_s:.0f} s") from error
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode != 0 or not lines:
        told = done.stderr.decode(errors="replace").strip().splitlines()
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise UnavailableError("the parser check", found=f"{how}{f' ({told[-1][:300]})' if told else ''}")
    answer = json.loads(lines[-1])
    return ParserVerdict(**{**answer, "messages": tuple(answer["messages"])})


def _check(data: bytes, two_four: bool) -> ParserVerdict:
    """The check, in this process. Networks must outlive their parsers, which hold no reference to them."""
    import tensorrt_rtx_bindings as trt

    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(" ".join(message.split())[:300])

    logger = Logger()
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    asked = builder.create_network(typed)  # asking fills the network it is asked with
    asking = trt.OnnxParser(asked, logger)
    whole = bool(asking.supports_model_v2(data)) and asking.num_subgraphs == 1
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    parsed = bool(parser.parse(data))
    if not parsed or not whole:
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        told = tuple(dict.fromkeys(" ".join(e.split())[:300] for e in (*errors, *said)))[:5]
        return ParserVerdict(trt.__version__, False, False, 0, 0, told)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, ARCHITECTURE), 0)
    if two_four:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return ParserVerdict(trt.__version__, True, False, network.num_layers, 0, tuple(said[-5:]))
    return ParserVerdict(trt.__version__, True, True, network.num_layers, int(engine.nbytes))


def main(request: str) -> None:
    """The process of one check: a request as JSON, the verdict as the last line of stdout."""
    asked = json.loads(request)
    verdict = _check(Path(asked["model"]).read_bytes(), asked["two_four"])
    sys.stdout.write("\n" + json.dumps(asdict(verdict)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
