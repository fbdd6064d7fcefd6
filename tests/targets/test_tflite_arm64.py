"""The files in LiteRT's own wheel for 64-bit Arm, under QEMU: the answers count, times do not.

Takes the aarch64 user space that `make test-devices` makes, and qemu-user; no root, no chroot. QEMU looks for files in a folder
of our own first, where /proc/cpuinfo is that of an Arm core: with the host's, the runtime's look at the processor is a crash.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets import phone
from edge_compress.targets.base import BuildRequest
from edge_compress.targets.tflite.metadata import OWN, Record, entry

ROOT, SITE = (Path(__file__).parents[2] / "build" / "devices" / name for name in ("arm64", "arm64-site"))
PYTHON = ROOT / "usr" / "bin" / "python3.11"
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "phone"
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
CORE = """processor\t: {number}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""  # Cortex-A76
SCRIPT = """
import platform, sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
delegates = sum(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())
(image,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
answers = []
for value in np.load(sys.argv[2]):
    value = value - 128 if image["dtype"] is np.int8 else value
    interpreter.set_tensor(image["index"], value.astype(image["dtype"])[None])
    interpreter.invoke()
    answers.append(interpreter.get_tensor(logits["index"])[0])
np.save(sys.argv[3], np.stack(answers))
print(platform.machine(), delegates)
"""
SHAPE = (3, 12, 12)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
lacking = phone.TARGET.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 on this machine"),
    pytest.mark.skipif(not (PYTHON.is_file() and SITE.is_dir()), reason="no aarch64 user space: make test-devices makes one"),
]
Answers = Callable[[Path, np.ndarray[Any, Any]], np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Answers of a file to pixels (n, H, W, C) on the Arm board, as its output stores them."""
    root = tmp_path_factory.mktemp("root")
    (root / "proc").mkdir()
    (root / "proc" / "cpuinfo").write_text("".join(CORE.format(number=n) for n in range(os.cpu_count() or 1)))
    for name in ("lib", "usr", "bin", "etc"):
        (root / name).symlink_to(ROOT / name)
    environment = {"QEMU_CPU": "cortex-a76", "PYTHONHOME": str(ROOT / "usr"), "PYTHONPATH": str(SITE)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}

    def answers(path: Path, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        np.save(root / "pixels.npy", pixels)
        command = [QEMU, "-L", root, PYTHON, "-c", SCRIPT, path, root / "pixels.npy", root / "answers.npy"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
        machine, delegates = done.stdout.split()
        assert machine == "aarch64"
        assert int(delegates) > 0  # XNNPACK's kernels for Arm, not LiteRT's references
        found: np.ndarray[Any, Any] = np.load(root / "answers.npy")
        return found

    return answers


def here(path: Path, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same on this machine."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    (image,), (logits,) = interpreter.get_input_details(), interpreter.get_output_details()
    answers = []
    for value in pixels:
        interpreter.set_tensor(image["index"], (value - 128 if image["dtype"] is np.int8 else value).astype(image["dtype"])[None])
        interpreter.invoke()
        answers.append(interpreter.get_tensor(logits["index"])[0])
    return np.stack(answers)


@pytest.mark.skipif(lacking is not None, reason=f"phone: {lacking}")
@pytest.mark.parametrize("precision", phone.TARGET.limits.precisions)
def test_answers_on_arm_are_those_of_this_machine(arm, tiny, tmp_path: Path, precision: Precision) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (24, *SHAPE)).astype(np.float32)
    centre, spread = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    inputs = ((pixels / 255 - centre) / spread).astype(np.float32)
    images = pixels.transpose(0, 2, 3, 1)
    request = BuildRequest(
        tiny,
        b"",
        image_signature(SHAPE),
        tuple("abcde"),
        precision,
        [images],
        lambda predict: 100.0,
        tmp_path,
        mean=MEAN,
        std=STD,
    )
    path = tmp_path / phone.TARGET.build(request).file.path
    found, expected = arm(path, images), here(path, images)
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.95
    if precision is Precision.INT8:
        assert found.dtype == expected.dtype == np.int8
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2  # steps of the output
    else:
        close = {Precision.FP32: 1e-5, Precision.FP16: 1e-2, Precision.DYNAMIC: 2e-2}[precision]  # of the range: rounding differs
        assert np.abs(found - expected).max() <= close * np.ptp(expected)
    with torch.no_grad():
        in_torch = tiny(torch.from_numpy(inputs)).argmax(1).numpy()
    assert (found.argmax(1) == in_torch).mean() >= 0.85


@pytest.mark.skipif(lacking is not None, reason=f"phone: {lacking}")
def test_sparse_weights_give_the_same_answers_where_zeros_are_skipped(arm, tmp_path: Path) -> None:
    """On Arm XNNPACK takes its sparse kernels, which this machine may never do."""
    from edge_compress.targets.tflite import sparse as tflite_sparse
    from small_mobile import SHAPE as IMAGE
    from small_mobile import Mobile, converted

    plain = converted(Mobile(), zeros=0.9)
    assert tflite_sparse.why_dense(plain) == ""
    pixels = np.random.default_rng(0).integers(0, 256, (3, *IMAGE[1:], 3)).astype(np.float32)
    (tmp_path / "plain.tflite").write_bytes(plain)
    (tmp_path / "sparse.tflite").write_bytes(tflite_sparse.encode(plain))
    expected = here(tmp_path / "plain.tflite", pixels)
    for name in ("plain", "sparse"):
        assert np.abs(arm(tmp_path / f"{name}.tflite", pixels) - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.tflite")), ids=lambda path: path.stem)
def test_committed_files_load_and_answer_on_arm(arm, path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    data = path.read_bytes()
    record = Record.from_bytes(entry(data, OWN) or b"")
    pixels = np.random.default_rng(1).integers(0, 256, (16, 32, 32, 3)).astype(np.float32)
    found, expected = arm(path, pixels), here(path, pixels)
    assert found.shape == (16, len(record.classes))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9
