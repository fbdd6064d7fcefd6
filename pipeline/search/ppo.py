"""PPO (Schulman et al. 2017) over the pruning ratios of all knobs, by stable-baselines3, within few evaluations.

Library defaults update the policy once in 2,048 steps: that is never. The settings here were found on a one-step problem with
nine actions and noise: there the defaults end at a reward of -0.70, these at -0.007, the best of as many random tries at -0.64.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from ..types import Candidate, Knob
from . import knapsack
from .gym_env import PruningEnv
from .problem import Levels
from .search_log import SearchLog

LEARNING_RATE = 5e-3
WARM_LEARNING_RATE = 5e-4  # with ten times as much the mean had left a good start for rewards of a fifth of it in 60 episodes
ROLLOUT = (8, 32)  # least and most episodes between two updates
WARM_ROLLOUT = 16  # at least, near a good start, where one knob's change is most of what an episode tells
UPDATES = 25  # as many as this when the rollouts' limits leave them
WARM_SHARE = 0.8  # of the evaluations, spent by the knapsack before a warm start, which gains more by them
COLD_LOG_STD = -1.0
WARM_LOG_STD = -2.5  # a good start is worth staying near; a rollout that finds nothing new there widens it
COLD_START = 0.5  # of the uniform plan's ratios: a little under the budget, so that the projection puts most samples on it
STALE_ROLLOUTS = 50  # rollouts in a row without a new setting, after which there is none to be found


class _IsolatedRng:
    """Isolates the global random state and thread count of stable-baselines3 from those of the caller.

    stable-baselines3 draws from the global generators of torch, numpy and random, and updates a network so small that threads
    only get in its way. Evaluations run with the caller's state: otherwise what an evaluation draws would change the policy, and
    a replay with remembered evaluations would take another course.
    """

    def __init__(self) -> None:
        self._inner: tuple[object, ...] | None = None

    @staticmethod
    def _state() -> tuple[torch.Tensor, object, object, int]:
        return torch.get_rng_state(), np.random.get_state(), random.getstate(), torch.get_num_threads()

    @staticmethod
    def _restore(state: tuple[torch.Tensor, object, object, int]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # type: ignore[arg-type]
        random.setstate(state[2])  # type: ignore[arg-type]
        torch.set_num_threads(state[3])

    @contextmanager
    def policy(self) -> Iterator[None]:
        """Switches to the policy's state; the caller's is restored afterwards, whatever happened."""
        self._outer = self._state()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            self._restore(self._outer)

    @contextmanager
    def caller(self) -> Iterator[None]:
        """Switches back to the caller's state for a while."""
        inner = self._state()
        self._restore(self._outer)
        try:
            yield
        finally:
            self._outer = self._state()
            self._restore(inner)


class _Outside:
    """Evaluates through the log with the caller's random state and threads."""

    def __init__(self, log: SearchLog, isolated: _IsolatedRng) -> None:
        self._log, self._rng = log, isolated

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._log.knobs

    def latency_estimate(self, levels: Levels) -> float:
        return self._log.latency_estimate(levels)

    def expect(self, settings: Sequence[Levels]) -> None:
        with self._rng.caller():
            self._log.expect(settings)

    def evaluate(self, levels: Levels) -> Candidate:
        if self._log.seen(levels):
            return self._log.evaluate(levels)
        with self._rng.caller():
            return self._log.evaluate(levels)


def _parameter(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


class _Watch(BaseCallback):
    """Evaluates the policy's mean after every update, widens a policy that repeats itself, stops with the last evaluation.

    Where there are several boards it announces what the next rollout is likely to ask for.
    """

    def __init__(self, log: SearchLog, outside: _Outside, env: PruningEnv) -> None:
        super().__init__()
        self._log, self._outside, self._env = log, outside, env
        self._stale, self._count = 0, -1

    def _on_rollout_start(self) -> None:
        if len(self._log.tried) == self._count:
            self._stale += 1
            with torch.no_grad():  # nothing new in a whole rollout: look further
                _parameter(self.model.policy.log_std).add_(0.5).clamp_(max=1.0)
        else:
            self._stale = 0
        self._count = len(self._log.tried)
        # The mean of a good policy is better than its samples, and it is what the policy has learned.
        observation, _ = self._env.reset()
        action, _ = self.model.predict(observation, deterministic=True)
        observation, *_ = self._env.step(action)
        if self._log.width > 1:
            self._outside.expect(self._samples(observation))

    def _samples(self, observation: NDArray[np.float32]) -> list[Levels]:
        """Settings the policy would ask for in a rollout if the observation stayed as it is. Its random state is kept."""
        assert isinstance(self.model, PPO)
        state, space = torch.get_rng_state(), self._env.action_space
        assert isinstance(space, spaces.Box)
        inputs, _ = self.model.policy.obs_to_tensor(observation)
        with torch.no_grad():
            actions = [self.model.policy(inputs)[0].numpy()[0] for _ in range(self.model.n_steps)]
        torch.set_rng_state(state)
        return [self._env.constraint.levels(self._env.shares(np.clip(a, space.low, space.high))) for a in actions]

    def _on_step(self) -> bool:
        return self._log.left > 0 and self._stale < STALE_ROLLOUTS


def run(log: SearchLog, rng: np.random.Generator) -> None:
    """Spends the log's evaluations.

    Warm: the first four fifths go to the knapsack, and the policy starts at its best plan. Cold: it starts at half of the
    ratios with which the uniform plan meets the budget, which costs nothing to know.

    Raises:
        SpentError: all evaluations are spent.
    """
    settings, warm = log.settings, log.settings.warm_start
    if warm:
        knapsack.run(log, round(WARM_SHARE * settings.evaluations), rng)
    rollout = min(max(settings.evaluations // UPDATES, WARM_ROLLOUT if warm else ROLLOUT[0]), ROLLOUT[1])
    isolated = _IsolatedRng()
    outside = _Outside(log, isolated)
    env = PruningEnv(outside, settings, log.constraint)
    with isolated.policy():
        model = PPO(
            "MlpPolicy",
            env,
            n_steps=rollout,
            batch_size=rollout,
            n_epochs=10,
            learning_rate=WARM_LEARNING_RATE if warm else LEARNING_RATE,
            gamma=0.0,
            policy_kwargs={"net_arch": [32], "log_std_init": WARM_LOG_STD if warm else COLD_LOG_STD},
            seed=settings.seed,
            device="cpu",
        )
        model.set_logger(Logger(folder=None, output_formats=[]))  # else it makes a folder of its own
        if warm and log.tried:
            mean = env.action(log.leader.levels)
        else:
            mean = (2.0 * COLD_START * log.constraint.clip(np.zeros(len(log.knobs))) - 1.0).astype(np.float32)
        with torch.no_grad():
            # The last layer's weights start at a hundredth, so that the bias is the mean action.
            _parameter(model.policy.action_net.bias).copy_(torch.from_numpy(mean))
        model.learn(total_timesteps=2**31, callback=_Watch(log, outside, env))
