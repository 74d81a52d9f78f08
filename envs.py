"""The paper's four -v3 tasks on today's MuJoCo bindings.

    env = envs.make("Humanoid-v3")      # any other Gymnasium id works too

Gymnasium >= 1.2 raises ImportError for every -v3 name: they needed mujoco-py. The dynamics, rewards
and resets of Gymnasium's -v4 classes are those of -v3; one thing is not. mujoco-py on MuJoCo >= 2.0
never computed contact forces, so `cfrc_ext` was all zero in the paper's stack (openai/gym#1541),
while -v4 calls `mj_rnePostConstraint`, whose values reach the thousands on Humanoid. A faithful -v3
leaves that call out. Then 84 of Ant's 111 and 84 of Humanoid's 376 columns are exactly 0, and so
are the contact costs.

For a checkpoint no state of a simulator is saved. MuJoCo's would not be enough: the rewards of Ant
and Humanoid read positions that lag one step behind it. Instead the vector environment remembers
how each running episode began and what was done since, and does it again (`episodes`, `replay`).
"""

import contextlib
import difflib
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.humanoid_v4 import HumanoidEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from quantize import columns_of

FLOAT32_MAX = float(np.finfo(np.float32).max)  # as which buffers keep rewards


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
    except Exception as error:  # of Gymnasium, of the module that is imported, of the environment
        others = dict.fromkeys(name for name in [*V3_TASKS, *gym.registry] if name != env_id)
        close = difflib.get_close_matches(env_id, others, n=3, cutoff=0.4) or list(V3_TASKS)
        misnamed = (gym.error.Error, TypeError, ValueError)  # what Gymnasium says of a bad name
        if env_id.split(":")[-1] in gym.registry or not isinstance(error, misnamed):
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot make '{env_id}': {why}; try {', '.join(close)}") from error
        raise ValueError(f"unknown --env '{env_id}'; closest: {', '.join(close)}") from error
    problem = _unsuitable(env.observation_space, env.action_space)
    if problem:
        env.close()
        raise ValueError(f"--env '{env_id}' {problem}")
    return env


class EnvironmentFault(Exception):
    """An environment raised, or returned what cannot be learned from; the message says what."""


class _Episode(NamedTuple):
    """What leads to an env's present state: a seed or np_random's state, and actions from there."""

    start: int | dict
    actions: list[np.ndarray]
    rewards: list[float]


class _VectorEnv(gym.vector.SyncVectorEnv):
    """Without infos, which nobody reads, and without every copy but one; replays episodes."""

    LONGEST = 10_000  # actions; longer episodes are not replayed

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._episodes: list[_Episode | None] = [None] * self.num_envs

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Reset all envs, with seed, seed + 1, ..., or those of options["reset_mask"].

        Returns:
            Observations (num_envs, n), of an env that was not reset its last one; empty infos.

        Raises:
            EnvironmentFault: see there.
        """
        mask = options["reset_mask"] if options else np.ones(self.num_envs, np.bool_)
        env_obs = list(self._env_obs)
        for i in np.flatnonzero(mask).tolist():
            start = _rng_state(self.envs[i]) if seed is None else seed + i
            self._episodes[i] = None  # until it has begun
            env_obs[i] = self._begin(i, None if seed is None else start)
            self._episodes[i] = None if start is None else _Episode(start, [], [])
        return self._checked(env_obs), {}

    def step(self, actions: np.ndarray) -> tuple:
        """As `gym.vector.VectorEnv.step`, with empty infos.

        Raises:
            EnvironmentFault: see there. `episodes` still leads to where this step began.
        """
        actions = np.array(actions)
        env_obs, reward = [None] * self.num_envs, np.empty(self.num_envs, np.float64)
        terminated, truncated = np.empty((2, self.num_envs), np.bool_)
        for i, action in enumerate(actions):
            env_obs[i], reward[i], terminated[i], truncated[i] = self._step(i, action)
        obs = self._checked(env_obs)
        for i, episode in enumerate(self._episodes):
            if episode and len(episode.actions) < self.LONGEST:
                episode.actions.append(actions[i])
                episode.rewards.append(float(reward[i]))
            else:
                self._episodes[i] = None
        return obs, reward, terminated, truncated, {}

    def episodes(self) -> list[dict]:
        """For a checkpoint: how every env came where it is; "start" is None where it is unknown."""
        return [
            {
                "start": episode.start if episode else None,
                "actions": torch.from_numpy(np.array(episode.actions if episode else [])),
                "rewards": torch.tensor(episode.rewards if episode else [], dtype=torch.float64),
                "obs": torch.from_numpy(obs),
            }
            for episode, obs in zip(self._episodes, self._checked(self._env_obs), strict=True)
        ]

    def replay(self, episodes: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """Bring every env to where it was when `episodes` was called.

        Returns:
            Observations (num_envs, n); and (num_envs,) bool, where a new episode has begun, as
            the rewards or the observation did not come out as they were, bit for bit.

        Raises:
            EnvironmentFault: see there; of a new episode only.
            ValueError: they are of more or fewer envs.
        """
        if len(episodes) != self.num_envs:
            raise ValueError(f"it has {len(episodes)} running episodes, here are {self.num_envs}")
        anew = np.empty(self.num_envs, np.bool_)
        for i, episode in enumerate(episodes):
            try:
                anew[i] = not self._replay(i, **episode)
            except (EnvironmentFault, TypeError, ValueError):
                anew[i] = True
        return self.reset(options={"reset_mask": anew})[0], anew

    def _replay(
        self, i: int, start: int | dict | None, actions: Tensor, rewards: Tensor, obs: Tensor
    ) -> bool:
        if start is None:
            return False
        if isinstance(start, dict):
            self.envs[i].unwrapped.np_random.bit_generator.state = start
        env_obs = list(self._env_obs)
        env_obs[i] = self._begin(i, start if isinstance(start, int) else None)
        for action, reward in zip(actions.numpy(), rewards.tolist(), strict=True):
            env_obs[i], again, terminated, truncated = self._step(i, action)
            if again != reward or terminated or truncated:
                return False
        self._episodes[i] = _Episode(start, list(actions.numpy().copy()), rewards.tolist())
        return self._checked(env_obs)[i].tobytes() == obs.numpy().tobytes()

    def close_extras(self, **kwargs) -> None:
        with contextlib.suppress(Exception):  # nobody depends on it any more
            super().close_extras(**kwargs)

    def _begin(self, i: int, seed: int | None) -> np.ndarray:
        try:
            obs, _ = self.envs[i].reset(seed=seed)
            return obs
        except Exception as error:
            raise raised(error) from error

    def _step(self, i: int, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        try:
            obs, reward, terminated, truncated, _ = self.envs[i].step(action)
            reward, terminated, truncated = float(reward), bool(terminated), bool(truncated)
        except Exception as error:
            raise raised(error) from error
        if not abs(reward) <= FLOAT32_MAX:  # nan is not, either
            raise EnvironmentFault(f"returned the reward {reward}, which is no finite float32")
        return obs, reward, terminated, truncated

    def _checked(self, env_obs: list[np.ndarray]) -> np.ndarray:
        """The envs' observations, (num_envs, n), in an array of their own; they are kept as well.

        Not what the envs returned: some write into the same array at every step.
        """
        obs = np.empty(self.observation_space.shape, self.observation_space.dtype)
        try:
            np.stack(env_obs, out=obs)  # raises if a shape or kind of numbers is another
        except (TypeError, ValueError):
            space = self.single_observation_space
            kinds = {f"{getattr(o, 'dtype', type(o))} {getattr(o, 'shape', '')}" for o in env_obs}
            raise EnvironmentFault(
                f"returned observations that are no {space.dtype} of shape {space.shape} but "
                f"{', '.join(sorted(kinds))}"
            ) from None
        if not np.abs(obs).max() <= FLOAT32_MAX:  # as which networks see it; nor is nan
            with np.errstate(over="ignore"):
                where = columns_of(~np.isfinite(obs.astype(np.float32)).all(0))
            raise EnvironmentFault(f"returned nan or inf in observation columns {where} as float32")
        self._env_obs = list(obs)
        return obs


def _rng_state(env: gym.Env) -> dict | None:
    """The state of an env's np_random in plain Python values; None if it has none of these."""
    generator = getattr(env.unwrapped.np_random, "bit_generator", None)
    return generator.state if isinstance(generator, np.random.PCG64) else None


def raised(error: Exception) -> EnvironmentFault:
    """What an env raised, as one line that says where."""
    frames, line = traceback.extract_tb(error.__traceback__), (str(error) or "-").splitlines()[0]
    own = [f for f in frames if "site-packages" not in f.filename and f.filename != __file__]
    frame = (own or frames)[-1]  # not that of the library which they called
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return EnvironmentFault(f"raised {type(error).__name__} in {where}: {line}")


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
    for kind, space in (("observations", obs_space), ("actions", action_space)):
        if not isinstance(space, Box) or len(space.shape) != 1 or not space.shape[0]:
            return f"has {kind} {space}; a Box of shape (n,), n at least 1, is needed"
    if not np.isfinite([action_space.low, action_space.high]).all():
        return f"has actions {action_space}; finite bounds are needed"
    if not (action_space.low < action_space.high).all():
        return f"has actions {action_space}; low must be below high"
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

    Raises:
        EnvironmentFault: see there.
    """
    if episodes == 0:
        return []
    try:
        env = make_vector(env_id, 1)
    except ValueError as error:  # a second one, where there may be only one at a time
        raise EnvironmentFault(f"was not evaluated: {error}") from error
    returns = []
    for episode in range(episodes):
        (obs,), _ = env.reset(seed=seed if episode == 0 else None)
        returns.append(0.0)
        for _ in range(10_000):
            (obs,), (reward,), (terminated,), (truncated,), _ = env.step(act(obs)[None])
            returns[-1] += float(reward)
            if terminated or truncated:
                break
    env.close()
    return returns
