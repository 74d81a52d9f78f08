"""The only place where observations live, and always as codes of a `quantize.py` codec.

`RolloutBuffer` holds PPO's n_steps per env; `ReplayBuffer` holds SAC's transitions with **one**
copy of each observation. Built on `torch.device("meta")` a buffer takes no memory but knows its
`nbytes`: that is how `memory.py` says what a run will take.
"""

import math
import resource
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from quantize import Codec
from support.columns import LiveColumns, Rows, columns_of, put, restore, stored, take, zeros

CPU = torch.device("cpu")


class ClampCount:
    """Counts of the observation values that were stored, and of those that had to be clamped.

    Attributes:
        seen, clipped: numbers of values so far, and of those that lay beyond the codec's bound.
        max_abs: largest |s| so far.
        column_peak: largest |s| beyond the bound for each of the n columns, 0 where there was none;
            None while nothing was clamped.
    """

    def __init__(self, codec: Codec):
        self.codec = codec
        self.seen = 0
        self.clipped = 0
        self.max_abs = 0.0
        self.column_peak: list[float] | None = None

    def count(self, obs: np.ndarray) -> None:
        """Count (k, n) observations that are about to be stored.

        Raises:
            ValueError: nan or inf; nothing is counted then. The message names the columns.
        """
        magnitude = np.abs(obs, dtype=np.float64)
        peak = float(magnitude.max(initial=0.0))  # nan if any is: then the comparison fails too
        if not peak <= self.codec.b:
            if not math.isfinite(peak):
                bad = ~np.isfinite(obs).all(0)
                raise ValueError(f"nan or inf in observation columns {columns_of(bad)}")
            beyond = magnitude > self.codec.b
            peaks = np.where(beyond, magnitude, 0.0).max(0)
            self.column_peak = np.maximum(self.column_peak or 0.0, peaks).tolist()
            self.clipped += int(np.count_nonzero(beyond))
        self.seen += obs.size
        self.max_abs = max(self.max_abs, peak)

    @property
    def fraction(self) -> float:
        """Share of the values seen that were clamped."""
        return self.clipped / self.seen if self.seen else 0.0

    def report(self) -> str | None:
        """One line on what was clamped and the bound that would hold it; None if nothing was."""
        if self.column_peak is None:
            return None
        remedy = self.codec.remedy.format(bound=math.ceil(self.max_abs))
        return (
            f"{self.clipped:,} of {self.seen:,} observation values lay beyond +-{self.codec.b:g} "
            f"and were clamped, in columns {columns_of(np.array(self.column_peak) > 0)}; "
            f"{remedy} would hold them"
        )

    def state_dict(self) -> dict:
        """The counts, for a checkpoint."""
        return {
            "seen": self.seen,
            "clipped": self.clipped,
            "max_abs": self.max_abs,
            "column_peak": self.column_peak,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Take over what `state_dict` returned."""
        self.seen, self.clipped = saved["seen"], saved["clipped"]
        self.max_abs, self.column_peak = saved["max_abs"], saved["column_peak"]


def array_bytes(buffer: object) -> int:
    """Bytes of the tensors that are attributes of a buffer."""
    return sum(value.nbytes for value in vars(buffer).values() if isinstance(value, torch.Tensor))


class RolloutBatch(NamedTuple):
    """A minibatch for PPO, all float32: obs (B, n), action (B, k), the others (B,)."""

    obs: torch.Tensor
    action: torch.Tensor
    log_prob: torch.Tensor
    advantage: torch.Tensor
    ret: torch.Tensor


class RolloutBuffer:
    """PPO's on-policy buffer, refilled for every update. Its arrays are (n_steps, num_envs, ...).

    `add` fills obs, actions, values, rewards and ends step by step. log_probs, advantages and
    returns are whole arrays for the caller to set, as ppo.py does.

    Args:
        codec: how observations are stored.
        n_steps: steps per env and rollout.
        num_envs, obs_dim, act_dim: sizes.
        device: where the minibatches go. The arrays are on the CPU, where the environments are.
        seed: of the minibatches' permutations.

    Attributes:
        clamped: what was clamped, a `ClampCount`.
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
        self.codec, self.obs_dim, self.act_dim, self.device = codec, obs_dim, act_dim, device
        self.clamped = ClampCount(codec)
        self.step = 0  # the row that is filled next
        self._rng = np.random.default_rng(seed)
        steps, host = (n_steps, num_envs), device if device.type == "meta" else CPU
        width, dtype = codec.row(obs_dim)
        self.obs = zeros((*steps, width), dtype, host)
        self.actions = zeros((*steps, act_dim), torch.float32, host)
        self.log_probs = zeros(steps, torch.float32, host)
        self.values = zeros(steps, torch.float32, host)
        self.rewards = zeros(steps, torch.float32, host)
        self.ends = zeros(steps, torch.bool, host)
        self.advantages = zeros(steps, torch.float32, host)
        self.returns = zeros(steps, torch.float32, host)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return array_bytes(self)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        """What `add` fills beside obs, as numpy sees it: assigning a row takes a third."""
        tensors = self.actions, self.values, self.rewards, self.ends
        return tuple(tensor.numpy() for tensor in tensors)

    def batch_bytes(self, batch_size: int) -> int:
        """Bytes of one decoded minibatch."""
        rows = min(batch_size, self.ends.numel())
        return rows * 4 * (self.obs_dim + self.act_dim + 3)  # log_prob, advantage, ret

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
            action: (num_envs, k), as sampled. value: (num_envs,), from the network.
            reward: (num_envs,), with gamma * V(final obs) added where the episode was truncated.
            end: (num_envs,) bool, the episode ended with this step, either way.

        Raises:
            ValueError: nan or inf in obs; nothing is stored then.
        """
        self.clamped.count(obs)
        t = self.step
        self.obs[t] = self.codec.pack(self.codec.encode(obs))
        actions, values, rewards, ends = self._arrays
        actions[t], values[t], rewards[t], ends[t] = action, value, reward, end
        self.step = (t + 1) % len(self.obs)

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

    def state_dict(self) -> dict:
        """For a checkpoint between two rollouts, when no row is needed any more."""
        return {"clamped": self.clamped.state_dict(), "rng": self._rng.bit_generator.state}

    def load_state_dict(self, saved: dict) -> None:
        """Take over what `state_dict` returned."""
        self.clamped.load_state_dict(saved["clamped"])
        self._rng.bit_generator.state = saved["rng"]


class ReplayBatch(NamedTuple):
    """A batch for SAC: obs and next_obs (B, n), action (B, k), reward (B,), all float32.

    terminated is (B,) bool. obs and next_obs are the two halves of one (2 B, n) tensor.
    """

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor


def rows_per_env(buffer_size: int, num_envs: int) -> int:
    """Rows of each env's ring: its share of buffer_size and the newest observation, at least 3."""
    return max(3, math.ceil(buffer_size / num_envs) + 1)


class ReplayBuffer:
    """SAC's buffer. The next observation of row i is row i + 1, so each is stored once.

    Every env has a ring of rows of its own. Its head is the open row: it holds the newest
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

    Attributes:
        size: number of stored transitions.
        clamped: what was clamped, a `ClampCount`.
    """

    BESIDE_OBS = ("actions", "rewards", "terminated", "is_start")

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
        self.codec, self.obs_dim, self.act_dim, self.device = codec, obs_dim, act_dim, device
        self.clamped = ClampCount(codec)
        self.size = 0
        self._rng = np.random.default_rng(seed)
        self.ring = rows_per_env(buffer_size, num_envs)  # rows of each env
        rows, host = num_envs * self.ring, device if device.type == "meta" else CPU
        keep = LiveColumns if drop_constant else Rows
        self.obs = keep(codec, num_envs, self.ring, obs_dim, device)
        self.actions = zeros((rows, act_dim), torch.float32, device)
        self.rewards = zeros((rows,), torch.float32, device)
        self.terminated = zeros((rows,), torch.bool, device)
        self.is_start = zeros((rows,), torch.bool, host)
        self.head = [env * self.ring for env in range(num_envs)]  # row of each env's head
        self.fill = [1] * num_envs  # rows in use of each ring, its head included
        self.open = np.zeros(num_envs, bool)  # whether the head holds an observation to act on

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays as they are now."""
        return self.obs.nbytes + array_bytes(self)

    def batch_bytes(self, batch_size: int) -> int:
        """Bytes of one decoded batch."""
        # obs, next_obs, action, reward in float32; terminated is a byte.
        return batch_size * (4 * (2 * self.obs_dim + self.act_dim + 1) + 1)

    def touch(self) -> None:
        """Make every page resident now: a lack of memory shows at the start, not hours later.

        Not with drop_constant, whose arrays grow with the data.
        """
        for array in (self.obs.array, *(getattr(self, name) for name in self.BESIDE_OBS)):
            flat = array.view(-1).view(torch.uint8)
            flat[:: resource.getpagesize()] |= 0
            flat[-1:] |= 0  # arrays do not begin with a page: the last one may hold a short tail

    def start(self, obs: np.ndarray, mask: np.ndarray) -> None:
        """Write the first observation of an episode at the head of every env in mask.

        If an episode is still running there, it ends as a truncation would end it: its newest
        observation stays, as the next_obs of its last transition.

        Args:
            obs: (num_envs, n), read where mask is true.
            mask: (num_envs,) bool, the envs that were reset.

        Raises:
            ValueError: nan or inf; nothing is stored then.
        """
        self.clamped.count(obs[mask])
        codes = self.codec.encode(obs[mask])
        envs = np.flatnonzero(mask).tolist()
        for env in envs:
            if self.is_start[self._beside_head(env, -1)]:
                self._advance(env)
        self.obs.put(np.array([self.head[env] for env in envs], np.int64), codes)
        self.open |= mask

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
            ValueError: nan or inf in next_obs, or an env in which `start` began no episode; nothing
                is stored then.
        """
        if not self.open.all():
            raise ValueError(f"start() must come before add() in envs {columns_of(~self.open)}")
        self.clamped.count(next_obs)
        rows = np.array(self.head)
        put(self.actions, rows, action)
        put(self.rewards, rows, reward)
        put(self.terminated, rows, terminated)
        self.is_start.numpy()[rows] = True
        self.size += len(rows)
        next_rows = np.array([self._advance(env) for env in range(len(rows))])
        self.obs.put(next_rows, self.codec.encode(next_obs))
        self.open = ~(terminated | truncated)
        for env in np.flatnonzero(~self.open).tolist():
            self._advance(env)  # beyond the final observation

    def _beside_head(self, env: int, by: int) -> int:
        """The row that lies `by` rows after the head of an env, going round in its ring."""
        return env * self.ring + (self.head[env] + by) % self.ring

    def _advance(self, env: int) -> int:
        """Move the head of an env to the next row, and return it.

        What was stored there, the oldest row of a full ring, no longer begins a transition.
        """
        self.head[env] = row = self._beside_head(env, 1)
        self.fill[env] = min(self.fill[env] + 1, self.ring)
        is_start = self.is_start.numpy()
        if is_start[row]:
            is_start[row] = False
            self.size -= 1
        return row

    def sample(self, batch_size: int) -> ReplayBatch:
        """Draw transitions uniformly, with replacement, over all envs together.

        Raises:
            ValueError: nothing is stored yet.
        """
        rows = self._draw(batch_size)
        next_rows = rows + 1
        next_rows[next_rows % self.ring == 0] -= self.ring  # going round in the env's ring
        both = np.concatenate([rows, next_rows])  # one gather for s and s'
        obs, next_obs = self.obs.get(both).chunk(2)
        action, reward = take(self.actions, rows), take(self.rewards, rows)
        return ReplayBatch(obs, action, reward, next_obs, take(self.terminated, rows))

    def _draw(self, n: int) -> np.ndarray:
        """n rows with `is_start`, uniform and independent. Rings may be filled unequally."""
        if self.size == 0:
            raise ValueError("the replay buffer holds no complete transition to sample yet")
        is_start, total = self.is_start.numpy(), sum(self.fill)
        rows = np.empty(0, np.int64)
        while len(rows) < n:  # some draws hit an open head or a final row
            draws = self._rng.integers(total, size=n + n // 4)
            if len(self.fill) > 1:  # they number the filled rows of all rings, one after the other
                ends = np.cumsum(self.fill)
                env = np.searchsorted(ends, draws, side="right")
                draws += env * self.ring - (ends - self.fill)[env]
            rows = np.concatenate([rows, draws[is_start[draws]]])
        return rows[:n]

    def state_dict(self) -> dict:
        """For a checkpoint: the rows in use, not copied, and the bookkeeping."""
        return {name: stored(getattr(self, name), self.fill) for name in self.BESIDE_OBS} | {
            "obs": self.obs.state_dict(self.fill),
            "head": list(self.head),
            "fill": list(self.fill),
            "clamped": self.clamped.state_dict(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: rows that this buffer does not have.
        """
        self.head, self.fill = list(saved["head"]), list(saved["fill"])
        self.open[:] = True  # a checkpoint is between two steps, after `start`
        self.obs.load_state_dict(saved["obs"], self.fill)
        for name in self.BESIDE_OBS:
            restore(getattr(self, name), self.fill, saved[name])
        self.size = int(self.is_start.count_nonzero())
        self.clamped.load_state_dict(saved["clamped"])
        self._rng.bit_generator.state = saved["rng"]
