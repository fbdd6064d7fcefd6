"""A .tflite file in LiteRT: its outputs, and who runs its operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...pipeline.errors import BuildError
from ...pipeline.signature import FileTensor, Signature
from ..base import AS_GIVEN, Arrays, FloatArray, Infer, Runner
from ..quiet import quiet
from .file import op_counts

DELEGATE = "DELEGATE"  # the operator that represents everything XNNPACK took over


def predictor(data: bytes, threads: int = 1, *, name: str = "the model", infer: Infer | None = None) -> Runner:
    """The file's inputs to its outputs through a fresh LiteRT interpreter, sample by sample.

    A file that was given mean and deviations takes pixels 0..255; another one takes network inputs. `infer` makes the inferences
    instead of the interpreter, by the names of the file's tensors.

    Raises:
        BuildError: the runtime refused the model, or does not give it to XNNPACK; from the runner: or its inputs.
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
    entries, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def answer(given: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        if infer is not None:
            found = infer({detail["name"]: values for detail, values in zip(entries, given, strict=True)})
            return [np.asarray(found[detail["name"]]) for detail in outputs]
        try:
            for detail, values in zip(entries, given, strict=True):
                interpreter.set_tensor(detail["index"], values)
            interpreter.invoke()
        except (RuntimeError, ValueError) as error:  # values of another shape, or an operator that gave up
            raise BuildError(f"LiteRT cannot run {name}", found=str(error)[:500]) from error
        return [np.asarray(interpreter.get_tensor(detail["index"])) for detail in outputs]

    def predict(inputs: Arrays) -> Arrays:
        each = inputs if isinstance(inputs, tuple) else (inputs,)
        if len(each) != len(entries):
            raise BuildError("the model's inputs", found=f"{len(each)} given", expected=f"{len(entries)}")
        if not len(each[0]):  # the outputs of no sample have shapes too
            one = predict(tuple(np.zeros((1, *array.shape[1:]), array.dtype) for array in each))
            return tuple(array[:0] for array in one) if isinstance(one, tuple) else one[:0]
        values = [_to_type(array, detail) for array, detail in zip(each, entries, strict=True)]
        parts = [answer([array[at : at + 1] for array in values]) for at in range(len(values[0]))]
        joined = tuple(
            _from_type(np.concatenate(same), detail) for same, detail in zip(zip(*parts, strict=True), outputs, strict=True)
        )
        return joined if len(joined) > 1 else joined[0]

    return predict


def _to_type(values: np.ndarray[Any, Any], detail: dict[str, Any]) -> np.ndarray[Any, Any]:
    scale, zero = detail["quantization"]
    if detail["dtype"] is np.float32 or not scale:
        return np.ascontiguousarray(values, dtype=detail["dtype"])
    values = np.ascontiguousarray(values, dtype=np.float32)
    limits = np.iinfo(detail["dtype"])
    steps: np.ndarray[Any, Any] = np.clip(np.rint(values / np.float32(scale)) + zero, limits.min, limits.max).astype(
        detail["dtype"]
    )
    return steps


def _from_type(values: np.ndarray[Any, Any], detail: dict[str, Any]) -> FloatArray:
    scale, zero = detail["quantization"]
    if detail["dtype"] is np.float32 or not scale:
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


def sides_of(data: bytes, signature: Signature, *, pixels: bool) -> tuple[tuple[FileTensor, ...], tuple[FileTensor, ...]]:
    """Returns the input and output tensors of a file; with `pixels` its input is stored pixels, else what the network takes."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        interpreter = Interpreter(model_content=data)
        interpreter.allocate_tensors()

    def tensor(detail: dict[str, Any], layout: str, said: str) -> FileTensor:
        scale, zero = detail["quantization"]
        name, shape, kind = str(detail["name"]), tuple(int(n) for n in detail["shape"]), np.dtype(detail["dtype"])
        if kind == np.float32 or not scale:
            return FileTensor(name, shape, layout, kind.name, said)
        steps = f"(quantized - zero_point) * scale: {said}, scale {scale:.6g}, zero point {zero}"
        return FileTensor(name, shape, layout, kind.name, steps, float(scale), int(zero))

    given = "pixels 0..255" if pixels else AS_GIVEN
    inputs = tuple(tensor(detail, "NHWC" if pixels else "", given) for detail in interpreter.get_input_details())
    names = [spec.name for spec in signature.outputs]
    return inputs, tuple(tensor(detail, "", name) for detail, name in zip(interpreter.get_output_details(), names, strict=True))
