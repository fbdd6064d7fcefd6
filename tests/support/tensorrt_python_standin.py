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


def answered(options: dict[str, str], wrong: float) -> np.ndarray:
    import onnx

    engine = Path(options["--loadEngine"])
    source = json.loads(engine.read_bytes().removeprefix(STAMP))["source"]
    # an engine that was built here lies one folder deeper than what was sent
    data = next(folder / source for folder in engine.parents if (folder / source).exists()).read_bytes()
    shape = [d.dim_value for d in onnx.load_model_from_string(data).graph.input[0].type.tensor_type.shape.dim][1:]
    logits = simulate(data)(np.fromfile(options["--inputs"], "<f4").reshape(-1, *shape))
    turned = np.arange(len(logits)) < wrong * len(logits)
    logits[turned] = np.roll(logits[turned], 1, axis=1)
    return logits


if __name__ == "__main__":
    if sys.argv[-1] == "--help":
        sys.exit(0)
    told = json.loads(Path(sys.argv[1]).read_text())
    options = dict(argument.split("=", 1) for argument in sys.argv[3:])
    answered(options, told.get("wrong", 0.0)).astype("<f4").tofile(options["--outputs"])
    print(f"&&&& PASSED TensorRT.python [TensorRT v{told['version']}]")
