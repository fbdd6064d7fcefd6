"""What installed packages say of themselves."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def license_of(package: str) -> str:
    """A package's licence: its SPDX expression, else the words of its classifiers or of its field; "" where it says nothing."""
    about = metadata.metadata(package)
    named = [text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or () if text.startswith("License :: OSI")]
    expression, said = (next(iter(about.get_all(key) or ()), "") for key in ("License-Expression", "License"))
    return expression or " AND ".join(named) or (said if len(said) < 100 and "\n" not in said else "")


def own_license() -> str:
    """The text of this tool's licence."""
    files = metadata.distribution("edge-compress").files or []
    return Path(str(next(file for file in files if file.name == "LICENSE").locate())).read_text(encoding="utf-8")
