"""Proximal Policy Optimization that learns from observations stored as fixed-point integers.

    python ppo.py --env Walker2d-v3 --quant-m 1       # the paper's method
    python ppo.py --env Walker2d-v3                   # its float64 baseline: one flag apart

"The paper" is Grossman & Plancher, "Just Round" (ICRA 2023). PPO is Schulman et al., "Proximal
Policy Optimization Algorithms" (arXiv:1707.06347v2), GAE is Schulman et al. (arXiv:1506.02438v6).
Details follow Stable-Baselines3's `ppo/ppo.py` (2.9.2). As in the paper the policy acts on raw
observations and learns from rounded ones, so the ratio of an update's first minibatch is not
quite 1; TensorBoard shows by how much as `losses/first_ratio_error`.

| symbol      | name         | meaning                                         |
|-------------|--------------|-------------------------------------------------|
| s, a        | obs, action  | a as sampled; the environment gets it clipped   |
| gamma       | gamma        | discount                                        |
| lambda      | gae_lambda   | weight of longer returns in the advantage       |
| delta_t     | delta        | one-step temporal difference error              |
| A_t         | advantage    | generalised advantage estimate                  |
| r_t(theta)  | ratio        | pi_theta(a|s) / pi_old(a|s)                     |
| epsilon     | clip_coef    | how far the ratio may move before it is clipped |
| m, b        | quant_m, quant_b | decimals kept, clamp bound                  |
"""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import memory
import runs
from buffers import RolloutBuffer
from envs import evaluate, make_vector
from networks import MLP, Adam, check_update, set_threads
from quantize import make_codec

ADAM_EPS = 1e-5  # not torch's 1e-8; SB3 policies.py:472
CLIP_EPS = 1e-6  # in the norm that the gradient is divided by; torch.nn.utils.clip_grad_norm_
ADVANTAGE_EPS = 1e-8  # keeps the normalised advantage finite; SB3 ppo.py:219


@dataclass
class Args:
    """Train PPO on observations stored as fixed point (--quant-m) or as floats."""

    env: str = "Humanoid-v3"
    """Gymnasium id (or module:id) with flat Box observations and actions; the paper's are -v3"""
    quant_m: int | None = None
    """decimals kept of each stored observation (paper: 1); 2 keeps 1.23 of 1.234, None all"""
    quant_b: float = 127.0
    """clamp bound: observations are clamped to [-b, b] before rounding"""
    storage: Literal["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"] | None = None
    """dtype in which the baseline stores observations; None is float64, the paper's"""
    pack: bool = False
    """store the codes of --quant-m in the bits they need: 8, 12, 15, 18 for m = 0, 1, 2, 3"""
    quant_act: bool = False
    """also act on the decoded observation (the paper acts on raw and learns from rounded ones)"""
    seed: int = 1
    """random seed of networks, environments, exploration and sampling"""
    total_timesteps: int = 1_000_000
    """environment transitions to train for, all envs together, rounded up to whole rollouts"""
    num_envs: int = 1
    """environments stepped side by side"""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one"""
    hidden: int = 64
    """width of both hidden layers (paper's appendix: 64, as SB3's PPO default)"""
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
    """of the policy and the value function (Table II)"""
    n_steps: int = 2048
    """steps of each env per update (Table II)"""
    batch_size: int = 64
    """steps per minibatch (Table II)"""
    n_epochs: int = 10
    """passes over the rollout per update"""
    gamma: float = 0.99
    """discount (Table II)"""
    gae_lambda: float = 0.95
    """GAE's lambda: 0 is the one-step error, 1 the whole return (Table II)"""
    clip_coef: float = 0.2
    """how far the ratio may move before its objective is clipped (Table II)"""
    vf_coef: float = 0.5
    """weight of the value loss (Table II)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (Table II)"""
    max_grad_norm: float = 0.5
    """bound on the norm of the whole gradient (Table II)"""


def check(args: Args) -> None:
    """Raise ValueError with one clear line for an argument out of its range."""
    at_least_1 = "total_timesteps hidden n_steps batch_size n_epochs"
    at_least_0 = "checkpoint_every eval_episodes clip_coef vf_coef ent_coef max_grad_norm"
    from_0_to_1 = "learning_rate gamma gae_lambda"
    ranges = ((at_least_1, 1, 10**12), (at_least_0, 0, 10**12), (from_0_to_1, 0, 1))
    for names, low, high in (*ranges, ("num_envs", 1, 10_000), ("seed", 0, 2**32 - 1)):
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise ValueError(f"{flag} is out of range; it must be from {low} to {high}")
    if args.batch_size > args.n_steps * args.num_envs:
        raise ValueError(
            f"--batch-size {args.batch_size} is larger than the buffer: --n-steps {args.n_steps} "
            f"times --num-envs {args.num_envs}"
        )


def prepare(args: Args) -> tuple:
    """Check everything, create the run's folder last, and say what memory the run will take.

    Returns:
        device, codec, vector env, its first obs (num_envs, n), dims (obs_dim, act_dim, num_envs),
        place: the run's folder, locked, and what was saved there if it is resumed.

    Raises:
        SystemExit: code 2 and one line on stderr for bad input; nothing has been created then.
    """
    with runs.refusing("ppo.py"):
        check(args)
        device = runs.find_device(args.device)
        codec = make_codec(args.quant_m, args.quant_b, args.storage, args.pack)
        envs = make_vector(args.env, args.num_envs)
        (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
        dims = {"obs_dim": obs_dim, "act_dim": act_dim, "num_envs": args.num_envs}
        sizes = dims | {name: getattr(args, name) for name in ("hidden", "n_steps", "batch_size")}
        footprint = memory.plan("ppo", codec, device, **sizes)  # refuses what cannot fit
        obs, _ = envs.reset(seed=args.seed)
        place = runs.find_place("ppo.py", args, device)
    print(f"{place} on {device}, observations stored as {codec.name}\n{footprint}")
    return device, codec, envs, obs, dims, place


def orthogonal(*sizes: int, gain: float) -> list[tuple[Tensor, Tensor]]:
    """Layers of one network as SB3 starts them, policies.py:617: no biases, orthogonal weights.

    gain is that of the last layer's weights, the others' is sqrt(2).
    """
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        weight = torch.empty(outputs, inputs)
        torch.nn.init.orthogonal_(weight, gain if len(layers) == len(sizes) - 2 else 2**0.5)
        layers.append((weight.T[None], torch.zeros(1, 1, outputs)))
    return layers


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log pi(a|s) of a diagonal Gaussian: action, mean (B, k), log_std (k,) -> (B,)."""
    standardised = (action - mean) / log_std.exp()
    return -(0.5 * (standardised**2 + math.log(2 * math.pi)) + log_std).sum(-1)


def gaussian_log_prob_gradient(
    action: Tensor, mean: Tensor, log_std: Tensor, d_log_prob: Tensor
) -> tuple[Tensor, Tensor]:
    """Back through the log_prob: from d_log_prob (B,) to mean (B, k) and to log_std (k,)."""
    std, d_log_prob = log_std.exp(), d_log_prob[:, None]
    standardised = (action - mean) / std
    d_log_std = d_log_prob * (standardised**2 - 1)
    return d_log_prob * standardised / std, d_log_std.sum(0)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: log_std (k,) -> ()."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    ends: Tensor,
    last_value: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns of a rollout. PPO eq. 11, 12; GAE eq. 16.

    gae_lambda = 0 gives the one-step error delta, 1 gives the discounted return minus the value.

    Args:
        rewards: (T, N), with gamma * V(final obs) added where an episode was truncated.
        values: (T, N), V(s_t) at collection.
        ends: (T, N) bool, the episode ended with step t, either way: nothing flows back across it.
        last_value: (N,), V of the observation after the last step.

    Returns:
        advantages (T, N) and returns (T, N) = advantages + values, what V is regressed on.
    """
    next_values = torch.cat([values[1:], last_value[None]])
    going_on = (~ends).float()
    deltas = rewards + gamma * going_on * next_values - values  # PPO eq. 12
    decays = gamma * gae_lambda * going_on
    advantages, advantage = [], torch.zeros_like(last_value)
    for delta, decay in zip(deltas.flip(0), decays.flip(0), strict=True):
        advantage = torch.addcmul(delta, decay, advantage)  # PPO eq. 11, from the last step back
        advantages.append(advantage)
    advantages = torch.stack(advantages).flip(0)
    return advantages, advantages + values


def normalize(advantage: Tensor) -> Tensor:
    """(B,) to mean 0, std 1; not in the PPO paper, SB3 ppo.py:218. A single value is left alone."""
    if len(advantage) == 1:
        return advantage
    return (advantage - advantage.mean()) / (advantage.std() + ADVANTAGE_EPS)


def clipped_policy_loss(ratio: Tensor, advantage: Tensor, clip_coef: float) -> Tensor:
    """-E[min(r A, clip(r, 1 - eps, 1 + eps) A)]: ratio, advantage (B,) -> (). PPO eq. 7."""
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantage, clipped_ratio * advantage).mean()


def clipped_policy_loss_gradient(ratio: Tensor, advantage: Tensor, clip_coef: float) -> Tensor:
    """Of `clipped_policy_loss`, by ratio: (B,), 0 where the clipped ratio gives the minimum."""
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -advantage * (ratio * advantage <= clipped_ratio * advantage) / len(ratio)


def value_loss(value: Tensor, ret: Tensor) -> Tensor:
    """Mean squared error: value, ret (B,) -> (). PPO eq. 9."""
    return F.mse_loss(value, ret)


def value_loss_gradient(value: Tensor, ret: Tensor) -> Tensor:
    """Of `value_loss`, by value: (B,)."""
    return 2 * (value - ret) / len(value)


@torch.inference_mode()  # all gradients are written out, see networks.py
def main(args: Args) -> dict:
    """Train, evaluate, and write TensorBoard logs and result.json into the run's folder.

    Returns:
        What training left behind: "result" (as in result.json), "policy",
        "value_function", "log_std", "adam", "buffer".

    Raises:
        SystemExit: for bad input, see `prepare`; for a signal or a fault, see `runs.Run`.
    """
    device, codec, envs, obs, dims, place = prepare(args)
    obs_dim, act_dim = dims["obs_dim"], dims["act_dim"]
    torch.manual_seed(args.seed)
    envs.action_space.seed(args.seed)
    low, high = envs.single_action_space.low, envs.single_action_space.high

    set_threads(args.batch_size, obs_dim, args.hidden)
    with torch.device(device):
        hidden = (obs_dim, args.hidden, args.hidden)
        policy = MLP(orthogonal(*hidden, act_dim, gain=0.01), "tanh")  # mean of the action
        value_function = MLP(orthogonal(*hidden, 1, gain=1.0), "tanh")
        log_std = torch.zeros(act_dim)
    adam = Adam([*policy.tensors, *value_function.tensors, log_std], args.learning_rate, ADAM_EPS)
    buffer = RolloutBuffer(codec, args.n_steps, **dims, device=device, seed=args.seed)

    # A second codec for acting, so that the clamp statistics count every stored value once.
    acting_codec = make_codec(args.quant_m, args.quant_b, args.storage)

    def acted_on(obs: np.ndarray) -> np.ndarray:
        """What is acted on: the raw observation as in the paper, or the decoded one."""
        if args.quant_act:
            return acting_codec.decode(acting_codec.encode(obs)).numpy()
        return obs.astype(np.float32)

    def best_action(obs: np.ndarray) -> np.ndarray:
        """Deterministic action: the mean, clipped to the environment's bounds."""
        return policy.in_numpy()(acted_on(obs[None]))[0, 0].clip(low, high)

    episodes: list[tuple[int, float]] = []  # (global_step at the end, return)
    episode_return = np.zeros(args.num_envs, np.float64)
    episode_length = np.zeros(args.num_envs, np.int64)
    global_step, first_ratio_error = 0, 0.0

    def state() -> dict:
        """What the next rollout depends on, for a checkpoint; copies, see `after_update`."""
        return {
            "global_step": global_step,
            "first_ratio_error": first_ratio_error,
            "episodes": torch.tensor(episodes, dtype=torch.float64),
            "episode_return": torch.from_numpy(episode_return.copy()),
            "episode_length": torch.from_numpy(episode_length.copy()),
            "adam": adam.state(),  # with the weights, and log_std
            "buffer": buffer.state(),
            "clamp": codec.clamp.state(),
            "envs": envs.episodes(),
            "rng": runs.rng_state(device),
        }

    anew = np.ones(args.num_envs, bool)  # the envs that begin an episode
    if place.saved:
        saved = place.saved["state"]
        with runs.refusing("ppo.py"), place.reading():
            runs.check_like(saved, state(), "it")
            global_step, first_ratio_error = saved["global_step"], saved["first_ratio_error"]
            episodes = [(int(step), ret) for step, ret in saved["episodes"].tolist()]
            episode_return[:], episode_length[:] = saved["episode_return"], saved["episode_length"]
            adam.load(saved["adam"])
            buffer.load(saved["buffer"])
            codec.clamp.load(saved["clamp"], obs_dim)
            obs, anew = envs.replay(saved["envs"])
            runs.set_rng_state(saved["rng"], device)
        episode_return[anew], episode_length[anew] = 0, 0
    # A stop comes between two updates. A fault comes in a rollout, and leaves what was before it.
    after_update = state()

    with runs.Run("ppo.py", args, device, place, lambda: after_update, anew) as run:
        while run.goes_on(global_step):
            # --- Collect n_steps transitions per env ---------------------------------------------
            # The density of mean + std * noise depends on the noise alone, so the rollout's is
            # drawn at once. Every action then takes the place of its noise.
            old_log_std = log_std.cpu()
            std, noise = old_log_std.exp(), buffer.actions.normal_()
            buffer.log_probs[:] = gaussian_log_prob(std * noise, torch.zeros_like(std), old_log_std)
            std, noise = std.numpy(), noise.numpy()
            policy_now, value_now = policy.in_numpy(), value_function.in_numpy()
            for t in range(args.n_steps):
                x = acted_on(obs)
                mean, value = policy_now(x)[0], value_now(x)[0, :, 0]
                action = mean + std * noise[t]
                # The environment gets the clipped action; the buffer keeps what was sampled.
                clipped = np.minimum(np.maximum(action, low), high)
                next_obs, reward, terminated, truncated, _ = envs.step(clipped)
                global_step += args.num_envs
                episode_return += reward
                episode_length += 1
                done = terminated | truncated
                cut = truncated & ~terminated
                if cut.any():  # not an end of the task: bootstrap from the true final observation
                    reward[cut] += args.gamma * value_now(acted_on(next_obs[cut]))[0, :, 0]
                buffer.add(obs, action, value, reward, done)
                if done.any():
                    episodes += [(global_step, float(ret)) for ret in episode_return[done]]
                    run.log_episodes(episode_return[done], episode_length[done], global_step)
                    episode_return[done], episode_length[done] = 0, 0
                    next_obs, _ = envs.reset(options={"reset_mask": done})
                obs = next_obs
                run.bar.update(args.num_envs)

            # --- Learn: n_epochs passes over the rollout in minibatches --------------------------
            last_value = torch.from_numpy(value_now(acted_on(obs))[0, :, 0])
            buffer.advantages[:], buffer.returns[:] = compute_gae(
                buffer.rewards, buffer.values, buffer.ends, last_value, args.gamma, args.gae_lambda
            )
            first_ratio_error = None
            for _ in range(args.n_epochs):
                for mb in buffer.minibatches(args.batch_size):
                    (mean,), policy_tape = policy.forward(mb.obs)
                    value, value_tape = value_function.forward(mb.obs)
                    log_prob = gaussian_log_prob(mb.action, mean, log_std)
                    log_ratio = log_prob - mb.log_prob
                    ratio = log_ratio.exp()
                    value, advantage = value[0, :, 0], normalize(mb.advantage)
                    if first_ratio_error is None:
                        first_ratio_error = (ratio - 1).abs().mean().item()
                    # PPO eq. 9, with the sign of a loss
                    d_ratio = clipped_policy_loss_gradient(ratio, advantage, args.clip_coef)
                    d_mean, d_log_std = gaussian_log_prob_gradient(
                        mb.action, mean, log_std, d_ratio * ratio
                    )
                    d_value = args.vf_coef * value_loss_gradient(value, mb.ret)
                    policy.backward(policy_tape, d_mean[None])
                    value_function.backward(value_tape, d_value[None, :, None])
                    log_std.grad.copy_(d_log_std - args.ent_coef)  # the entropy's by log_std is 1
                    v_loss = value_loss(value, mb.ret)
                    check_update("the values", v_loss, adam.gradient, global_step)
                    norm = adam.gradient.norm()
                    adam.gradient *= (args.max_grad_norm / (norm + CLIP_EPS)).clamp(max=1)
                    adam.step()

            # --- Log the last minibatch's losses, and the entropy after it -----------------------
            unexplained = (buffer.returns - buffer.values).var() / buffer.returns.var()
            for tag, metric in {
                "losses/policy_loss": clipped_policy_loss(ratio, advantage, args.clip_coef),
                "losses/value_loss": v_loss,
                "losses/entropy": gaussian_entropy(log_std),
                "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of Schulman's note on KL
                "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
                "losses/first_ratio_error": first_ratio_error,
                "losses/explained_variance": 1 - unexplained,
                "charts/SPS": global_step / run.seconds,
                "memory/buffer_bytes": buffer.nbytes,
                "quant/clip_fraction": codec.clamp.fraction,
                "quant/max_abs_obs": codec.clamp.max_abs,
            }.items():
                run.log(tag, torch.as_tensor(metric).item(), global_step)
            run.warn_of_clamping(codec.clamp)
            after_update = state()

        # --- Sum up ------------------------------------------------------------------------------
        run.bar.close()
        envs.close()
        print(f"trained; {args.eval_episodes} evaluation episodes follow")
        last_tenth = [ret for step, ret in episodes if step > 0.9 * global_step]
        result = {
            "algo": "ppo",
            "global_step": global_step,
            "ms_per_step": 1000 * run.seconds / global_step,
            "storage": codec.name,
            "buffer_bytes": buffer.nbytes,
            "rss_bytes": memory.resident(),
            "peak_rss_bytes": memory.peak_resident(),
            "clip_fraction": codec.clamp.fraction,
            "max_abs_obs": codec.clamp.max_abs,
            "clamped": codec.clamp.report(),
            "first_ratio_error": first_ratio_error,
            "return_last_tenth": float(np.mean(last_tenth)) if last_tenth else None,
            "evaluation": evaluate(args.env, best_action, args.eval_episodes, args.seed + 10_000),
            "args": asdict(args),
            **runs.provenance(),
        }
        run.finish(result)
    return {
        "result": result,
        "policy": policy,
        "value_function": value_function,
        "log_std": log_std,
        "adam": adam,
        "buffer": buffer,
    }


if __name__ == "__main__":
    with runs.command("ppo.py"):
        main(tyro.cli(Args))
