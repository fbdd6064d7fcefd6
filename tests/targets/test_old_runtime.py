"""The same file in the retired tflite-runtime, which some boards still have; it needs numpy 1: an environment of its own."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets import phone
from edge_compress.targets.base import BuildRequest, Interface

SHAPE = (3, 12, 12)
PYTHON = os.environ.get("EDGE_COMPRESS_TFLITE_RUNTIME", "")
lacking = phone.TARGET.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(lacking is not None, reason=f"phone: {lacking}"),
    pytest.mark.skipif(
        not PYTHON, reason="EDGE_COMPRESS_TFLITE_RUNTIME names no Python with tflite-runtime==2.14.0 and numpy==1.26.4"
    ),
]
SCRIPT = """
import sys
import numpy as np
from tflite_runtime.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
(image,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
answers = []
for pixels in np.load(sys.argv[2]):
    value = pixels - 128 if image["dtype"] is np.int8 else pixels
    interpreter.set_tensor(image["index"], value.astype(image["dtype"])[None])
    interpreter.invoke()
    answers.append(interpreter.get_tensor(logits["index"])[0])
np.save(sys.argv[3], np.stack(answers).astype(np.float32))
"""


def test_int8_and_float_files_give_the_same_answers_in_tflite_runtime(tiny, tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    pixels = np.random.default_rng(3).integers(0, 256, (16, *SHAPE)).astype(np.float32)
    images = pixels.transpose(0, 2, 3, 1)
    baseline = phone.TARGET.baseline(tiny, Interface(image_signature(SHAPE), tuple("abcde"), mean, std))
    artifact = phone.TARGET.build(
        BuildRequest(
            tiny,
            baseline,
            image_signature(SHAPE),
            tuple("abcde"),
            Precision.INT8,
            [images],
            lambda predict: 100.0,
            tmp_path,
            mean=mean,
            std=std,
        )
    )
    np.save(tmp_path / "pixels.npy", images)
    for ref, tolerance in ((artifact.file, 0.05), (artifact.baseline, 1e-5)):  # int8 kernels of two ages round differently
        command = [PYTHON, "-c", SCRIPT, tmp_path / ref.path, tmp_path / "pixels.npy", tmp_path / "answers.npy"]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
        found = np.load(tmp_path / "answers.npy")
        with phone.TARGET.runner(tmp_path / ref.path) as run:
            expected = run(images)
        if ref is artifact.file:  # steps of the output's scale: a straight line between the two
            found = np.polyval(np.polyfit(found.ravel(), expected.ravel(), 1), found)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9
