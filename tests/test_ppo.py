"""PPO's maths against oracles, one whole update against a plain reimplementation, and the ratio."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Independent, Normal

import envs
import memory
import ppo
from buffers import RolloutBatch
from networks import MLP, Adam
from ppo import Args
from quantize import Packed


def tiny(tmp_path, **changes) -> Args:
    defaults = {
        "env": "Pendulum-v1", "total_timesteps": 256, "n_steps": 256, "batch_size": 32,
        "n_epochs": 2, "hidden": 8, "eval_episodes": 0, "run_dir": str(tmp_path), "device": "cpu",
    }  # fmt: skip
    return Args(**{**defaults, **changes})


# --- The maths -----------------------------------------------------------------------------------


def random_rollout(steps: int, num_envs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(steps, num_envs, generator=generator) for _ in range(2))
    ends = torch.rand(steps, num_envs, generator=generator) < 0.2
    return rewards, values, ends, torch.randn(num_envs, generator=generator)


def naive_gae(rewards, values, ends, last_value, gamma, gae_lambda):
    """The defining sum: A_t = sum_k (gamma lambda)^k delta_{t+k}, up to the episode's end."""
    steps, num_envs = rewards.shape
    advantages = torch.zeros(steps, num_envs, dtype=torch.float64)
    for n in range(num_envs):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                following = last_value[n] if k == steps - 1 else values[k + 1, n]
                delta = rewards[k, n] - values[k, n] + (0 if ends[k, n] else gamma * following)
                advantages[t, n] += weight * delta
                if ends[k, n]:
                    break
                weight *= gamma * gae_lambda
    return advantages


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_gae_equals_the_defining_sum(gae_lambda, num_envs):
    rollout = random_rollout(40, num_envs, seed=num_envs)
    advantages, returns = ppo.compute_gae(*rollout, 0.9, gae_lambda)
    expected = naive_gae(*rollout, 0.9, gae_lambda)
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(returns, advantages + rollout[1])


def test_gae_limits():
    rewards, values, ends, last_value = random_rollout(30, 2, seed=0)
    following = torch.cat([values[1:], last_value[None]])
    delta = rewards + 0.9 * torch.where(ends, 0.0, following) - values
    torch.testing.assert_close(
        ppo.compute_gae(rewards, values, ends, last_value, 0.9, 0.0)[0], delta
    )
    returns = ppo.compute_gae(rewards, values, ends, last_value, 0.9, 1.0)[1]
    ret = last_value  # lambda = 1: the discounted sum of rewards, bootstrapped at the cut
    for t in reversed(range(30)):
        ret = rewards[t] + 0.9 * torch.where(ends[t], 0.0, ret)
        torch.testing.assert_close(returns[t], ret, atol=1e-5, rtol=1e-5)


def test_nothing_flows_back_across_an_end():
    rewards, values, ends, last_value = random_rollout(20, 1, seed=3)
    ends[:], ends[9] = False, True
    before = ppo.compute_gae(rewards, values, ends, last_value, 0.99, 0.95)[0]
    rewards[10:] += 100.0
    values[10:] -= 100.0
    after = ppo.compute_gae(rewards, values, ends, last_value, 0.99, 0.95)[0]
    torch.testing.assert_close(before[:10], after[:10])
    assert not torch.allclose(before[10:], after[10:])


def test_gaussian_equals_torch_distributions():
    torch.manual_seed(0)
    action, mean, log_std = torch.randn(100, 4), torch.randn(100, 4), torch.randn(4)
    normal = Independent(Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(
        ppo.gaussian_log_prob(action, mean, log_std), normal.log_prob(action)
    )
    torch.testing.assert_close(ppo.gaussian_entropy(log_std), normal.entropy()[0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # too likely already: no further
        (0.5, 2.0, -1.0, -2.0),  # became unlikely although good: free to come back
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 2.0),
    ],
)
def test_clipped_policy_loss(ratio, advantage, loss, gradient):
    ratio = torch.tensor([ratio], requires_grad=True)
    ours = ppo.clipped_policy_loss(ratio, torch.tensor([advantage]), 0.2)
    ours.backward()
    assert ours.item() == pytest.approx(loss)
    assert ratio.grad.item() == pytest.approx(gradient)
    (ours,) = ppo.clipped_policy_loss_gradient(ratio.detach(), torch.tensor([advantage]), 0.2)
    assert ours.item() == pytest.approx(gradient)


def test_normalize():
    advantage = torch.tensor([1.0, 2.0, 6.0])
    expected = (advantage.numpy() - 3) / np.std(advantage.numpy(), ddof=1)
    np.testing.assert_allclose(ppo.normalize(advantage), expected, rtol=1e-6)
    assert ppo.normalize(torch.tensor([5.0])).item() == 5.0
    assert torch.isfinite(ppo.normalize(torch.full((4,), 3.0))).all()


# --- Gradients: in float64, against autograd's ---------------------------------------------------


def assert_equal_gradients(ours, theirs) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 50])
@pytest.mark.parametrize("act_dim", [1, 4])
def test_gaussian_log_prob_gradient_equals_autograds(batch_size, act_dim):
    torch.manual_seed(0)
    action, d_log_prob = randn(batch_size, act_dim), randn(batch_size)
    mean, log_std = randn(batch_size, act_dim).requires_grad_(), randn(act_dim).requires_grad_()
    loss = (d_log_prob * ppo.gaussian_log_prob(action, mean, log_std)).sum()
    expected = torch.autograd.grad(loss, (mean, log_std))
    ours = ppo.gaussian_log_prob_gradient(action, mean.detach(), log_std.detach(), d_log_prob)
    assert_equal_gradients(ours, expected)


@pytest.mark.parametrize("clip_coef", [0.0, 0.2])
@pytest.mark.parametrize("batch_size", [1, 200])
def test_clipped_policy_loss_gradient_equals_autograds(batch_size, clip_coef):
    """Ratios within the clip and on both sides of it, each with advantages of either sign and 0."""
    torch.manual_seed(batch_size)
    ratio, advantage = (0.4 * randn(batch_size)).exp(), randn(batch_size)
    advantage[::9] = 0
    ratio[1::9] = 1  # as in the first minibatch
    for beyond in (ratio < 1 - clip_coef, ratio > 1 + clip_coef, (ratio - 1).abs() < clip_coef):
        for sign in (-1, 0, 1):
            assert batch_size == 1 or (advantage[beyond].sign() == sign).any() or clip_coef == 0
    loss = ppo.clipped_policy_loss(ratio.requires_grad_(), advantage, clip_coef)
    expected = torch.autograd.grad(loss, ratio)
    ours = ppo.clipped_policy_loss_gradient(ratio.detach(), advantage, clip_coef)
    assert_equal_gradients([ours], expected)


@pytest.mark.parametrize("batch_size", [1, 50])
def test_value_loss_gradient_equals_autograds(batch_size):
    torch.manual_seed(0)
    value, ret = randn(batch_size).requires_grad_(), randn(batch_size)
    expected = torch.autograd.grad(F.mse_loss(value, ret), value)
    assert_equal_gradients([ppo.value_loss_gradient(value.detach(), ret)], expected)


def test_the_policys_whole_gradient_equals_autograds():
    """The clipped loss of a policy that has moved since the rollout, through the ratio."""
    torch.manual_seed(0)
    pairs = ppo.orthogonal(5, 8, 8, 2, gain=1.0)
    mlp = MLP([(weight.double(), bias.double()) for weight, bias in pairs], "tanh")
    log_std = torch.tensor([-0.5, 0.4], dtype=torch.float64)
    adam, net = Adam([*mlp.tensors, log_std], learning_rate=0.0), separate(mlp)
    obs, action, advantage = randn(64, 5), randn(64, 2), randn(64)
    plain_log_std = log_std.clone().requires_grad_()
    log_prob = Normal(net(obs), plain_log_std.exp()).log_prob(action).sum(1)
    old_log_prob = log_prob.detach() + 0.3 * randn(64)
    ratio = (log_prob - old_log_prob).exp()
    ppo.clipped_policy_loss(ratio, advantage, 0.2).backward()
    expected = [*in_mlps_shape([p.grad for p in net.parameters()]), plain_log_std.grad]

    (mean,), tape = mlp.forward(obs)
    ratio = (ppo.gaussian_log_prob(action, mean, log_std) - old_log_prob).exp()
    d_log_prob = ppo.clipped_policy_loss_gradient(ratio, advantage, 0.2) * ratio
    d_mean, d_log_std = ppo.gaussian_log_prob_gradient(action, mean, log_std, d_log_prob)
    mlp.backward(tape, d_mean[None])
    log_std.grad.copy_(d_log_std)
    expected = torch.cat([gradient.flatten() for gradient in expected])
    torch.testing.assert_close(adam.gradient, expected, rtol=1e-11, atol=1e-13)


# --- The networks --------------------------------------------------------------------------------


def separate(mlp: MLP) -> nn.Sequential:
    """A plain network with the same weights, for autograd. Draws no random number."""
    net = nn.Sequential()
    for weight, bias in zip(mlp.tensors[::2], mlp.tensors[1::2], strict=True):
        linear = nn.utils.skip_init(nn.Linear, *weight.shape[1:], dtype=weight.dtype)
        linear.weight.data.copy_(weight[0].T)
        linear.bias.data.copy_(bias[0, 0])
        net.extend([linear, nn.Tanh()])
    return net[:-1]


def in_mlps_shape(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of a Linear's weights (outputs, inputs) and biases, in turn, as the tensors of an MLP."""
    return [value.T[None] if value.ndim == 2 else value[None, None] for value in values]


def test_networks_start_orthogonal_with_sb3s_gains():
    torch.manual_seed(0)
    policy, value = ppo.orthogonal(20, 64, 64, 6, gain=0.01), ppo.orthogonal(20, 64, 64, 1, gain=1)
    for layers, last_gain, outputs in ((policy, 0.01, 6), (value, 1.0, 1)):
        shapes = [tuple(tensor.shape) for layer in layers for tensor in layer]
        hidden = [(1, 20, 64), (1, 1, 64), (1, 64, 64), (1, 1, 64)]
        assert shapes == [*hidden, (1, 64, outputs), (1, 1, outputs)]
        for ((weight,), bias), gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-5, rtol=0)
            assert not bias.any()
    assert not torch.equal(policy[0][0], value[0][0])


def initial(args: Args) -> tuple[MLP, MLP]:
    """Policy and value function as main starts them, on Pendulum; so stands torch's generator."""
    torch.manual_seed(args.seed)
    policy = MLP(ppo.orthogonal(3, args.hidden, args.hidden, 1, gain=0.01), "tanh")
    return policy, MLP(ppo.orthogonal(3, args.hidden, args.hidden, 1, gain=1.0), "tanh")


def learned(trained: dict) -> list[torch.Tensor]:
    """All parameters."""
    return [*trained["policy"].tensors, *trained["value_function"].tensors, trained["log_std"]]


# --- The loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "always_clipped"),
    [
        ({"ent_coef": 0.01, "max_grad_norm": 0.05}, True),
        # Not the value function alone makes the norm, and it is sometimes below its bound.
        ({"ent_coef": 0.3, "vf_coef": 1e-3}, False),
    ],
)
def test_an_update_equals_a_plain_reimplementation_of_sb3s(
    tmp_path, monkeypatch, changes, always_clipped
):
    """Two rollouts with time limits in them, rewards, GAE and 32 Adam steps, from plain parts.

    Adam forgives a wrong factor in a gradient, so the last step's gradients are compared as well.
    """
    minibatches, rollouts = [], []

    class Recording(ppo.RolloutBuffer):
        def minibatches(self, batch_size):
            if len(minibatches) % 16 == 0:
                arrays = {name: getattr(self, name).numpy().copy() for name in self.layout}
                rollouts.append(arrays)
            for batch in super().minibatches(batch_size):
                minibatches.append(batch)
                yield batch

    monkeypatch.setattr(ppo, "RolloutBuffer", Recording)
    # At this rate the second rollout has another log_std.
    args = tiny(tmp_path, total_timesteps=512, learning_rate=0.01, **changes)
    trained = ppo.main(args)
    assert (len(minibatches), len(rollouts)) == (32, 2)

    actor, critic = map(separate, initial(args))
    log_std = torch.zeros(1, requires_grad=True)
    parameters = [*actor.parameters(), *critic.parameters(), log_std]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)
    clipped, upcoming = 0, iter(minibatches)

    # Replay the actions in an environment of its own: same seed, same dynamics.
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=args.seed)
    for rollout, end in zip(rollouts, (199, 399 - 256), strict=True):  # Pendulum's 200 steps
        rewards, values, ends = (np.zeros((256, 1)) for _ in range(3))
        noise = torch.empty(256, 1, 1).normal_()
        with torch.no_grad():
            for t in range(256):
                as_float = torch.as_tensor(obs)[None]
                values[t] = critic(as_float)
                mean, std, action = actor(as_float), log_std.exp(), rollout["actions"][t, 0]
                assert action.item() == pytest.approx((mean + std * noise[t]).item(), abs=1e-5)
                log_prob = Normal(mean, std).log_prob(torch.tensor(action)).sum()
                assert log_prob.item() == pytest.approx(rollout["log_probs"][t, 0], abs=1e-5)
                obs, reward, terminated, truncated, _ = env.step(action.clip(-2, 2))
                rewards[t] = reward
                if truncated:
                    assert t == end and not terminated
                    rewards[t] += args.gamma * critic(torch.as_tensor(obs)[None]).item()
                    ends[t] = True
                    obs, _ = env.reset()
            last_value = critic(torch.as_tensor(obs)[None])[0]
        assert np.flatnonzero(rollout["ends"]).tolist() == [end]
        np.testing.assert_allclose(rollout["rewards"], rewards, atol=1e-4)
        np.testing.assert_allclose(rollout["values"], values, atol=1e-5)
        arrays = torch.tensor(rewards), torch.tensor(values), torch.tensor(ends).bool(), last_value
        advantages = naive_gae(*arrays, 0.99, 0.95)
        np.testing.assert_allclose(rollout["advantages"], advantages, atol=1e-3)
        np.testing.assert_allclose(rollout["returns"], advantages + arrays[1], atol=1e-3)

        for _ in range(16):
            batch = RolloutBatch(*(field.clone() for field in next(upcoming)))
            normal = Normal(actor(batch.obs), log_std.exp())
            ratio = (normal.log_prob(batch.action).sum(1) - batch.log_prob).exp()
            advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
            surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            value_loss = F.mse_loss(critic(batch.obs).flatten(), batch.ret)
            entropy = normal.entropy().sum(1).mean()
            loss = -surrogate.mean() + args.vf_coef * value_loss - args.ent_coef * entropy
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            clipped += norm.item() > args.max_grad_norm
            optimizer.step()
    assert clipped and (clipped == 32) == always_clipped
    for kind, theirs in (("weight", parameters), ("gradient", [p.grad for p in parameters])):
        plain = in_mlps_shape([value.detach() for value in theirs[:-1]]) + theirs[-1:]
        for ours, expected in zip(learned(trained), plain, strict=True):
            ours = ours.grad if kind == "gradient" else ours
            torch.testing.assert_close(ours, expected.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"storage": "float64"}, True),
        ({"storage": "float32"}, True),
        ({"quant_m": 1, "quant_act": True}, True),
        ({"storage": "bfloat16", "quant_act": True}, True),
        ({"num_envs": 3}, True),
        ({"quant_m": 1}, False),  # the paper: acts on raw, learns from rounded
    ],
)
def test_first_ratio_is_one_exactly_where_it_should_be(tmp_path, changes, exact):
    # The second rollout's, when log_std is no longer 0.
    args = tiny(tmp_path, total_timesteps=512, learning_rate=0.01, **changes)
    error = ppo.main(args)["result"]["first_ratio_error"]
    assert (error < 2e-6) == exact


@pytest.mark.parametrize(
    "changes",
    [
        {"num_envs": 3},
        {"quant_m": 1},
        {"quant_act": True, "quant_m": 0},
        {"ent_coef": 0.1},
        {"batch_size": 51},  # 256 = 5 * 51 + 1: a minibatch of one
    ],
)
def test_a_run_updates_every_parameter(tmp_path, changes):
    args = tiny(tmp_path, **changes)
    trained = ppo.main(args)
    policy, value_function = initial(args)
    start = [*policy.tensors, *value_function.tensors, torch.zeros(1)]
    for before, after in zip(start, learned(trained), strict=True):
        assert torch.isfinite(after).all()
        assert not torch.equal(before, after)
    assert trained["result"]["global_step"] == 256 * args.num_envs


def test_whole_rollouts_are_collected(tmp_path):
    assert ppo.main(tiny(tmp_path, total_timesteps=257))["result"]["global_step"] == 512


def test_same_seed_same_weights_and_another_seed_others(tmp_path):
    weights = [
        torch.cat([p.flatten() for p in learned(ppo.main(tiny(tmp_path, seed=seed)))])
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("changes", [{}, {"quant_m": 1, "num_envs": 3}])
def test_allocated_ledger_equals_the_tensors_of_a_run(tmp_path, changes):
    args = tiny(tmp_path, **changes)
    trained = ppo.main(args)
    buffer, parameters, adam = trained["buffer"], learned(trained), trained["adam"]
    ledger = memory.allocated_ppo(
        buffer.codec, obs_dim=3, act_dim=1, hidden=8, n_steps=256,
        num_envs=args.num_envs, batch_size=32,
    )  # fmt: skip
    assert ledger["buffer observations"] == buffer.obs.nbytes
    assert ledger["buffer observations"] + ledger["buffer rest"] == buffer.nbytes
    assert ledger["networks"] == sum(p.nbytes for p in parameters)
    assert ledger["gradients"] == sum(p.grad.nbytes for p in parameters)
    assert ledger["Adam moments"] == adam.mean.nbytes + adam.square.nbytes
    held = sum(v.nbytes for v in vars(adam).values() if torch.is_tensor(v))
    assert held == ledger["networks"] + ledger["gradients"] + ledger["Adam moments"]
    assert ledger["decoded batch"] == sum(t.nbytes for t in next(buffer.minibatches(32)))


class Wide(gym.ObservationWrapper):
    """Pendulum in 22 columns."""

    def __init__(self):
        super().__init__(gym.make("Pendulum-v1", max_episode_steps=50))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (22,), np.float64)

    def observation(self, obs):
        return np.outer(obs, range(1, 9)).flat[:22]


@pytest.mark.parametrize(
    ("changes", "num_envs"),
    [({"quant_m": 1}, 1), ({"quant_m": 2}, 3), ({"quant_m": 3, "quant_act": True}, 1)],
)
def test_packing_changes_no_bit_of_a_run(tmp_path, monkeypatch, changes, num_envs):
    monkeypatch.setattr(envs, "make", lambda _: Wide())
    runs = []
    for name, pack in (("plain", False), ("packed", True)):
        args = tiny(tmp_path, n_steps=128, num_envs=num_envs, run_name=name, pack=pack, **changes)
        args.eval_episodes, args.total_timesteps = 1, 2 * 128 * num_envs
        trained = ppo.main(args)
        events = EventAccumulator(str(tmp_path / name), size_guidance={"scalars": 0}).Reload()
        logged = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag not in ("charts/SPS", "memory/buffer_bytes")
        }
        tensors = [*learned(trained), trained["adam"].mean, trained["adam"].square]
        runs.append((trained, tensors, logged, trained["result"]))
    (plain, tensors, logged, result), (packed, same_tensors, same_logged, same_result) = runs
    for one, other in zip(tensors, same_tensors, strict=True):
        assert torch.equal(one, other)
    assert same_logged == logged
    assert len(logged["charts/episodic_return"]) == 5
    for name in ("return_last_tenth", "evaluation", "clip_fraction", "max_abs_obs", "clamped"):
        assert same_result[name] == result[name]
    assert type(packed["buffer"].codec) is Packed
    width, _ = packed["buffer"].codec.row(22)
    saved = 128 * num_envs * (22 * plain["buffer"].codec.dtype.itemsize - 2 * width)
    assert result["buffer_bytes"] - same_result["buffer_bytes"] == saved > 0
