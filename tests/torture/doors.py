"""The doors of the program: for each, what comes in there, mutated, and the call that takes it in."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations as change
import numpy as np
from workshop import Reference, Workshop

Work = Sequence[str] | Callable[[], int]


@dataclass(frozen=True)
class Call:
    """What is tried with one mutated input."""

    work: Work
    before: Callable[[], None] | None = None
    run: bool = False  # see `forks.Ended.fault`
    refused: bool = False  # no change of this input may be taken


@dataclass(frozen=True)
class Room:
    """What the doors take their inputs from: a workshop, a finished run, its bundle, and a folder for what is changed."""

    shop: Workshop
    wanted: Reference
    bundle: Path
    folder: Path

    def fresh(self, name: str, data: bytes) -> Path:
        """A new file in the folder."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def copy(self) -> Path:
        """A copy of the finished run."""
        return Path(shutil.copytree(self.wanted.folder, self.folder / "run"))


def _called(call: Callable[[], object]) -> Callable[[], int]:
    """A function of the library under the command line's own mapping of errors."""

    def work() -> int:
        from edge_compress.pipeline.cli.exit_codes import exit_code_of

        return exit_code_of(lambda: int(call() is NotImplemented))

    return work


def _with_digest(report: Any, rng: random.Random) -> bytes:
    """A report's text, in most cases with its own digest right: what it says is then looked at."""
    from edge_compress.pipeline.codec import json_sha256

    if isinstance(report, dict) and rng.random() < 0.9:
        try:
            report["sha256"] = json_sha256({key: value for key, value in report.items() if key != "sha256"})
        except (ValueError, TypeError):  # what has no digest is refused by it
            report["sha256"] = ""
    return change.json_text(report, rng)


def config_file(room: Room, rng: random.Random) -> Call:
    from edge_compress.pipeline import config

    text = (room.wanted.folder / "config.toml").read_text(encoding="utf-8")
    file = room.fresh("config.toml", change.changed_toml(text, rng))
    return Call(_called(lambda: config.load(file, {})))


def npz_file(room: Room, rng: random.Random) -> Call:
    from edge_compress.pipeline.data.datasets import load_data

    with np.load(room.shop.npz) as data:
        file = room.fresh("data.npz", change.changed_npz(dict(data), rng))
    return Call(_called(lambda: load_data(f"npz:{file}", seed=0)))


def image_folder(room: Room, rng: random.Random) -> Call:
    from edge_compress.pipeline.data.datasets import load_data
    from PIL import Image

    with np.load(room.shop.npz) as data:
        images, labels = data["train_images"], data["train_labels"]
    changed = rng.randrange(24)
    for number in range(24):
        name = f"{rng.choice(('train', 'train', 'train'))}/{labels[number] % 2}/{number}"
        suffix = rng.choice((".png", ".jpg", ".bmp", ".tif", ".gif", ".webp"))
        buffer = io.BytesIO()
        Image.fromarray(images[number][:, :, 0].repeat(4, 0).repeat(4, 1)).save(buffer, Image.registered_extensions()[suffix])
        raw = buffer.getvalue()
        for part in ("train", "test"):
            room.fresh(
                f"images/{part}/{name.partition('/')[2]}{suffix}", change.changed_bytes(raw, rng) if number == changed else raw
            )

    def read() -> None:
        data = load_data(f"imagefolder:{room.folder / 'images'}", seed=0)
        for split in (data.train, data.search, data.test):
            split.read(np.arange(len(split)))

    return Call(_called(read))


def weights_file(room: Room, rng: random.Random) -> Call:
    import torch
    from safetensors.torch import load_file, save

    state: dict[str, Any] = load_file(room.shop.weights)
    pickled = rng.random() < 0.5
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(state))
        match rng.randrange(4):
            case 0:
                state[rng.choice(("", "x", change.ESCAPE, f"module.{name}"))] = state.pop(name)
            case 1 if pickled:
                state[name] = rng.choice((None, [1], {"a": state}, "x", torch.empty(3, device="meta"), torch.eye(3).to_sparse()))
            case _ if isinstance(state[name], torch.Tensor) and state[name].layout is torch.strided and not state[name].is_meta:
                array = change.changed_array(state[name].numpy(), rng)
                plain = array.dtype.kind in "fiub" and array.dtype != np.dtype("uint64")
                state[name] = torch.from_numpy(array.copy()) if plain else state[name].to(torch.float16)
    if pickled:
        buffer = io.BytesIO()
        wrapped = {"state_dict": state, "epoch": 3}
        legacy = rng.random() < 0.4
        torch.save(rng.choice((state, wrapped, list(state.values()), wrapped)), buffer, _use_new_zipfile_serialization=not legacy)
        raw = buffer.getvalue() if legacy else change.recompressed(buffer.getvalue(), rng)
    else:
        raw = save({name: tensor.contiguous() for name, tensor in state.items()})
    file = room.fresh(
        "weights" + (".pt" if pickled else ".safetensors"), change.changed_bytes(raw, rng) if rng.random() < 0.5 else raw
    )
    return Call(["inspect", "--model", f"{room.shop.model}:network", "--weights", str(file), "--input-shape", "1,8,8", "--json"])


def board_file(room: Room, rng: random.Random) -> Call:
    from edge_compress.devices import board

    lines = (
        *('targets = ["x86"]', 'transport = "local"', 'runtime = "onnxruntime"', "threads = 1", "affinity = [0]"),
        *('class = "desk"', 'precisions = ["fp32"]', "memory_mib = 100", 'power_mode = ""', 'notes = "mine"', "emulated = false"),
    )
    file = room.fresh("desk.toml", change.changed_toml("\n".join(lines), rng))
    if rng.random() < 0.85:
        return Call(_called(lambda: board.load(str(file))))
    model = room.wanted.folder / "artifacts/x86/model.onnx"
    return Call(["profile", str(model), "--device", str(file), "--sessions", "1"], run=True)


def board_reply(room: Room, rng: random.Random) -> Call:
    """The answers of the agent on a board, one of them changed."""
    number, seed = rng.randrange(14), rng.randrange(2**32)

    def before() -> None:
        from edge_compress.devices.agent.frames import Channel

        receive, count = Channel.receive, iter(range(10**9))

        def changed(self: Channel, *more: Any, **named: Any) -> tuple[dict[str, Any], bytes]:
            header, payload = receive(self, *more, **named)
            if next(count) != number:
                return header, payload
            own = random.Random(seed)
            if payload and own.random() < 0.5:
                return header, change.changed_bytes(payload, own)
            return change.changed_json(header, own), payload

        Channel.receive = changed  # type: ignore[method-assign]

    model = room.wanted.folder / "artifacts/x86/model.onnx"
    return Call(["profile", str(model), "--sessions", "1"], before, run=True)


def bundle_file(room: Room, rng: random.Random) -> Call:
    whole = changed = room.bundle.read_bytes()
    while changed == whole:
        changed = change.changed_bytes(whole, rng)
    return Call(["verify", str(room.fresh(room.bundle.name, changed))], refused=True)


def bundle_content(room: Room, rng: random.Random) -> Call:
    """A bundle that is whole, with its manifest, its report or another member changed and all digests right."""
    from edge_compress.pipeline.release import archive

    packed = archive.unpack(room.bundle)
    files = dict(packed.files)
    name = rng.choice(("manifest.json", "manifest.json", "report.json", *files))
    if name == "report.json":
        files[name] = _with_digest(change.changed_json(json.loads(files[name]), rng), rng)
    elif name.endswith(".json"):
        files[name] = change.json_text(change.changed_json(json.loads(files[name]), rng), rng)
    else:
        files[name] = change.changed_bytes(files[name], rng)
    if name != "manifest.json":
        manifest = json.loads(files["manifest.json"])
        for entry in manifest["files"]:
            entry.update(sha256=hashlib.sha256(files[entry["path"]]).hexdigest(), size_bytes=len(files[entry["path"]]))
        files["manifest.json"] = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    return Call(["verify", str(room.fresh(room.bundle.name, archive.pack(archive.Archive(packed.folder, files))))])


def report_file(room: Room, rng: random.Random) -> Call:
    run = room.copy()
    file = run / "report.json"
    file.write_bytes(_with_digest(change.changed_json(json.loads(file.read_bytes()), rng), rng))
    whole, other = str(room.wanted.folder), str(room.folder / "out")
    return Call(
        rng.choice(
            (
                *(["verify", str(run)], ["verify", str(run)], ["report", str(run)]),
                ["release", str(run), "--out", other, "--allow-failed"],
                ["report", whole, str(run), "--out", f"{other}.html"],
                ["verify", whole, "--against", str(file)],
            )
        )
    )


def model_file(room: Room, rng: random.Random) -> Call:
    """An artifact or its golden samples, changed, with the report's digests right; or a model to profile."""
    run = room.copy()
    name = rng.choice(("model.onnx", "golden.safetensors"))
    file = run / "artifacts/x86" / name
    file.write_bytes(change.changed_bytes(file.read_bytes(), rng))
    if name == "model.onnx" and rng.random() < 0.5:
        return Call(["profile", str(file), "--sessions", "1"], run=True)
    report = json.loads((run / "report.json").read_bytes())
    entry = report["targets"]["x86"]["artifact" if name == "model.onnx" else "golden"]
    entry.update(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size_bytes=file.stat().st_size)
    (run / "report.json").write_bytes(_with_digest(report, random.Random(1)))
    return Call(["verify", str(run)])


def run_record(room: Room, rng: random.Random) -> Call:
    """A result, a remark or a setting of a finished run, changed, the digest made right; the same command again."""
    from edge_compress.pipeline.codec import json_sha256

    run = room.copy()
    file = rng.choice(sorted([*run.glob("stages/**/*.json"), run / "config.toml"]))
    if file.suffix == ".toml":
        file.write_bytes(change.changed_toml(file.read_text(encoding="utf-8"), rng))
    else:
        stored = json.loads(file.read_bytes())
        changed = change.changed_json(stored, rng)
        if file.name == "result.json" and rng.random() < 0.7:
            changed = {**stored, "result": change.changed_json(stored["result"], rng)}
            try:
                changed["sha256"] = json_sha256(changed["result"])
            except (ValueError, TypeError, UnicodeError):  # what has no digest is refused by it
                changed["sha256"] = ""
        file.write_bytes(change.json_text(changed, rng))
    return Call(room.shop.arguments("demo", run), run=True)


def cache_lines(room: Room, rng: random.Random) -> Call:
    """A latency cache and an evaluations file with lines changed, checks made right."""
    from edge_compress.devices.measure import latency_cache
    from edge_compress.pipeline.codec import json_sha256
    from edge_compress.pipeline.evaluate.evaluation_log import Memo

    (cache,) = (room.shop.cache("demo") / "latency").glob("*.jsonl")
    (memo,) = room.wanted.folder.glob("stages/candidates-*/evaluations.jsonl")
    context = json.loads(cache.read_bytes().splitlines()[0])["context"]

    def changed(file: Path, check: Callable[[Any], str]) -> bytes:
        lines = file.read_bytes().splitlines()
        at = rng.randrange(len(lines))
        value = change.changed_json(json.loads(lines[at]), rng)
        if isinstance(value, dict) and rng.random() < 0.8:
            try:
                value["check"] = check({key: own for key, own in value.items() if key != "check"})
            except (ValueError, TypeError, UnicodeError):
                value["check"] = ""
        lines[at] = change.json_text(value, rng).replace(b"\n", b"")
        return b"\n".join(lines) + b"\n"

    folder = room.fresh(f"latency/{cache.name}", changed(cache, latency_cache._check)).parent
    evaluations = room.fresh(memo.name, changed(memo, json_sha256))
    return Call(_called(lambda: (latency_cache.LatencyCache(context, folder), Memo(evaluations))))


def public_key(room: Room, rng: random.Random) -> Call:
    text = b"untrusted comment: minisign public key\nRWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n"
    key = room.fresh("key.pub", change.changed_bytes(text, rng))
    bundle = room.fresh(room.bundle.name, room.bundle.read_bytes())
    signature = b"untrusted comment: x\nRUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJyl"
    signature += b"DOocrCo8KLzZwo=\ntrusted comment: x\nAAAA\n"
    room.fresh(f"{bundle.name}.minisig", change.changed_bytes(signature, rng))
    return Call(["verify", str(bundle), "--public-key", str(key)])


DOORS: dict[Callable[[Room, random.Random], Call], int] = {  # with their shares of the inputs
    config_file: 20,
    npz_file: 20,
    image_folder: 10,
    weights_file: 25,
    board_file: 15,
    board_reply: 5,
    bundle_file: 15,
    bundle_content: 20,
    report_file: 25,
    model_file: 8,
    run_record: 3,
    cache_lines: 20,
    public_key: 5,
}
