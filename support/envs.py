"""Environments: the paper's four -v3 tasks on today's MuJoCo, and several of one kind at once.

    envs = VectorEnv("Humanoid-v3", num_envs=2)       # any other Gymnasium id works too
    obs, _ = envs.reset(seed=1)                         # (2, 376)
    obs, reward, terminated, truncated, _ = envs.step(actions)

Gymnasium >= 1.2 raises ImportError for every -v3 name: they needed mujoco-py. The dynamics, rewards
and resets of Gymnasium's -v4 classes are those of -v3; one thing is not. mujoco-py on MuJoCo >= 2.0
never computed contact forces, so `cfrc_ext` was all zero in the paper's stack (openai/gym#1541),
while -v4 calls `mj_rnePostConstraint`, whose values reach the thousands on Humanoid. A faithful -v3
leaves that call out. Then 84 of Ant's 111 and 84 of Humanoid's 376 columns are exactly 0, and so
are the contact costs.
"""

import contextlib
import difflib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco import ant_v4, half_cheetah_v4, humanoid_v4, walker2d_v4
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box

from support.columns import columns_of
from support.errors import EnvironmentFault

FLOAT32_MAX = float(np.finfo(np.float32).max)  # networks and buffers hold float32


def _v3(env_id: str, v4: type, **kwargs) -> EnvSpec:
    """How Gymnasium makes a -v3 task: its -v4 class, but without contact forces."""

    class V3(v4):
        def _step_mujoco_simulation(self, ctrl, n_frames):
            # Without v4's mj_rnePostConstraint, cfrc_ext keeps the zeros of mj_resetData. That call
            # fills cacc, cfrc_int and cfrc_ext only for readers; the dynamics never read them.
            self.data.ctrl[:] = ctrl
            mujoco.mj_step(self.model, self.data, nstep=n_frames)

    # v3's limit for all four. The passive checker would only add a wrapper to every step; the tests
    # run the full `check_env` instead.
    return EnvSpec(env_id, V3, max_episode_steps=1000, disable_env_checker=True, kwargs=kwargs)


# A dict, not `gym.register`: registering a -v3 name warns twice and would act at import.
V3_TASKS = {
    "Walker2d-v3": _v3("Walker2d-v3", walker2d_v4.Walker2dEnv),
    "HalfCheetah-v3": _v3("HalfCheetah-v3", half_cheetah_v4.HalfCheetahEnv),
    # v3 always observed the (zero) contact forces; v4 drops these 84 columns unless asked.
    "Ant-v3": _v3("Ant-v3", ant_v4.AntEnv, use_contact_forces=True),
    "Humanoid-v3": _v3("Humanoid-v3", humanoid_v4.HumanoidEnv),
}


def make(env_id: str, **options: Any) -> gym.Env:
    """Make one environment, whose observations and bounded actions are flat Boxes.

    Args:
        env_id: one of `V3_TASKS` or any registered Gymnasium id.
        options: of `gym.make`: render_mode="rgb_array" for images.

    Raises:
        ValueError: unknown id (with the closest names) or unsuitable spaces (with what was found).
    """
    try:
        with warnings.catch_warnings():  # an outdated id is told of in the one line below, or works
            warnings.simplefilter("ignore", DeprecationWarning)
            env = gym.make(V3_TASKS.get(env_id, env_id), **options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # even sys.exit: the environment's code may do anything
        others = dict.fromkeys(name for name in [*V3_TASKS, *gym.registry] if name != env_id)
        close = difflib.get_close_matches(env_id, others, n=3, cutoff=0.4) or list(V3_TASKS)
        misnamed = (gym.error.Error, TypeError, ValueError)  # what Gymnasium says of a bad name
        if env_id.split(":")[-1] in gym.registry or not isinstance(error, misnamed):
            why = _first_line(error) if isinstance(error, Exception) else type(error).__name__
            raise ValueError(f"cannot make '{env_id}': {why}; try {', '.join(close)}") from error
        raise ValueError(f"unknown --env '{env_id}'; closest: {', '.join(close)}") from error
    spaces = (getattr(env, f"{name}_space", None) for name in ("observation", "action"))
    problem = unsuitable(*spaces)
    if problem:
        env.close()
        raise ValueError(f"--env '{env_id}' {problem}")
    return env


def unsuitable(obs_space: gym.Space | None, action_space: gym.Space | None) -> str | None:
    """What keeps these spaces from being used here, as the end of a sentence; None if nothing."""
    for kind, space in (("observations", obs_space), ("actions", action_space)):
        if not isinstance(space, Box) or len(space.shape) != 1 or not space.shape[0]:
            return f"has {kind} {space}; a Box of shape (n,), n at least 1, is needed"
        if space.dtype.itemsize > 8:
            return f"has {kind} {space}; numbers of at most 64 bits are needed"
    bounds = np.array([action_space.low, action_space.high], np.float64)
    if not (np.abs(bounds) <= 1e38).all():  # high - low must be finite, too
        return f"has actions {action_space}; finite bounds are needed, within +-1e38"
    if not (action_space.low < action_space.high).all():
        return f"has actions {action_space}; low must be below high"
    return None


@dataclass
class _Episode:
    """How an environment got to where it is: the start of its episode, and every step since."""

    start: int | dict | None = None  # seed or random generator's state; None: cannot be replayed
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


class VectorEnv(gym.vector.SyncVectorEnv):
    """`make` num_envs times, stepped together; observations and rewards are checked to be finite.

    Every step is a real one: at an episode's end `step` returns the final observation, and the
    caller begins the next with `reset(options={"reset_mask": terminated | truncated})`.

    `state_dict` holds no simulator's state, which would not be enough: Ant's and Humanoid's rewards
    read positions that lag one step behind it. It holds how the running episodes began and their
    actions, and `load_state_dict` replays these.

    Attributes:
        obs: (num_envs, n), the newest observations; every step makes a new array.
        fresh: (num_envs,) bool, where the last `reset` or `load_state_dict` began an episode.

    Raises:
        ValueError: as `make` does, and for environments with different spaces.
    """

    LONGEST = 10_000  # steps; longer episodes are not replayed

    def __init__(self, env_id: str, num_envs: int, **options: Any):
        disabled = gym.vector.AutoresetMode.DISABLED
        try:
            super().__init__([lambda: make(env_id, **options)] * num_envs, autoreset_mode=disabled)
        except RuntimeError as error:  # Gymnasium's, when they have different spaces
            raise ValueError(f"--env '{env_id}' cannot be used: {_first_line(error)}") from error
        self.env_id = env_id
        self.obs = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        self.fresh = np.zeros(num_envs, np.bool_)
        self._episodes = [_Episode() for _ in range(num_envs)]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin an episode everywhere, or where options["reset_mask"], (num_envs,) bool, is true.

        With a seed, the environments get seed, seed + 1, ...

        Returns:
            All observations, (num_envs, n), and an empty dict.

        Raises:
            EnvironmentFault: see there.
        """
        mask = options["reset_mask"] if options else np.ones(self.num_envs, np.bool_)
        obs = self.obs.copy()
        for i in np.flatnonzero(mask).tolist():
            start = _rng_state(self.envs[i]) if seed is None else seed + i
            self._episodes[i] = _Episode()  # not to be replayed, if this reset fails
            self._reset_one(i, None if seed is None else start, obs[i])
            self._episodes[i].start = start
        self.obs, self.fresh = obs, mask.copy()
        return obs, {}

    def step(self, actions: np.ndarray) -> tuple:
        """Step every environment with its row of actions, (num_envs, k).

        Returns:
            obs (num_envs, n), reward (num_envs,) float64, terminated and truncated (num_envs,)
            bool, which the caller may keep, and an empty dict.

        Raises:
            EnvironmentFault: see there. `obs` and `state_dict()` are as before this step then.
        """
        actions = np.array(actions)  # a copy: the episodes keep its rows
        obs = np.empty_like(self.obs)
        reward = np.empty(self.num_envs, np.float64)
        terminated = np.empty(self.num_envs, np.bool_)
        truncated = np.empty(self.num_envs, np.bool_)
        for i in range(self.num_envs):
            reward[i], terminated[i], truncated[i] = self._step_one(i, actions[i], obs[i])
        self.obs = obs
        for i, episode in enumerate(self._episodes):
            if episode.start is None or len(episode.actions) == self.LONGEST:
                self._episodes[i] = _Episode()
            else:
                episode.actions.append(actions[i])
                episode.rewards.append(float(reward[i]))
        return obs, reward, terminated, truncated, {}

    def state_dict(self) -> dict:
        """The running episodes and the newest observations, independent of later steps."""
        return {
            "episodes": [
                {
                    "start": episode.start,
                    "actions": torch.from_numpy(np.array(episode.actions)),
                    "rewards": torch.tensor(episode.rewards, dtype=torch.float64),
                    "obs": torch.from_numpy(obs.copy()),
                }
                for episode, obs in zip(self._episodes, self.obs, strict=True)
            ]
        }

    def load_state_dict(self, saved: dict) -> None:
        """Bring every environment to where it was when `state_dict` was called.

        Where rewards or the newest observation do not come out the same, bit for bit, a new episode
        begins instead, and `fresh` is true.

        Raises:
            EnvironmentFault: see there; only of an episode that begins instead.
            ValueError: saved is of another number of environments.
        """
        episodes = saved["episodes"]
        if len(episodes) != self.num_envs:
            raise ValueError(f"it has {len(episodes)} environments, this run has {self.num_envs}")
        self.obs, replayed = self.obs.copy(), np.zeros(self.num_envs, np.bool_)
        for i, episode in enumerate(episodes):
            with contextlib.suppress(EnvironmentFault, TypeError, ValueError):
                replayed[i] = self._replay(i, **episode)
        self.reset(options={"reset_mask": ~replayed})

    def _replay(self, i: int, start: int | dict | None, actions, rewards, obs) -> bool:
        """Replay an episode from `state_dict`; return whether it came out the same."""
        if start is None:
            return False
        if isinstance(start, dict):
            self.envs[i].unwrapped.np_random.bit_generator.state = start
        self._reset_one(i, start if isinstance(start, int) else None, self.obs[i])
        for action, reward in zip(actions.numpy(), rewards.tolist(), strict=True):
            if self._step_one(i, action, self.obs[i]) != (reward, False, False):
                return False
        self._episodes[i] = _Episode(start, list(actions.numpy().copy()), rewards.tolist())
        return self.obs[i].tobytes() == obs.numpy().tobytes()

    def _reset_one(self, i: int, seed: int | None, row: np.ndarray) -> None:
        """Reset environment i and write its observation to row, (n,)."""
        try:
            obs, _ = self.envs[i].reset(seed=seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._raised(error) from error
        self._write(obs, row)

    def _step_one(self, i: int, action: np.ndarray, row: np.ndarray) -> tuple[float, bool, bool]:
        """Step environment i, write its observation to row, (n,), and return the other three."""
        try:
            obs, reward, terminated, truncated, _ = self.envs[i].step(action)
            reward, terminated, truncated = float(reward), bool(terminated), bool(truncated)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._raised(error) from error
        if not abs(reward) <= FLOAT32_MAX:  # nan is not, either
            raise self._fault(f"returned the reward {reward}, which is no finite float32")
        self._write(obs, row)
        return reward, terminated, truncated

    def _write(self, obs: np.ndarray, row: np.ndarray) -> None:
        """Check an observation and copy it to row, (n,): an env may use one array for all steps."""
        try:
            obs = np.asarray(obs)
            if obs.shape != row.shape:  # copyto would repeat a single number
                raise ValueError
            np.copyto(row, obs, casting="same_kind")
        except (TypeError, ValueError):
            raise self._fault(
                f"returned observations that are no {row.dtype} of shape {row.shape} but "
                f"{getattr(obs, 'dtype', type(obs))} {getattr(obs, 'shape', '')}"
            ) from None
        # Quick; the sum of squares is larger, or nan, if any value is beyond FLOAT32_MAX or nan.
        if not float(np.vdot(row, row)) <= 1e76:
            bad = ~(np.abs(row.astype(np.float64)) <= FLOAT32_MAX)
            if bad.any():  # else only the sum was too large, in float16 for example
                where = columns_of(bad)
                raise self._fault(f"returned nan or inf in observation columns {where} as float32")

    def _raised(self, error: BaseException) -> EnvironmentFault:
        """What environment code raised, as one line that says where."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and f.filename != __file__]
        frame = (own or frames)[-1]  # not that of the library which they called
        where = f"{Path(frame.filename).name}, line {frame.lineno}"
        return self._fault(f"raised {type(error).__name__} in {where}: {_first_line(error)}")

    def _fault(self, what: str) -> EnvironmentFault:
        return EnvironmentFault(f"{self.env_id} {what}")

    def close_extras(self, **kwargs) -> None:
        with contextlib.suppress(Exception):  # nobody depends on it any more
            super().close_extras(**kwargs)


def _rng_state(env: gym.Env) -> dict | None:
    """The state of an env's np_random in plain Python values; None if it has none of these."""
    generator = getattr(env.unwrapped.np_random, "bit_generator", None)
    return generator.state if isinstance(generator, np.random.PCG64) else None


def _first_line(error: BaseException) -> str:
    """An exception's message up to its first line break, without escape codes; or its type."""
    try:
        line = str(error).split("\n")[0]
    except Exception:  # its __str__ raises
        line = ""
    return "".join(filter(str.isprintable, line)) or type(error).__name__


@torch.no_grad()
def evaluate(
    env_id: str,
    act: Callable[[np.ndarray], np.ndarray],
    episodes: int,
    seed: int,
    watch: Callable[[int, int, VectorEnv], None] | None = None,
    **options: Any,
) -> list[float]:
    """Returns of whole episodes under a policy, each episode of at most 10,000 steps.

    Args:
        env_id: as for `make`.
        act: observation (n,) -> action (k,) within the environment's bounds.
        episodes: how many.
        seed: of the first reset; the others go on from there.
        watch: gets the numbers of episode and step, from 0, and the envs, one, before every step.
        options: as for `make`.

    Raises:
        EnvironmentFault: see there.
    """
    if episodes == 0:
        return []
    try:
        env = VectorEnv(env_id, 1, **options)
    except ValueError as error:  # a second one, where there may be only one at a time
        raise EnvironmentFault(f"{env_id} was not evaluated: {error}") from error
    returns = []
    for episode in range(episodes):
        (obs,), _ = env.reset(seed=seed if episode == 0 else None)
        returns.append(0.0)
        for step in range(10_000):
            if watch:
                watch(episode, step, env)
            (obs,), (reward,), (terminated,), (truncated,), _ = env.step(act(obs)[None])
            returns[-1] += float(reward)
            if terminated or truncated:
                break
    env.close()
    return returns
