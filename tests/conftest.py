"""How `make test` shares the tests out among processes: a file stays together, and so do tests that share a finished run."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pytest

# the end-to-end tests that read one finished run, which a process makes once; the others make their own runs, in another process
SHARING = ("test_bad_input.py", "test_bundle.py", "test_demo.py", "test_resume.py", "test_verdict.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The end-to-end tests are two groups, of about the same time; each makes the networks that it uses once."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist's own groups are unknown to pytest 9.2
        def _split_scope(self, nodeid: str) -> str:
            path = PurePosixPath(nodeid.partition("::")[0])
            if "e2e" not in path.parts:
                return str(path)
            return "e2e: one finished run" if path.name in SHARING else "e2e: runs of their own"

    return ByFile(config, log)
