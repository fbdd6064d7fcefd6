"""A pretended Jetson behind the stand-in for ssh, and files to build engines of."""

import hashlib
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import trtexec_standin
from edge_compress.pipeline.options import SPARSITY_KEY
from onnx import TensorProto, helper, numpy_helper

MODE = '#!/bin/sh\necho "NV Power Mode: 15W"\n'


class Programs:
    """A folder for a board's PATH, with a trtexec in it that does as it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, {"version": "100300", "times_ms": {}}
        folder.mkdir()
        self.put("trtexec", Path(trtexec_standin.__file__).read_text().replace('"""A', f'#!{sys.executable}\n"""A', 1))
        self.put("nvpmodel", MODE)
        self.tell()

    def put(self, name, text):
        file = self.folder / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def tell(self, **more):
        self.told |= more
        (self.folder / "trtexec.json").write_text(json.dumps(self.told))


class Jetson(Programs):
    """What the pretended board is told to be, and what was asked of it."""

    def __init__(self, standin, tmp_path):
        super().__init__(tmp_path / "jetson")
        self.standin, self.programs = standin, self.folder
        standin.tell(path=f"{self.folder}:{os.environ['PATH']}")

    def commands(self, word):
        """Calls whose command line holds a word, as the board's shell got them."""
        return [call[-1] for call in self.standin.calls("ssh") if word in call[-1]]


def onnx_file(path, *, channels=4, quantized=False, half=False, sparse=False):
    kind = np.float16 if half else np.float32
    weight = numpy_helper.from_array(np.ones((channels, 3, 1, 1), kind), "w")
    nodes = [helper.make_node("Conv", ["input", "w"], ["logits"])]
    extra = []
    if quantized:
        nodes = [
            helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("Conv", ["d", "w"], ["logits"]),
        ]
        extra = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [weight, *extra],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    if sparse:
        helper.set_model_props(model, {SPARSITY_KEY: "enable"})
    path.write_bytes(model.SerializeToString())
    return path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
