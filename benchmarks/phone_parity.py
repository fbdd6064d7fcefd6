r"""MobileNetV2 as .tflite files beside the PyTorch model they were made from, whole and with channels pruned.

    python benchmarks/phone_parity.py --weights mobilenet_v2.pt --images images.zip \
        --out benchmarks/results/phone/mobilenet-v2-parity.json

For each of the two networks a float and an int8 file is built as the phone target builds them; what counts is the share of images
on which file and PyTorch model name the same class. Images are a zip of CLASS/NAME, square, cut to their central 224 pixels, in
three parts: some to calibrate and train on, some to choose epoch and ranges by, the rest for the figures. Pixels become
x / 127.5 - 1. The pruned network is trained for `--epochs`, with the whole one as its teacher.

The images may be ones the network was trained on: the figures say that a file is faithful, nothing of accuracy.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from edge_compress.devices.local import describe
from edge_compress.pipeline.data.splits import ArraySource, DataSet, Split
from edge_compress.pipeline.files import atomic_write, sha256_file
from edge_compress.pipeline.finetune.training import FinetuneSettings, Step, finetune
from edge_compress.pipeline.network.cost import cost_of
from edge_compress.pipeline.options import Precision
from edge_compress.pipeline.pattern.units import Units
from edge_compress.pipeline.reconstruct.gptq import round_weights
from edge_compress.pipeline.score.ranking import UnitScores, ordered
from edge_compress.pipeline.signature import image_signature
from edge_compress.pipeline.task.classification import Classification
from edge_compress.pipeline.task.samples import image_data
from edge_compress.pipeline.types import DataInfo, Epoch, Knob, Preprocess, Splits
from edge_compress.targets.base import BuildRequest, FloatArray, Interface
from edge_compress.targets.onnx.export import fold_batchnorm
from edge_compress.targets.phone import TARGET
from PIL import Image
from torch import nn

SIZE = 224
SHAPE = (3, SIZE, SIZE)
HALF = (0.5, 0.5, 0.5)  # mean and std of pixels on [0, 1]
SCORE = "hasa"
RATE = 2e-5  # without BatchNorm, at 3e-4, 400 images undo what solving the layers gave


@dataclass(frozen=True)
class Images:
    """Network inputs (n, C, H, W) in three parts."""

    calibration: FloatArray
    search: FloatArray
    held_out: FloatArray


def load_images(path: Path, calibration: int, search: int, seed: int) -> Images:
    """The zip's images in seeded order: so many to calibrate on, so many to choose by, the rest for the figures."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        order = np.random.default_rng(seed).permutation(len(names))
        inputs = np.stack([_input(archive.read(names[i])) for i in order])
    return Images(inputs[:calibration], inputs[calibration : calibration + search], inputs[calibration + search :])


def _input(data: bytes) -> FloatArray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"), np.float32)
    top, left = ((n - SIZE) // 2 for n in pixels.shape[:2])
    return pixels[top : top + SIZE, left : left + SIZE].transpose(2, 0, 1) / np.float32(127.5) - np.float32(1.0)


def mobilenet(weights: Path) -> nn.Module:
    """MobileNetV2 of torchvision with a state dict in any precision."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    net = torchvision.models.mobilenet_v2()
    net.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()})
    return net.eval()


def pruned(net: nn.Module, images: FloatArray, share: float, sizes: tuple[int, ...]) -> nn.Module:
    """The network with this share of the channels of these inner groups, those of the highest removal cost, reconstructed."""
    # without BatchNorm: where it is already folded, re-estimated statistics would be another network's
    signature = image_signature(SHAPE)
    way = Units(fold_batchnorm(net, signature), torch.zeros(1, *SHAPE), signature, TARGET.limits, SCORE, seed=0)
    inputs = torch.from_numpy(images)
    scores = UnitScores(way.net, way.scored, inputs, SCORE, seed=0).at(1.0)

    def level(knob: Knob) -> int:
        chosen = knob.size in sizes and knob.kind not in ("stream", "block")
        return min(range(len(knob.kept)), key=lambda i: abs(knob.kept[i] - share * knob.size)) if chosen else 0

    return way.solved(way.plan_for(tuple(map(level, way.knobs)), ordered(scores)), inputs)


def trained(student: nn.Module, whole: nn.Module, images: Images, epochs: int) -> None:
    """Distil the whole network into the pruned one, in place, on the images to calibrate on; no label is used."""
    splits = []
    for part in (images.calibration, images.search):
        pixels = stored(part)
        source = ArraySource(pixels, classes(in_torch(whole), part))
        splits.append(Split(source, np.arange(len(pixels))))
    info = DataInfo("photographs", "", (), SHAPE, Splits(len(splits[0]), len(splits[1]), 0))
    how = FinetuneSettings(epochs, 0, RATE, batch=16)

    def tell(event: Step | Epoch) -> None:
        if isinstance(event, Epoch):
            print(f"epoch {event.epoch}: loss {event.loss:.3f}, {event.search_value:.1f} % as the whole network", flush=True)

    with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
        data = DataSet(info, splits[0], splits[1], splits[1])
        samples = image_data(data, Preprocess(HALF, HALF, "crop-flip"))
        finetune(student, whole, samples, Classification(1.0, 2.0), how, folder=Path(folder), progress=tell)


def stored(inputs: FloatArray) -> np.ndarray[Any, Any]:
    """The pixels (n, H, W, C) that network inputs come from."""
    return np.rint((inputs.transpose(0, 2, 3, 1) + 1.0) * 127.5).astype(np.uint8)


def classes(predict: Callable[[FloatArray], FloatArray], inputs: FloatArray, batch: int = 50) -> np.ndarray[Any, Any]:
    """The class that a network names for each input."""
    return np.concatenate([predict(inputs[at : at + batch]).argmax(1) for at in range(0, len(inputs), batch)])


def in_torch(net: nn.Module) -> Callable[[FloatArray], FloatArray]:
    """The PyTorch network as a function of arrays."""

    @torch.inference_mode()
    def predict(inputs: FloatArray) -> FloatArray:
        return net(torch.from_numpy(inputs)).numpy()

    return predict


def parity(net: nn.Module, dense: nn.Module, images: Images, precision: Precision, threads: int) -> dict[str, Any]:
    """Build one file and compare it with the network it was made from."""
    search, held_out = (classes(in_torch(net), part) for part in (images.search, images.held_out))

    def score(predict: Callable[[FloatArray], FloatArray]) -> float:
        return 100.0 * float((classes(predict, stored(images.search)) == search).mean())

    with tempfile.TemporaryDirectory(prefix="edge-compress-") as folder:
        labels = tuple(f"class {i:04d}" for i in range(1000))
        request = BuildRequest(
            module=net,
            baseline=TARGET.baseline(dense, Interface(image_signature(SHAPE), labels, HALF, HALF)),
            signature=image_signature(SHAPE),
            classes=labels,
            precision=precision,
            calibration=[stored(images.calibration)],
            rounded=partial(round_weights, net, [images.calibration]),
            score=score,
            folder=Path(folder),
            threads=threads,
            mean=HALF,
            std=HALF,
        )
        start = time.monotonic()
        artifact = TARGET.build(request)
        built = time.monotonic()
        with TARGET.runner(Path(folder) / artifact.file.path, threads) as run:
            same = classes(run, stored(images.held_out)) == held_out
        verified = time.monotonic()
    return {
        "precision": str(precision),
        "size_bytes": artifact.file.size_bytes,
        "agreement": float(same.mean()),
        "samples": len(same),
        "build_seconds": built - start,
        "verify_seconds": verified - built,
        "notes": artifact.notes,
        "choices": artifact.choices,
        "options": artifact.options,
    }


def main() -> None:
    """Build, compare and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="zip")
    parser.add_argument("--calibration", type=int, default=400, metavar="IMAGES")
    parser.add_argument("--search", type=int, default=100, metavar="IMAGES")
    parser.add_argument("--epochs", type=int, default=4, help="of the pruned network's training")
    parser.add_argument("--keep", type=float, default=0.75, metavar="SHARE", help="of such a group's channels")
    parser.add_argument("--sizes", type=int, nargs="+", default=(384, 576), help="of inner groups that lose channels")
    parser.add_argument(
        "--solved", type=int, default=100, metavar="IMAGES", help="of those to calibrate on, that layers are solved on"
    )
    parser.add_argument("--only", nargs="*", default=("whole", "pruned"), choices=("whole", "pruned"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    images = load_images(given.images, given.calibration, given.search, seed=0)
    whole = mobilenet(given.weights)
    rows = []
    for name in given.only:
        net = whole
        if name == "pruned":
            net = pruned(whole, images.calibration[: given.solved], given.keep, tuple(given.sizes))
            trained(net, whole, images, given.epochs)
        kept = float((classes(in_torch(net), images.held_out) == classes(in_torch(whole), images.held_out)).mean())
        for precision in (Precision.FP32, Precision.INT8):
            row = parity(net, whole, images, precision, given.threads)
            rows.append(
                {"network": name, **asdict(cost_of(net, torch.zeros(1, *SHAPE))), "agreement_with_dense_in_torch": kept, **row}
            )
            took = f"{row['build_seconds']:.0f} s to build, {row['verify_seconds']:.0f} s to verify"
            print(f"{name:7s} {precision:5s} {100 * row['agreement']:6.2f} %  {took}", flush=True)
    about = {
        "weights_sha256": sha256_file(given.weights),
        "images_sha256": sha256_file(given.images),
        "calibration": given.calibration,
        "search": given.search,
        "keep": given.keep,
        "sizes": list(given.sizes),
        "solved": given.solved,
        "epochs": given.epochs,
        "threads": given.threads,
        "kind": "measured",
    }
    table = {"settings": about, "machine": describe("litert"), "rows": rows}
    atomic_write(given.out, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
