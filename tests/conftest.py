"""How `make test` shares the tests out among processes: a file stays together, and so do all runs of the command line."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The end-to-end tests share networks and a finished run, which one process makes once."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist's own groups are unknown to pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "e2e" if "/e2e/" in path else path

    return ByFile(config, log)
