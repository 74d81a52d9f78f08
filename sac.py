"""Soft Actor-Critic that learns from observations stored as rounded fixed-point integers.

    python sac.py --env Humanoid-v3 --quant-m 2       # the paper's method
    python sac.py --env Humanoid-v3                   # its float64 baseline: one flag apart

"The paper" is Grossman & Plancher, "Just Round" (ICRA 2023). SAC is Haarnoja et al., "Soft
Actor-Critic Algorithms and Applications" (arXiv:1812.05905v2). Details follow Stable-Baselines3's
`sac/sac.py` (2.9.2), with one copy of each observation and, at any --num-envs, one update per
transition. docs/hacks.md shows changes that you can make here.

| symbol   | name                  | meaning                                                      |
|----------|-----------------------|--------------------------------------------------------------|
| s, s', a | obs, next_obs, action | a in [-1, 1], as the networks see it                         |
| u        | mean + std * noise    | Gaussian sample before squashing, a = tanh(u)                |
| gamma    | gamma                 | discount                                                     |
| tau      | tau                   | share of the critics that enters the targets at every update |
| alpha    | alpha, log_alpha      | temperature: weight of the entropy                           |
| H bar    | target_entropy        | entropy that alpha is tuned for                              |
| Q1, Q2   | q[0], q[1]            | the twin critics                                             |
| m, b     | quant_m, quant_b      | decimals kept, clamp bound                                   |
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

import memory
from buffers import ReplayBuffer
from quantize import make_codec
from support import arguments, errors, runs
from support.envs import VectorEnv
from support.networks import Actor, Adam, Critic, flatten, set_threads
from support.recording import Recorded, check_recordings

SQUASH_EPS = 1e-6  # keeps log(1 - a^2) finite at a = +-1; SB3 distributions.py:241
LOG_EVERY = 1000  # steps between two entries of the losses in TensorBoard


@dataclass
class Args:
    """Train SAC on observations stored as fixed point (--quant-m) or as floats."""

    env: str = "Humanoid-v3"
    """Gymnasium id (or module:id) with flat Box observations and actions; the paper's are -v3"""
    quant_m: int | None = None
    """decimals kept of each stored observation (paper: 2); 2 keeps 1.23 of 1.234, None all"""
    quant_b: float = 127.0
    """clamp bound: observations are clamped to [-b, b] before rounding"""
    storage: Literal["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"] | None = None
    """dtype in which the baseline stores observations; None is float64, the paper's"""
    pack: bool = False
    """store the codes of --quant-m in the bits they need: 8, 12, 15, 18 for m = 0, 1, 2, 3"""
    quant_act: bool = False
    """also act on the decoded observation (the paper acts on raw and learns from rounded ones)"""
    drop_constant: bool = False
    """store a column of the observation only from its first change on"""
    memory_budget: str | None = None
    """bytes for buffer, networks and batch, e.g. 750MB: the buffer takes the rest, at the start"""
    eager: bool = False
    """let autograd run at every update: prints and breakpoints work inside a loss; slower"""
    seed: int = 1
    """random seed of networks, environments, exploration and sampling"""
    total_timesteps: int = 1_000_000
    """environment transitions to train for, all envs together"""
    num_envs: int = 1
    """environments stepped side by side"""
    device: str = "cpu"
    """cpu, cuda, or auto: cuda where there is one"""
    hidden: int = 64
    """width of both hidden layers (paper's appendix: 64; SB3's SAC default: 256)"""
    eval_episodes: int = 10
    """deterministic episodes after training, each of at most 10,000 steps; 0 is none"""
    run_dir: str = "runs"
    """folder that holds the folders of the runs"""
    run_name: str | None = None
    """folder of this run; None derives it from env, seed and what differs from the defaults"""
    tag: str | None = None
    """a word of your own in the run's name, to tell what you changed in the code"""
    checkpoint_every: int = 0
    """steps from one checkpoint to the next; with 0 there is one only when the run is stopped"""
    resume: bool = False
    """go on from its last checkpoint with --run-name, or with the last such run left unfinished"""

    learning_rate: float = 3e-4
    """of actor, critics and alpha (Table II)"""
    buffer_size: int = 1_000_000
    """rows of the replay buffer, all envs together; an episode of T steps takes T + 1 (Table II)"""
    learning_starts: int = 100
    """transitions with uniformly random actions before the first update"""
    train_freq: int = 1
    """transitions from one round of updates to the next (Table II)"""
    gradient_steps: int = 1
    """updates in each round (Table II)"""
    batch_size: int = 256
    """transitions per update (Table II)"""
    gamma: float = 0.99
    """discount (Table II)"""
    tau: float = 0.005
    """target = (1 - tau) target + tau critic, after every update (Table II)"""
    target_entropy: float | None = None
    """entropy in nats that alpha is tuned for; None is minus the number of actions"""


def check(args: Args) -> None:
    """Raise ValueError with one clear line for arguments that do not go together."""
    if args.memory_budget is None and args.batch_size > args.buffer_size:
        raise ValueError(
            f"--batch-size {args.batch_size} is larger than --buffer-size {args.buffer_size}"
        )
    if args.memory_budget is not None and args.buffer_size != Args.buffer_size:
        raise ValueError("--memory-budget sets the buffer's size; drop --buffer-size or the budget")
    if args.memory_budget is not None and args.drop_constant:
        raise ValueError(
            "with --drop-constant the buffer's bytes depend on the data and --memory-budget cannot "
            "tell its size; `memory.py --budget 750MB --live-columns N` does, for --buffer-size"
        )


def prepare(args: Args) -> tuple:
    """Check everything, build codec and envs, say what memory it takes; then make the folder."""
    arguments.check_ranges(args)
    check(args)
    device = runs.find_device(args.device)
    codec = make_codec(args.quant_m, args.quant_b, args.storage, args.pack)
    envs = VectorEnv(args.env, args.num_envs)
    (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    sizes = {"obs_dim": obs_dim, "act_dim": act_dim, "num_envs": args.num_envs}
    others = {"hidden": args.hidden, "batch_size": args.batch_size}
    rows = memory.buffer_size(args, codec, device, **sizes, **others)  # or what the budget holds
    sizes["buffer_size"] = rows
    footprint = memory.plan("sac", codec, device, args.drop_constant, **sizes, **others)
    envs.reset(seed=args.seed)
    folder = runs.find_folder("sac.py", args, device)
    errors.say(f"{folder} on {device}, {rows:,} observations stored as {codec.name}\n{footprint}")
    return device, codec, envs, sizes, folder


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """a = tanh(u), u = mean + std * noise: (B, k) each -> action (B, k) in [-1, 1]."""
    return torch.tanh(mean + log_std.exp() * noise)


def squashed_log_prob(noise: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log pi(a|s) of a = tanh(u), u = mean + std * noise: (B, k) each -> (B,). SAC appendix C.

    Of the action within [-1, 1], before `to_env`. SB3 distributions.py:229 evaluates the same
    density through (u - mean) / std.
    """
    log_gaussian = -0.5 * (noise**2 + math.log(2 * math.pi)) - log_std
    return (log_gaussian - torch.log(1 - action**2 + SQUASH_EPS)).sum(-1)


def soft_q_target(
    reward: Tensor,
    terminated: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor,
    gamma: float,
) -> Tensor:
    """r + gamma (min_i Q_i(s', a') - alpha log pi(a'|s')), only r where s' is terminal: (B,).

    A truncated episode goes on in principle, so it bootstraps. SAC eq. 3, 5 with the twin minimum.

    Args:
        reward, next_log_prob: (B,). terminated: (B,) bool. next_q: (2, B). alpha: ().
    """
    next_value = next_q.amin(0) - alpha * next_log_prob  # SAC eq. 3
    # where, not a product: 0 * nan would be nan.
    return reward + gamma * torch.where(terminated, 0.0, next_value)


def critic_loss(q: Tensor, q_target: Tensor) -> Tensor:
    """0.5 (MSE1 + MSE2): q (2, B), q_target (B,) -> (). SAC eq. 5."""
    return 0.5 * (q - q_target).square().mean(1).sum()


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """alpha log pi(a|s) - min_i Q_i(s, a), averaged: q (2, B), log_prob (B,) -> (). SAC eq. 9."""
    return (alpha * log_prob - q.amin(0)).mean()


def alpha_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """-log alpha (log pi + H bar): raises alpha while the entropy is below H bar. SB3 sac.py:240.

    SAC eq. 18 has alpha itself in front; SB3's log alpha gives a gradient of the same sign.
    """
    return -(log_alpha * (log_prob + target_entropy).detach()).mean()


def main(args: Args) -> dict:
    """Train, evaluate, write logs, weights and result.json; return `parts` and the result."""
    with errors.refusing("sac.py"):
        device, codec, envs, sizes, folder = prepare(args)
    obs_dim, act_dim = sizes["obs_dim"], sizes["act_dim"]
    torch.manual_seed(args.seed)
    envs.action_space.seed(args.seed)
    low, high = envs.single_action_space.low, envs.single_action_space.high
    set_threads(args.batch_size, obs_dim + act_dim, args.hidden)

    # --- Networks, optimisers, buffer ------------------------------------------------------------
    actor = Actor(obs_dim, act_dim, args.hidden).to(device)
    critic = Critic(obs_dim, act_dim, args.hidden).to(device)  # Q1 and Q2
    target = copy.deepcopy(critic)
    log_alpha = nn.Parameter(torch.zeros((), device=device))
    target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
    # Adam works per parameter: one over actor and log_alpha makes the same steps as SB3's two.
    actor_parameters, critic_parameters = flatten(actor, log_alpha), flatten(critic)
    target_parameters = flatten(target)
    actor_adam = Adam(actor_parameters, args.learning_rate)
    critic_adam = Adam(critic_parameters, args.learning_rate)
    buffer = ReplayBuffer(
        codec, **sizes, device=device, seed=args.seed, drop_constant=args.drop_constant
    )
    if args.memory_budget is not None:
        buffer.touch()

    # --- What is computed at every step; see support/recording.py --------------------------------
    def policy(obs: Tensor, noise: Tensor) -> Tensor:
        return squash(*actor(obs), noise)

    def bellman_target(
        next_obs: Tensor, noise: Tensor, reward: Tensor, terminated: Tensor
    ) -> Tensor:
        mean, log_std = actor(next_obs)
        next_action = squash(mean, log_std, noise)
        next_log_prob = squashed_log_prob(noise, log_std, next_action)
        next_q = target(next_obs, next_action)
        return soft_q_target(reward, terminated, next_q, next_log_prob, log_alpha.exp(), args.gamma)

    def loss_of_critic(obs: Tensor, action: Tensor, q_target: Tensor) -> tuple[Tensor, ...]:
        q = critic(obs, action)
        return critic_loss(q, q_target), q

    def loss_of_actor_and_alpha(obs: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        # Only actor and log_alpha get gradients of this, as they are in actor_parameters.
        mean, log_std = actor(obs)
        action = squash(mean, log_std, noise)
        log_prob = squashed_log_prob(noise, log_std, action)
        pi_loss = actor_loss(critic(obs, action), log_prob, log_alpha.detach().exp())
        temperature_loss = alpha_loss(log_alpha, log_prob, target_entropy)
        return pi_loss + temperature_loss, pi_loss, temperature_loss, log_prob

    record = partial(Recorded, eager=args.eager)
    act, find_target = record(policy), record(bellman_target)
    critic_gradient = record(loss_of_critic, critic_parameters)
    actor_gradient = record(loss_of_actor_and_alpha, actor_parameters)

    def to_env(action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the environment's bounds."""
        return low + (action + 1) / 2 * (high - low)

    def acted_on(obs: np.ndarray) -> Tensor:
        """What is acted on: the raw observation as in the paper, or the decoded one."""
        raw = torch.from_numpy(obs.astype(np.float32))
        return (codec.decode(codec.encode(obs)) if args.quant_act else raw).to(device)

    def best_action(obs: np.ndarray) -> np.ndarray:
        """Deterministic action for one observation: tanh of the mean."""
        no_noise = torch.zeros(1, act_dim, device=device)
        return to_env(policy(acted_on(obs[None]), no_noise)[0].cpu().numpy())

    progress, buffer_bytes = runs.Progress(args.num_envs), buffer.nbytes
    parts = {  # all that the next step depends on: saved in checkpoints, restored by --resume
        "actor": actor,
        "critic": critic,
        "target": target,
        "log_alpha": log_alpha,
        "actor_adam": actor_adam,
        "critic_adam": critic_adam,
        "buffer": buffer,
        "envs": envs,
        "action_space": envs.action_space.np_random,
        "progress": progress,
    }
    # Inference mode is the fastest; gradients come from what is recorded above, not .backward().
    with runs.Run("sac.py", args, device, folder, **parts) as run, torch.inference_mode():
        obs = envs.obs
        buffer.start(obs, envs.fresh)
        while run.goes_on():
            # --- Collect one transition per env --------------------------------------------------
            if progress.global_step < args.learning_starts:
                action = 2 * (envs.action_space.sample() - low) / (high - low) - 1
            else:
                noise = torch.randn(args.num_envs, act_dim, device=device)
                action = act(acted_on(obs), noise).cpu().numpy()
            next_obs, reward, terminated, truncated, _ = envs.step(to_env(action))
            buffer.add(action, reward, next_obs, terminated, truncated)
            obs, done = next_obs, terminated | truncated
            run.advance(reward, done)
            run.warn_of_clamping(buffer.clamped)
            if args.drop_constant and buffer.nbytes != buffer_bytes:
                buffer_bytes = buffer.nbytes
                run.say(memory.columns_found(buffer_bytes, buffer.obs.live, device))
            if done.any():
                obs, _ = envs.reset(options={"reset_mask": done})
                buffer.start(obs, done)

            # --- Learn: as many updates as fell due with these transitions -----------------------
            step = progress.global_step
            # How many multiples of train_freq this step has reached.
            rounds = step // args.train_freq - (step - args.num_envs) // args.train_freq
            updates = rounds * args.gradient_steps if step > args.learning_starts else 0
            for _ in range(updates):
                batch = buffer.sample(args.batch_size)
                noise, next_noise = torch.randn(2, args.batch_size, act_dim, device=device)
                q_target = find_target(batch.next_obs, next_noise, batch.reward, batch.terminated)
                # critic_gradient and actor_gradient also set the .grad of their parameters.
                qf_loss, q = critic_gradient(batch.obs, batch.action, q_target)
                critic_adam.step()
                _, pi_loss, temperature_loss, log_prob = actor_gradient(batch.obs, noise)
                actor_adam.step()
                target_parameters.lerp_(critic_parameters, args.tau)

            # --- Log the last update -------------------------------------------------------------
            if updates and step % LOG_EVERY < max(args.num_envs, args.train_freq):
                check_recordings(act, find_target, critic_gradient, actor_gradient)
                run.log(
                    {
                        "losses/qf_loss": qf_loss,
                        "losses/actor_loss": pi_loss,
                        "losses/alpha_loss": temperature_loss,
                        "losses/qf1_values": q[0].mean(),
                        "losses/qf2_values": q[1].mean(),
                        "losses/entropy": -log_prob.mean(),
                        "losses/alpha": log_alpha.exp(),
                        "charts/SPS": step / run.seconds,
                        "memory/buffer_bytes": buffer.nbytes,
                        "quant/clip_fraction": buffer.clamped.fraction,
                        "quant/max_abs_obs": buffer.clamped.max_abs,
                    }
                )

        # --- Sum up ------------------------------------------------------------------------------
        check_recordings(act, find_target, critic_gradient, actor_gradient)
        result = run.finish(buffer, best_action, buffer_size=sizes["buffer_size"])
    return parts | {"result": result}


if __name__ == "__main__":
    with errors.command("sac.py"):
        main(tyro.cli(Args))
