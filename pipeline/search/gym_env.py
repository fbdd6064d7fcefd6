"""The search as a Gymnasium environment of one step."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from ..types import Candidate
from .problem import Evaluator, FloatArray, Levels, SearchSettings, Wall, reward, signal, thresholds_of


class PruningEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Thresholds in; accuracy and measured latency out.

    An episode has one step, which sets every layer's threshold at once. The reward of a setting is known only when the whole
    network is set, and nothing random happens between layers, so an episode that walks layer by layer would only spread one
    number over many steps; with one step, gamma = 0 and no value function has to look ahead.

    action: Box(-1, 1), one number per knob; the threshold (share of units removed, in [0, 1]) is `(action + 1) / 2`.
        Gaussian policies want a symmetric box. In hard mode the wall raises thresholds that are over budget.
    observation: Box, float32: sparsity per knob (share removed by the last candidate), its accuracy, what it spends of the
        budget, the budget, the best reward so far. `reset(seed=...)` forgets the last candidate; `reset()` keeps it.
    reward: see `signal`. info: "candidate" and the reported "reward".
    """

    def __init__(self, evaluator: Evaluator, settings: SearchSettings, wall: Wall | None = None) -> None:
        self._evaluator, self._settings = evaluator, settings
        self.wall = wall or Wall(evaluator.knobs, evaluator.latency_estimate, settings)
        n = len(evaluator.knobs)
        self.action_space = spaces.Box(-1.0, 1.0, (n,), np.float32)
        low = np.array([0.0] * n + [0.0, 0.0, 0.0, -10.0], dtype=np.float32)
        high = np.array([1.0] * n + [1.0, 10.0, 10.0, 10.0], dtype=np.float32)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self._forget()

    def _forget(self) -> None:
        self._last: Candidate | None = None
        self._best = 0.0

    def thresholds(self, action: ArrayLike) -> FloatArray:
        """The thresholds an action stands for, after the wall."""
        return self.wall.clip((np.asarray(action, dtype=np.float64) + 1.0) / 2.0)

    def action(self, levels: Levels) -> NDArray[np.float32]:
        """The action that stands for these levels (before the wall)."""
        return (2.0 * thresholds_of(self._evaluator.knobs, levels) - 1.0).astype(np.float32)

    def _observation(self) -> NDArray[np.float32]:
        if self._last is None:
            sparsity, accuracy = np.zeros(len(self._evaluator.knobs)), 0.0
            ratio = self._evaluator.latency_estimate((0,) * len(self._evaluator.knobs))
        else:
            sparsity = thresholds_of(self._evaluator.knobs, self._last.levels)
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
        candidate = self._evaluator.evaluate(self.wall.levels(self.thresholds(action)))
        value = reward(candidate, self._settings)
        self._best = value if self._last is None else max(self._best, value)
        self._last = candidate
        return self._observation(), signal(candidate, self._settings), True, False, {"candidate": candidate, "reward": value}
