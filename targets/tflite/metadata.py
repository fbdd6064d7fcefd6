"""What readers of a .tflite file find in it: the standard TFLite Metadata, the labels as a packed file, and our own record.

Written by hand with flatbuffers, field by field: the package that has generated classes for it (tflite-support) needs protobuf 3.
Field numbers are those of metadata_schema.fbs, version 1.1.0 (tflite-support 0.4.4). The labels lie in a zip archive appended to
the file, where Android's MetadataExtractor and `unzip` find them; a runtime reads the flatbuffer in front and never gets there.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import flatbuffers
import numpy as np

from ...pipeline.errors import BuildError

STANDARD = "TFLITE_METADATA"  # the name under which readers look for it
OWN = "EDGE_COMPRESS"
LABELS = "labels.txt"
_IDENTIFIER = b"M001"
_IMAGE_PROPERTIES, _FEATURE_PROPERTIES, _NORMALIZATION = 2, 1, 1  # members of the unions
_RGB, _GRAYSCALE, _UNKNOWN = 1, 2, 0
_AXIS_LABELS = 2
_STAMP = (1980, 1, 1, 0, 0, 0)  # equal labels give equal bytes


@dataclass(frozen=True)
class Record:
    """What our own runner needs: how images of the file's input relate to network inputs."""

    mean: tuple[float, ...]  # per channel, of pixels on [0, 1]; empty: the file takes network inputs as they are
    std: tuple[float, ...]
    classes: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """JSON, sorted."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The inverse of `to_bytes`.

        Raises:
            BuildError: the bytes are no such record.
        """
        try:
            values = json.loads(data)
            mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
            return cls(mean, std, tuple(str(c) for c in values["classes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BuildError("the record inside the .tflite file cannot be read", found=str(error)) from error


def standard(image_shape: tuple[int, int, int], record: Record) -> bytes:
    """The ModelMetadata flatbuffer: an image input that needs no normalisation (or says which was done), labelled logits.

    Args:
        image_shape: (C, H, W).
        record: with its mean, the file takes pixels 0..255 and normalises them itself; without, it takes network inputs.
    """
    channels, height, width = image_shape
    b = flatbuffers.Builder(1024)
    color = {3: _RGB, 1: _GRAYSCALE}.get(channels, _UNKNOWN)
    size = _table(b, [(0, "uint32", width), (1, "uint32", height)])
    properties = _table(b, [(0, "int8", color), (1, "table", size)])
    content = _table(b, [(0, "uint8", _IMAGE_PROPERTIES), (1, "table", properties)])
    units = []
    if record.mean:
        options = _table(b, [(0, "table", _floats(b, [0.0])), (1, "table", _floats(b, [1.0]))])
        units = [_table(b, [(0, "uint8", _NORMALIZATION), (1, "table", options)])]
    stats = _table(b, [(0, "table", _floats(b, [255.0])), (1, "table", _floats(b, [0.0]))]) if record.mean else 0
    what = "pixels 0..255, normalised inside the model" if record.mean else "pixels, already scaled and normalised"
    image = _table(
        b,
        [
            (0, "table", b.CreateString("image")),
            (1, "table", b.CreateString(f"NHWC image, {what}")),
            (3, "table", content),
            (4, "table", _tables(b, units)),
            (5, "table", stats),
        ],
    )
    feature = _table(b, [(0, "uint8", _FEATURE_PROPERTIES), (1, "table", _table(b, []))])
    named = b.CreateString(LABELS)
    labels = _table(b, [(0, "table", named), (1, "table", b.CreateString("class names, in order")), (2, "int8", _AXIS_LABELS)])
    logits = _table(
        b,
        [
            (0, "table", b.CreateString("logits")),
            (1, "table", b.CreateString("one score for each class, before softmax")),
            (3, "table", feature),
            (6, "table", _tables(b, [labels])),
        ],
    )
    graph = _table(b, [(2, "table", _tables(b, [image])), (3, "table", _tables(b, [logits]))])
    root = _table(
        b,
        [
            (0, "table", b.CreateString("edge-compress classifier")),
            (3, "table", _tables(b, [graph])),
            (7, "table", b.CreateString("1.0.0")),
        ],
    )
    b.Finish(root, _IDENTIFIER)
    return bytes(b.Output())


def described(data: bytes, image_shape: tuple[int, int, int], record: Record) -> bytes:
    """The file with the standard metadata, our own record and the labels in it."""
    return with_labels(put(data, {STANDARD: standard(image_shape, record), OWN: record.to_bytes()}), record.classes)


def put(data: bytes, entries: Mapping[str, bytes]) -> bytes:
    """The file with these metadata entries, in place of older ones of the same names."""
    from ai_edge_litert import schema_py_generated as schema

    from .file import read, write

    model = read(data)
    model.metadata = [old for old in model.metadata or [] if old.name.decode() not in entries]
    for name, value in entries.items():
        buffer, new = schema.BufferT(), schema.MetadataT()
        buffer.data = np.frombuffer(value, np.uint8)
        new.name, new.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata.append(new)
    return write(model)


def entry(data: bytes, name: str, file: str = "the file") -> bytes | None:
    """A metadata entry of a file, or None; `file` is the file's name, for messages.

    Raises:
        BuildError: the bytes are no .tflite file.
    """
    from .file import read

    model = read(data, file)
    return next((bytes(model.buffers[e.buffer].data) for e in model.metadata or [] if e.name.decode() == name), None)


def with_labels(data: bytes, classes: Sequence[str]) -> bytes:
    """The model's file with `labels.txt`, one class a line, packed behind it.

    Raises:
        BuildError: a class name has a line break in it, which would shift the names after it.
    """
    broken = next((name for name in classes if len(name.splitlines()) > 1), None)
    if broken is not None:
        raise BuildError("class names in labels.txt", found=repr(broken), expected="one line each")
    file = io.BytesIO()
    file.write(data)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(LABELS, _STAMP), "".join(f"{name}\n" for name in classes))
    return file.getvalue()


def labels_of(data: bytes) -> tuple[str, ...]:
    """The class names packed into a file, or none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return tuple(archive.read(LABELS).decode().splitlines())
    except (zipfile.BadZipFile, KeyError):
        return ()


def _table(b: Any, fields: Sequence[tuple[int, str, int]]) -> int:
    """A table of (field number, kind, value); a value of 0 is the default and is left out."""
    put = {
        "table": b.PrependUOffsetTRelativeSlot,
        "uint32": b.PrependUint32Slot,
        "uint8": b.PrependUint8Slot,
        "int8": b.PrependInt8Slot,
    }
    b.StartObject(max((number for number, _, _ in fields), default=-1) + 1)
    for number, kind, value in fields:
        put[kind](number, value, 0)
    return int(b.EndObject())


def _tables(b: Any, offsets: Sequence[int]) -> int:
    """A vector of tables; 0 for none."""
    if not offsets:
        return 0
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    return int(b.EndVector())


def _floats(b: Any, values: Sequence[float]) -> int:
    b.StartVector(4, len(values), 4)
    for value in reversed(values):
        b.PrependFloat32(value)
    return int(b.EndVector())
