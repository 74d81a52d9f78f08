"""Stable-Baselines3's SAC, TD3 or DDPG learning from our replay buffer: one argument more.

    from examples.sb3_buffer import FixedPointReplayBuffer  # PYTHONPATH=/path/to/this/repository
    SAC("MlpPolicy", env, replay_buffer_class=FixedPointReplayBuffer, replay_buffer_kwargs={"m": 2})

A million rows of Humanoid-v3 take 6.1 GB before: float64, each observation twice. After, 0.83 GB:
int16, each once; 0.56 GB with pack and drop_constant. SB3's optimize_memory_usage takes 3.1 GB.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro

try:
    from stable_baselines3 import SAC
    from stable_baselines3.common import buffers as sb3
except ModuleNotFoundError as error:
    sys.exit(f"sb3_buffer.py: error: {error}; .venv/bin/pip install -r tests/requirements.txt")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memory
from buffers import CPU, ReplayBuffer
from quantize import make_codec
from support import envs, errors


class FixedPointReplayBuffer(sb3.ReplayBuffer):
    """Of flat Boxes, else ValueError. m (None: float64), b, pack, drop_constant: as in sac.py."""

    def __init__(self, *args, m=2, b=127, pack=False, drop_constant=False, **kwargs):
        if kwargs.pop("optimize_memory_usage", False):
            raise ValueError("drop optimize_memory_usage: each observation is stored once anyway")
        sb3.BaseBuffer.__init__(self, *args, **kwargs)  # ReplayBuffer's would allocate its arrays
        if problem := envs.unsuitable(self.observation_space, self.action_space):
            raise ValueError(f"FixedPointReplayBuffer: the environment {problem}")
        self.codec, self.drop_constant = make_codec(m, b, None, pack), drop_constant
        self.handle_timeout_termination = True  # read by load_replay_buffer
        self.reset()

    def reset(self):
        sizes = self.buffer_size, self.n_envs, *self.obs_shape, self.action_dim
        self.rows = ReplayBuffer(self.codec, *sizes, CPU, torch.initial_seed(), self.drop_constant)
        self.newest, self.ended = np.zeros(self.obs_shape), np.ones(self.n_envs, bool)

    def size(self):
        return self.rows.size // self.n_envs  # per env, as SB3 counts

    def add(self, obs, next_obs, action, reward, done, infos):
        # After an end, and after the reset in mid-episode that a second learn() does.
        self.rows.start(obs, self.ended | (obs != self.newest).any(1))
        timeout = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        self.rows.add(action, reward, next_obs, done & ~timeout, done & timeout)
        self.newest, self.ended = next_obs.copy(), done.copy()

    def sample(self, batch_size, env=None):
        batch = self.rows.sample(batch_size)
        obs, next_obs = (self._normalize_obs(x.numpy(), env) for x in (batch.obs, batch.next_obs))
        reward = self._normalize_reward(batch.reward[:, None].numpy(), env)
        parts = obs, batch.action, next_obs, batch.terminated[:, None].float(), reward
        return sb3.ReplayBufferSamples(*(torch.as_tensor(x, device=self.device) for x in parts))


def main(env: str = "Pendulum-v1", total_timesteps: int = 5_000, quant_m: int | None = 2) -> None:
    """Train SAC on observations rounded to quant_m decimals; print what both buffers take."""
    ours = {"replay_buffer_class": FixedPointReplayBuffer, "replay_buffer_kwargs": {"m": quant_m}}
    model = SAC("MlpPolicy", envs.make(env), seed=1, **ours).learn(total_timesteps)
    returns = envs.evaluate(env, lambda obs: model.predict(obs, deterministic=True)[0], 10, seed=1)
    theirs = sb3.ReplayBuffer(model.buffer_size, model.observation_space, model.action_space)
    before = sum(x.nbytes for x in vars(theirs).values() if isinstance(x, np.ndarray))
    after = model.replay_buffer.rows.nbytes
    print(f"{env}, mean return of 10 episodes: {np.mean(returns):.1f}")
    print(f"{model.buffer_size:,} rows: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")
    memory.main(memory.Args(env="Humanoid-v3", layouts=True, live_columns=257))  # of 376


if __name__ == "__main__":
    with errors.command("sb3_buffer.py"), errors.refusing("sb3_buffer.py"):
        tyro.cli(main)
