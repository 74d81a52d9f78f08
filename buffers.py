"""The only place where observations live, and always as codes of a `quantize.py` codec.

`RolloutBuffer` holds PPO's n_steps per env; `ReplayBuffer` holds SAC's transitions with **one**
copy of each observation, kept by `columns.py`. A layout function names every array with shape and
dtype: `memory.py` adds it up, while `nbytes` adds up the arrays that a buffer really has.
"""

import math
import resource
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from columns import LiveColumns, Rows, put, restore, stored, zeros
from quantize import Codec, ObservationError

FLOAT32_MAX = torch.finfo(torch.float32).max
PER_ROW = ("actions", "rewards", "terminated", "is_start")  # of a replay buffer, beside obs
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> (shape, dtype)


def layout_bytes(layout: Layout) -> int:
    """Bytes that the arrays of a layout take."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def _float32_reward(reward: np.ndarray) -> np.ndarray:
    """(num_envs,) -> float32. Raises ObservationError on nan, inf or beyond float32."""
    good = np.abs(reward) <= FLOAT32_MAX
    if not good.all():
        raise ObservationError(f"nan or inf in the reward of env {np.flatnonzero(~good)}")
    return reward.astype(np.float32)


class RolloutBatch(NamedTuple):
    """A minibatch for PPO, all float32: obs (B, n), action (B, k), the others (B,)."""

    obs: torch.Tensor
    action: torch.Tensor
    log_prob: torch.Tensor
    advantage: torch.Tensor
    ret: torch.Tensor


def rollout_layout(codec: Codec, n_steps: int, num_envs: int, obs_dim: int, act_dim: int) -> Layout:
    """Arrays of a `RolloutBuffer`: (n_steps, num_envs, ...)."""
    steps, (width, dtype) = (n_steps, num_envs), codec.row(obs_dim)
    scalars = ("log_probs", "values", "rewards", "advantages", "returns")
    return {
        "obs": ((*steps, width), dtype),
        "actions": ((*steps, act_dim), torch.float32),
        **{name: (steps, torch.float32) for name in scalars},
        "ends": (steps, torch.bool),
    }


class RolloutBuffer:
    """PPO's on-policy buffer, refilled for every update.

    `add` fills obs, actions, values, rewards and ends step by step. log_probs, advantages and
    returns are whole arrays for the caller to set, as ppo.py does.

    Args:
        codec: how observations are stored.
        n_steps: steps per env and rollout.
        num_envs, obs_dim, act_dim: sizes.
        device: where the minibatches go. The arrays are on the CPU, where the environments are.
        seed: of the minibatches' permutations.
    """

    def __init__(
        self,
        codec: Codec,
        n_steps: int,
        num_envs: int,
        obs_dim: int,
        act_dim: int,
        device: torch.device,
        seed: int,
    ):
        self.codec, self.obs_dim = codec, obs_dim
        self.layout = rollout_layout(codec, n_steps, num_envs, obs_dim, act_dim)
        for name, (shape, dtype) in self.layout.items():
            setattr(self, name, zeros(shape, dtype, torch.device("cpu")))
        self.device, self.step = device, 0
        self._rng = np.random.default_rng(seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are."""
        return sum(getattr(self, name).nbytes for name in self.layout)

    def add(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        value: np.ndarray,
        reward: np.ndarray,
        end: np.ndarray,
    ) -> None:
        """Store one step of every env; the row after the last one is the first again.

        Args:
            obs: (num_envs, n), what the action was chosen on.
            action, value: (num_envs, k), (num_envs,), from the networks.
            reward: (num_envs,), with gamma * V(final obs) added where the episode was truncated.
            end: (num_envs,) bool, the episode ended with this step, either way.

        Raises:
            ObservationError: nan or inf in obs or reward; nothing is stored then.
        """
        codes, reward, t = self.codec.encode(obs), _float32_reward(reward), self.step
        self.obs[t] = self.codec.pack(codes)
        for array, row in (
            (self.actions, action),
            (self.values, value),
            (self.rewards, reward),
            (self.ends, end),
        ):
            array.numpy()[t] = row
        self.step = (t + 1) % len(self.obs)

    def state(self) -> dict:
        """For a checkpoint between two rollouts, when no row is needed any more."""
        return {"rng": self._rng.bit_generator.state}

    def load(self, saved: dict) -> None:
        """Take over what `state` returned."""
        self._rng.bit_generator.state = saved["rng"]

    def minibatches(self, batch_size: int) -> Iterator[RolloutBatch]:
        """One pass over all steps in a fresh random order; the last batch may be smaller."""
        flat = [
            array.flatten(0, 1).to(self.device)
            for array in (self.obs, self.actions, self.log_probs, self.advantages, self.returns)
        ]
        order = torch.from_numpy(self._rng.permutation(len(flat[0]))).to(self.device)
        for index in order.split(batch_size):
            rows, *rest = (array.index_select(0, index) for array in flat)
            codes = self.codec.unpack(rows, self.obs_dim)
            yield RolloutBatch(self.codec.decode(codes), *rest)


class ReplayBatch(NamedTuple):
    """A batch for SAC, float32: both_obs (2 B, n), action (B, k), reward (B,).

    terminated is (B,) bool. The first B rows of both_obs are obs, the others next_obs: a network
    can take them in one pass.
    """

    both_obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    terminated: torch.Tensor

    @property
    def obs(self) -> torch.Tensor:
        """(B, n), a view."""
        return self.both_obs[: len(self.action)]

    @property
    def next_obs(self) -> torch.Tensor:
        """(B, n), a view."""
        return self.both_obs[len(self.action) :]


def rows_per_env(buffer_size: int, num_envs: int) -> int:
    """Rows of each env's ring: its share of buffer_size and the newest observation, at least 3."""
    return max(3, math.ceil(buffer_size / num_envs) + 1)


def replay_layout(
    codec: Codec,
    buffer_size: int,
    num_envs: int,
    obs_dim: int,
    act_dim: int,
    live_columns: int | None = None,
) -> Layout:
    """Arrays of a `ReplayBuffer`: one row per observation, and three numbers per env.

    With live_columns, those of one that drops constant columns, once it is settled, if that many of
    the obs_dim columns change in its first rows and none later.
    """
    rows = num_envs * rows_per_env(buffer_size, num_envs)
    width, dtype = codec.row(obs_dim if live_columns is None else live_columns)
    layout = {
        "obs": ((rows, width), dtype),
        "actions": ((rows, act_dim), torch.float32),
        "rewards": ((rows,), torch.float32),
        "terminated": ((rows,), torch.bool),
        "is_start": ((rows,), torch.bool),
        "first_row": ((num_envs,), torch.int64),
        "head": ((num_envs,), torch.int64),
        "fill": ((num_envs,), torch.int64),
    }
    if live_columns is not None:
        layout["constant"] = ((obs_dim,), codec.dtype)
        layout["live"] = ((obs_dim,), torch.bool)
        layout["columns"] = layout["place"] = ((obs_dim,), torch.int64)
    return layout


class ReplayBuffer:
    """SAC's buffer. The next observation of row i is row i + 1, so each is stored once.

    Every env has a ring of rows of its own. `head` is its open row: it holds the newest
    observation, whose action is not known yet. An episode of T steps takes T + 1 rows:

        row        i     i+1   ...   i+T-1   i+T     i+T+1
        obs        s_0   s_1   ...   s_T-1   s_T     s_0 of the next episode
        is_start   1     1     ...   1       0       0
                                             final   head

    s_T is the true final observation, whether the episode terminated or was truncated. Only rows
    with `is_start` begin a stored transition. Once the ring is full, a new head overwrites the
    oldest row. The row before that was overwritten a step earlier, so no stored transition points
    at overwritten data.

    Args:
        codec: how observations are stored.
        buffer_size: rows, all envs together.
        num_envs, obs_dim, act_dim: sizes.
        device: where observations, actions and rewards live; indices are drawn on the CPU.
        seed: of the sampling.
        drop_constant: store a column of the observation only from its first change on.
    """

    def __init__(
        self,
        codec: Codec,
        buffer_size: int,
        num_envs: int,
        obs_dim: int,
        act_dim: int,
        device: torch.device,
        seed: int,
        drop_constant: bool = False,
    ):
        self.codec = codec
        self.rows = rows_per_env(buffer_size, num_envs)
        keep = LiveColumns if drop_constant else Rows
        self.obs = keep(codec, num_envs, self.rows, obs_dim, device)
        self.layout = replay_layout(codec, buffer_size, num_envs, obs_dim, act_dim)
        del self.layout["obs"]
        for name, (shape, dtype) in self.layout.items():
            if name in ("actions", "rewards", "terminated"):
                setattr(self, name, zeros(shape, dtype, device))
            else:  # bookkeeping, read and written by numpy
                setattr(self, name, zeros(shape, dtype, torch.device("cpu")).numpy())
        self.first_row[:] = np.arange(num_envs) * self.rows
        self.head[:] = self.first_row
        self.fill[:] = 1  # rows in use per ring, its head included
        self.size = 0  # stored transitions
        self.device = device
        self._rng = np.random.default_rng(seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are."""
        return self.obs.nbytes + sum(getattr(self, name).nbytes for name in self.layout)

    def touch(self) -> None:
        """Make every page resident now: a lack of memory shows at the start, not hours later.

        Not with drop_constant, whose arrays grow with the data.
        """
        for array in (self.obs.array, *(getattr(self, name) for name in self.layout)):
            flat = torch.as_tensor(array).view(-1).view(torch.uint8)
            flat[:: resource.getpagesize()] |= 0
            flat[-1:] |= 0  # arrays do not begin with a page: the last one may hold a short tail

    def start(self, obs: np.ndarray, mask: np.ndarray) -> None:
        """Write the first observation of an episode at the head of every env in mask.

        Args:
            obs: (num_envs, n), read where mask is true.
            mask: (num_envs,) bool, the envs that were reset.

        Raises:
            ObservationError: nan or inf; nothing is stored then.
        """
        codes = self.codec.encode(obs[mask])
        self.obs.put(self.head[mask], codes)

    def add(
        self,
        action: np.ndarray,
        reward: np.ndarray,
        next_obs: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """Fill in the transition at every env's head and move the head on: by 1, at an end by 2.

        Args:
            action: (num_envs, k), as the networks see it.
            reward: (num_envs,).
            next_obs: (num_envs, n), the observation that the step returned, final or not.
            terminated, truncated: (num_envs,) bool. If both are set, terminated wins: no bootstrap.

        Raises:
            ObservationError: nan or inf in next_obs or reward; nothing is stored then.
        """
        codes, reward = self.codec.encode(next_obs), _float32_reward(reward)
        row, next_row = self.head, self._after(self.head)
        done = terminated | truncated
        put(self.actions, row, torch.from_numpy(np.asarray(action, np.float32)))
        put(self.rewards, row, torch.from_numpy(reward))
        put(self.terminated, row, torch.from_numpy(terminated))
        self.obs.put(next_row, codes)

        self._forget(next_row)  # the oldest row falls out,
        new_head = next_row
        if done.any():
            new_head = np.where(done, self._after(next_row), next_row)
            self._forget(new_head)  # and at an end one more
        self.is_start[row] = True
        self.size += len(row)
        self.fill[:] = np.minimum(self.fill + 1 + done, self.rows)
        self.head[:] = new_head

    def _forget(self, rows: np.ndarray) -> None:
        """No transition begins at these rows any more."""
        self.size -= int(np.count_nonzero(self.is_start[rows]))
        self.is_start[rows] = False

    def sample(self, batch_size: int) -> ReplayBatch:
        """Draw transitions uniformly, with replacement, over all envs together.

        Raises:
            ValueError: nothing is stored yet.
        """
        rows = self._draw(batch_size)
        # One gather for s and s': row and row + 1.
        both = torch.from_numpy(np.concatenate([rows, self._after(rows)])).to(self.device)
        index = both[:batch_size]
        return ReplayBatch(
            self.obs.get(both),
            self.actions.index_select(0, index),
            self.rewards.index_select(0, index),
            self.terminated.index_select(0, index),
        )

    def cut(self, mask: np.ndarray) -> None:
        """End the running episodes of the envs in mask, as a truncation would: a new one follows.

        For an env that could not be brought back to where it was; `start` must come next. The
        newest observation stays the next_obs of the last transition.
        """
        new_head = np.where(mask, self._after(self.head), self.head)
        self._forget(new_head[mask])
        self.fill[:] = np.minimum(self.fill + mask, self.rows)
        self.head[:] = new_head

    def state(self) -> dict:
        """For a checkpoint: the rows in use, not copied, and the bookkeeping."""
        return {
            "obs": self.obs.state(self.fill),
            **{name: stored(torch.as_tensor(getattr(self, name)), self.fill) for name in PER_ROW},
            "head": torch.from_numpy(self.head.copy()),
            "fill": torch.from_numpy(self.fill.copy()),
            "size": self.size,
            "rng": self._rng.bit_generator.state,
        }

    def load(self, saved: dict) -> None:
        """Take over what `state` returned.

        Raises:
            ValueError: rows that this buffer does not have.
        """
        head, fill = saved["head"].numpy(), saved["fill"].numpy()
        inside = (head >= self.first_row) & (head < self.first_row + self.rows)
        if not (inside & (fill >= 1) & (fill <= self.rows)).all():
            raise ValueError("its replay buffer has other rows than this one")
        self.head[:], self.fill[:], self.size = head, fill, saved["size"]
        self.obs.load(saved["obs"], self.fill)
        for name in PER_ROW:
            restore(torch.as_tensor(getattr(self, name)), self.fill, saved[name])
        if self.size != np.count_nonzero(self.is_start):
            raise ValueError("its replay buffer counts other transitions than it holds")
        self._rng.bit_generator.state = saved["rng"]

    def _draw(self, n: int) -> np.ndarray:
        """n rows with `is_start`, uniform and independent. Rings may be filled unequally."""
        if self.size == 0:
            raise ValueError("the replay buffer holds no complete transition to sample yet")
        filled = np.cumsum(self.fill)
        to_row = self.first_row + self.fill - filled  # from a place among all filled rows
        rows = np.empty(0, np.int64)
        while len(rows) < n:  # some draws hit an open head or a final row
            draws = self._rng.integers(filled[-1], size=n + n // 4)
            draws += to_row[np.searchsorted(filled, draws, side="right")]
            rows = np.concatenate([rows, draws[self.is_start[draws]]])
        return rows[:n]

    def _after(self, row: np.ndarray) -> np.ndarray:
        """The row after each, going round within its env's ring."""
        after = row + 1
        return after - self.rows * (after % self.rows == 0)
