"""The search as a Gymnasium environment of one step."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from ..types import Candidate
from .problem import BudgetConstraint, Evaluator, FloatArray, Levels, SearchSettings, bounds, reward, shares_of, signal


class PruningEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Takes pruning ratios; answers with accuracy and measured latency.

    An episode has one step, which sets every layer's ratio at once. The reward of a setting is known only when the whole
    network is set, and nothing random happens between layers, so an episode that walks layer by layer would only spread one
    number over many steps; with one step, gamma = 0 and no value function has to look ahead.

    action: Box(-1, 1), one number per knob; the share of units removed, in [0, 1], is `(action + 1) / 2`.
        Gaussian policies want a symmetric box. In hard mode, shares that are over budget are projected onto it.
    observation: Box, float32: sparsity per knob (share removed by the last candidate), its accuracy, what it spends of the
        budget, the budget, the best reward so far. `reset(seed=...)` forgets the last candidate; `reset()` keeps it.
    reward: see `signal`. info: "candidate" and the reported "reward".
    """

    def __init__(self, evaluator: Evaluator, settings: SearchSettings, constraint: BudgetConstraint | None = None) -> None:
        self._evaluator, self._settings = evaluator, settings
        self.constraint = constraint or BudgetConstraint(evaluator.knobs, evaluator.latency_estimate, settings)
        n = len(evaluator.knobs)
        self.action_space = spaces.Box(-1.0, 1.0, (n,), np.float32)
        low = np.array([0.0] * n + [0.0, 0.0, 0.0, -10.0], dtype=np.float32)
        high = np.array([1.0] * n + [1.0, 10.0, 10.0, 10.0], dtype=np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self._forget()

    def _forget(self) -> None:
        self._last: Candidate | None = None
        self._best = 0.0

    def shares(self, action: ArrayLike) -> FloatArray:
        """Shares removed that an action stands for, projected onto the budget."""
        return self.constraint.clip((np.asarray(action, dtype=np.float64) + 1.0) / 2.0)

    def action(self, levels: Levels) -> NDArray[np.float32]:
        """The action that stands for these levels, before the projection: the middle of what is rounded to each knob's level.

        With its own share, level 0 would lie on the edge of the box, where noise goes one way only, and all knobs there would
        leave it together when a plan is a little over budget.
        """
        middles = [(low + high) / 2 for low, high in map(bounds, self._evaluator.knobs, levels)]
        return np.array([2.0 * middle - 1.0 for middle in middles], dtype=np.float32)

    def _observation(self) -> NDArray[np.float32]:
        if self._last is None:
            sparsity, accuracy = np.zeros(len(self._evaluator.knobs)), 0.0
            ratio = self._evaluator.latency_estimate((0,) * len(self._evaluator.knobs))
        else:
            sparsity = shares_of(self._evaluator.knobs, self._last.levels)
            accuracy, ratio = self._last.accuracy, self._last.spent
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        values = np.array([*sparsity, accuracy, ratio, self._settings.budget, self._best], dtype=np.float32)
        return np.clip(values, space.low, space.high)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode. No evaluation is spent."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._forget()
        return self._observation(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Evaluate the setting the action stands for; the episode ends."""
        candidate = self._evaluator.evaluate(self.constraint.levels(self.shares(action)))
        value = reward(candidate, self._settings)
        self._best = value if self._last is None else max(self._best, value)
        self._last = candidate
        return self._observation(), signal(candidate, self._settings), True, False, {"candidate": candidate, "reward": value}
