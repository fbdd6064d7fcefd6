"""Seeded mutations of what comes from outside: bytes, JSON, TOML, arrays. Every function leaves its input as it was."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

ESCAPE = "\x1b]0;owned\x07\x1b[31mred"
_LONG = "x" * 5000
DEEP = 20_000
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**400),
    *(0.5, -0.0, 1e-308, 1e308, -1e9, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "x",
        ESCAPE,
        _LONG,
        "é\udc80",
        "line\nline",
        "\0",
        "1",
        "nan",
        "../../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "-rf",
        "~nouser/x",
        "(,)f4",
        "2f4",
        "artifacts/x86/gol den",
        "99999999999999999999,1",
    ),
    [1] * 65,
    *([], {}, [[]], [1, 2, 3], ["x"] * 1000, {"a": {"b": 1}}, {"": None}, [None], [{}]),
)
_TOML = (
    *("", "true", "-1", "0", "1e400", "nan", "-inf", "9" * 5000, "0x7fffffffffffffff", "1979-05-27", '""', '"\\u0000"'),
    *('"\\u001b[31mred"', "[]", "[[]]", "{}", '["x86", "x86"]', "[1, 2]", '"../../etc/passwd"', '"~nouser/x"', f'"{_LONG}"'),
    *("[" * 3000 + "]" * 3000, "'''", '"\\ud800"', '"8ms"', '"0.5,0.5"', '"1%"', '"4GB"', "[nan]", '"auto"'),
)
_CHUNKS = (b"", b"\0", b"\xff" * 8, b"[" * DEEP, b'{"a":' * DEEP, b"\x80\x7f" * 6, b"9" * 5000, b"\xed\xa0\x80", b"\n\n", b"NaN")
_DTYPES = ("bool", "int8", "uint8", "int64", "float16", "float32", "float64", "complex64", "datetime64[s]", "U4", "S3", "object")


def recompressed(archive: bytes, rng: random.Random) -> bytes:
    """A zip archive with its files stored, as they were, or compressed in one of the ways that Python reads."""
    kind, buffer = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)), io.BytesIO()
    if kind == zipfile.ZIP_STORED:
        return archive
    with zipfile.ZipFile(io.BytesIO(archive)) as plain, zipfile.ZipFile(buffer, "w", kind) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    return buffer.getvalue()


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file with one to four changes: bits, cuts, insertions, repetitions; sometimes another file altogether."""
    if rng.random() < 0.05:
        return rng.choice((b"", b"\0", b"hello\n", rng.randbytes(1000), data + data, b"PK\x03\x04" + bytes(100), data[::-1]))
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 2, 4, 8, 64, 4096)))
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                changed[at:end] = rng.choice(_CHUNKS)
            case 3:
                changed[at:at] = rng.choice(_CHUNKS)
            case 4:
                changed[at:end] = rng.randbytes(end - at)
            case _:
                changed[at:at] = changed[at:end]
    return bytes(changed)


def changed_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three places deleted, renamed or replaced by what does not belong there."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return rng.choice(HOSTILE)
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", ESCAPE, _LONG, f"{key}2"))] = holder.pop(key)
            case 2 if isinstance(holder, dict):
                holder["unknown"] = rng.choice(HOSTILE)
            case 3:
                other, place = rng.choice(places)
                holder[key] = copy.deepcopy(other[place])
            case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = rng.choice((-holder[key], holder[key] * 1000, holder[key] + 1, str(holder[key])))
            case _:
                holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return changed


def json_text(value: Any, rng: random.Random) -> bytes:
    """The value as text; sometimes with the text itself damaged."""
    try:
        text = json.dumps(value, indent=rng.choice((None, 1)))
    except ValueError:  # an integer of more digits than Python prints
        text = '{"value": 1' + "0" * 5000 + "}"
    data = text.encode("utf-8", "surrogatepass")
    return changed_bytes(data, rng) if rng.random() < 0.1 else data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of everything below a value; of a list no more than its first three."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 3)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def changed_toml(text: str, rng: random.Random) -> bytes:
    """A TOML file with values, keys and lines changed."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key = lines[at].partition(" = ")[0]
        match rng.randrange(7):
            case 0:
                lines.insert(at, lines[at])
            case 1:
                lines[at] = f"{key}x = 1"
            case 2:
                lines.insert(at, rng.choice(("[table]", "[[table]]", "[table", "a.b.c = 1", "= 1", "\x07", "\ufeff", '"" = 1')))
            case _:
                lines[at] = f"{key} = {rng.choice(_TOML)}"
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return changed_bytes(data, rng) if rng.random() < 0.15 else data


def changed_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """An array of another type, shape, length or content."""
    match rng.randrange(8):
        case 0:
            return array.reshape(-1)
        case 1:
            return array[: rng.randrange(min(len(array), 4) + 1)] if array.ndim else array
        case 2:
            return array[..., None]
        case 3 if array.size and array.dtype.kind == "f":
            broken = array.copy()
            broken.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, 3e38))
            return broken
        case 3:
            return np.full_like(array, 255 if array.dtype == np.uint8 else -1)
        case 4:
            return array.T
        case 5:
            return np.concatenate([array, array[:1]]) if array.ndim and len(array) else array
        case 6:
            return np.array(rng.choice((None, "x", 3, [], {"a": 1})))
        case _:
            try:
                return array.astype(rng.choice(_DTYPES))
            except (TypeError, ValueError):
                return array.astype(object)


def changed_npz(arrays: Mapping[str, np.ndarray], rng: random.Random) -> bytes:
    """An npz file with arrays changed, renamed or left out, or with its zip or a header damaged."""
    changed = dict(arrays)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(changed) or ["x"])
        match rng.randrange(5):
            case 0:
                changed.pop(name, None)
            case 1 if name in changed:
                changed[rng.choice(("", "../x", ESCAPE, "classes", f"{name}_"))] = changed[name]
            case _ if name in changed:
                changed[name] = changed_array(changed[name], rng)
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, array in changed.items():
            archive.writestr(f"{name}.npy", _npy(array, rng))
    data = buffer.getvalue()
    return changed_bytes(data, rng) if rng.random() < 0.3 else data


def _npy(array: np.ndarray, rng: random.Random) -> bytes:
    """An array in numpy's format, one in five with another header."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    data = buffer.getvalue()
    if rng.random() < 0.8:
        return data
    heads = (
        "{'descr': '|u1', 'fortran_order': False, 'shape': (40000, 1000, 1000), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (3,",
        "{'descr': [('a', '<i4')] , 'fortran_order': True, 'shape': (1,), }",
        "(" * 5000,
    )
    head = rng.choice(heads).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data[128:]
