"""A run: the stages in order, for one latency budget or for several.

In: a `Config`. Out: the run folder with its report, and the exit code. Start with `stages.run_one`; `budgets` is around it.
"""

from .budgets import run_pipeline

__all__ = ["run_pipeline"]
