"""PPO's maths against oracles, one whole update against a plain reimplementation, and the ratio."""

import copy

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
from ppo import ActorCritic, Args
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


def test_normalize():
    advantage = torch.tensor([1.0, 2.0, 6.0])
    expected = (advantage.numpy() - 3) / np.std(advantage.numpy(), ddof=1)
    np.testing.assert_allclose(ppo.normalize(advantage), expected, rtol=1e-6)
    assert ppo.normalize(torch.tensor([5.0])).item() == 5.0
    assert torch.isfinite(ppo.normalize(torch.full((4,), 3.0))).all()


# --- The network ---------------------------------------------------------------------------------


def separate_networks(policy: ActorCritic) -> tuple[nn.Sequential, nn.Sequential]:
    """The same weights in two plain networks."""

    def mlp(i, w, b):
        layers = ((policy.w1[i], policy.b1[i]), (policy.w2[i], policy.b2[i]), (w, b))
        net = nn.Sequential()
        for weight, bias in layers:
            linear = nn.Linear(*weight.shape)
            linear.weight.data, linear.bias.data = (
                weight.data.T.clone(),
                bias.data.flatten().clone(),
            )
            net.extend([linear, nn.Tanh()])
        return net[:-1]

    return mlp(0, policy.w_mean, policy.b_mean), mlp(1, policy.w_value, policy.b_value)


def test_actor_critic_equals_two_separate_networks():
    torch.manual_seed(0)
    policy, obs = ActorCritic(5, 2, 8), torch.randn(16, 5)
    actor, critic = separate_networks(policy)
    mean, value = policy(obs)
    torch.testing.assert_close(mean, actor(obs))
    torch.testing.assert_close(value, critic(obs)[:, 0])


def test_actor_critic_starts_orthogonal_with_sb3s_gains():
    torch.manual_seed(0)
    policy = ActorCritic(20, 6, 64)
    for weight, gain in (
        (policy.w1[0], 2**0.5), (policy.w1[1], 2**0.5), (policy.w2[0], 2**0.5),
        (policy.w2[1], 2**0.5), (policy.w_mean, 0.01), (policy.w_value, 1.0),
    ):  # fmt: skip
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-5, rtol=0)
    zeros = (policy.b1, policy.b2, policy.b_mean, policy.b_value, policy.log_std)
    assert all(not p.any() for p in zeros)
    assert not torch.equal(policy.w1[0], policy.w1[1])


# --- The loop ------------------------------------------------------------------------------------


def test_an_update_equals_a_plain_reimplementation_of_sb3s(tmp_path, monkeypatch):
    """Rollout with a time limit in it, rewards, GAE and 16 Adam steps, from plain parts."""
    minibatches = []

    class Recording(ppo.RolloutBuffer):
        def minibatches(self, batch_size):
            for batch in super().minibatches(batch_size):
                minibatches.append(batch)
                yield batch

    monkeypatch.setattr(ppo, "RolloutBuffer", Recording)
    args = tiny(tmp_path, max_grad_norm=0.05, ent_coef=0.01)
    trained = ppo.main(args)
    buffer = trained["buffer"]
    assert len(minibatches) == 16

    torch.manual_seed(args.seed)
    policy = ActorCritic(3, 1, 8)
    actor, critic = separate_networks(policy)
    log_std = torch.zeros(1, requires_grad=True)
    log_std.data.copy_(policy.log_std.data)

    # Replay the actions in an environment of its own: same seed, same dynamics.
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=args.seed)
    rewards, values, ends = (np.zeros((256, 1)) for _ in range(3))
    with torch.no_grad():
        for t in range(256):
            as_float = torch.as_tensor(obs)[None]
            values[t] = critic(as_float)
            action = buffer.actions[t, 0]
            log_prob = Normal(actor(as_float), log_std.exp()).log_prob(action).sum()
            assert log_prob.item() == pytest.approx(buffer.log_probs[t, 0].item(), abs=1e-5)
            obs, reward, terminated, truncated, _ = env.step(action.numpy().clip(-2, 2))
            rewards[t] = reward
            if truncated:  # Pendulum's limit of 200 steps
                assert t == 199 and not terminated
                rewards[t] += args.gamma * critic(torch.as_tensor(obs)[None]).item()
                ends[t] = True
                obs, _ = env.reset()
        last_value = critic(torch.as_tensor(obs)[None])[0]
    assert buffer.ends[:, 0].nonzero().flatten().tolist() == [199]
    np.testing.assert_allclose(buffer.rewards, rewards, atol=1e-4)
    np.testing.assert_allclose(buffer.values, values, atol=1e-5)
    rollout = torch.tensor(rewards), torch.tensor(values), torch.tensor(ends).bool(), last_value
    advantages = naive_gae(*rollout, 0.99, 0.95)
    np.testing.assert_allclose(buffer.advantages, advantages, atol=1e-3)

    parameters = [*actor.parameters(), *critic.parameters(), log_std]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)
    clipped = 0
    for batch in minibatches:
        normal = Normal(actor(batch.obs), log_std.exp())
        ratio = (normal.log_prob(batch.action).sum(1) - batch.log_prob).exp()
        advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
        surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        value_loss = F.mse_loss(critic(batch.obs).flatten(), batch.ret)
        entropy = normal.entropy().sum(1).mean()
        loss = -surrogate.mean() + 0.5 * value_loss - 0.01 * entropy
        optimizer.zero_grad()
        loss.backward()
        clipped += nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item() > 0.05
        optimizer.step()
    assert clipped
    final_actor, final_critic = separate_networks(trained["policy"])
    for ours, theirs in ((final_actor, actor), (final_critic, critic)):
        for mine, plain in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trained["policy"].log_std.data, log_std.data)


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"storage": "float64"}, True),
        ({"storage": "float32"}, True),
        ({"quant_m": 1, "quant_act": True}, True),
        ({"storage": "bfloat16", "quant_act": True}, True),
        ({"quant_m": 1}, False),  # the paper: acts on raw, learns from rounded
    ],
)
def test_first_ratio_is_one_exactly_where_it_should_be(tmp_path, changes, exact):
    error = ppo.main(tiny(tmp_path, **changes))["result"]["first_ratio_error"]
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
    torch.manual_seed(args.seed)
    initial = ActorCritic(3, 1, 8)
    for before, after in zip(initial.parameters(), trained["policy"].parameters(), strict=True):
        assert torch.isfinite(after).all()
        assert not torch.equal(before, after)
    assert trained["result"]["global_step"] == 256 * args.num_envs


def test_whole_rollouts_are_collected(tmp_path):
    assert ppo.main(tiny(tmp_path, total_timesteps=257))["result"]["global_step"] == 512


def test_same_seed_same_weights_and_another_seed_others(tmp_path):
    weights = [ppo.main(tiny(tmp_path, seed=seed))["policy"].state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["w1"], weights[2]["w1"])


def test_flatten_gives_views_of_one_vector():
    policy = ActorCritic(3, 1, 8)
    before = copy.deepcopy(policy.state_dict())
    flat = ppo.flatten([*policy.parameters()])
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    with torch.no_grad():
        flat.zero_()
        flat.grad.fill_(1.0)
    assert all(not p.any() and p.grad.all() for p in policy.parameters())


@pytest.mark.parametrize("changes", [{}, {"quant_m": 1, "num_envs": 3}])
def test_allocated_ledger_equals_the_tensors_of_a_run(tmp_path, changes):
    args = tiny(tmp_path, **changes)
    trained = ppo.main(args)
    buffer, parameters = trained["buffer"], [*trained["policy"].parameters()]
    ledger = memory.allocated_ppo(
        buffer.codec, obs_dim=3, act_dim=1, hidden=8, n_steps=256,
        num_envs=args.num_envs, batch_size=32,
    )  # fmt: skip
    assert ledger["buffer observations"] == buffer.obs.nbytes
    assert ledger["buffer observations"] + ledger["buffer rest"] == buffer.nbytes
    assert ledger["networks"] == sum(p.nbytes for p in parameters)
    assert ledger["gradients"] == sum(p.grad.nbytes for p in parameters)
    (state,) = trained["optimizer"].state.values()
    assert ledger["Adam moments"] == sum(t.nbytes for t in state.values())
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
        (state,) = trained["optimizer"].state.values()
        events = EventAccumulator(str(tmp_path / name), size_guidance={"scalars": 0}).Reload()
        logged = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag not in ("charts/SPS", "memory/buffer_bytes")
        }
        learned = [*trained["policy"].parameters(), *state.values()]
        runs.append((trained, learned, logged, trained["result"]))
    (plain, learned, logged, result), (packed, same_learned, same_logged, same_result) = runs
    for one, other in zip(learned, same_learned, strict=True):
        assert torch.equal(one, other)
    assert same_logged == logged
    assert len(logged["charts/episodic_return"]) == 5
    for name in ("return_last_tenth", "evaluation", "clip_fraction", "max_abs_obs", "clamped"):
        assert same_result[name] == result[name]
    assert type(packed["buffer"].codec) is Packed
    width, _ = packed["buffer"].codec.row(22)
    saved = 128 * num_envs * (22 * plain["buffer"].codec.dtype.itemsize - 2 * width)
    assert result["buffer_bytes"] - same_result["buffer_bytes"] == saved > 0
