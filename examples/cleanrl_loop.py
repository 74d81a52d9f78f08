"""DDPG in one file, as CleanRL would write it; what our replay buffer needs ends in # ours.

A million rows of Humanoid-v3 take 3.1 GB before, as CleanRL stores them: float32, each observation
twice. After, 0.83 GB: int16, each once; 0.56 GB with pack and drop_constant. Only `start` has no
counterpart in CleanRL. DDPG: arXiv:1509.02971. `python examples/cleanrl_loop.py` takes a minute.
A loop of yours elsewhere finds buffers.py and what it needs by PYTHONPATH=/path/to/this/repository.
"""

import copy
import sys
from pathlib import Path

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import memory
from buffers import CPU, ReplayBuffer  # ours
from quantize import make_codec  # ours
from support import envs, errors

NUM_ENVS = 2  # each step is one of both, and one update
ROWS = 1_000_000  # of the replay buffer; an episode of T steps takes T + 1
BATCH, LEARNING_RATE = 256, 1e-3
NOISE = 0.1  # standard deviation of what is added to actions in [-1, 1], to explore
GAMMA, TAU = 0.99, 0.005  # discount; share of the networks that enters the targets


def mlp(inputs: int, outputs: int, *last: nn.Module) -> nn.Sequential:
    hidden = nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(64, outputs), *last)


def main(env: str = "Pendulum-v1", total_timesteps: int = 20_000, quant_m: int | None = 2):
    """Train on observations rounded to quant_m decimals; return actor and critic."""
    torch.manual_seed(1)
    vec = envs.VectorEnv(env, NUM_ENVS)  # Gymnasium's, with AutoresetMode.DISABLED
    low, high = vec.single_action_space.low, vec.single_action_space.high
    n, k = vec.single_observation_space.shape[0], len(low)
    buffer = ReplayBuffer(make_codec(quant_m, 127, None), ROWS, NUM_ENVS, n, k, CPU, seed=1)  # ours
    actor, critic = networks = nn.ModuleList([mlp(n, k, nn.Tanh()), mlp(n + k, 1)])
    actor_target, critic_target = targets = copy.deepcopy(networks).requires_grad_(False)
    adam = torch.optim.Adam(networks.parameters(), LEARNING_RATE)

    def act(obs, noise=0.0):
        action = actor(torch.as_tensor(obs, dtype=torch.float32)).detach()
        action = (action + noise * torch.randn(action.shape)).clamp(-1, 1).numpy()
        return action, low + (action + 1) / 2 * (high - low)  # as stored, as the env takes it

    obs, _ = vec.reset(seed=1)
    for _ in range(0, total_timesteps, NUM_ENVS):
        buffer.start(obs, vec.fresh)  # ours, where an episode begins
        action, scaled = act(obs, NOISE)
        next_obs, reward, terminated, truncated, _ = vec.step(scaled)
        buffer.add(action, reward, next_obs, terminated, truncated)  # ours
        obs, _ = vec.reset(options={"reset_mask": terminated | truncated})
        batch = buffer.sample(BATCH)  # ours
        next_q = critic_target(torch.cat([batch.next_obs, actor_target(batch.next_obs)], 1))[:, 0]
        q_target = batch.reward + GAMMA * torch.where(batch.terminated, 0.0, next_q)
        q = critic(torch.cat([batch.obs, batch.action], 1))[:, 0]
        q_of_actor = critic(torch.cat([batch.obs, actor(batch.obs)], 1))
        adam.zero_grad()
        (q - q_target).square().mean().backward()
        (-q_of_actor.mean()).backward(inputs=[*actor.parameters()])  # not the critic's
        adam.step()
        for target, source in zip(targets.parameters(), networks.parameters(), strict=True):
            target.lerp_(source.detach(), TAU)

    returns = envs.evaluate(env, lambda obs: act(obs)[1], 10, seed=1)
    print(f"{env}, mean return of 10 episodes: {sum(returns) / 10:.1f}")
    before = ROWS * 4 * (2 * n + k + 3)  # float32: obs, next_obs, action, reward, done, timeout
    print(f"{ROWS:,} rows: {before / 1e6:.1f} MB before, {buffer.nbytes / 1e6:.1f} MB after")
    memory.main(memory.Args(env="Humanoid-v3", layouts=True, live_columns=257))  # of 376
    return networks


if __name__ == "__main__":
    with errors.command("cleanrl_loop.py"), errors.refusing("cleanrl_loop.py"):
        tyro.cli(main)
