"""A stand-in for a board's `python3` that knows TensorRT, for tests: it answers for the engines of the trtexec stand-in.

It is called with trtexec.json and what the board's python3 was called with. What an engine would answer it computes in ONNX
Runtime, from the file that the engine was built from, which lies where the agent keeps its files. trtexec.json may say
    wrong     share of the images that it names another class for
"""

import json
import sys
from pathlib import Path

import numpy as np
from edge_compress.targets.onnx.run import simulate
from trtexec_standin import STAMP


def answered(options: dict[str, str], wrong: float) -> bytes:
    import onnx
    from onnx.helper import tensor_dtype_to_np_dtype

    engine = Path(options["--loadEngine"])
    source = json.loads(engine.read_bytes().removeprefix(STAMP))["source"]
    # an engine that was built here lies one folder deeper than what was sent
    data = next(folder / source for folder in engine.parents if (folder / source).exists()).read_bytes()
    kinds = {value.name: value.type.tensor_type for value in onnx.load_model_from_string(data).graph.input}
    wanted = json.loads(options["--tensors"])
    given = {name: size for name, _, size in wanted if name in kinds}
    rows, inputs, at = np.fromfile(options["--inputs"], np.uint8).reshape(-1, sum(given.values())), [], 0
    for name, size in given.items():
        kind, shape = tensor_dtype_to_np_dtype(kinds[name].elem_type), [d.dim_value for d in kinds[name].shape.dim][1:]
        inputs.append(np.ascontiguousarray(rows[:, at : at + size]).view(kind).reshape(len(rows), *shape))
        at += size
    found = simulate(data)(tuple(inputs) if len(inputs) > 1 else inputs[0])
    outputs = found if isinstance(found, tuple) else (found,)
    turned = np.arange(len(rows)) < wrong * len(rows)
    for output in outputs:
        output[turned] = np.roll(output[turned], 1, axis=-1)
    return np.concatenate([np.ascontiguousarray(o).reshape(len(rows), -1).view(np.uint8) for o in outputs], axis=1).tobytes()


if __name__ == "__main__":
    if sys.argv[-1] == "--help":
        sys.exit(0)
    told = json.loads(Path(sys.argv[1]).read_text())
    options = dict(argument.split("=", 1) for argument in sys.argv[3:])
    Path(options["--outputs"]).write_bytes(answered(options, told.get("wrong", 0.0)))
    print(f"&&&& PASSED TensorRT.python [TensorRT v{told['version']}]")
