"""Metadata of a .tflite file: the standard TFLite Metadata, the labels as a packed file, and our own record.

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
from ...pipeline.signature import Signature

STANDARD = "TFLITE_METADATA"  # the name under which readers look for it
OWN = "EDGE_COMPRESS"
LABELS = "labels.txt"
_IDENTIFIER = b"M001"
_IMAGE_PROPERTIES, _FEATURE_PROPERTIES, _NORMALIZATION = np.uint8(2), np.uint8(1), np.uint8(1)  # members of the unions
_RGB, _GRAYSCALE, _UNKNOWN, _AXIS_LABELS = np.int8(1), np.int8(2), np.int8(0), np.int8(2)
_STAMP = (1980, 1, 1, 0, 0, 0)  # equal labels give equal bytes


@dataclass(frozen=True)
class Record:
    """Our own record: how images of the file's input relate to network inputs, and the classes."""

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
            BuildError: the bytes are not such a record.
        """
        try:
            values = json.loads(data)
            mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
            return cls(mean, std, tuple(str(c) for c in values["classes"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BuildError("the record inside the .tflite file cannot be read", found=str(error)) from error


def standard(signature: Signature, record: Record) -> bytes:
    """The ModelMetadata flatbuffer: an image input that needs no normalisation (or says which was done), labelled logits."""
    channels, height, width = signature.image_shape
    b = flatbuffers.Builder(1024)
    size = _table(b, np.uint32(width), np.uint32(height))
    properties = _table(b, {3: _RGB, 1: _GRAYSCALE}.get(channels, _UNKNOWN), size)
    content = _table(b, _IMAGE_PROPERTIES, properties)
    units, stats = [], 0
    if record.mean:
        units = [_table(b, _NORMALIZATION, _table(b, _floats(b, [0.0]), _floats(b, [1.0])))]
        stats = _table(b, _floats(b, [255.0]), _floats(b, [0.0]))
    what = "pixels 0..255, normalised inside the model" if record.mean else "pixels, already scaled and normalised"
    image = _table(b, b.CreateString("image"), b.CreateString(f"NHWC image, {what}"), 0, content, _tables(b, units), stats)
    feature = _table(b, _FEATURE_PROPERTIES, _table(b))
    labels = _table(b, b.CreateString(LABELS), b.CreateString("class names, in order"), _AXIS_LABELS)
    about = (b.CreateString("logits"), b.CreateString("one score for each class, before softmax"))
    logits = _table(b, *about, 0, feature, 0, 0, _tables(b, [labels]))
    graph = _table(b, 0, 0, _tables(b, [image]), _tables(b, [logits]))
    title = b.CreateString("edge-compress classifier")
    b.Finish(_table(b, title, 0, 0, _tables(b, [graph]), 0, 0, 0, b.CreateString("1.0.0")), _IDENTIFIER)
    return bytes(b.Output())


def described(data: bytes, signature: Signature, record: Record) -> bytes:
    """The file with our own record in it; a classifier's also with the standard metadata and the labels."""
    if not record.classes:
        return put(data, {OWN: record.to_bytes()})
    return with_labels(put(data, {STANDARD: standard(signature, record), OWN: record.to_bytes()}), record.classes)


def put(data: bytes, entries: Mapping[str, bytes]) -> bytes:
    """The file with these metadata entries, in place of older ones of the same names."""
    from ai_edge_litert import schema_py_generated as schema

    from .file import add_buffer, read, write

    model = read(data)
    model.metadata = [old for old in model.metadata or [] if old.name.decode() not in entries]
    for name, value in entries.items():
        model.metadata.append(schema.MetadataT(name, add_buffer(model, np.frombuffer(value, np.uint8))))
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


def _table(b: Any, *fields: Any) -> int:
    """A table of its fields by number: places of strings, vectors and tables, or scalars of numpy; 0 is left out."""
    scalars = {np.uint32: b.PrependUint32Slot, np.uint8: b.PrependUint8Slot, np.int8: b.PrependInt8Slot}
    b.StartObject(len(fields))
    for number, value in enumerate(fields):
        scalars.get(type(value), b.PrependUOffsetTRelativeSlot)(number, value, 0)
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
