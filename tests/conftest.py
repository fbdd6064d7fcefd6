"""How `make test` shares the tests out among processes: a file stays together, and so do tests that share a finished run."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

# the end-to-end tests that read one finished run, which a process makes once
SHARING = ("test_bad_input.py", "test_bundle.py", "test_demo.py", "test_resume.py", "test_verdict.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A scope is a file, but for the tests of `SHARING`, which are one."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist's own groups are unknown to pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            path = PurePosixPath(nodeid.partition("::")[0])
            return "one finished run" if "e2e" in path.parts and path.name in SHARING else str(path)

    return ByFile(config, log)
