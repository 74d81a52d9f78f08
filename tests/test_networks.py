"""support/networks.py against plain nn.Linear layers, and torch.optim.Adam over single tensors."""

import copy
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from support.networks import (
    LOG_STD_MAX,
    LOG_STD_MIN,
    Actor,
    ActorCritic,
    Adam,
    Critic,
    ParallelLinear,
    flatten,
    set_threads,
)

ROOT = Path(__file__).parent.parent


def separate(network: Critic | ActorCritic) -> list[nn.Sequential]:
    """The critics, or policy and value function, as plain networks with the same weights."""
    if isinstance(network, Critic):
        heads, activation = [network.last] * len(network.first.weight), nn.ReLU
    else:
        heads, activation = [network.mean, network.value], nn.Tanh
    networks = []
    for i, head in enumerate(heads):
        plain = nn.Sequential()
        for layer in (network.first, network.second, head):
            weight, bias = layer.weight, layer.bias
            if isinstance(layer, ParallelLinear):
                weight, bias = weight[i].T, bias[i, 0]
            linear = nn.utils.skip_init(nn.Linear, *weight.T.shape)
            linear.weight.data.copy_(weight)
            linear.bias.data.copy_(bias)
            plain.extend([linear, activation()])
        networks.append(plain[:-1])
    return networks


# --- The networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(
    ("count", "obs_dim", "act_dim", "hidden"),
    [(2, 17, 6, 64), (2, 3, 1, 8), (1, 3, 2, 8), (3, 5, 2, 16), (2, 1, 1, 1)],
)
def test_critics_equal_separate_networks(count, obs_dim, act_dim, hidden, rows):
    torch.manual_seed(0)
    critic = Critic(obs_dim, act_dim, hidden, count)
    plain = separate(critic)
    obs, action = torch.randn(rows, obs_dim), torch.randn(rows, act_dim).requires_grad_()
    q = critic(obs, action)
    expected = torch.stack([net(torch.cat([obs, action], 1))[:, 0] for net in plain])
    assert q.shape == (count, rows)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)

    weighting = torch.randn(count, rows)
    by_action, *ours = torch.autograd.grad((q * weighting).sum(), [action, *critic.parameters()])
    parameters = [parameter for net in plain for parameter in net.parameters()]
    one_by_one = torch.autograd.grad((expected * weighting).sum(), [action, *parameters])
    torch.testing.assert_close(by_action, one_by_one[0], rtol=1e-4, atol=1e-5)
    for i in range(count):
        for mine, theirs in zip(ours, one_by_one[1 + 6 * i : 7 + 6 * i], strict=True):
            theirs = theirs.T if theirs.ndim == 2 else theirs[None]
            torch.testing.assert_close(mine[i], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_inputs_side_by_side_count_as_one(count, outputs):
    torch.manual_seed(0)
    layer = ParallelLinear(count, 5, outputs)
    x = torch.randn(count, 6, 5)
    expected = torch.bmm(x, layer.weight) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[..., :2], x[..., 2:]), expected)
    torch.testing.assert_close(layer(x[:1, :, :2], x[:1, :, 2:])[0], expected[0])


def test_the_actor_gives_a_mean_and_a_clamped_log_std():
    torch.manual_seed(0)
    actor, obs = Actor(5, 3, 16), torch.randn(200, 5) * 300
    raw_mean, raw_log_std = actor.layers(obs).chunk(2, 1)
    mean, log_std = actor(obs)
    assert mean.shape == log_std.shape == (200, 3)
    assert torch.equal(mean, raw_mean)
    assert (raw_log_std > LOG_STD_MAX).any() and (raw_log_std < LOG_STD_MIN).any()
    assert torch.equal(log_std, raw_log_std.clamp(-20, 2))
    kinds = [type(part) for part in actor.layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("make", [lambda: Critic(100, 4, 64), lambda: Actor(100, 4, 64)])
def test_sacs_networks_start_like_torchs_linear(make):
    torch.manual_seed(0)
    for layer in make().modules():
        if isinstance(layer, ParallelLinear | nn.Linear):
            weight, bias = layer.weight, layer.bias
            bound = (weight.shape[1] if isinstance(layer, nn.Linear) else weight.shape[-2]) ** -0.5
            for tensor in (weight, bias):
                assert tensor.abs().max() <= bound
                if tensor.numel() > 1000:  # the standard deviation of a uniform distribution
                    assert tensor.abs().max() > 0.95 * bound
                    assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            if isinstance(layer, ParallelLinear):
                assert not torch.equal(weight[0], weight[1]) and not torch.equal(bias[0], bias[1])


@pytest.mark.parametrize("rows", [1, 7])
def test_policy_and_value_function_equal_separate_networks(rows):
    """And neither's loss has a gradient for the other, nor the mean's for log_std."""
    torch.manual_seed(0)
    network, obs = ActorCritic(5, 3, 16), torch.randn(rows, 5)
    policy, value_function = separate(network)
    mean, log_std, value = network(obs)
    assert mean.shape == (rows, 3) and log_std is network.log_std and value.shape == (rows,)
    torch.testing.assert_close(mean, policy(obs))
    torch.testing.assert_close(value, value_function(obs)[:, 0])
    mean.sum().backward(retain_graph=True)
    assert network.log_std.grad is None and network.value.weight.grad is None
    for layer in (network.first, network.second):
        assert layer.weight.grad[0].any() and not layer.weight.grad[1].any()
    network.zero_grad()
    value.sum().backward()
    assert network.log_std.grad is None and network.mean.weight.grad is None
    for layer in (network.first, network.second):
        assert layer.weight.grad[1].any() and not layer.weight.grad[0].any()


def test_ppos_networks_start_orthogonal_with_sb3s_gains():
    torch.manual_seed(0)
    network = ActorCritic(20, 6, 64)
    for plain, last_gain in zip(separate(network), (0.01, 1.0), strict=True):
        for linear, gain in zip(plain[::2], (2**0.5, 2**0.5, last_gain), strict=True):
            weight = linear.weight.detach()
            gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-5, rtol=0)
            assert not linear.bias.any()
    for layer in (network.first, network.second):
        assert not torch.equal(layer.weight[0], layer.weight[1])
    assert network.log_std.tolist() == [0.0] * 6


# --- One vector ----------------------------------------------------------------------------------


def test_flatten_keeps_the_values_and_makes_views_of_one_vector():
    torch.manual_seed(0)
    actor, log_alpha = Actor(3, 2, 8), nn.Parameter(torch.tensor(0.7))
    views = [*actor.parameters(), log_alpha]
    before = [view.detach().clone() for view in views]
    vector = flatten(actor, log_alpha)
    assert isinstance(vector, nn.Parameter) and vector.ndim == 1
    for view, same in zip(views, before, strict=True):
        assert view.shape == same.shape and torch.equal(view, same)
    assert all(view is listed for view, listed in zip(views, vector.views, strict=True))
    assert torch.equal(vector, torch.cat([same.flatten() for same in before]))
    with torch.no_grad():
        vector += 1
        assert all(torch.equal(view, same + 1) for view, same in zip(views, before, strict=True))
        log_alpha.fill_(7.0)
        assert vector[-1] == 7
    assert [*actor.parameters()] == views[:-1] and not actor.layers[0].weight.grad


def test_views_follow_load_state_dict_and_steps_of_adam():
    torch.manual_seed(0)
    critic = Critic(3, 1, 8)
    vector, other = flatten(critic), Critic(3, 1, 8)
    critic.load_state_dict(other.state_dict())
    theirs = torch.cat([p.detach().flatten() for p in other.parameters()])
    assert torch.equal(vector, theirs)
    vector.grad = torch.ones_like(vector)
    Adam(vector, 0.1).step()
    moved = torch.cat([p.detach().flatten() for p in critic.parameters()])
    assert torch.equal(moved, vector)
    torch.testing.assert_close(moved, theirs - 0.1)


def test_a_copy_made_before_or_after_flatten_has_memory_of_its_own():
    """As sac.py makes its target networks."""
    critic = Critic(3, 1, 8)
    early = copy.deepcopy(critic)
    vector = flatten(critic)
    late = copy.deepcopy(critic)
    targets = [flatten(early), flatten(late)]
    before = vector.detach().clone()
    with torch.no_grad():
        vector += 1
    for target in targets:
        assert torch.equal(target, before)


# --- Adam ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [{}, {"eps": 1e-5}], ids=["default", "1e-5"])
def test_adam_over_the_vector_equals_torchs_over_every_tensor(eps):
    torch.manual_seed(0)
    network, critic = ActorCritic(5, 2, 8), Critic(5, 2, 8)
    parameters = itertools.chain(network.parameters(), critic.parameters())
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    vector = flatten(network, critic)
    adam, plain = Adam(vector, 0.01, **eps), torch.optim.Adam(theirs, 0.01, **eps)
    for step in range(20):
        if step == 10:
            adam.learning_rate = plain.param_groups[0]["lr"] = 0.003
        gradients = [torch.randn_like(p) * 10.0 ** torch.randint(-9, 4, p.shape) for p in theirs]
        vector.grad = torch.cat([gradient.flatten() for gradient in gradients])
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        plain.step()
    for mine, expected in zip(vector.views, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    for moment, name in ((adam.mean, "exp_avg"), (adam.square, "exp_avg_sq")):
        expected = torch.cat([plain.state[other][name].flatten() for other in theirs])
        torch.testing.assert_close(moment, expected, rtol=1e-5, atol=0)


finite = st.sampled_from([0.0, 1e-9, 1e-6]) | st.floats(-1e6, 1e6, allow_subnormal=False)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    gradients=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=12),
    learning_rate=st.sampled_from([0.0, 3e-4, 1.0]),
    eps=st.sampled_from([1e-8, 1e-5, 1.0]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.9)]),
)
def test_adam_equals_torchs_for_any_gradients(gradients, learning_rate, eps, betas):
    start = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    adam = Adam(ours, learning_rate, eps)
    plain = torch.optim.Adam([theirs], lr=learning_rate, eps=eps, betas=betas)
    for gradient in gradients:
        ours.grad = theirs.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step(*betas)
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_adam_goes_on_from_what_it_saved():
    torch.manual_seed(0)
    vectors = [nn.Parameter(torch.randn(10)) for _ in range(2)]
    adams = [Adam(vectors[0], 0.01), Adam(vectors[1], 0.5)]
    for step in range(6):
        if step == 3:
            adams[1].load_state_dict(copy.deepcopy(adams[0].state_dict()))
            vectors[1].data.copy_(vectors[0])
        for adam in adams[: 1 + (step >= 3)]:
            adam.parameters.grad = torch.arange(10.0) - step
            adam.step()
    assert torch.equal(*vectors)
    for name in ("mean", "square", "steps", "learning_rate"):
        one, other = (getattr(adam, name) for adam in adams)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_adam_refuses_what_other_networks_saved():
    saved = Adam(nn.Parameter(torch.zeros(10)), 0.1).state_dict()
    with pytest.raises(RuntimeError, match="size"):
        Adam(nn.Parameter(torch.zeros(1001)), 0.1).load_state_dict(saved)


# --- Threads -------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch_size", "inputs", "hidden", "threads"),
    [
        (256, 23, 64, 1),  # SAC on Walker2d-v3
        (256, 119, 64, 1),  # Ant-v3
        (256, 393, 64, 2),  # Humanoid-v3
        (256, 23, 256, 2),
        (64, 376, 64, 1),  # PPO on Humanoid-v3
    ],
)
def test_small_networks_take_one_thread(two_threads, batch_size, inputs, hidden, threads):
    set_threads(batch_size, inputs, hidden)
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL")
def test_mkl_sets_itself_up_on_one_thread():
    """As two threads at once may do it differently; both kinds of product that networks have."""
    code = "from support.networks import set_threads; set_threads(256, 376, 256)"
    code += "; import torch; print(torch.get_num_threads())"
    variables = {"MKL_VERBOSE": "1", "OMP_NUM_THREADS": "2"}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=os.environ | variables, **options).stdout
    products = re.findall(r"MKL_VERBOSE (S\w+)\(.*NThr:(\d+)", said)
    assert products == [("SGEMM", "1"), ("SGEMM_BATCH", "1")]
    assert said.splitlines()[-1] == "2"  # it has its threads back
