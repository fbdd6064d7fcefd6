"""How `make test` shares the tests out among processes: a file stays together, and so do all runs of the command line."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The end-to-end tests share networks and a finished run, which one process makes once."""
    for item in items:
        group = "e2e" if "/e2e/" in item.path.as_posix() else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
