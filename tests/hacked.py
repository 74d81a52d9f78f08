"""Runs in a copy of the tree that one of docs/hacks/*.patch has changed; see test_hacks.py.

    python tests/hacked.py third-critic    # in the copy's folder, with PYTHONPATH=.

Trains 300 steps straight, and stopped on the way and resumed, on Pendulum-v1. The weights must be
the same. Then it checks what the hack is for.
"""

import math
import signal
import sys
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ppo
import sac
from buffers import ReplayBuffer, RolloutBuffer
from quantize import FixedPoint, Float, make_codec
from support import runs
from support.networks import Critic
from support.recording import Recorded

SMALL = {"env": "Pendulum-v1", "total_timesteps": 300, "hidden": 16, "batch_size": 32}
ONLY = {
    sac: {"learning_starts": 40},
    ppo: {"n_steps": 50, "n_epochs": 3},  # a last minibatch of 18 steps
}
STOP = 140  # within an episode; for PPO within a rollout
CPU = torch.device("cpu")


# --- What is kept of the runs, for the checks ----------------------------------------------------

recorded: dict[str, Recorded] = {}  # of the newest run, by the function's name
logged: dict[str, list[float]] = defaultdict(list)  # by tag, of the newest run
acting: list = []  # best_action of the newest run


class Kept(Recorded):
    def __init__(self, function, *args, **kwargs):
        super().__init__(function, *args, **kwargs)
        recorded[self.name] = self


def keep_log(self, scalars):
    for tag, value in scalars.items():
        logged[tag].append(float(value))


def keep_policy(env_id, act, episodes, seed, evaluate=runs.evaluate):
    acting[:] = [act]
    return evaluate(env_id, act, episodes, seed)


def stopping(self, reward, done, advance=runs.Progress.advance):
    ended = advance(self, reward, done)
    if self.global_step == STOP:
        signal.raise_signal(signal.SIGTERM)
    return ended


def train(script, run_name: str, stops: bool = False, **options) -> dict:
    """Train for 300 steps; return the parts of the run and its weights.pt as "weights"."""
    logged.clear()
    options = SMALL | ONLY[script] | {"eval_episodes": 1, "run_name": run_name} | options
    args = script.Args(**options)
    if stops:
        with mock.patch.object(runs.Progress, "advance", stopping):
            try:
                script.main(args)
            except SystemExit as stop:
                assert stop.code == 128 + signal.SIGTERM
        args = replace(args, resume=True)
    weights = Path("runs", run_name, "weights.pt")
    assert not weights.exists()
    return script.main(args) | {"weights": torch.load(weights, weights_only=True)}


def train_twice(script, **options) -> dict:
    """Train straight, and stopped and resumed; return the latter's parts if nothing differs."""
    name = script.__name__
    straight = train(script, f"{name}-straight", **options)
    resumed = train(script, f"{name}-resumed", stops=True, **options)
    assert resumed["weights"].keys() == straight["weights"].keys()
    for part, weights in straight["weights"].items():
        for key, weight in weights.items():
            assert torch.equal(resumed["weights"][part][key], weight), (part, key)
    assert resumed["result"]["evaluation"] == straight["result"]["evaluation"]
    return resumed


# --- What the checks share -----------------------------------------------------------------------


def assert_close(found, expected, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Of tensors, arrays or numbers. torch's takes a second, for importing torch.distributed."""
    found, expected = (x.detach() if isinstance(x, Tensor) else x for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def inputs_of(name: str) -> list[Tensor]:
    """The inputs of a recorded function's latest call, in a form that autograd takes."""
    *_, inputs = recorded[name].latest.values()
    return [x.clone() for x in inputs]


def check_gradient(name: str, loss: Tensor) -> None:
    """The replayed gradient for the latest inputs is that of loss, which is written out here."""
    function = recorded[name]
    function(*inputs_of(name))
    assert not function.eager
    views = function.parameters.views
    expected = torch.autograd.grad(loss, views, materialize_grads=True)
    expected = torch.cat([gradient.flatten() for gradient in expected])
    assert expected.abs().max() > 0
    assert_close(function.parameters.grad, expected, atol=1e-5 * expected.abs().max().item())


def one_by_one(critic: Critic, obs: Tensor, action: Tensor, activation) -> Tensor:
    """The q of every critic, (count, B), each as a plain network."""
    q = []
    for i in range(len(critic.first.weight)):
        h = torch.cat([obs, action], 1)
        for layer in (critic.first, critic.second):
            h = activation(h @ layer.weight[i] + layer.bias[i])
        q.append((h @ critic.last.weight[i] + critic.last.bias[i])[:, 0])
    return torch.stack(q)


def actor_and_alpha_loss(parts: dict, alpha: Tensor) -> Tensor:
    """SAC eq. 9 for the latest batch."""
    obs, noise = inputs_of("loss_of_actor_and_alpha")
    mean, log_std = parts["actor"](obs)
    action = sac.squash(mean, log_std, noise)
    log_prob = sac.squashed_log_prob(noise, log_std, action)
    q = one_by_one(parts["critic"], obs, action, torch.relu)
    return (alpha * log_prob - q.min(0).values).mean()


# --- One check for each hack ---------------------------------------------------------------------


def third_critic() -> None:
    parts = train_twice(sac)
    assert len(parts["critic"].first.weight) == 3
    obs, action, y = inputs_of("loss_of_critic")
    q = one_by_one(parts["critic"], obs, action, torch.relu)
    check_gradient("loss_of_critic", sum(0.5 * F.mse_loss(q[i], y) for i in range(3)))

    obs, noise = inputs_of("loss_of_actor_and_alpha")
    _, log_std = parts["actor"](obs)
    log_prob = sac.squashed_log_prob(noise, log_std, sac.squash(*parts["actor"](obs), noise))
    temperature_loss = -(parts["log_alpha"] * (log_prob.detach() - 1)).mean()  # one action
    alpha = parts["log_alpha"].detach().exp()
    check_gradient("loss_of_actor_and_alpha", actor_and_alpha_loss(parts, alpha) + temperature_loss)

    q = torch.randn(3, 50, requires_grad=True)
    (share,) = torch.autograd.grad(sac.actor_loss(q, torch.zeros(50), alpha), q)
    smallest = F.one_hot(q.argmin(0), 3).T
    assert smallest[1].sum() > 5
    assert_close(share, -smallest / 50)  # the middle critic's too


def layernorm_elu_critic() -> None:
    critic = train_twice(sac)["critic"]
    obs, action, y = inputs_of("loss_of_critic")
    q = one_by_one(critic, obs, action, lambda h: F.elu((h - h.mean(1, True)) / deviation(h)))
    assert_close(critic(obs, action), q)
    check_gradient("loss_of_critic", 0.5 * (F.mse_loss(q[0], y) + F.mse_loss(q[1], y)))
    assert all(len(parameter) == 2 for parameter in critic.parameters())  # nothing is shared


def deviation(h: Tensor) -> Tensor:
    return (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt()


def huber_loss() -> None:
    critic = train_twice(sac)["critic"]
    obs, action, y = inputs_of("loss_of_critic")
    distance = (critic(obs, action) - y).abs()
    assert distance.min() < 1 < distance.max()
    loss = torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean(1).sum()
    assert_close(recorded["loss_of_critic"](obs, action, y)[0], loss)
    check_gradient("loss_of_critic", loss)


def fixed_alpha() -> None:
    parts = train_twice(sac)
    assert_close(parts["log_alpha"].exp().item(), 0.2)
    assert len(logged["losses/alpha"]) > 2
    np.testing.assert_allclose(logged["losses/alpha"], 0.2, rtol=1e-6)
    np.testing.assert_array_equal(logged["losses/alpha_loss"], 0)
    check_gradient("loss_of_actor_and_alpha", actor_and_alpha_loss(parts, 0.2))


def target_smoothing() -> None:
    parts = train_twice(sac)
    inputs = next_obs, noise, reward, terminated = inputs_of("bellman_target")
    mean, log_std = parts["actor"](next_obs)
    next_action = sac.squash(mean, log_std, noise)
    log_prob = sac.squashed_log_prob(noise, log_std, next_action)

    def expected(smoothing: Tensor | float) -> Tensor:
        q = parts["target"](next_obs, (next_action + smoothing).clamp(-1, 1)).min(0).values
        value = q - parts["log_alpha"].exp() * log_prob
        return (reward + 0.99 * torch.where(terminated, 0.0, value)).detach()

    torch.manual_seed(0)
    y = recorded["bellman_target"](*inputs)
    torch.manual_seed(0)
    assert_close(y, expected((0.2 * torch.randn_like(next_action)).clamp(-0.5, 0.5)))
    assert not torch.allclose(y, expected(0.0))
    assert not torch.equal(y, recorded["bellman_target"](*inputs))  # new noise at every update


def n_step() -> None:
    parts = train_twice(sac)
    next_obs, noise, reward, terminated, discount = inputs_of("bellman_target")
    powers = torch.tensor([0.99, 0.99**2, 0.99**3])
    power = (discount[:, None] - powers).abs().argmin(1)
    assert_close(discount, powers[power])
    assert (power == 2).sum() > 25
    y = recorded["bellman_target"](next_obs, noise, reward, terminated, discount)
    mean, log_std = parts["actor"](next_obs)
    next_action = sac.squash(mean, log_std, noise)
    log_prob = sac.squashed_log_prob(noise, log_std, next_action)
    q = parts["target"](next_obs, next_action).min(0).values
    assert_close(y, (reward + discount * (q - parts["log_alpha"].exp() * log_prob)).detach())

    # Against a walk through the history: 2 envs, rings that wrap, episodes that end either way.
    rng, n, gamma = np.random.default_rng(0), 3, 0.9
    buffer = ReplayBuffer(Float(torch.float64), 50, 2, 1, 1, CPU, seed=0)
    obs = np.array([[0.0], [1000.0]])
    buffer.start(obs, np.array([True, True]))
    history: dict[float, tuple] = {}  # obs -> reward, next_obs, terminated, whether it ended
    for _ in range(200):
        reward, (terminated, truncated) = rng.normal(size=2), rng.random((2, 2)) < 0.1
        buffer.add(np.zeros((2, 1)), reward, obs + 1, terminated, truncated)
        ended = terminated | truncated
        for i in range(2):
            history[obs[i, 0]] = reward[i], obs[i, 0] + 1, terminated[i], ended[i]
        obs = obs + 1
        if ended.any():
            obs = obs + ended[:, None]
            buffer.start(obs, ended)
    batch = buffer.sample(500, n, gamma)
    lengths = set()
    for i, first in enumerate(batch.obs[:, 0].tolist()):
        total, at = 0.0, first
        for k in range(n):
            reward, at, terminated, ended = history[at]
            total += gamma**k * reward
            if ended or at not in history:
                break
        lengths.add(k)
        found = batch.reward[i], batch.next_obs[i, 0], batch.terminated[i], batch.discount[i]
        np.testing.assert_allclose(found, (total, at, terminated, gamma ** (k + 1)), rtol=1e-5)
    assert lengths == {0, 1, 2}


def value_clipping() -> None:
    parts = train_twice(ppo)
    obs, action, log_prob, _, ret = inputs_of("loss")
    _, _, value = parts["actor_critic"](obs)
    old_value = value.detach() + torch.linspace(-1, 1, len(obs))  # as if V had moved that far
    ret = torch.randn(len(obs))
    clipped = torch.maximum(torch.minimum(value, old_value + 0.2), old_value - 0.2)
    errors = torch.maximum((value - ret) ** 2, (clipped - ret) ** 2)
    total, policy_loss, v_loss, *_ = recorded["loss"](obs, action, log_prob, ret - old_value, ret)
    assert_close(v_loss, errors.mean().detach())
    assert v_loss > F.mse_loss(value, ret)
    assert_close(total, policy_loss + 0.5 * v_loss)


def kl_early_stopping() -> None:
    rollouts, minibatches = 6, 2
    parts = train_twice(ppo, target_kl=0.0)
    assert parts["adam"].steps == rollouts * minibatches  # one pass over each
    parts = train(ppo, "unbounded", target_kl=1e9)
    assert parts["adam"].steps == 3 * rollouts * minibatches


def learning_rate_decay() -> None:
    parts = train_twice(ppo)
    assert_close(parts["adam"].learning_rate, 3e-4 * 50 / 300, atol=0)
    train(ppo, "logged")
    rates = [3e-4 * left / 300 for left in (300, 250, 200, 150, 100, 50)]
    assert_close(logged["charts/learning_rate"], rates, atol=0)


def stochastic_rounding() -> None:
    for script in (sac, ppo):
        train_twice(script, quant_m=1, quant_act=True)
        floats = train(script, f"{script.__name__}-float")  # no rounding, but a generator
        assert floats["result"]["storage"] == "float64"
    codec, values = FixedPoint(1, 127), np.array([0.123, -0.17, 0.01, 5.0, -126.98, 127.0, 0.0])
    stored = codec.decode(codec.encode(np.tile(values, (40_000, 1)))).double()
    # Five standard errors of what is one of two codes 0.1 apart.
    np.testing.assert_allclose(stored.mean(0), values, atol=5 * 0.05 / math.sqrt(40_000))
    assert (stored - torch.from_numpy(values)).abs().max() < 0.1 + 1e-5
    assert [len(column.unique()) for column in stored.T] == [2, 2, 2, 1, 2, 1, 1]
    edge = FixedPoint(0, 127.4).encode(np.repeat([127.4, -127.4], 1000))  # int8 has no 128
    assert edge.unique().tolist() == [-127, 127]


def normalised_observations() -> None:
    seen: list[np.ndarray] = []

    def keep_obs(self, obs, *others, add=RolloutBuffer.add):
        seen.append(obs)
        add(self, obs, *others)

    with mock.patch.object(RolloutBuffer, "add", keep_obs):
        parts = train(ppo, "seen")
    norm, seen = parts["obs_norm"], np.concatenate(seen)
    assert norm.count == 300
    np.testing.assert_allclose(norm.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.var, seen.var(0), rtol=1e-4)
    # In an update the statistics are those of its rollout, so the ratio begins with 1.
    assert parts["result"]["first_ratio_error"] < 1e-5
    assert torch.equal(
        parts["weights"]["obs_norm"]["mean"], norm.mean
    )  # evaluation changed nothing
    for obs in (seen[0], seen[-1], np.array([1e9, 0.0, 0.0])):
        normal = ((obs - norm.mean.numpy()) / np.sqrt(norm.var.numpy())).clip(-10, 10)
        mean, _, _ = parts["actor_critic"](torch.from_numpy(normal[None]).float())
        (best_action,) = acting
        with torch.no_grad():
            assert_close(best_action(obs), mean[0].clamp(-2, 2))
    assert torch.equal(train_twice(ppo)["obs_norm"].mean, norm.mean)  # restored, and moved on


def mu_law_storage() -> None:
    for script in (sac, ppo):
        parts = train_twice(script, storage="mu_law")
        assert parts["result"]["storage"] == "mu_law"
        obs = parts["buffer"].obs
        assert (obs if script is ppo else obs.array).dtype == torch.int8
    codec = make_codec(None, 127, "mu_law")
    codes = torch.arange(-127, 128, dtype=torch.int8)
    assert torch.equal(codec.encode(codec.decode(codes).numpy()), codes)
    values = np.linspace(-127, 127, 100_001)
    error = np.abs(codec.decode(codec.encode(values)).numpy() - values)
    steps = (127 / 255 + np.abs(values)) * math.log(256) / 127
    assert (error <= 0.52 * steps).all()
    assert steps.min() < 0.022 < 0.44 < steps.max()
    assert codec.decode(codec.encode(np.array([1e9, -1e9]))).tolist() == [127, -127]


def main(hack: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a loss that cannot be recorded would warn
    sac.LOG_EVERY = 50  # and compare its replays with autograd then
    with (
        mock.patch.object(sac, "Recorded", Kept),
        mock.patch.object(ppo, "Recorded", Kept),
        mock.patch.object(runs.Run, "log", keep_log),
        mock.patch.object(runs, "evaluate", keep_policy),
    ):
        globals()[hack.replace("-", "_")]()


if __name__ == "__main__":
    main(sys.argv[1])
