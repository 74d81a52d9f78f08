"""Soft Actor-Critic that learns from observations stored as rounded fixed-point integers.

    python sac.py --env Humanoid-v3 --quant-m 2       # the paper's method
    python sac.py --env Humanoid-v3                   # its float64 baseline: one flag apart

"The paper" is Grossman & Plancher, "Just Round" (ICRA 2023). SAC is Haarnoja et al., "Soft
Actor-Critic Algorithms and Applications" (arXiv:1812.05905v2). Details follow Stable-Baselines3's
`sac/sac.py` (2.9.2), with one copy of each observation and, at any --num-envs, one update per
transition.

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
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import memory
import runs
from buffers import ReplayBuffer
from envs import evaluate, make_vector
from networks import MLP, Adam, check_update, flatten, set_threads
from quantize import make_codec

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # SB3 sac/policies.py:21
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
    """bytes for buffer, networks and batch, e.g. 750MB: the buffer takes what is left, at once"""
    seed: int = 1
    """random seed of networks, environments, exploration and sampling"""
    total_timesteps: int = 1_000_000
    """environment transitions to train for, all envs together"""
    num_envs: int = 1
    """environments stepped side by side"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one"""
    hidden: int = 64
    """width of both hidden layers (paper's appendix: 64; SB3's SAC default: 256)"""
    eval_episodes: int = 10
    """deterministic episodes after training, each of at most 10,000 steps; 0 is none"""
    run_dir: str = "runs"
    """folder that holds the folders of the runs"""
    run_name: str | None = None
    """folder of this run; None derives it from env, seed and what differs from the defaults"""
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
    """Raise ValueError with one clear line for an argument out of its range."""
    at_least_1 = "total_timesteps hidden buffer_size batch_size train_freq gradient_steps"
    at_least_0 = "checkpoint_every eval_episodes learning_starts"
    from_0_to_1 = "learning_rate gamma tau"
    ranges = ((at_least_1, 1, 10**12), (at_least_0, 0, 10**12), (from_0_to_1, 0, 1))
    for names, low, high in (*ranges, ("num_envs", 1, 10_000), ("seed", 0, 2**32 - 1)):
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise ValueError(f"{flag} is out of range; it must be from {low} to {high}")
    if args.target_entropy is not None and not math.isfinite(args.target_entropy):
        raise ValueError(f"--target-entropy {args.target_entropy} is not finite")
    if args.memory_budget is not None and args.buffer_size != Args.buffer_size:
        raise ValueError("--memory-budget sets the buffer's size; drop --buffer-size or the budget")
    if args.memory_budget is not None and args.drop_constant:
        raise ValueError(
            "with --drop-constant the buffer's bytes depend on the data and --memory-budget cannot "
            "tell its size; `memory.py --budget 750MB --live-columns N` does, for --buffer-size"
        )
    if args.memory_budget is None and args.batch_size > args.buffer_size:
        raise ValueError(
            f"--batch-size {args.batch_size} is larger than --buffer-size {args.buffer_size}"
        )


def prepare(args: Args) -> tuple:
    """Check everything, create the run's folder last, and say what memory the run will take.

    Returns:
        device, codec, vector env, its first obs (num_envs, n), sizes (obs_dim, act_dim, num_envs,
        buffer_size), place: the run's folder, locked, and what was saved there if it is resumed.

    Raises:
        SystemExit: code 2 and one line on stderr for bad input; nothing has been created then.
    """
    with runs.refusing("sac.py"):
        check(args)
        device = runs.find_device(args.device)
        codec = make_codec(args.quant_m, args.quant_b, args.storage, args.pack)
        envs = make_vector(args.env, args.num_envs)
        (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
        sizes = {"obs_dim": obs_dim, "act_dim": act_dim, "num_envs": args.num_envs}
        networks = {"hidden": args.hidden, "batch_size": args.batch_size}
        if args.memory_budget is None:
            sizes["buffer_size"] = args.buffer_size
        else:
            budget, free = memory.parse_bytes(args.memory_budget), memory.free_memory(device)
            if budget > free:
                raise ValueError(
                    f"--memory-budget {args.memory_budget} is more than the {memory.mb(free)} MB "
                    "of memory that are free"
                )
            sizes["buffer_size"] = memory.largest("sac", codec, budget, **sizes, **networks)
        footprint = memory.plan(  # refuses what cannot fit
            "sac", codec, device, **sizes, **networks, drop_constant=args.drop_constant
        )
        obs, _ = envs.reset(seed=args.seed)
        place = runs.find_place("sac.py", args, device)
    print(f"{place} on {device}, observations stored as {codec.name}\n{footprint}")
    if args.memory_budget is not None:
        print(
            f"--memory-budget {args.memory_budget} holds {sizes['buffer_size']:,} rows; Python and "
            "its libraries take about 300 MB beside it"
        )
    return device, codec, envs, obs, sizes, place


def uniform(count: int, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Layers of `count` networks as torch's Linear, and so SB3, starts them: +-1 / sqrt(inputs)."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        weight, bias = torch.empty(count, inputs, outputs), torch.empty(count, 1, outputs)
        bound = inputs**-0.5
        layers.append((weight.uniform_(-bound, bound), bias.uniform_(-bound, bound)))
    return layers


def mean_and_log_std(out: Tensor) -> tuple[Tensor, Tensor]:
    """The actor's output (B, 2k) -> mean and log_std of u, both (B, k). SB3 sac/policies.py:25."""
    mean, log_std = out.chunk(2, -1)
    return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """a = tanh(u), u = mean + std * noise: (B, k) each -> action (B, k) in [-1, 1]."""
    return torch.addcmul(mean, log_std.exp(), noise).tanh_()


def squashed_log_prob(noise: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log pi(a|s) of a = tanh(u), u = mean + std * noise: (B, k) each -> (B,). SAC appendix C.

    In [-1, 1] units. SB3 distributions.py:229 evaluates the same density through (u - mean) / std.
    """
    log_gaussian = -0.5 * (noise**2 + math.log(2 * math.pi)) - log_std
    return (log_gaussian - torch.log(1 - action**2 + SQUASH_EPS)).sum(-1)


def squash_gradient(
    out: Tensor, noise: Tensor, action: Tensor, d_action: Tensor, d_log_prob: Tensor
) -> Tensor:
    """Back through the action and its log_prob, to the actor's output.

    Args:
        out: (B, 2k), what noise and action, (B, k) each, belong to.
        d_action, d_log_prob: (B, k) and (B,), the gradient of a loss by each.

    Returns:
        (B, 2k), the gradient by `out`.
    """
    _, log_std = mean_and_log_std(out)
    d_log_prob, slope = d_log_prob[:, None], 1 - action**2  # d tanh(u) / du
    d_u = (d_action + 2 * d_log_prob * action / (slope + SQUASH_EPS)) * slope
    inside = out.chunk(2, -1)[1] == log_std  # a clamped log_std has no gradient
    d_log_std = (d_u * log_std.exp() * noise - d_log_prob) * inside
    return torch.cat([d_u, d_log_std], -1)  # d u / d mean = 1


def soft_q_target(
    reward: Tensor,
    terminated: Tensor,
    next_q: Tensor,
    next_log_prob: Tensor,
    alpha: Tensor,
    gamma: float,
) -> Tensor:
    """r + gamma (min_i Q_i(s', a') - alpha log pi(a'|s')), only r where s' is terminal.

    A truncated episode goes on in principle, so it bootstraps. SAC eq. 3, 5 with the twin minimum.

    Args:
        reward, next_log_prob: (B,). terminated: (B,) bool. next_q: (2, B). alpha: ().
    """
    next_value = next_q.amin(0) - alpha * next_log_prob  # SAC eq. 3
    # where, not a product: 0 * nan would be nan.
    return reward + gamma * torch.where(terminated, 0.0, next_value)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """0.5 (MSE1 + MSE2), which is the mean over both critics: q (2, B), target (B,). SAC eq. 5."""
    return (q - target).square().mean()


def critic_loss_gradient(q: Tensor, target: Tensor) -> Tensor:
    """Of `critic_loss`, by q: (2, B)."""
    return (q - target) / len(target)


def actor_loss(q: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
    """alpha log pi(a|s) - min_i Q_i(s, a), averaged: q (2, B), log_prob (B,). SAC eq. 9."""
    return (alpha * log_prob - q.amin(0)).mean()


def actor_loss_gradient(q: Tensor, log_prob: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Of `actor_loss`, by q (2, B) and by log_prob (B,)."""
    share = (torch.sign(q.flip(0) - q) + 1) / 2  # 1 for the smaller one, 1/2 each if equal
    return -share / len(log_prob), (alpha / len(log_prob)).expand_as(log_prob)


def alpha_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """-log alpha (log pi + H bar): raises alpha while the entropy is below H bar. SB3 sac.py:240.

    SAC eq. 18 has alpha itself in front; SB3's log alpha gives a gradient of the same sign.
    """
    return -(log_alpha * (log_prob + target_entropy).detach()).mean()


def alpha_loss_gradient(log_prob: Tensor, target_entropy: float) -> Tensor:
    """Of `alpha_loss`, by log_alpha: ()."""
    return -(log_prob + target_entropy).mean()


@torch.inference_mode()  # all gradients are written out, see networks.py
def main(args: Args) -> dict:
    """Train, evaluate, and write TensorBoard logs and result.json into the run's folder.

    Returns:
        What training left behind: "result" (as in result.json), "actor", "critic",
        "target", "log_alpha", "adams", "buffer".

    Raises:
        SystemExit: for bad input, see `prepare`; for a signal or a fault, see `runs.Run`.
    """
    device, codec, envs, obs, sizes, place = prepare(args)
    obs_dim, act_dim = sizes["obs_dim"], sizes["act_dim"]
    torch.manual_seed(args.seed)
    envs.action_space.seed(args.seed)
    low, high = envs.single_action_space.low, envs.single_action_space.high

    set_threads(args.batch_size, obs_dim + act_dim, args.hidden)
    with torch.device(device):
        hidden = (args.hidden, args.hidden)
        actor = MLP(uniform(1, obs_dim, *hidden, 2 * act_dim), "relu")
        critic = MLP(uniform(2, obs_dim + act_dim, *hidden, 1), "relu")  # Q1 and Q2
        log_alpha = torch.zeros(())
    target = copy.deepcopy(critic)
    target_entropy = -float(act_dim) if args.target_entropy is None else args.target_entropy
    # Adam works per parameter: one over actor and log_alpha makes the same steps as SB3's two.
    actor_adam = Adam([*actor.tensors, log_alpha], args.learning_rate)
    critic_adam, target_params = Adam(critic.tensors, args.learning_rate), flatten(target.tensors)
    buffer = ReplayBuffer(
        codec, **sizes, device=device, seed=args.seed, drop_constant=args.drop_constant
    )
    if args.memory_budget is not None:
        buffer.touch()

    def to_env(action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the environment's bounds."""
        return low + (action + 1) / 2 * (high - low)

    # A second codec for acting, so that the clamp statistics count every stored value once.
    acting_codec = make_codec(args.quant_m, args.quant_b, args.storage)

    def acted_on(obs: np.ndarray) -> np.ndarray:
        """What is acted on: the raw observation as in the paper, or the decoded one."""
        if args.quant_act:
            return acting_codec.decode(acting_codec.encode(obs)).numpy()
        return obs.astype(np.float32)

    def best_action(obs: np.ndarray) -> np.ndarray:
        """Deterministic action: tanh of the mean."""
        out = actor.in_numpy()(acted_on(obs[None]))
        return to_env(np.tanh(out[0, 0, :act_dim]))

    episodes: list[tuple[int, float]] = []  # (global_step at the end, return)
    episode_return = np.zeros(args.num_envs, np.float64)
    episode_length = np.zeros(args.num_envs, np.int64)
    global_step, next_log = 0, LOG_EVERY
    buffer_bytes = buffer.nbytes  # with --drop-constant it depends on the data

    def state() -> dict:
        """What the next step depends on, for a checkpoint."""
        return {
            "global_step": global_step,
            "next_log": next_log,
            "episodes": torch.tensor(episodes, dtype=torch.float64),
            "episode_return": torch.from_numpy(episode_return.copy()),
            "episode_length": torch.from_numpy(episode_length.copy()),
            "actor": actor_adam.state(),  # with the weights, and log_alpha
            "critic": critic_adam.state(),
            "target": target_params.cpu().clone(),
            "buffer": buffer.state(),
            "clamp": codec.clamp.state(),
            "envs": envs.episodes(),
            "rng": runs.rng_state(device, envs.action_space),
        }

    anew = np.ones(args.num_envs, bool)  # the envs that begin an episode
    if place.saved:
        saved = place.saved["state"]
        with runs.refusing("sac.py"), place.reading():
            runs.check_like(saved, state(), "it")
            global_step, next_log = saved["global_step"], saved["next_log"]
            episodes = [(int(step), ret) for step, ret in saved["episodes"].tolist()]
            episode_return[:], episode_length[:] = saved["episode_return"], saved["episode_length"]
            actor_adam.load(saved["actor"])
            critic_adam.load(saved["critic"])
            target_params.copy_(saved["target"])
            buffer.load(saved["buffer"])
            codec.clamp.load(saved["clamp"], obs_dim)
            obs, anew = envs.replay(saved["envs"])
            runs.set_rng_state(saved["rng"], device, envs.action_space)
        episode_return[anew], episode_length[anew] = 0, 0
        buffer.cut(anew)
    buffer.start(obs, anew)

    with runs.Run("sac.py", args, device, place, state, anew) as run:
        while run.goes_on(global_step):
            # --- Collect one transition per env --------------------------------------------------
            if global_step < args.learning_starts:
                action = 2 * (envs.action_space.sample() - low) / (high - low) - 1
            else:
                out = actor.in_numpy()(acted_on(obs))[0]
                mean, log_std = out[:, :act_dim], out[:, act_dim:]
                noise = torch.randn(args.num_envs, act_dim).numpy()
                action = np.tanh(mean + np.exp(log_std.clip(LOG_STD_MIN, LOG_STD_MAX)) * noise)
            next_obs, reward, terminated, truncated, _ = envs.step(to_env(action))
            buffer.add(action, reward, next_obs, terminated, truncated)
            if args.drop_constant and buffer.nbytes != buffer_bytes:
                buffer_bytes = buffer.nbytes
                run.bar.write(memory.settled(buffer_bytes, buffer.obs.live, device))
            run.warn_of_clamping(codec.clamp)
            global_step += args.num_envs
            episode_return += reward
            episode_length += 1
            done = terminated | truncated
            if done.any():
                episodes += [(global_step, float(ret)) for ret in episode_return[done]]
                run.log_episodes(episode_return[done], episode_length[done], global_step)
                episode_return[done], episode_length[done] = 0, 0
                next_obs, _ = envs.reset(options={"reset_mask": done})
                buffer.start(next_obs, done)
            obs = next_obs
            run.bar.update(args.num_envs)

            # --- Learn: as many updates as fell due with these transitions -----------------------
            due = global_step // args.train_freq - (global_step - args.num_envs) // args.train_freq
            due *= global_step > args.learning_starts
            for _ in range(due * args.gradient_steps):
                batch = buffer.sample(args.batch_size)
                # Actions for s in the first half of the rows, for s' in the second.
                out, actor_tape = actor.forward(batch.both_obs)
                noise = torch.randn(len(batch.both_obs), act_dim, device=device)
                mean, log_std = mean_and_log_std(out[0])
                actions = squash(mean, log_std, noise)
                log_probs = squashed_log_prob(noise, log_std, actions)
                action, next_action = actions.chunk(2)
                log_prob, next_log_prob = log_probs.chunk(2)
                alpha = log_alpha.exp()  # before this update's own step of alpha

                next_q, _ = target.forward(torch.cat([batch.next_obs, next_action], 1))
                q_target = soft_q_target(
                    batch.reward, batch.terminated, next_q[..., 0], next_log_prob, alpha, args.gamma
                )
                q, tape = critic.forward(torch.cat([batch.obs, batch.action], 1))
                critic.backward(tape, critic_loss_gradient(q[..., 0], q_target)[..., None])
                qf_loss = critic_loss(q[..., 0], q_target)
                check_update("the critics", qf_loss, critic_adam.gradient, global_step)
                critic_adam.step()

                q_pi, tape = critic.forward(torch.cat([batch.obs, action], 1))
                d_q, d_log_prob = actor_loss_gradient(q_pi[..., 0], log_prob, alpha)
                d_action = critic.input_gradient(tape, d_q[..., None], start=obs_dim)
                half = slice(args.batch_size)  # the rows of s
                d_out = squash_gradient(out[0, half], noise[half], action, d_action, d_log_prob)
                actor.backward([layer[:, half] for layer in actor_tape], d_out[None])
                log_alpha.grad.copy_(alpha_loss_gradient(log_prob, target_entropy))
                pi_loss = actor_loss(q_pi[..., 0], log_prob, alpha)
                check_update("actor and alpha", pi_loss, actor_adam.gradient, global_step)
                actor_adam.step()

                target_params.lerp_(critic_adam.params, args.tau)  # target + tau (critic - target)

            # --- Log -----------------------------------------------------------------------------
            if due and global_step >= next_log:
                next_log = global_step + LOG_EVERY
                for tag, metric in {
                    "losses/qf_loss": qf_loss,
                    "losses/actor_loss": pi_loss,
                    "losses/alpha_loss": alpha_loss(log_alpha, log_prob, target_entropy),
                    "losses/qf1_values": q[0].mean(),
                    "losses/qf2_values": q[1].mean(),
                    "losses/entropy": -log_prob.mean(),
                    "losses/alpha": alpha,
                    "charts/SPS": global_step / run.seconds,
                    "memory/buffer_bytes": buffer.nbytes,
                    "quant/clip_fraction": codec.clamp.fraction,
                    "quant/max_abs_obs": codec.clamp.max_abs,
                }.items():
                    run.log(tag, torch.as_tensor(metric).item(), global_step)

        # --- Sum up ------------------------------------------------------------------------------
        run.bar.close()
        envs.close()
        print(f"trained; {args.eval_episodes} evaluation episodes follow")
        last_tenth = [ret for step, ret in episodes if step > 0.9 * global_step]
        result = {
            "algo": "sac",
            "global_step": global_step,
            "ms_per_step": 1000 * run.seconds / global_step,
            "storage": codec.name,
            "buffer_bytes": buffer.nbytes,
            "rss_bytes": memory.resident(),
            "peak_rss_bytes": memory.peak_resident(),
            "clip_fraction": codec.clamp.fraction,
            "max_abs_obs": codec.clamp.max_abs,
            "clamped": codec.clamp.report(),
            "return_last_tenth": float(np.mean(last_tenth)) if last_tenth else None,
            "evaluation": evaluate(args.env, best_action, args.eval_episodes, args.seed + 10_000),
            "args": asdict(args) | {"buffer_size": sizes["buffer_size"]},
            **runs.provenance(),
        }
        run.finish(result)
    return {
        "result": result,
        "actor": actor,
        "critic": critic,
        "target": target,
        "log_alpha": log_alpha,
        "adams": (actor_adam, critic_adam),
        "buffer": buffer,
    }


if __name__ == "__main__":
    with runs.command("sac.py"):
        main(tyro.cli(Args))
