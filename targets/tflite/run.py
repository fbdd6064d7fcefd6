"""A .tflite file in LiteRT: its outputs, and who runs its operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...pipeline.errors import BuildError
from ..base import FloatArray, Images, Infer, Runner
from .file import op_counts, quiet

DELEGATE = "DELEGATE"  # the operator that represents everything XNNPACK took over


def predictor(data: bytes, threads: int = 1, *, name: str = "the model", infer: Infer | None = None) -> Runner:
    """The file's inputs (n, H, W, C) to logits (n, classes) through a fresh LiteRT interpreter.

    A file that was given mean and deviations takes pixels 0..255; another one takes network inputs. `infer` makes the inferences
    instead of the interpreter, by the names of the file's tensors.

    Raises:
        BuildError: the runtime refused the model, or does not give it to XNNPACK.
    """
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

    def predict(images: Images) -> FloatArray:
        values = _to_type(np.ascontiguousarray(images, dtype=np.float32), image)
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


def facts_of(data: bytes, threads: int) -> dict[str, str]:
    """Operators of the file, and how many parts of it XNNPACK runs."""
    from ai_edge_litert.interpreter import Interpreter

    counts = op_counts(data)
    with quiet():
        interpreter = Interpreter(model_content=data, num_threads=threads)
        interpreter.allocate_tensors()
        delegated = sum(op["op_name"] == DELEGATE for op in interpreter._get_ops_details())
    operators = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    note = f"{sum(counts.values())} operators ({operators}), {counts['TRANSPOSE']} of them transposes; XNNPACK parts: {delegated}"
    return {"note": note, "transposes": str(counts["TRANSPOSE"]), "delegates": str(delegated)}
