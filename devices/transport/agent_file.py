"""The agent as the one file that a board gets: a zip that Python runs, with the same bytes from the same sources."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from pathlib import Path

from .. import agent

_NAME = "edge_compress_agent"  # of the package inside
_MAIN = f"import sys\n\nfrom {_NAME}.main import main\n\nsys.exit(main(sys.argv[1:]))\n"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the earliest date that a zip can hold


@functools.lru_cache(maxsize=1)
def packed_agent() -> tuple[bytes, str]:
    """The file and its SHA-256.

    `zipapp` would store the files' own dates, and another zlib compresses to other bytes: dates are fixed, nothing is compressed.
    """
    folder, buffer = Path(agent.__file__).parent, io.BytesIO()
    sources = {f"{_NAME}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in folder.rglob("*.py")}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted({"__main__.py": _MAIN.encode(), **sources}.items()):
            archive.writestr(zipfile.ZipInfo(name, _LONG_AGO), data)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()
