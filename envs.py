"""The paper's four -v3 tasks on today's MuJoCo bindings.

    env = envs.make("Humanoid-v3")      # any other Gymnasium id works too

Gymnasium >= 1.2 raises ImportError for every -v3 name: they needed mujoco-py. The dynamics, rewards
and resets of Gymnasium's -v4 classes are those of -v3; one thing is not. mujoco-py on MuJoCo >= 2.0
never computed contact forces, so `cfrc_ext` was all zero in the paper's stack (openai/gym#1541),
while -v4 calls `mj_rnePostConstraint`, whose values reach the thousands on Humanoid. A faithful -v3
leaves that call out. Then 84 of Ant's 111 and 84 of Humanoid's 376 columns are exactly 0, and so
are the contact costs.
"""

import difflib
import warnings
from collections.abc import Callable

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.humanoid_v4 import HumanoidEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv
from gymnasium.envs.registration import EnvSpec


class _NoContactForces:
    """Steps without `mj_rnePostConstraint`, so `cfrc_ext` keeps the zeros of `mj_resetData`.

    That call only fills cacc, cfrc_int and cfrc_ext for readers; the dynamics never read them.
    """

    def _step_mujoco_simulation(self, ctrl, n_frames):
        self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, nstep=n_frames)


class Walker2dV3(_NoContactForces, Walker2dEnv):
    pass


class HalfCheetahV3(_NoContactForces, HalfCheetahEnv):
    pass


class AntV3(_NoContactForces, AntEnv):
    pass


class HumanoidV3(_NoContactForces, HumanoidEnv):
    pass


def _spec(env_id: str, entry_point: type, **kwargs) -> EnvSpec:
    # v3's limit for all four. The passive checker would only add a wrapper to every step; the tests
    # run the full `check_env` instead.
    return EnvSpec(
        env_id, entry_point, max_episode_steps=1000, disable_env_checker=True, kwargs=kwargs
    )


# A dict, not `gym.register`: registering a -v3 name warns twice and would act at import.
V3_TASKS = {
    "Walker2d-v3": _spec("Walker2d-v3", Walker2dV3),
    "HalfCheetah-v3": _spec("HalfCheetah-v3", HalfCheetahV3),
    # v3 always observed the (zero) contact forces; v4 drops these 84 columns unless asked.
    "Ant-v3": _spec("Ant-v3", AntV3, use_contact_forces=True),
    "Humanoid-v3": _spec("Humanoid-v3", HumanoidV3),
}


def make(env_id: str) -> gym.Env:
    """Make one environment with a flat Box observation and a bounded flat Box action.

    Args:
        env_id: one of `V3_TASKS` or any registered Gymnasium id.

    Raises:
        ValueError: unknown id (with the closest names) or unsuitable spaces (with what was found).
    """
    try:
        with warnings.catch_warnings():  # an outdated id is told of in the one line below, or works
            warnings.simplefilter("ignore", DeprecationWarning)
            env = gym.make(V3_TASKS.get(env_id, env_id))
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        others = dict.fromkeys(name for name in [*V3_TASKS, *gym.registry] if name != env_id)
        close = difflib.get_close_matches(env_id, others, n=3, cutoff=0.4) or list(V3_TASKS)
        if env_id in gym.registry or isinstance(error, ModuleNotFoundError):
            why = str(error).splitlines()[0]
            raise ValueError(f"cannot make '{env_id}': {why}; try {', '.join(close)}") from error
        raise ValueError(f"unknown --env '{env_id}'; closest: {', '.join(close)}") from error
    problem = _unsuitable(env.observation_space, env.action_space)
    if problem:
        env.close()
        raise ValueError(f"--env '{env_id}' {problem}")
    return env


class _VectorEnv(gym.vector.SyncVectorEnv):
    """Without the infos, which nobody reads, and without every copy but one."""

    def _add_info(self, vector_infos: dict, env_info: dict, env_num: int) -> dict:
        return vector_infos

    def step(self, actions: np.ndarray) -> tuple:
        reward = np.empty(self.num_envs, np.float64)
        terminated, truncated = np.empty((2, self.num_envs), np.bool_)
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            self._env_obs[i], reward[i], terminated[i], truncated[i], _ = env.step(action)
        obs = np.empty(self.observation_space.shape, self.observation_space.dtype)
        np.stack(self._env_obs, out=obs)  # raises if an env's shape or kind of numbers is another
        return obs, reward, terminated, truncated, {}


def make_vector(env_id: str, num_envs: int) -> gym.vector.SyncVectorEnv:
    """`make` num_envs times, side by side, without autoreset and without infos.

    Every step is a real one and `next_obs` is the true final observation; the caller resets with
    `envs.reset(options={"reset_mask": done})`.

    Raises:
        ValueError: as `make`.
    """
    disabled = gym.vector.AutoresetMode.DISABLED
    return _VectorEnv([lambda: make(env_id)] * num_envs, autoreset_mode=disabled)


def _unsuitable(obs_space: gym.Space, action_space: gym.Space) -> str | None:
    """What keeps these spaces from being used here, as the end of a sentence; None if nothing."""
    Box = gym.spaces.Box
    if not isinstance(obs_space, Box) or len(obs_space.shape) != 1:
        return f"has observations {obs_space}; a Box of shape (n,) is needed"
    if not isinstance(action_space, Box) or len(action_space.shape) != 1:
        return f"has actions {action_space}; a Box of shape (n,) is needed"
    if not np.isfinite([action_space.low, action_space.high]).all():
        return f"has actions {action_space}; finite bounds are needed"
    return None


@torch.no_grad()
def evaluate(
    env_id: str, act: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int
) -> list[float]:
    """Returns of whole episodes under a policy, each episode of at most 10,000 steps.

    Args:
        env_id: as for `make`.
        act: observation (n,) -> action (k,) within the environment's bounds.
        episodes: how many; the first is seeded.
        seed: of the first reset.
    """
    env = make(env_id)
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        returns.append(0.0)
        for _ in range(10_000):
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            returns[-1] += float(reward)
            if terminated or truncated:
                break
    env.close()
    return returns
