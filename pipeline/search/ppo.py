"""PPO (Schulman et al. 2017) over the thresholds of all knobs, by stable-baselines3, in as few evaluations as it gets.

Library defaults update the policy once in 2,048 steps: that is never. The settings here were found on a one-step problem with
nine actions and noise: there the defaults end at a reward of -0.70, these at -0.007, the best of as many random tries at -0.64.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from ..types import Candidate, Knob
from . import knapsack
from .gym_env import PruningEnv
from .problem import Levels

if TYPE_CHECKING:
    from .tally import Tally

LEARNING_RATE = 5e-3
WARM_LEARNING_RATE = 5e-4  # with ten times as much the mean had left a good start for rewards of a fifth of it in 60 episodes
ROLLOUT = (8, 32)  # least and most episodes between two updates
WARM_ROLLOUT = 16  # at least, near a good start, where one knob's change is most of what an episode tells
UPDATES = 25  # as many as this when the rollouts' limits leave them
WARM_SHARE = 0.5  # of the evaluations, spent by the knapsack before a warm start
COLD_LOG_STD = -1.0
WARM_LOG_STD = -3.0  # a good start is worth staying near; a rollout that finds nothing new there widens it
COLD_START = 0.5  # of the uniform plan's thresholds: a little under the wall, which then puts most samples on the budget
STALE_ROLLOUTS = 50  # rollouts in a row without a new setting, after which there is none to be found


class _Aside:
    """Two worlds that take turns: the policy's (one thread, its own random numbers) and the caller's.

    stable-baselines3 draws from the global generators of torch, numpy and random, and updates a network so small that threads
    only get in its way. Evaluations run in the caller's world: otherwise what an evaluation draws would change the policy, and a
    replay with remembered evaluations would go another way.
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
        """The policy's world; the caller's is back afterwards, whatever happened."""
        self._outer = self._state()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            self._restore(self._outer)

    @contextmanager
    def caller(self) -> Iterator[None]:
        """Within the policy's world, the caller's for a while."""
        inner = self._state()
        self._restore(self._outer)
        try:
            yield
        finally:
            self._outer = self._state()
            self._restore(inner)


class _Outside:
    """The tally as an evaluator that answers in the caller's world."""

    def __init__(self, tally: Tally, aside: _Aside) -> None:
        self._tally, self._aside = tally, aside

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._tally.knobs

    def latency_estimate(self, levels: Levels) -> float:
        return self._tally.latency_estimate(levels)

    def expect(self, settings: Sequence[Levels]) -> None:
        with self._aside.caller():
            self._tally.expect(settings)

    def evaluate(self, levels: Levels) -> Candidate:
        if self._tally.seen(levels):
            return self._tally.evaluate(levels)
        with self._aside.caller():
            return self._tally.evaluate(levels)


def _parameter(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


class _Watch(BaseCallback):
    """Asks for the policy's mean after every update, wakes a policy that repeats itself, ends with the last evaluation.

    Where there are several boards it says what the next rollout is likely to ask for.
    """

    def __init__(self, tally: Tally, outside: _Outside, env: PruningEnv) -> None:
        super().__init__()
        self._tally, self._outside, self._env = tally, outside, env
        self._stale, self._count = 0, -1

    def _on_rollout_start(self) -> None:
        if len(self._tally.tried) == self._count:
            self._stale += 1
            with torch.no_grad():  # nothing new in a whole rollout: look further
                _parameter(self.model.policy.log_std).add_(0.5).clamp_(max=1.0)
        else:
            self._stale = 0
        self._count = len(self._tally.tried)
        # The mean of a good policy is better than its samples, and it is what the policy has learned.
        observation, _ = self._env.reset()
        action, _ = self.model.predict(observation, deterministic=True)
        observation, *_ = self._env.step(action)
        if self._tally.width > 1:
            self._outside.expect(self._samples(observation))

    def _samples(self, observation: NDArray[np.float32]) -> list[Levels]:
        """What the policy would ask for in a rollout if the observation stayed as it is. Its random numbers are not used up."""
        assert isinstance(self.model, PPO)
        state, space = torch.get_rng_state(), self._env.action_space
        assert isinstance(space, spaces.Box)
        inputs, _ = self.model.policy.obs_to_tensor(observation)
        with torch.no_grad():
            actions = [self.model.policy(inputs)[0].numpy()[0] for _ in range(self.model.n_steps)]
        torch.set_rng_state(state)
        return [self._env.wall.levels(self._env.thresholds(np.clip(a, space.low, space.high))) for a in actions]

    def _on_step(self) -> bool:
        return self._tally.left > 0 and self._stale < STALE_ROLLOUTS


def run(tally: Tally, rng: np.random.Generator) -> None:
    """Spend the tally's evaluations.

    Warm: the first half goes to the knapsack, and the policy starts at its best plan. Cold: it starts at half of the
    thresholds with which the uniform plan meets the wall, which costs nothing to know.

    Raises:
        SpentError: all evaluations are spent.
    """
    settings, warm = tally.settings, tally.settings.warm_start
    if warm:
        knapsack.run(tally, round(WARM_SHARE * settings.evaluations), rng)
    rollout = min(max(settings.evaluations // UPDATES, WARM_ROLLOUT if warm else ROLLOUT[0]), ROLLOUT[1])
    aside = _Aside()
    outside = _Outside(tally, aside)
    env = PruningEnv(outside, settings, tally.wall)
    with aside.policy():
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
        if warm and tally.tried:
            mean = env.action(tally.leader.levels)
        else:
            mean = (2.0 * COLD_START * tally.wall.clip(np.zeros(len(tally.knobs))) - 1.0).astype(np.float32)
        with torch.no_grad():
            # The last layer's weights start at a hundredth, so that the bias is the mean action.
            _parameter(model.policy.action_net.bias).copy_(torch.from_numpy(mean))
        model.learn(total_timesteps=2**31, callback=_Watch(tally, outside, env))
