"""Folders of a user, outside his runs: his home, and what is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from ..pipeline.errors import InputError


def home_folder() -> Path:
    """Returns the user's home folder.

    Raises:
        InputError: there is none, as for a user of a container who is not in its /etc/passwd.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        do = "set HOME, or XDG_CONFIG_HOME and XDG_CACHE_HOME"
        raise InputError("the home folder", found="none for this user", expected="one", do=do) from error


def user_cache() -> Path:
    """Returns $EDGE_COMPRESS_CACHE, else edge-compress in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("EDGE_COMPRESS_CACHE", "")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else home_folder() / ".cache") / "edge-compress"


def cache_folder() -> Path:
    """Returns the folder of the latency caches, in `user_cache`."""
    return user_cache() / "latency"
