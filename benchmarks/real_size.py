"""Networks at 224 pixels from load to the verified file: seconds of every stage, peak memory, speed and agreement.

The photographs are labelled by the dense network, so that dense top-1 is 100 % and the artifact's is their agreement. Networks
without trained weights (`random`) have labels that mean little: only time and memory count there.

    python benchmarks/real_size.py mobilenet_v2 --photographs DIR --weights mobilenet_v2.pt --work build/real_size
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edge_compress.devices.local import describe
from edge_compress.pipeline.data.user_code import load_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real_size.json"
NETWORKS: dict[str, dict[str, Any]] = {  # how each is made, and the options of its run
    "mobilenet_v2": {"make": "torchvision.models.mobilenet_v2()", "options": {"latency-budget": 0.45, "finetune-epochs": 10}},
    "resnet50": {"make": "torchvision.models.resnet50()", "options": {"latency-budget": 0.6}},
    "efficientnet_b0": {"make": "timm.create_model('efficientnet_b0')", "options": {"latency-budget": 0.6}},
    "convnext_atto": {"make": "timm.create_model('convnext_atto')", "options": {"latency-budget": 0.7}},
    "vit_tiny": {"make": "timm.create_model('vit_tiny_patch16_224')", "options": {"latency-budget": 0.7}},
}
STAGE = re.compile(r"^\S+ (\S+) (.+): done in (?:(\d+) min )?([\d.]+) s$")
MODULE = '''"""A network at 224 pixels, and photographs that it has labelled."""
from pathlib import Path
import numpy as np
import torch
import torchvision
from PIL import Image

MEAN = STD = (0.5, 0.5, 0.5)
HERE = Path(__file__).parent


def network():
    {imports}
    return {make}


def photographs():
    files = sorted(path for path in Path({photographs!r}).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    crop = torchvision.transforms.functional.center_crop
    images = np.stack([np.asarray(crop(Image.open(file).convert("RGB"), 224)) for file in files])
    net = network()
    net.load_state_dict(torch.load(HERE / "weights.pt", weights_only=True))
    net.eval()
    with torch.no_grad():
        parts = [net(torch.from_numpy(part).permute(0, 3, 1, 2) / 127.5 - 1).argmax(1) for part in np.array_split(images, 40)]
    labels, cut = torch.cat(parts).numpy(), len(images) * 4 // 5
    names = np.array([str(i) for i in range(1000)])
    return {{"train_images": images[:cut], "train_labels": labels[:cut], "test_images": images[cut:],
             "test_labels": labels[cut:], "classes": names}}
'''


def prepared(name: str, photographs: Path, weights: Path | None, folder: Path) -> None:
    """Writes the user's file and the weights of a network, drawn where none are given."""
    import torch

    about = NETWORKS[name]
    imports = "import timm" if "timm" in about["make"] else "pass"
    folder.mkdir(parents=True, exist_ok=True)
    text = MODULE.format(imports=imports, make=about["make"], photographs=str(photographs.resolve()))
    (folder / "net.py").write_text(text, encoding="utf-8")
    if weights is not None:
        state = torch.load(weights, weights_only=True)
    else:
        torch.manual_seed(0)
        state = load_file(folder / "net.py", "model").network().state_dict()
    plain = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(plain, folder / "weights.pt")


def run(name: str, folder: Path, more: list[str]) -> dict[str, Any]:
    """One network's figures."""
    options = {"evaluations": 40, "finetune-epochs": 2, "max-minutes": 30, "max-accuracy-drop": 5, **NETWORKS[name]["options"]}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "edge_compress", "--target", "x86", "--model", "net.py:network", "--weights", "weights.pt"]
    command += ["--data", "net.py:photographs", "--augment", "none", "--out", "run", "--verbose", *flags, *more]
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found: dict[str, Any] = {"name": name, "options": options, "more": more, "exit_code": process.returncode}
    found |= {"minutes": round((time.monotonic() - start) / 60, 1), "peak_bytes": usage.ru_maxrss * 1024, "stages_s": {}}
    for line in (folder / "run" / "run.log").read_text(encoding="utf-8").splitlines():
        if match := STAGE.match(line):
            found["stages_s"][match[2]] = 60 * int(match[3] or 0) + float(match[4])
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    target = report["targets"]["x86"]
    unpruned = target.get("quantised") or target.get("unpruned") or {}
    return found | {
        "agreement": target["accuracy"]["top1"],
        "speedup_over_float": target["latency"]["speedup"],
        "speedup_over_int8": unpruned.get("gain"),
        "quality": target["latency"]["quality"],
        "notes": report["notes"],
    }


def main() -> None:
    """Runs the networks named and writes benchmarks/results/real_size.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="+", choices=[*NETWORKS])
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="state dict of the one network named; drawn if left out")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--more", nargs="*", default=[], help="options of the runs, such as max-memory=2GB")
    given = parser.parse_args()
    more = [part for text in given.more for part in (f"--{text.partition('=')[0]}", text.partition("=")[2])]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    kept = json.loads(RESULTS.read_text())["networks"] if RESULTS.is_file() else []
    for name in given.names:
        prepared(name, given.photographs, given.weights, given.work / name)
        found = run(name, given.work / name, more) | {"commit": commit, "weights": "trained" if given.weights else "random"}
        kept = [each for each in kept if each["name"] != name] + [found]
        RESULTS.write_text(json.dumps({"processor": describe("onnxruntime")["cpu"], "networks": kept}, indent=1) + "\n")
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
