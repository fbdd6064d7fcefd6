"""Labels and metadata, as readers that know nothing of this project find them."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest
from edge_compress.pipeline.errors import BuildError
from edge_compress.pipeline.signature import image_signature
from edge_compress.targets.tflite.metadata import Record, standard, with_labels

PIXELS = Record((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), ("cat", "dog", "größe"))
PLAIN = Record((), (), ("a", "b"))


class Table:
    """A flatbuffer table read by hand, so that writer and reader share no code."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place

    @classmethod
    def root(cls, data: bytes) -> Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def where(self, field: int) -> int | None:
        start = self.place - struct.unpack_from("<i", self.data, self.place)[0]
        length = struct.unpack_from("<H", self.data, start)[0]
        if 4 + 2 * field >= length:
            return None
        offset = struct.unpack_from("<H", self.data, start + 4 + 2 * field)[0]
        return self.place + offset if offset else None

    def follow(self, field: int) -> int:
        at = self.where(field)
        assert at is not None, f"field {field} is not there"
        return at + struct.unpack_from("<I", self.data, at)[0]

    def number(self, field: int, kind: str) -> int:
        at = self.where(field)
        return 0 if at is None else struct.unpack_from(f"<{kind}", self.data, at)[0]

    def table(self, field: int) -> Table:
        return Table(self.data, self.follow(field))

    def text(self, field: int) -> str:
        at = self.follow(field)
        length = struct.unpack_from("<I", self.data, at)[0]
        return self.data[at + 4 : at + 4 + length].decode()

    def tables(self, field: int) -> list[Table]:
        at = self.follow(field)
        places = [at + 4 + 4 * n for n in range(struct.unpack_from("<I", self.data, at)[0])]
        return [Table(self.data, place + struct.unpack_from("<I", self.data, place)[0]) for place in places]

    def floats(self, field: int) -> list[float]:
        at = self.follow(field)
        return list(struct.unpack_from(f"<{struct.unpack_from('<I', self.data, at)[0]}f", self.data, at + 4))


def test_the_standard_metadata_says_what_goes_in_and_what_the_outputs_are_called():
    data = standard(image_signature((3, 24, 32)), PIXELS)
    assert data[4:8] == b"M001"
    (graph,) = Table.root(data).tables(3)
    (image,), (logits,) = graph.tables(2), graph.tables(3)
    assert image.text(0) == "image"
    content = image.table(3)
    assert content.number(0, "B") == 2  # ImageProperties
    size = content.table(1).table(1)
    assert (content.table(1).number(0, "b"), size.number(0, "I"), size.number(1, "I")) == (1, 32, 24)  # RGB, width, height
    (unit,) = image.tables(4)
    assert unit.number(0, "B") == 1  # NormalizationOptions: pixels go in as they are
    assert (unit.table(1).floats(0), unit.table(1).floats(1)) == ([0.0], [1.0])
    assert (image.table(5).floats(0), image.table(5).floats(1)) == ([255.0], [0.0])
    (labels,) = logits.tables(6)
    assert (labels.text(0), labels.number(2, "b")) == ("labels.txt", 2)  # TENSOR_AXIS_LABELS


def test_a_network_that_takes_normalised_inputs_claims_no_pixels():
    (graph,) = Table.root(standard(image_signature((1, 8, 8)), PLAIN)).tables(3)
    (image,) = graph.tables(2)
    assert image.where(4) is None
    assert image.where(5) is None
    assert "already" in image.text(1)
    assert image.table(3).table(1).number(0, "b") == 2  # grey


def test_labels_lie_in_an_archive_behind_the_model():
    model = b"\x1c\x00\x00\x00TFL3" + bytes(100)
    packed = with_labels(model, PIXELS.classes)
    assert packed.startswith(model)
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert archive.namelist() == ["labels.txt"]
        assert archive.read("labels.txt").decode() == "cat\ndog\ngröße\n"
    assert with_labels(model, PIXELS.classes) == packed


def test_a_class_name_of_two_lines_is_refused():
    with pytest.raises(BuildError, match=r"class names.*'a\\nb'.*one line each"):
        with_labels(b"", ("x", "a\nb"))


HUGE = b'{"mean": [1' + b"0" * 400 + b'], "std": [1], "classes": []}'  # no float holds it


def test_the_record_comes_back_and_a_broken_one_is_named():
    assert Record.from_bytes(PIXELS.to_bytes()) == PIXELS
    for broken in (b"", b"{}", b"[1]", b'{"mean": 1, "std": [], "classes": []}', b"[" * 100_000, HUGE):
        with pytest.raises(BuildError, match="record inside"):
            Record.from_bytes(broken)
