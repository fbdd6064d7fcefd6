"""Jetsons that are none: behind an ssh that runs their commands here, with stand-ins on their PATH for what JetPack brings.

What the stand-ins build is stamped. A test that wants to see what lies behind the stamp takes it away itself.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

DEVICES = Path(__file__).parent
# `down` in a board's folder: a word in a command, on which the link to it goes down when it has come `after` times
SSH = """#!/bin/sh
case "$*" in *"-O exit"*) exit 0;; esac
for part; do host=$command; command=$part; done
cd "{boards}/$host" || exit 255
if [ -e down ]; then
    case "$command" in *"$(cat down)"*) echo >>seen;; esac
    if [ "$(cat seen 2>/dev/null | wc -l)" -gt "$(cat after)" ]; then
        echo "Timeout, server $host not responding." >&2; exit 255
    fi
fi
PATH="$PWD/programs:$PATH" exec sh -c "$command"
"""
SCP = """#!{python}
import pathlib, shutil, sys
boards = pathlib.Path({boards!r})
places = [boards.joinpath(*part.rsplit(":", 1)) if ":" in part else pathlib.Path(part).absolute() for part in sys.argv[-2:]]
shutil.copy(*places)
"""
MODE = '#!/bin/sh\necho "NV Power Mode: 15W"\n'
PYTHON = '#!/bin/sh\nPYTHONPATH={devices} exec {python} {devices}/tensorrt_python_standin.py {told} "$@"\n'
TEGRASTATS = """#!/bin/sh
while :; do echo "RAM 1/7MB CPU [5%@729] GR3D_FREQ 26% tj@46.4C VDD_IN 4900mW/5000mW"; sleep 0.1; done
"""


class PretendedJetson:
    """One board: its file for --device, and what its programs are told."""

    def __init__(self, boards: Path, name: str) -> None:
        self.name, self.home, self.file = name, boards / name, boards / f"{name}.toml"
        self.programs = self.home / "programs"
        self.programs.mkdir(parents=True)
        self.put("trtexec", (DEVICES / "trtexec_standin.py").read_text().replace('"""A', f'#!{sys.executable}\n"""A', 1))
        self._told: dict[str, object] = {"version": "100300"}
        self.tell()
        self.describe()

    def describe(self, **more: str) -> None:
        """Write its file."""
        words = {"transport": "ssh", "runtime": "tensorrt", "address": self.name, "python": sys.executable} | more
        self.file.write_text('targets = ["jetson"]\n' + "".join(f'{key} = "{word}"\n' for key, word in words.items()))

    def put(self, name: str, text: str) -> None:
        """Put a program on its PATH."""
        executable(self.programs / name, text)

    def tell(self, **more: object) -> None:
        """What its trtexec has to do from now on; see the stand-in."""
        self._told |= more
        (self.programs / "trtexec.json").write_text(json.dumps(self._told))

    def bring_jetpack(self) -> None:
        """What a real one has besides trtexec: Python that knows TensorRT, tegrastats, nvpmodel."""
        told = self.programs / "trtexec.json"
        self.put("python3", PYTHON.format(devices=DEVICES, python=sys.executable, told=told))
        self.put("tegrastats", TEGRASTATS)
        self.put("nvpmodel", MODE)

    def goes_down_at(self, word: str, after: int) -> None:
        """The link goes down, and stays so, when commands with this word in it have come so many times."""
        (self.home / "after").write_text(str(after))
        (self.home / "down").write_text(word)

    def engines(self) -> list[Path]:
        """The engines that lie on it."""
        return sorted(self.home.rglob("*.engine"))


def executable(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def jetsons(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[PretendedJetson, ...]:
    """Boards of these names, and the ssh and scp that lead to them, on PATH."""
    boards, tools = folder / "boards", folder / "tools"
    boards.mkdir()
    tools.mkdir()
    executable(tools / "ssh", SSH.format(boards=boards))
    executable(tools / "scp", SCP.format(boards=str(boards), python=sys.executable))
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    return tuple(PretendedJetson(boards, name) for name in names)
