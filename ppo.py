"""Proximal Policy Optimization that learns from observations stored as fixed-point integers.

    python ppo.py --env Walker2d-v3 --quant-m 2       # the paper's method, which takes m = 1
    python ppo.py --env Walker2d-v3                   # its float64 baseline: one flag apart

"The paper" is Grossman & Plancher, "Just Round" (ICRA 2023). PPO is Schulman et al., "Proximal
Policy Optimization Algorithms" (arXiv:1707.06347v2), GAE is Schulman et al. (arXiv:1506.02438v6).
Details follow Stable-Baselines3's `ppo/ppo.py` (2.9.2). As in the paper the policy acts on raw
observations and learns from rounded ones, so the ratio of an update's first minibatch is not
quite 1; TensorBoard shows by how much as `losses/first_ratio_error`.

| symbol     | name             | meaning                                         |
|------------|------------------|-------------------------------------------------|
| s, a       | obs, action      | a as sampled; the environment gets it clipped   |
| gamma      | gamma            | discount                                        |
| lambda     | gae_lambda       | weight of longer returns in the advantage       |
| delta_t    | delta            | one-step temporal difference error              |
| A_t        | advantage        | generalised advantage estimate                  |
| r_t(theta) | ratio            | pi_theta(a|s) / pi_old(a|s)                     |
| epsilon    | clip_coef        | how far the ratio may move before it is clipped |
| m, b       | quant_m, quant_b | decimals kept, clamp bound                      |
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import memory
from buffers import RolloutBuffer
from quantize import make_codec
from support import arguments, errors, runs
from support.envs import VectorEnv
from support.networks import ActorCritic, Adam, flatten, set_threads
from support.recording import Recorded, check_recordings

ADAM_EPS = 1e-5  # not torch's 1e-8; SB3 policies.py:472
NORM_EPS = 1e-6  # in the norm that the gradient is divided by; torch.nn.utils.clip_grad_norm_
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
    eager: bool = False
    """let autograd run at every update: prints and breakpoints work inside a loss; slower"""
    seed: int = 1
    """random seed of networks, environments, exploration and sampling"""
    total_timesteps: int = 1_000_000
    """environment transitions to train for, all envs together, rounded up to whole rollouts"""
    num_envs: int = 1
    """environments stepped side by side"""
    device: str = "cpu"
    """cpu, cuda, or auto: cuda where there is one"""
    hidden: int = 64
    """width of both hidden layers (paper's appendix: 64, as SB3's PPO default)"""
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
    """Raise ValueError with one clear line for arguments that do not go together."""
    if args.batch_size > args.n_steps * args.num_envs:
        sizes = f"--n-steps {args.n_steps} times --num-envs {args.num_envs}"
        raise ValueError(f"--batch-size {args.batch_size} is larger than the buffer: {sizes}")


def prepare(args: Args) -> tuple:
    """Check everything, build codec and envs, say what memory it takes, make the folder last."""
    arguments.check_ranges(args)
    check(args)
    device = runs.find_device(args.device)
    codec = make_codec(args.quant_m, args.quant_b, args.storage, args.pack)
    envs = VectorEnv(args.env, args.num_envs)
    (obs_dim,), (act_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    sizes = dict(obs_dim=obs_dim, act_dim=act_dim, num_envs=args.num_envs, n_steps=args.n_steps)
    others = {"hidden": args.hidden, "batch_size": args.batch_size}
    footprint = memory.plan("ppo", codec, device, **sizes, **others)
    envs.reset(seed=args.seed)
    folder = runs.find_folder("ppo.py", args, device)
    errors.say(f"{folder} on {device}, observations stored as {codec.name}\n{footprint}")
    return device, codec, envs, sizes, folder


def gaussian_log_prob(noise: Tensor, log_std: Tensor) -> Tensor:
    """log pi(a|s) of a = mean + std * noise: noise (..., k), log_std (k,) or (..., k) -> (...)."""
    return -0.5 * (noise**2).sum(-1) - (log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """Entropy in nats of a diagonal Gaussian: log_std (k,), or (B, k) for the mean, -> ()."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1).mean()


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


def main(args: Args) -> dict:
    """Train, evaluate, write logs, weights and result.json; return `parts` and the result."""
    with errors.refusing("ppo.py"):
        device, codec, envs, sizes, folder = prepare(args)
    obs_dim, act_dim = sizes["obs_dim"], sizes["act_dim"]
    torch.manual_seed(args.seed)
    low, high = envs.single_action_space.low, envs.single_action_space.high
    set_threads(args.batch_size, obs_dim, args.hidden)

    # --- Networks, optimiser, buffer -------------------------------------------------------------
    actor_critic = ActorCritic(obs_dim, act_dim, args.hidden).to(device)
    parameters = flatten(actor_critic)
    adam = Adam(parameters, args.learning_rate, ADAM_EPS)
    buffer = RolloutBuffer(codec, **sizes, device=device, seed=args.seed)

    # --- What is computed at every step; see support/recording.py --------------------------------
    def sample_action(obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_std, value = actor_critic(obs)
        return mean + log_std.exp() * noise, log_std.expand_as(mean), value

    def loss(obs, action, old_log_prob, advantage, ret):  # (B, n), (B, k), and (B,) each
        mean, log_std, value = actor_critic(obs)
        noise = (action - mean) / log_std.exp()
        log_ratio = gaussian_log_prob(noise, log_std) - old_log_prob
        ratio = log_ratio.exp()
        policy_loss = clipped_policy_loss(ratio, normalize(advantage), args.clip_coef)
        v_loss = F.mse_loss(value, ret)  # (V - V_targ)^2
        entropy = gaussian_entropy(log_std)
        # PPO eq. 9, with the sign of a loss
        total = policy_loss + args.vf_coef * v_loss - args.ent_coef * entropy
        return total, policy_loss, v_loss, entropy, ratio, log_ratio

    record = partial(Recorded, eager=args.eager)
    act, gradient = record(sample_action), record(loss, parameters)

    def acted_on(obs: np.ndarray) -> Tensor:
        """What is acted on: the raw observation as in the paper, or the decoded one."""
        raw = torch.from_numpy(obs.astype(np.float32))
        return (codec.decode(codec.encode(obs)) if args.quant_act else raw).to(device)

    def best_action(obs: np.ndarray) -> np.ndarray:
        """Deterministic action for one observation: the mean, clipped to the bounds."""
        (mean,), _, _ = actor_critic(acted_on(obs[None]))
        return mean.cpu().numpy().clip(low, high)

    def value_of(obs: np.ndarray) -> Tensor:
        """V of (num_envs, n) observations: (num_envs,)."""
        return actor_critic(acted_on(obs))[2].cpu()

    progress, first_ratio_error = runs.Progress(args.num_envs), torch.zeros(())
    parts = {  # all that the next rollout depends on: saved in checkpoints, restored by --resume
        "actor_critic": actor_critic,
        "adam": adam,
        "buffer": buffer,
        "envs": envs,
        "progress": progress,
        "first_ratio_error": first_ratio_error,
    }
    # Inference mode is the fastest; gradients come from what is recorded above, not .backward().
    with runs.Run("ppo.py", args, device, folder, **parts) as run, torch.inference_mode():
        obs = envs.obs
        while run.goes_on():
            run.snapshot()  # a fault within this rollout saves what was before it

            # --- Collect n_steps transitions per env ---------------------------------------------
            noise, log_stds = torch.randn(args.n_steps, args.num_envs, act_dim, device=device), []
            for noise_t in noise:
                action, log_std, value = act(acted_on(obs), noise_t)
                log_stds.append(log_std)
                action = action.cpu().numpy()
                # The environment gets the clipped action; the buffer keeps what was sampled.
                clipped = np.minimum(np.maximum(action, low), high)
                next_obs, reward, terminated, truncated, _ = envs.step(clipped)
                done = terminated | truncated
                run.advance(reward, done)
                if ended := done.any():
                    # Truncation is no end of the task: the true final observation has a value.
                    discounted = args.gamma * value_of(next_obs).numpy()
                    reward = reward + np.where(truncated & ~terminated, discounted, 0)
                buffer.add(obs, action, value.cpu().numpy(), reward, done)
                obs = next_obs
                if ended:
                    obs, _ = envs.reset(options={"reset_mask": done})
            run.warn_of_clamping(buffer.clamped)
            buffer.log_probs[:] = gaussian_log_prob(noise, torch.stack(log_stds))

            # --- Learn: n_epochs passes over the rollout in minibatches --------------------------
            rollout = buffer.rewards, buffer.values, buffer.ends, value_of(obs)
            gae = compute_gae(*rollout, args.gamma, args.gae_lambda)
            buffer.advantages[:], buffer.returns[:] = gae
            first_ratio = None
            for _ in range(args.n_epochs):
                for batch in buffer.minibatches(args.batch_size):
                    _, policy_loss, v_loss, entropy, ratio, log_ratio = gradient(*batch)
                    first_ratio = ratio if first_ratio is None else first_ratio
                    norm = parameters.grad.norm()
                    parameters.grad *= (args.max_grad_norm / (norm + NORM_EPS)).clamp(max=1)
                    adam.step()
            first_ratio_error.copy_((first_ratio - 1).abs().mean())

            # --- Log the last minibatch ----------------------------------------------------------
            check_recordings(act, gradient)
            unexplained = (buffer.returns - buffer.values).var() / buffer.returns.var()
            run.log(
                {
                    "losses/policy_loss": policy_loss,
                    "losses/value_loss": v_loss,
                    "losses/entropy": entropy,
                    "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # k3 of Schulman's note
                    "losses/clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
                    "losses/first_ratio_error": first_ratio_error,
                    "losses/explained_variance": 1 - unexplained,
                    "charts/SPS": progress.global_step / run.seconds,
                    "memory/buffer_bytes": buffer.nbytes,
                    "quant/clip_fraction": buffer.clamped.fraction,
                    "quant/max_abs_obs": buffer.clamped.max_abs,
                }
            )

        # --- Sum up ------------------------------------------------------------------------------
        check_recordings(act, gradient)
        result = run.finish(buffer, best_action, first_ratio_error=first_ratio_error.item())
    return parts | {"result": result}


if __name__ == "__main__":
    with errors.command("ppo.py"):
        main(tyro.cli(Args))
