"""What the campaigns share: a small trained network with its data, the kinds of runs, and what each gives uninterrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from forks import Ended, forked, preload

RUN_S = 300.0  # until a run is taken for hung
SEED = 3
_SAME = re.compile(r"^(?:budgets/[^/]+/)?(?:artifacts/.*|plan\.json)$")  # what has to be the same bit for bit
_MACHINE = re.compile(r"golden\.safetensors$")  # names the machine
COMMON = {
    "seed": SEED,
    "evaluations": 6,
    "finetune_epochs": 2,
    "latency_budget": "0.8",
    "precision": "int8",
    "min_speedup": 0.01,
}
KINDS: dict[str, dict[str, object]] = {
    "demo": {"target": "x86"},
    "phone": {"target": "phone"},
    "weight": {"target": "x86", "pattern": "weight"},
    "recipe": {"target": "x86", "max_drop": 100},
    "budgets": {"target": "x86", "latency_budget": "0.6,0.45,0.3", "evaluations": 12},
}


@dataclass(frozen=True)
class Reference:
    """What a run gives that nothing disturbs."""

    folder: Path
    code: int
    digest: str
    seconds: float


@dataclass(frozen=True)
class Workshop:
    """A folder with a network, its weights and data, and a latency cache for each kind of run."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "small.py"

    @property
    def weights(self) -> Path:
        return self.folder / "small.safetensors"

    @property
    def npz(self) -> Path:
        return self.folder / "small.npz"

    def cache(self, kind: str) -> Path:
        """The cache of the runs of a kind: latencies of one context alone."""
        return self.folder / kind / "cache"

    def arguments(self, kind: str, out: Path | None, **changed: object) -> list[str]:
        """The command line of a run of this kind; `min_speedup=2` adds or replaces `--min-speedup 2`, None removes it."""
        subject: dict[str, object] = {"recipe": self.model}
        if kind != "recipe":
            picked = {"model": f"{self.model}:network", "weights": self.weights, "data": f"npz:{self.npz}"}
            subject = picked | {"mean": "0.305", "std": "0.376", "augment": "none", "max_accuracy_drop": 100}
        options = COMMON | subject | KINDS[kind] | {"out": out} | changed
        given = {name: value for name, value in options.items() if value is not None}
        return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]

    def run(self, kind: str, out: Path, *, seconds: float = RUN_S, cache: Path | None = None, before: Any = None) -> Ended:
        """A run in a child of its own."""

        def first() -> None:
            os.environ["EDGE_COMPRESS_CACHE"] = str(cache or self.cache(kind))
            if before is not None:
                before()

        return forked(self.arguments(kind, out), seconds=seconds, before=first)

    def reference(self, kind: str) -> Reference:
        """The uninterrupted run of a kind: made twice, the second time with the first one's cache, and timed then.

        Raises:
            RuntimeError: it fails, or the two differ: nothing could be compared with it.
        """
        ends = []
        for name in ("first", "reference"):
            folder = self.folder / kind / name
            ended = self.run(kind, folder)
            if ended.fault(run=True) or ended.code not in (0, 1):
                raise RuntimeError(f"{kind}: {ended.code} {ended.err}")
            ends.append(Reference(folder, ended.code, digest_of(folder), ended.seconds))
        if (ends[0].code, ends[0].digest) != (ends[1].code, ends[1].digest):
            raise RuntimeError(f"{kind}: two uninterrupted runs differ: {[(end.code, end.digest) for end in ends]}")
        shutil.rmtree(ends[0].folder)
        return ends[1]

    def difference(self, kind: str, ended: Ended, folder: Path, wanted: Reference) -> str:
        """Names what is wrong with a run that has ended by itself; "" where it is as the uninterrupted one."""
        if found := ended.fault(run=True):
            return f"{found}: {ended.last_line}"
        if ended.code != wanted.code:
            return f"exit code {ended.code}, not {wanted.code}: {ended.last_line}"
        if digest_of(folder) != wanted.digest:
            return "another artifact"
        left = [path.name for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == ".holder"]
        return f"left behind: {left}" if left else ""


def available(kind: str) -> bool:
    """Whether this machine has what a kind of run needs."""
    return kind != "phone" or all(find_spec(name) for name in ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"))


def digest_of(folder: Path) -> str:
    """The SHA-256 over artifacts and plans of a finished run, and over what its reports say of them."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and _SAME.match(name) and not _MACHINE.search(name):
            total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for path in sorted(folder.rglob("report.json")):
        total.update(
            f"{path.relative_to(folder)} {json.dumps(_figures(json.loads(path.read_bytes())), sort_keys=True)}\n".encode()
        )
    return total.hexdigest()


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report must not depend on when, or in how many calls, a run was made."""
    targets = {
        name: {key: target[key] for key in ("status", "verdict", "artifact", "accuracy", "unpruned")}
        | {"speedup": target["latency"] and target["latency"]["speedup"]}
        for name, target in report["targets"].items()
    }
    pruned = {key: report["pruned"][key] for key in ("params", "macs", "value", "sparsity", "knobs", "state")}
    levels = report["pruned"]["search"]["best"]["levels"]
    return {"targets": targets, "pruned": pruned, "levels": levels, "dense": report["dense"], "passed": report["passed"]}


def workshop_in(folder: Path) -> Workshop:
    """Makes a workshop: 300 + 100 digits, and the network trained on them for some seconds; imports what its runs need."""
    made = Workshop(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("small.py"), made.model)

    def rehearsal() -> int:
        from edge_compress.pipeline.cli.main import main

        invent_times()
        os.environ["EDGE_COMPRESS_CACHE"] = str(folder / "rehearsal" / "cache")
        run, bundles = folder / "rehearsal" / "run", str(folder / "rehearsal" / "bundles")
        with contextlib.redirect_stdout(sys.stderr):
            calls = (
                made.arguments("demo", run),
                ["release", str(run), "--out", bundles],
                ["verify", str(run)],
                ["report", str(run), str(run), "--out", str(run / "two.html")],
                ["profile", str(run / "artifacts/x86/model.onnx")],
                ["inspect", "--model", f"{made.model}:network", "--input-shape", "1,8,8"],
            )
            return _trained(made) or max(main(list(map(str, call))) for call in calls)

    preload(rehearsal, seconds=RUN_S)
    shutil.rmtree(folder / "rehearsal")
    invent_times()
    return made


def _trained(made: Workshop) -> int:
    import runpy

    import torch
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    images = np.rint(scans.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    first, last = slice(0, 300), slice(300, 400)
    np.savez(
        made.npz,
        train_images=images[first],
        train_labels=labels[first],
        test_images=images[last],
        test_labels=labels[last],
    )
    torch.manual_seed(0)
    small = runpy.run_path(str(made.model))
    network, mean, std = small["network"](), small["MEAN"][0], small["STD"][0]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    pixels = (torch.tensor(images[first]).permute(0, 3, 1, 2).float() / 255 - mean) / std
    for _ in range(25):
        for rows in torch.randperm(len(pixels)).split(50):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(pixels[rows]), torch.tensor(labels[first])[rows]).backward()
            optimizer.step()
    save_file(network.state_dict(), made.weights)
    return 0


def invent_times() -> None:
    """Replaces the times of latency measurements by ones that follow from the files' sizes, and takes few of them.

    The agent, its worker process and the loading of models stay as they are. Plans depend on latencies: with measured ones no
    two runs without a common cache would give the same artifact.
    """
    from edge_compress.devices import remote
    from edge_compress.devices.measure import meter, rounds
    from edge_compress.devices.transport.connection import Connection, LoadedModel

    sizes: dict[str, int] = {}  # by digest
    put, load, measured = Connection.put_bytes, Connection.load, rounds.measured
    measure, sessions = remote.RemoteDevice.measure, remote.RemoteDevice.sessions

    def put_bytes(self: Connection, data: bytes, name: str) -> tuple[str, bool]:
        found = put(self, data, name)
        sizes[found[0]] = len(data)
        return found

    def loaded(self: Connection, source: Any, *more: Any) -> LoadedModel:
        model = load(self, source, *more)
        digest = hashlib.sha256(source.read_bytes()).hexdigest() if isinstance(source, Path) else source[0]
        model.size = sizes[digest]  # type: ignore[attr-defined]
        return model

    def invented(agent: Connection, models: Any, settings: Any, seed: int) -> Any:
        few = dataclasses.replace(settings, max_seconds=0.05, warmup_seconds=0.01, min_pairs=6, max_pairs=6, min_sample_ms=0.01)
        found = measured(agent, models, few, seed)
        samples = [
            dataclasses.replace(
                own, wall_ns=np.full(len(own.wall_ns), 100.0 * model.size), cpu_ns=np.full(len(own.cpu_ns), 100.0 * model.size)
            )
            for own, model in zip((found.baseline, *found.candidates), models, strict=True)
        ]
        return dataclasses.replace(found, baseline=samples[0], candidates=tuple(samples[1:]))

    def once(call: Any) -> Any:
        def shortened(self: Any, baseline: Any, other: Any, settings: Any, progress: Any = None) -> Any:
            return call(self, baseline, other, dataclasses.replace(settings, sessions=1, resamples=50), progress)

        return shortened

    Connection.put_bytes, Connection.load = put_bytes, loaded  # type: ignore[method-assign]
    remote.measured = meter.measured = invented  # type: ignore[attr-defined]
    remote.RemoteDevice.measure, remote.RemoteDevice.sessions = once(measure), once(sessions)  # type: ignore[method-assign]
