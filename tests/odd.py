"""An environment in which one chosen thing goes wrong."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Odd(gym.Env):
    """Nothing wrong with it, but for what is asked for.

    Args:
        part: what goes wrong: the "obs" or "reward" of a step, all that "step" or "reset" gives,
            "make" or "close".
        at: in which step, reset, ..., counted from 1 since the env was made.
        what: is raised, if it is an exception, or given instead.
        length: of an episode, which is then truncated; None is endless.
    """

    def __init__(self, part="", at=0, what=None, *, length=None, obs_space=None, act_space=None):
        self.part, self.at, self.what, self.length = part, at, what, length
        self.observation_space = obs_space or Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = act_space or Box(-1, 1, (1,))
        self.steps = self.resets = self.closes = self.episode_steps = 0
        self.odd("make", 1, None)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets, self.episode_steps = self.resets + 1, 0
        self.obs = self.np_random.uniform(-1, 1, self.observation_space.shape)
        return self.odd("reset", self.resets, (self.obs, {}))

    def step(self, action):
        self.steps, self.episode_steps = self.steps + 1, self.episode_steps + 1
        self.obs = 0.9 * self.obs + 0.1 * np.sum(action)
        obs, reward = self.odd("obs", self.steps, self.obs), self.odd("reward", self.steps, 1.0)
        truncated = self.episode_steps == self.length
        return self.odd("step", self.steps, (obs, reward, False, truncated, {}))

    def close(self):
        self.closes += 1
        self.odd("close", self.closes, None)

    def odd(self, part, count, fine):
        if (part, count) != (self.part, self.at):
            return fine
        if isinstance(self.what, BaseException):
            raise self.what.with_traceback(None)
        return self.what
