"""A .tflite file in LiteRT: its answers to network inputs, and who runs its operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...pipeline.errors import BuildError
from ..base import FloatArray, Infer, Runner
from .file import op_counts
from .metadata import OWN, Record, entry
from .quiet import quiet

DELEGATE = "DELEGATE"  # the operator that stands for all that XNNPACK took over


def predictor(
    data: bytes, threads: int = 1, *, record: Record | None = None, name: str = "the model", infer: Infer | None = None
) -> Runner:
    """Network inputs (n, C, H, W) to logits (n, classes) through a fresh LiteRT interpreter.

    A file that normalises pixels itself gets the pixels that the inputs came from, to the nearest integer where it is int8.

    Args:
        data: the file.
        threads: of the runtime.
        record: how inputs relate to pixels; None: as the file says.
        name: of the file, for messages.
        infer: makes the inferences, by the names of the file's tensors; None: this interpreter.

    Raises:
        BuildError: the runtime refused the model, or does not give it to XNNPACK.
    """
    if record is None:
        own = entry(data, OWN, name)
        record = Record((), (), ()) if own is None else Record.from_bytes(own)
    with quiet():
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_content=data, num_threads=threads)
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise BuildError(f"LiteRT cannot load {name}", found=str(error)[:500]) from error
    if not any(op["op_name"] == DELEGATE for op in interpreter._get_ops_details()):
        raise BuildError(f"LiteRT runs {name} without XNNPACK", expected="a DELEGATE operator", do="report the model")
    image, logits = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def answer(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if infer is not None:
            return infer({image["name"]: values})[logits["name"]]
        interpreter.set_tensor(image["index"], values)
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(logits["index"]))

    mean, std = (np.array(v or (0.0,), np.float32).reshape(1, -1, 1, 1) for v in (record.mean, record.std))

    def predict(inputs: FloatArray) -> FloatArray:
        values = np.asarray(inputs, dtype=np.float32)
        if record.mean:
            values = (values * std + mean) * np.float32(255.0)
        values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
        values = _to_type(values, image)
        answers = np.zeros((len(values), logits["shape"][-1]), np.float32)
        for at in range(len(values)):
            answers[at] = _from_type(answer(values[at : at + 1]), logits)
        return answers

    return predict


def _to_type(values: FloatArray, detail: dict[str, Any]) -> np.ndarray[Any, Any]:
    scale, zero = detail["quantization"]
    if detail["dtype"] is np.float32:
        return values
    limits = np.iinfo(detail["dtype"])
    steps: np.ndarray[Any, Any] = np.clip(np.rint(values / np.float32(scale)) + zero, limits.min, limits.max).astype(
        detail["dtype"]
    )
    return steps


def _from_type(values: np.ndarray[Any, Any], detail: dict[str, Any]) -> FloatArray:
    scale, zero = detail["quantization"]
    if detail["dtype"] is np.float32:
        return values
    answers: FloatArray = (values.astype(np.float32) - zero) * np.float32(scale)
    return answers


def pixels(inputs: FloatArray, record: Record) -> FloatArray:
    """What the file takes, (n, H, W, C), of network inputs (n, C, H, W)."""
    values = np.asarray(inputs, dtype=np.float32)
    if record.mean:
        mean, std = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (record.mean, record.std))
        values = np.rint((values * std + mean) * np.float32(255.0))
    return np.ascontiguousarray(values.transpose(0, 2, 3, 1))


def facts_of(data: bytes, threads: int) -> dict[str, str]:
    """What is in the file and who runs it."""
    from ai_edge_litert.interpreter import Interpreter

    counts = op_counts(data)
    with quiet():
        interpreter = Interpreter(model_content=data, num_threads=threads)
        interpreter.allocate_tensors()
        delegated = sum(op["op_name"] == DELEGATE for op in interpreter._get_ops_details())
    operators = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    note = f"{sum(counts.values())} operators ({operators}), {counts['TRANSPOSE']} of them transposes; XNNPACK parts: {delegated}"
    return {"note": note, "transposes": str(counts["TRANSPOSE"]), "delegates": str(delegated)}
