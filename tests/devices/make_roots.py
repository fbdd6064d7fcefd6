"""Makes what `make test-devices` needs beside programs: a root with adbd, and an aarch64 user space, in build/devices.

    python tests/devices/make_roots.py

Takes mmdebstrap, QEMU and root; what cannot be made is said, and the tests that want it are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOTS = Path(__file__).parents[2] / "build" / "devices"
ADBD = "adbd,coreutils,dash,bash,python3,procps"
ARM64 = "python3,libgomp1,libstdc++6,ca-certificates,coreutils,dash,bash,procps,sed,grep,libc-bin"
SITE = ("numpy", "onnxruntime", "flatbuffers", "packaging", "protobuf", "ml_dtypes", "tqdm", "typing_extensions")
LITERT = ("ai-edge-litert==2.3.0", "backports.strenum")
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
DEADLINE_S = 900


def main() -> int:
    """Make what is not there."""
    ROOTS.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        sys.stderr.write("roots of Debian: root and mmdebstrap are needed; their tests are skipped\n")
        return 0
    make("adbd", lambda into: bootstrap("amd64", ADBD, "trixie", into))
    if shutil.which("qemu-aarch64-static") is None or shutil.which("arch-test") is None:
        sys.stderr.write("aarch64 user space: qemu-user-static and arch-test are needed; its tests are skipped\n")
        return 0
    make("arm64", lambda into: bootstrap("arm64", ARM64, "bookworm", into))
    make("arm64-site", packages)
    return 0


def make(name: str, how) -> None:  # type: ignore[no-untyped-def]
    """Make one folder, whole or not at all."""
    target, part = ROOTS / name, ROOTS / f"{name}.part"
    if target.exists():
        return
    shutil.rmtree(part, ignore_errors=True)
    sys.stderr.write(f"making {target} ...\n")
    try:
        subprocess.run(how(part), check=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(part, ignore_errors=True)
        sys.stderr.write(f"{name} cannot be made ({error}); its tests are skipped\n")
    else:
        part.rename(target)


def bootstrap(machine: str, packages: str, suite: str, into: Path) -> list[str]:
    """The command for a root; `extract` runs none of the packages' scripts."""
    return ["mmdebstrap", f"--arch={machine}", "--variant=extract", f"--include={packages}", suite, str(into)]


def packages(into: Path) -> list[str]:
    """The command for the runtimes' aarch64 wheels, in the versions of this environment."""
    pinned = [f"{name}=={metadata.version(name)}" if name in ("numpy", "onnxruntime") else name for name in SITE]
    options = [part for name in PLATFORMS for part in ("--platform", name)]
    return [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(into), "--only-binary=:all:"),
        *("--python-version", "3.11", *options, *pinned, *LITERT),
    ]


if __name__ == "__main__":
    sys.exit(main())
