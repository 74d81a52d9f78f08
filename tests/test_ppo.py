"""PPO's maths against oracles, whole updates against plain ones and SB3's, and the ratio."""

import copy
import re

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
import torch.nn.functional as F
from helpers import refused, scalars
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from test_networks import separate
from test_recording import Checked
from torch import nn
from torch.distributions import Independent, Normal

import memory
import ppo
from buffers import RolloutBatch
from ppo import Args
from quantize import Packed
from support import envs
from support.networks import ActorCritic

ARRAYS = ("actions", "log_probs", "values", "rewards", "ends", "advantages", "returns")


def tiny(tmp_path, **changes) -> Args:
    defaults = {
        "env": "Pendulum-v1", "total_timesteps": 256, "n_steps": 256, "batch_size": 32,
        "n_epochs": 2, "hidden": 8, "eval_episodes": 0, "run_dir": str(tmp_path),
    }  # fmt: skip
    return Args(**{**defaults, **changes})


def weights_of(trained: dict) -> dict[str, torch.Tensor]:
    """Every parameter of a run, by name."""
    return {name: p.detach() for name, p in trained["actor_critic"].named_parameters()}


def plain_parameters(network: ActorCritic) -> list[torch.Tensor]:
    """log_std, then weights and biases of the policy's layers and of the value function's."""
    return [network.log_std, *(p for plain in separate(network) for p in plain.parameters())]


# --- The maths -----------------------------------------------------------------------------------


def random_rollout(steps: int, num_envs: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(steps, num_envs, generator=generator) for _ in range(2))
    ends = torch.rand(steps, num_envs, generator=generator) < 0.2
    return rewards, values, ends, torch.randn(num_envs, generator=generator)


def naive_gae(rewards, values, ends, last_value, gamma, gae_lambda):
    """The defining sum: A_t = sum_k (gamma lambda)^k delta_{t+k}, up to the episode's end."""
    steps, num_envs = rewards.shape
    rewards, ends = rewards.tolist(), ends.tolist()
    values = [*values.tolist(), last_value.tolist()]
    advantages = torch.zeros(steps, num_envs, dtype=torch.float64)
    for n in range(num_envs):
        for t in range(steps):
            total, weight = 0.0, 1.0
            for k in range(t, steps):
                following = 0 if ends[k][n] else values[k + 1][n]
                total += weight * (rewards[k][n] + gamma * following - values[k][n])
                if ends[k][n]:
                    break
                weight *= gamma * gae_lambda
            advantages[t, n] = total
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
    noise = (action - mean) / log_std.exp()
    torch.testing.assert_close(ppo.gaussian_log_prob(noise, log_std), normal.log_prob(action))
    torch.testing.assert_close(ppo.gaussian_entropy(log_std), normal.entropy()[0])
    one_each = torch.randn(100, 4)  # as of a policy whose std depends on the observation
    expected = Independent(Normal(0.0, one_each.exp()), 1).entropy().mean()
    torch.testing.assert_close(ppo.gaussian_entropy(one_each), expected)


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


# --- Recorded and eager --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"ent_coef": 0.1},
        {"batch_size": 51},  # 256 = 5 * 51 + 1: a minibatch of one
        {"batch_size": 100, "num_envs": 3, "hidden": 64, "quant_m": 1},  # 768 = 7 * 100 + 68
        {"hidden": 1, "batch_size": 256, "clip_coef": 0.0},
    ],
)
@pytest.mark.filterwarnings("error")  # nothing falls back
def test_every_function_agrees_with_autograd_at_every_call(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(ppo, "Recorded", Checked)
    args = tiny(tmp_path, learning_rate=0.01, **changes)
    with Checked.counting() as calls:
        ppo.main(args)
    minibatches = -(-256 * args.num_envs // args.batch_size)
    assert calls == {"sample_action": 256, "loss": 2 * minibatches}


@pytest.mark.parametrize("changes", [{}, {"num_envs": 3, "quant_m": 1, "batch_size": 100}])
def test_eager_and_recorded_runs_end_with_the_same_weights(tmp_path, monkeypatch, changes):
    by_replay = weights_of(ppo.main(tiny(tmp_path, total_timesteps=512, **changes)))
    monkeypatch.setattr(ppo.Recorded, "_record", None)  # with --eager nothing is
    theirs = weights_of(ppo.main(tiny(tmp_path, total_timesteps=512, eager=True, **changes)))
    for name, ours in by_replay.items():
        torch.testing.assert_close(ours, theirs[name], atol=1e-4, rtol=0)


def test_a_python_number_that_changes_stops_the_run(tmp_path, monkeypatch, capfd):
    """As it would if somebody made clip_coef decay."""
    args = tiny(tmp_path, total_timesteps=1024, ent_coef=0.1)

    class Decaying(ppo.RolloutBuffer):
        def minibatches(self, batch_size):
            args.ent_coef *= 0.5
            return super().minibatches(batch_size)

    monkeypatch.setattr(ppo, "RolloutBuffer", Decaying)
    line = refused(ppo, args, capfd)
    assert re.match(r"ppo\.py: error: at step 256 loss gives other numbers .*--eager", line)
    args.eager = True
    assert ppo.main(args)["result"]["global_step"] == 1024


@pytest.mark.parametrize("eager", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capfd, eager):
    monkeypatch.setattr(ppo, "clipped_policy_loss", lambda ratio, *_: (ratio.mean() - 9).log())
    line = refused(ppo, tiny(tmp_path, eager=eager), capfd)
    assert re.match(r"ppo\.py: error: at step 256 loss is nan .*stopped", line)


# --- Whole updates -------------------------------------------------------------------------------


def initial(args: Args) -> ActorCritic:
    """The networks as main starts them, on Pendulum; torch's generator stands right after."""
    torch.manual_seed(args.seed)
    return ActorCritic(3, 1, args.hidden)


def last_gradient(trained: dict) -> ActorCritic:
    """The gradient of the last minibatch, in place of the weights that it belongs to."""
    network = copy.deepcopy(trained["actor_critic"])
    nn.utils.vector_to_parameters(trained["adam"].parameters.grad, network.parameters())
    return network


def watched_run(monkeypatch, args: Args) -> tuple[dict, list[RolloutBatch], list[dict]]:
    """A run, with its minibatches and the arrays of its rollouts, in their order."""
    minibatches, rollouts = [], []

    class Watched(ppo.RolloutBuffer):
        def minibatches(self, batch_size):
            if len(minibatches) % (args.n_epochs * args.n_steps // batch_size) == 0:
                rollouts.append({name: getattr(self, name).numpy().copy() for name in ARRAYS})
            for batch in super().minibatches(batch_size):
                with torch.inference_mode(False):  # autograd is to take them
                    minibatches.append(RolloutBatch(*(field.clone() for field in batch)))
                yield batch

    monkeypatch.setattr(ppo, "RolloutBuffer", Watched)
    return ppo.main(args), minibatches, rollouts


@pytest.mark.parametrize(
    ("changes", "always_clipped"),
    [
        ({"ent_coef": 0.01, "max_grad_norm": 0.05}, True),
        ({"ent_coef": 0.01, "max_grad_norm": 0.05, "eager": True}, True),
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
    # At this rate the second rollout has another log_std.
    args = tiny(tmp_path, total_timesteps=512, learning_rate=0.01, **changes)
    trained, minibatches, rollouts = watched_run(monkeypatch, args)
    assert (len(minibatches), len(rollouts)) == (32, 2)

    network = initial(args)
    actor, critic = separate(network)
    log_std = network.log_std
    parameters = [log_std, *actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)
    clipped, upcoming = 0, iter(minibatches)

    # Replay the actions in an environment of its own: same seed, same dynamics.
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=args.seed)
    for rollout, end in zip(rollouts, (199, 399 - 256), strict=True):  # Pendulum's 200 steps
        rewards, values, ends = (np.zeros((256, 1)) for _ in range(3))
        noise = torch.randn(256, 1, 1)
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
            batch = next(upcoming)
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
    for ours, expected in (
        (trained["actor_critic"], parameters),
        (last_gradient(trained), [p.grad for p in parameters]),
    ):
        for mine, other in zip(plain_parameters(ours), expected, strict=True):
            torch.testing.assert_close(mine.detach(), other.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("eager", [False, True])
def test_eighty_minibatches_equal_stable_baselines3s(tmp_path, monkeypatch, eager):
    """From the same weights and minibatches as SB3's own `PPO.train`."""
    args = tiny(
        tmp_path, hidden=64, quant_m=1, n_epochs=10, batch_size=32, ent_coef=0.01, eager=eager
    )
    trained, minibatches, _ = watched_run(monkeypatch, args)
    policy, value_function = separate(initial(args))
    options = {"n_epochs": 10, "batch_size": 32, "ent_coef": 0.01, "device": "cpu"}
    model = sb3.PPO("MlpPolicy", "Pendulum-v1", **options)
    model.set_logger(Logger(None, []))
    extractor, theirs = model.policy.mlp_extractor, [model.policy.log_std]
    for body, head, plain in (
        (extractor.policy_net, model.policy.action_net, policy),
        (extractor.value_net, model.policy.value_net, value_function),
    ):
        for linear, same in zip((body[0], body[2], head), plain[::2], strict=True):
            linear.load_state_dict(same.state_dict())
            theirs += linear.parameters()
    samples = [
        RolloutBufferSamples(b.obs, b.action, torch.zeros(32), b.log_prob, b.advantage, b.ret)
        for b in minibatches
    ]
    upcoming = iter(samples)
    model.rollout_buffer.get = lambda _: [next(upcoming) for _ in range(8)]
    model.train()
    assert len(samples) == 80 and next(upcoming, None) is None

    ours = plain_parameters(trained["actor_critic"])
    apart = [(x - y).abs().max().item() for x, y in zip(ours, theirs, strict=True)]
    print(f"largest difference of a weight after 80 minibatches: {max(apart):.2g}")
    assert max(apart) < 5e-6
    for mine, other in zip(plain_parameters(last_gradient(trained)), theirs, strict=True):
        torch.testing.assert_close(mine.detach(), other.grad, atol=1e-5, rtol=1e-3)


# --- The loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({}, True),
        ({"eager": True}, True),
        ({"storage": "float64"}, True),
        ({"storage": "float32"}, True),
        ({"quant_m": 1, "quant_act": True}, True),
        ({"storage": "bfloat16", "quant_act": True}, True),
        ({"num_envs": 3}, True),
        ({"quant_m": 1}, False),  # the paper: acts on raw, learns from rounded
    ],
)
def test_first_ratio_is_one_exactly_where_it_should_be(tmp_path, changes, exact):
    # The last rollout's, when log_std is no longer 0.
    args = tiny(tmp_path, total_timesteps=768, learning_rate=0.01, **changes)
    error = ppo.main(args)["result"]["first_ratio_error"]
    assert (error < 2e-6) == exact


class Shifted(ActorCritic):
    def forward(self, obs):
        mean, log_std, value = super().forward(obs)
        return mean, log_std - 1, value


class StateDependent(ActorCritic):
    def forward(self, obs):
        mean, log_std, value = super().forward(obs)
        return mean, log_std + torch.tanh(obs[:, :1]), value


@pytest.mark.parametrize("network", [Shifted, StateDependent])
@pytest.mark.parametrize("changes", [{}, {"num_envs": 3, "eager": True}])
def test_every_update_starts_at_ratio_one_whatever_std_the_policy_returns(
    tmp_path, monkeypatch, network, changes
):
    monkeypatch.setattr(ppo, "ActorCritic", network)
    steps = 4 * 256 * changes.get("num_envs", 1)
    ppo.main(tiny(tmp_path, total_timesteps=steps, learning_rate=0.01, run_name="run", **changes))
    errors = [error for _, error in scalars(tmp_path / "run")["losses/first_ratio_error"]]
    assert len(errors) == 4 and max(errors) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eager": True},
        {"num_envs": 3},
        {"quant_m": 1},
        {"quant_m": 2, "pack": True},
        {"quant_act": True, "quant_m": 0},
        {"storage": "float16"},
        {"ent_coef": 0.1},
        {"batch_size": 51},  # 256 = 5 * 51 + 1: a minibatch of one
    ],
)
def test_a_run_updates_every_parameter(tmp_path, changes):
    args = tiny(tmp_path, **changes)
    trained = ppo.main(args)
    after = weights_of(trained)
    for name, before in initial(args).named_parameters():
        assert after[name].isfinite().all() and not torch.equal(before, after[name])
        if name.startswith(("first", "second")):  # of both networks
            assert not any(map(torch.equal, before, after[name]))
    assert trained["result"]["global_step"] == 256 * args.num_envs


def test_whole_rollouts_are_collected(tmp_path):
    assert ppo.main(tiny(tmp_path, total_timesteps=257))["result"]["global_step"] == 512


def test_the_environment_gets_clipped_actions_and_the_buffer_what_was_sampled(
    tmp_path, monkeypatch
):
    executed, make = [], ppo.VectorEnv

    def recording(env_id, num_envs):
        vector = make(env_id, num_envs)
        step = vector.step
        vector.step = lambda action: executed.append(action.copy()) or step(action)
        return vector

    monkeypatch.setattr(ppo, "VectorEnv", recording)
    stored = ppo.main(tiny(tmp_path))["buffer"].actions.numpy()
    assert np.abs(stored).max() > 2  # Pendulum's bounds are +-2
    np.testing.assert_array_equal(np.array(executed), stored.clip(-2, 2))


@pytest.mark.parametrize("changes", [{}, {"quant_m": 1, "num_envs": 3}])
def test_allocated_ledger_equals_the_tensors_of_a_run(tmp_path, changes):
    args = tiny(tmp_path, **changes)
    trained = ppo.main(args)
    buffer, adam = trained["buffer"], trained["adam"]
    ledger = memory.allocated(
        "ppo", buffer.codec, obs_dim=3, act_dim=1, hidden=8, n_steps=256,
        num_envs=args.num_envs, batch_size=32,
    )  # fmt: skip
    tensors = [*weights_of(trained).values(), adam.parameters.grad, adam.mean, adam.square]
    held = buffer.nbytes + sum(tensor.nbytes for tensor in tensors)
    assert ledger["buffer observations"] == buffer.obs.nbytes
    assert ledger["decoded batch"] == sum(t.nbytes for t in next(buffer.minibatches(32)))
    acting = 256 * args.num_envs * (1 + 1) * 4  # noise and log_std
    assert memory.total(ledger) == held + acting + ledger["decoded batch"]


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
        trained, logged = ppo.main(args), scalars(tmp_path / name)
        del logged["memory/buffer_bytes"]
        runs.append((trained, logged, trained["result"]))
    (plain, logged, result), (packed, same_logged, same_result) = runs
    learned, same_learned = weights_of(plain), weights_of(packed)
    assert all(torch.equal(learned[name], same_learned[name]) for name in learned)
    assert same_logged == logged
    assert len(logged["charts/episodic_return"]) == 5
    for name in ("return_last_tenth", "evaluation", "clip_fraction", "max_abs_obs", "clamped"):
        assert same_result[name] == result[name]
    assert type(packed["buffer"].codec) is Packed
    width, _ = packed["buffer"].codec.row(22)
    saved = 128 * num_envs * (22 * plain["buffer"].codec.dtype.itemsize - 2 * width)
    assert result["buffer_bytes"] - same_result["buffer_bytes"] == saved > 0
