"""support/recording.py: replays against autograd itself, and what must not go wrong in silence."""

import collections
import contextlib
import itertools
import warnings
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import SCRIPTS
from hypothesis import given, settings
from torch import nn

from support.networks import Actor, ActorCritic, Adam, Critic, flatten
from support.recording import Recorded, StaleRecording, check_recordings
from support.tape import Tape

pytestmark = pytest.mark.filterwarnings("error")  # no loss falls back unless a test says so


def weights(*shapes: tuple[int, ...]) -> tuple[nn.Parameter, list[nn.Parameter]]:
    """A vector of random parameters, and its views of these shapes."""
    views = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    return flatten(*views), views


def assert_close(ours, theirs, rtol: float = 1e-5) -> None:
    """Equal to rtol of the largest finite entry."""
    ours, theirs = ([x] if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.dtype) == (expected.shape, expected.dtype)
        finite = expected[expected.isfinite()].double()
        scale = finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(mine, expected, rtol=rtol, atol=rtol * scale, equal_nan=True)


def assert_agrees(function, parameters, make_inputs, calls: int = 4) -> Recorded:
    """Recorded and eager give the same results, gradients and random numbers, at every call."""
    recorded, eager = Recorded(function, parameters), Recorded(function, parameters, eager=True)
    for _ in range(calls):
        inputs = make_inputs()
        before, state = [x.clone() for x in inputs], torch.get_rng_state()
        with torch.no_grad():
            ours, gradient = recorded(*inputs), parameters.grad.clone()
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            theirs, expected = eager(*inputs), parameters.grad.clone()
        assert torch.equal(after, torch.get_rng_state())
        assert all(torch.equal(x, same) for x, same in zip(inputs, before, strict=True))
        assert_close(ours, theirs)
        assert_close(gradient, expected)
        with torch.no_grad():
            parameters += 0.1 * torch.randn_like(parameters)
    check_recordings(recorded)
    return recorded


class Checked(Recorded):
    """Compares every call with autograd. For whole runs: set it in place of a script's Recorded."""

    calls: ClassVar[collections.Counter] = collections.Counter()

    @classmethod
    @contextlib.contextmanager
    def counting(cls):
        """Counts the calls that were compared, by the function's name."""
        cls.calls.clear()
        yield cls.calls

    def __call__(self, *inputs):
        state, parameters = torch.get_rng_state(), self.parameters
        results = super().__call__(*inputs)
        after, gradient = torch.get_rng_state(), None if parameters is None else parameters.grad
        torch.set_rng_state(state)
        assert_close(results, Recorded(self.function, parameters, eager=True)(*inputs))
        assert torch.equal(after, torch.get_rng_state())
        if parameters is not None:
            sizes = [view.numel() for view in parameters.views]
            assert_close(gradient.split(sizes), parameters.grad.split(sizes), rtol=2e-5)
            parameters.grad = gradient
        assert not self.eager
        self.calls[self.name] += 1
        return results


# --- Recorded and eager agree --------------------------------------------------------------------


def overwriting(x, w):
    y = (x * w).clone()
    y[:, 0] *= 2
    y[1] = 0
    return y.square().sum()


def through_a_view(x, w):
    y = x * w
    y.view(-1).mul_(2)
    return y.square().sum()


LOSSES = {
    "relu": lambda x, w: (F.relu(x * w) * x).mean(),
    "relu_": lambda x, w: (F.relu_(x * w) * x).mean(),
    "overwriting": overwriting,
    "through a view": through_a_view,
    "threshold": lambda x, w: F.threshold(x * w, 0.1, 0.0).sum(),
    "threshold at 0": lambda x, w: F.threshold(x * w, 0.0, 0.0).sum(),
    "relu at infinite slope": lambda x, w: (x * w).relu().sqrt().relu().sum(),
    "elu": lambda x, w: F.elu(x * w).sum(),
    "leaky relu": lambda x, w: F.leaky_relu(x * w).square().sum(),
    "gelu": lambda x, w: F.gelu(x * w).sum(),
    "layer norm": lambda x, w: F.layer_norm(x * w, (4,)).pow(3).sum(),
    "huber": lambda x, w: F.smooth_l1_loss(x * w, x),
    "where": lambda x, w: torch.where(x > 0, x * w, 0.0).sum(),
    "clamp": lambda x, w: (x * w).clamp(-0.3, 0.3).square().sum() + (x - w).clamp(min=0).sum(),
    "minima": lambda x, w: ((x * w).amin(0) + (x * w).min(0).values).sum() - (x * w).amax(),
    "numbers": lambda x, w: (2 / (1 + (x * w) ** 2) - (1 - x * w) / 3).sum(),
    "mixed dtypes": lambda x, w: ((x.double() * w * 3).sum() + ((x > 0) * 3 * w).sum()).float(),
    "integers": lambda x, w: ((10 * x).int() // 3 * w).sum(),
    "indices": lambda x, w: (x * w)[[0, 0, 2]].square().sum(),
    "gather": lambda x, w: (x * w).gather(1, x.argsort(1))[:, 0].sum(),
    "order": lambda x, w: (x * w).sort(1).values[:, 1:].sum() + (x * w).topk(2, 1).values.sum(),
    "spread": lambda x, w: (x * w).std(1).mean() + (x * w).var(),
    "softmax": lambda x, w: (x * w).log_softmax(1)[:, 0].mean() + (x * w).logsumexp(1).sum(),
    "views": lambda x, w: (w.T.reshape(5, 4) * x).chunk(2, 1)[1].sum() + (w.unbind(0)[2] * x).sum(),
    "constants": lambda x, w: (x * w * torch.arange(4) * torch.full((4,), 2.0)).sum(),
    "second derivative": lambda x, w: torch.autograd.grad(
        (x * w).square().sum(), w, create_graph=True
    )[0].square().sum(),
    "dropout": lambda x, w: F.dropout(x * w, 0.5).sum(),
    "noise": lambda x, w: (x * w + torch.randn_like(x) - torch.randn_like(x)).square().sum(),
    "noise without an input": lambda x, w: (x * w * torch.randn(5, 4)).square().sum(),
    "noise in place": lambda x, w: (x * w * torch.empty(5, 4).uniform_()).sum(),
    "shuffled": lambda x, w: (x * w)[torch.randperm(5)][:2].sum(),
    "no gradient": lambda x, w: 0 * w.sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_recorded_loss_agrees_with_autograd(name):
    torch.manual_seed(0)
    vector, (w,) = weights((5, 4))
    recorded = assert_agrees(lambda x: LOSSES[name](x, w), vector, lambda: [torch.randn(5, 4)])
    assert not recorded.eager and len(recorded.replays) == 1
    assert name == "no gradient" or vector.grad.abs().max() > 0


OPERATIONS = {
    "mul": lambda x, y, _: x * y,
    "add": lambda x, y, _: x + y,
    "sub": lambda x, y, _: x - 0.5 * y,
    "number": lambda x, y, _: 1.5 - x / 2,
    "relu": lambda x, y, _: x.relu(),
    "relu_": lambda x, y, _: (x + y).relu_(),
    "tanh": lambda x, y, _: x.tanh(),
    "exp": lambda x, y, _: x.clamp(-3, 3).exp(),
    "clamp": lambda x, y, _: x.clamp(-0.5, 1.0),
    "square": lambda x, y, _: x.tanh().square(),
    "amin": lambda x, y, _: x - y.amin(0),
    "min": lambda x, y, _: torch.min(x, y),
    "where": lambda x, y, _: torch.where(x > y, x, 0.0),
    "cat": lambda x, y, _: torch.cat([x, y], 1)[:, 1:4],
    "sum": lambda x, y, _: x + y.sum(0) / 4,
    "mean": lambda x, y, _: x - y.mean(),
    "matmul": lambda x, y, v: x @ v + y,
    "detach": lambda x, y, _: x * y.detach(),
}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 11), st.integers(0, 11)),
        min_size=1,
        max_size=10,
    )
)
def test_any_small_expression_agrees_with_autograd(steps):
    torch.manual_seed(0)
    vector, (w, v) = weights((4, 3), (3, 3))

    def loss(x, y):
        values = [x, y, w, x * w]
        for name, i, j in steps:
            chosen = values[i % len(values)], values[j % len(values)]
            values.append(OPERATIONS[name](*chosen, v).clamp(-50, 50))
        return values[-1].square().mean() + (v * v).sum(), *values[4:]

    with warnings.catch_warnings():  # a product that stands twice and is overwritten once
        warnings.filterwarnings("default", "loss cannot be recorded.*gives other numbers")
        assert_agrees(loss, vector, lambda: [torch.randn(4, 3), torch.randn(4, 3)], calls=3)


def test_three_critics_agree_with_autograd_to_the_last_layer():
    torch.manual_seed(0)
    critic = Critic(3, 1, 8, count=3)

    def loss(obs, action, y):
        return (critic(obs, action) - y).square().mean()

    assert_agrees(
        loss, flatten(critic), lambda: [torch.randn(16, 3), torch.randn(16, 1), torch.randn(16)]
    )
    assert all(view.abs().sum() > 0 for view in critic.parameters())


def test_results_have_their_own_shapes_and_dtypes_and_no_graph():
    vector, (w,) = weights((5, 4))

    def loss(x):
        y = x * w
        return y.mean(), y, y[0], x > 0, y.argmax(1), y.double().sum(), y.new_zeros(0)

    recorded = assert_agrees(loss, vector, lambda: [torch.randn(5, 4)])
    results = recorded(torch.randn(5, 4))
    shapes = [(), (5, 4), (4,), (5, 4), (5,), (), (0,)]
    assert [tuple(result.shape) for result in results] == shapes
    assert not any(result.requires_grad for result in results)
    kept = [result.clone() for result in results]
    recorded(torch.randn(5, 4))
    assert all(map(torch.equal, results, kept))  # a later call leaves them alone


@pytest.mark.parametrize("eager", [False, True])
def test_a_function_without_parameters_needs_no_loss(eager):
    torch.manual_seed(0)
    _, (w,) = weights((4, 2))
    recorded = Recorded(lambda x: x @ w, eager=eager)
    for rows in (3, 1, 3):
        x = torch.randn(rows, 4)
        result = recorded(x)  # one result is no tuple
        assert torch.allclose(result, x @ w) and not result.requires_grad
    module = nn.Linear(4, 2)
    assert Recorded(module, eager=eager)(torch.randn(3, 4)).shape == (3, 2)


def test_every_shape_has_a_recording_of_its_own():
    """As PPO's last minibatch, which may be smaller."""
    torch.manual_seed(0)
    vector, (w,) = weights((4,))
    rows = itertools.cycle([256, 256, 37, 1])
    recorded = assert_agrees(
        lambda x: (x * w - x.mean()).square().mean(), vector,
        lambda: [torch.randn(next(rows), 4)], calls=8,
    )  # fmt: skip
    assert [shape[0] for ((shape, *_),) in recorded.replays] == [256, 37, 1]


def test_results_of_one_function_go_into_another():
    """They are tensors of inference mode, which autograd refuses."""
    torch.manual_seed(0)
    vector, (w,) = weights((4,))
    target = Recorded(lambda x: 2 * x)
    for eager in (False, True):
        gradient = Recorded(lambda x, y: (x * w - y).square().mean(), vector, eager)
        x = torch.randn(3, 4)
        with torch.inference_mode():
            y = target(x)
            assert y.is_inference()
            gradient(x, y)
        expected = (2 / 12 * (x * w - 2 * x) * x).sum(0)
        assert_close(vector.grad, expected.detach())
        check_recordings(target, gradient)


# --- TorchScript and numpy -----------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch):
    """The lists that TorchScript runs."""
    lists, trace = [], torch.jit.trace

    def watched(*args, **kwargs):
        lists.append(trace(*args, **kwargs))
        return lists[-1]

    monkeypatch.setattr(torch.jit, "trace", watched)
    return lists


def refused(*args, **kwargs):
    raise RuntimeError("unknown to TorchScript")


@pytest.mark.parametrize(("name", "losses"), [("sac", 3), ("ppo", 2)])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_scripts_losses_run_in_torchscript_and_in_python_with_the_same_bits(
    tmp_path, monkeypatch, traced, name, losses, num_envs
):
    """SAC's target and two losses, PPO's loss for both sizes of a minibatch."""
    sizes = {"sac": {"learning_starts": 30, "buffer_size": 200}, "ppo": {"n_steps": 70}}[name]
    options = sizes | {"total_timesteps": 210, "batch_size": 16, "hidden": 8, "eval_episodes": 0}

    def weights_of_a_run() -> list[torch.Tensor]:
        module = SCRIPTS[name]
        run = {"env": "Pendulum-v1", "run_dir": str(tmp_path), "num_envs": num_envs}
        parts = module.main(module.Args(**run, **options))
        return [part.parameters for part in parts.values() if isinstance(part, Adam)]

    in_torchscript = weights_of_a_run()
    assert len(traced) == losses
    assert all(isinstance(ran, torch.jit.ScriptFunction) for ran in traced)
    monkeypatch.setattr(torch.jit, "trace", refused)
    for one, same in zip(in_torchscript, weights_of_a_run(), strict=True):
        assert torch.equal(one, same)


def test_what_torchscript_does_not_know_runs_in_python(traced):
    torch.manual_seed(0)
    vector, (w,) = weights((5, 4))
    recorded = assert_agrees(
        lambda x: LOSSES["layer norm"](x, w), vector, lambda: [torch.randn(5, 4)]
    )
    assert not traced and not recorded.eager and len(recorded.replays) == 1


@pytest.fixture
def in_numpy(monkeypatch):
    """The names of the operations that numpy runs, for each of its lists."""
    lists, replay = [], Tape._in_numpy

    def watched(tape, calls):
        lists.append([node.name for node in calls])
        return replay(tape, calls)

    monkeypatch.setattr(Tape, "_in_numpy", watched)
    return lists


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("network", [Actor, ActorCritic])
def test_acting_runs_in_numpy_and_follows_the_parameters(in_numpy, network, rows):
    torch.manual_seed(0)
    network = network(5, 2, 16)
    vector = flatten(network)

    def act(obs, noise):
        mean, log_std, *value = network(obs)
        return mean + log_std.exp() * noise, log_std.expand_as(mean), *value

    recorded = Recorded(act)
    for _ in range(3):
        inputs = torch.randn(rows, 5), torch.randn(rows, 2)
        assert_close(recorded(*inputs), [x.detach() for x in act(*inputs)])
        with torch.no_grad():
            vector += 0.1 * torch.randn_like(vector)
    assert len(in_numpy) == 1
    assert isinstance(Recorded(act)(torch.randn(2000, 5), torch.randn(2000, 2)), tuple)
    assert len(in_numpy) == 1  # torch is faster there


SHAPED = torch.linspace(-2, 2, 12).view(3, 1, 4)
IN_NUMPY_TOO = {
    "squeeze": lambda x: (x.squeeze(), x.squeeze(1), x.squeeze(0), x.squeeze((0, 1))),
    "unbind": lambda x: (*x.tanh().unbind(), *x.unbind(-1), *x.unbind(1)),
    "chunk": lambda x: (*x.tanh().chunk(2), *x.chunk(3, -1), *x.split(3, 2)),
    "clamp": lambda x: (x.clamp(-1, 1), x.clamp(min=0), x.clamp(max=0), x.clamp(0.5 * x, x * x)),
    "expand": lambda x: (x.expand(2, 3, 5, 4), x.expand(-1, 2, -1)),
    "overflow": lambda x: ((100 * x).exp(), (100 * x).exp() * 0, 3e38 * x),
}


@pytest.mark.parametrize("name", IN_NUMPY_TOO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32])
def test_numpy_gives_torchs_shapes_and_dtypes(in_numpy, name, dtype):
    function, x = IN_NUMPY_TOO[name], SHAPED.to(dtype)
    recorded = Recorded(lambda x: tuple(torch.relu(y) * 2 for y in function(x)))
    assert_close(recorded(x), [torch.relu(y) * 2 for y in function(x)])
    assert not recorded.eager and len(in_numpy) == (dtype == torch.float32)
    scale = torch.tensor(2.0, dtype=torch.float64)  # alone it makes no result float64
    assert Recorded(lambda x: x * scale)(x).dtype == (x * scale).dtype


SHARED = torch.linspace(0.1, 1, 12).view(3, 4)
READ_AGAIN = {  # each would be wrong if the second line wrote where the first one's result lies
    "an input": lambda x: (x.relu(), x.exp(), x),
    "a parameter's view": lambda x: ((SHARED[0] * x).exp(), SHARED[0].exp(), SHARED * x),
    "a result": lambda x: (y := x * 2, y.relu()),
    "by a later operation": lambda x: (y := x * 2, y.exp() + y)[1],
    "through a view": lambda x: (y := x * 2, y[1], y.tanh() * y[1])[2],
    "by way of a view": lambda x: (y := x * 2, y.view(4, 3).exp().view(3, 4) - y)[1],
    "wider": lambda x: (x[:1] * 2) * x,
    "twice at once": lambda x: (x * 2).exp() * (x * 2).exp(),
    "of another dtype": lambda x: (x * 2).int() * 1.5 + (x > 0),
    "the second": lambda x: (x - 1) - (x * 2).relu(),
}


@pytest.mark.parametrize("name", READ_AGAIN)
def test_nothing_that_is_read_again_is_overwritten(name):
    function = READ_AGAIN[name]
    x, shared = torch.randn(3, 4, dtype=torch.float64), SHARED.clone()
    recorded = Recorded(function)
    for _ in range(4):  # TorchScript changes its mind in the first calls
        before = x.clone()
        results, expected = recorded(x), function(x)
        assert_close(results, expected)
        assert torch.equal(x, before) and torch.equal(SHARED, shared)
    assert not recorded.eager


def test_an_intermediate_result_is_overwritten_where_it_is_not_read_again(monkeypatch):
    codes, compiled = [], Tape._compile
    monkeypatch.setattr(Tape, "_compile", lambda t: codes.append(str(t.graph)) or compiled(t))
    x = torch.randn(3, 4, dtype=torch.float64)
    Recorded(lambda x: (x @ x.mT).relu() + 1)(x)
    assert "relu_" in codes[0] and "add_" in codes[0]


# --- What changes between calls ------------------------------------------------------------------


def test_tensors_that_are_changed_in_place_are_followed():
    vector, (w,) = weights((3,))
    scale, views = torch.tensor(1.0), torch.arange(6.0).view(2, 3)
    recorded = Recorded(lambda x: (x * w * scale * views[1]).sum(), vector)
    x = torch.ones(3)
    for factor in (1.0, 5.0, -2.0):
        scale.fill_(factor)
        views[1] = torch.tensor([1.0, 2.0, factor])
        recorded(x)
        assert vector.grad.tolist() == [factor, 2 * factor, factor**2]
    check_recordings(recorded)


def test_parameters_are_followed_through_adam_and_load_state_dict():
    torch.manual_seed(0)
    network, other = nn.Linear(3, 1), nn.Linear(3, 1)
    vector = flatten(network)
    recorded = Recorded(lambda x: network(x).square().mean(), vector)
    adam, x = Adam(vector, 0.1), torch.randn(5, 3)
    losses = [recorded(x).item()]
    adam.step()
    losses.append(recorded(x).item())
    network.load_state_dict(other.state_dict())
    losses.append(recorded(x).item())
    assert losses[1] < losses[0] and len({*losses}) == 3
    assert losses[2] == pytest.approx(other(x).square().mean().item())


def test_a_product_of_which_views_are_read_again_is_not_overwritten():
    torch.manual_seed(0)
    vector, (w, b) = weights((3, 5), (5,))
    with torch.no_grad():
        b.zero_()  # so that nothing differs while recording

    def both_ways(x):
        one = (x.view(4, 2, 3) @ w + b).square().sum()
        return one + (x.view(4, 2, 3).flatten(0, 1) @ w).abs().sum()

    recorded, x = Recorded(both_ways, vector), torch.randn(8, 3)
    recorded(x)
    with torch.no_grad():
        b.fill_(0.5)
    assert_close(recorded(x), both_ways(x).detach())
    check_recordings(recorded)


def test_other_strides_and_an_input_that_requires_grad_are_other_recordings():
    recorded = Recorded(lambda x: x.reshape(-1) * 2)
    for x in (torch.randn(3, 4), torch.randn(4, 3).T, nn.Parameter(torch.randn(3, 4))):
        for _ in range(2):
            assert_close(recorded(x), x.detach().reshape(-1) * 2)
    assert not recorded.eager


def test_a_number_that_changes_in_step_with_the_log_is_found_in_the_first_calls():
    vector, (w,) = weights((3,))
    step = 0

    def my_loss(x):
        return ((1.0 if step % 2 else 0.5) * x * w).sum()

    recorded = Recorded(my_loss, vector)
    recorded(torch.ones(3))
    step = 1
    with pytest.raises(StaleRecording):
        recorded(torch.ones(3))


@pytest.mark.parametrize("what", ["modules", "vector", "both", "one of two", "replaced"])
def test_gradients_reach_torchs_optimiser_after_a_zero_grad(what):
    torch.manual_seed(0)
    network, other = nn.Linear(3, 1), nn.Linear(3, 1)
    vector = flatten(network, other)
    recorded = Recorded(lambda x: (network(x) + other(x)).square().mean(), vector)
    optimizer, x = torch.optim.SGD(vector.views, 0.05), torch.randn(5, 3)
    losses = []
    for _ in range(4):
        if what in ("modules", "both"):
            optimizer.zero_grad()
        if what in ("vector", "both"):
            vector.grad = None
        if what == "one of two":
            other.zero_grad()
        if what == "replaced":
            vector.grad = vector.grad.clone()
        with torch.inference_mode():
            losses.append(recorded(x).item())
        torch.testing.assert_close(vector.grad[:3].view(1, 3), network.weight.grad)
        torch.testing.assert_close(vector.grad[-1:], other.bias.grad)
        optimizer.step()
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]


@pytest.mark.parametrize("size", [1, 1e-3])
def test_the_last_digits_of_saturated_actions_stop_no_run(size):
    """Where log(1 - a^2) makes percents of them, and a mean of such terms is near 0."""
    torch.manual_seed(0)
    actor, log_alpha = nn.Linear(376, 34), nn.Parameter(torch.zeros(()))
    with torch.no_grad():
        actor.weight *= 10
    vector = flatten(actor, log_alpha)

    def log_prob(obs):
        return torch.log(1 - torch.tanh(actor(obs)) ** 2 + 1e-6).sum(-1)

    def my_loss(obs, level):
        return -(log_alpha * (log_prob(obs) - level).detach()).mean() + size * log_prob(obs).mean()

    recorded = Recorded(my_loss, vector)
    with torch.no_grad():
        for _ in range(30):
            obs = torch.randn(256, 376)
            recorded(obs, log_prob(obs).mean())  # so that log_alpha's gradient is nearly 0
            check_recordings(recorded)
    assert not recorded.eager


@pytest.mark.parametrize("part", [0, 1, 2, 3])  # weight and bias of either layer
@pytest.mark.parametrize("factor", [0, -1, 1.5, float("nan")])
def test_a_fast_replay_that_loses_a_layer_is_found_beside_a_large_gradient(part, factor):
    """As that of SAC's log_alpha, beside which all of the actor's is small."""
    network, scale = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), weights((1,))[1][0]

    def my_loss(x):
        return network(x).square().mean() + 10 * scale.sum()

    recorded = Recorded(my_loss, flatten(network, scale))
    recorded(torch.randn(16, 3))
    check_recordings(recorded)
    ((key, (fast, plain)),) = recorded.replays.items()

    def broken(*inputs):
        results = [*fast(*inputs)]
        results[1 + part] = results[1 + part] * factor
        return tuple(results)

    recorded.replays[key] = broken, plain
    with pytest.raises(StaleRecording):
        check_recordings(recorded)


@pytest.mark.parametrize("calls", [1, 2, 10])
def test_a_python_number_that_changes_stops_the_run_at_the_next_check(calls):
    vector, (w,) = weights((3,))
    settings_of_run = {"gamma": 0.5}

    def my_loss(x):
        return (settings_of_run["gamma"] * x * w).sum()

    recorded, eager = Recorded(my_loss, vector), Recorded(my_loss, vector, eager=True)
    x = torch.ones(3)
    for _ in range(calls):
        recorded(x), eager(x)
    check_recordings(recorded, eager)
    settings_of_run["gamma"] = 0.9
    if calls < 3:
        with pytest.raises(StaleRecording):
            recorded(x)
        return
    recorded(x)
    assert vector.grad.tolist() == [0.5] * 3
    eager(x)
    assert vector.grad == pytest.approx([0.9] * 3)
    check_recordings(eager, Recorded(my_loss, vector))  # nothing was recorded: nothing is stale
    with pytest.raises(StaleRecording, match=r"my_loss .* Python number .* input, or use --eager"):
        check_recordings(eager, recorded)


def test_a_check_changes_neither_gradients_nor_random_numbers():
    torch.manual_seed(0)
    vector, (w,) = weights((3,))
    recorded = Recorded(lambda x: (x * w + torch.randn(3)).square().sum(), vector)
    recorded(torch.ones(3))
    before, state = vector.grad.clone(), torch.get_rng_state()
    check_recordings(recorded)
    assert torch.equal(vector.grad, before) and torch.equal(torch.get_rng_state(), state)


def test_random_numbers_are_fresh_at_every_replay_and_those_of_eager():
    def sample(x):
        return x + torch.randn_like(x), torch.rand(2)

    streams = []
    for eager in (False, True):
        torch.manual_seed(7)
        drawn, x = Recorded(sample, eager=eager), torch.zeros(3)
        streams.append(torch.cat([part for _ in range(4) for part in drawn(x)]))
    assert torch.equal(*streams)
    assert len(streams[0].unique()) == 4 * 5


# --- What cannot be recorded ---------------------------------------------------------------------


def test_a_loss_that_branches_falls_back_with_one_warning():
    torch.manual_seed(0)
    vector, (w,) = weights((4,))

    def branching(x):
        noisy = x * w + torch.randn(4)
        return noisy.sum() if x.sum() > 0 else (3 * noisy).square().sum()

    recorded, eager = Recorded(branching, vector), Recorded(branching, vector, eager=True)
    signs = set()
    with pytest.warns(
        UserWarning, match="^branching cannot be recorded.* value of a tensor"
    ) as caught:
        for rows in (2, 2, 3, 5, 5, 5):
            x, state = torch.randn(rows, 4), torch.get_rng_state()
            signs.add((x.sum() > 0).item())
            ours, gradient = recorded(x), vector.grad.clone()
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            assert torch.equal(ours, eager(x)) and torch.equal(gradient, vector.grad)
            assert torch.equal(after, torch.get_rng_state())
    assert len(caught) == 1 and signs == {True, False}
    assert caught[0].filename == __file__  # where it is called
    check_recordings(recorded)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: (x * w)[x > 0].mean(), "size of a result depends on"),
        (lambda x, w: (x * w).sum() * x[0, 0].item(), "uses the value of a tensor"),
        (lambda x, w: (x * w).sum() * len(x.unique()), "size of a result depends on"),
        (lambda x, w: (x * w + torch.from_numpy(x.numpy())).square().sum(), r"values .*numpy"),
        (lambda x, w: (x * w).sum() * sum(x[0].tolist()), r"values .*tolist"),
        (lambda x, w: torch.nn.BatchNorm1d(4)(x * w).square().sum(), "changes a tensor in place"),
    ],
)
def test_what_a_tape_cannot_hold_falls_back_too(function, reason):
    torch.manual_seed(0)
    vector, (w,) = weights((5, 4))
    with pytest.warns(UserWarning, match=reason) as caught:
        recorded = assert_agrees(lambda x: function(x, w), vector, lambda: [torch.randn(5, 4)])
    assert len(caught) == 1 and recorded.eager


@pytest.mark.parametrize("shape", [(1, 4), ()])
def test_a_single_row_cannot_hide_what_the_tape_froze(shape):
    """As when SAC or PPO act in one environment."""
    with pytest.warns(UserWarning, match="values of a tensor"):
        recorded = Recorded(lambda x: x + torch.from_numpy(x.numpy().copy()))
        recorded(torch.ones(shape))
    assert torch.equal(recorded(torch.full(shape, 3.0)), torch.full(shape, 6.0))


def clamped_twice(x, w):
    error = x * w - 1
    return (error + (x * w - 1).clamp_(-1, 1)).square().sum()


def weighted(x, w):
    weight = torch.ones_like(x)
    weight[x > 2] = 2
    return (weight * x * w).sum() + torch.zeros_like(x).add_(x).mul(w).sum()


@pytest.mark.parametrize("function", [clamped_twice, weighted])
def test_what_is_overwritten_is_neither_merged_nor_kept(function):
    """The first inputs overwrite nothing with another value, so that only later ones can tell."""
    vector, (w,) = weights((3,))
    recorded, reference = Recorded(lambda x: function(x, w), vector), torch.ones(3)
    for scale in (0.1, 5.0, 0.1):
        x = scale * torch.ones(3)
        loss, gradient = recorded(x), vector.grad.clone()
        reference = w.detach().clone().requires_grad_()
        function(x, reference).backward()
        assert_close(loss, function(x, w).detach())
        assert_close(gradient, reference.grad)
    assert not recorded.eager


def test_a_value_near_0_is_no_stale_recording():
    """It may be a difference of large numbers, which numpy rounds otherwise than torch."""
    torch.manual_seed(0)
    network = ActorCritic(17, 6, 64)
    act = Recorded(lambda obs: network(obs)[2])
    with torch.inference_mode():
        for _ in range(2000):
            act(torch.randn(1, 17))
            check_recordings(act)
    assert not act.eager


def test_parameters_that_leave_their_vector_are_noticed():
    network = torch.nn.Linear(3, 1)
    vector = flatten(network)
    recorded = Recorded(lambda x: network(x).sum(), vector)
    recorded(torch.ones(1, 3))
    check_recordings(recorded)
    network.weight.data = network.weight.data + 1
    with pytest.raises(StaleRecording, match="have left the vector"):
        check_recordings(recorded)


def test_every_shape_is_checked():
    vector, (w,) = weights((3,))
    factor = 1.0
    recorded = Recorded(lambda x: (factor * x * w).sum(), vector)
    for _ in range(3):
        recorded(torch.ones(2, 3))
    factor = 2.0
    recorded(torch.ones(1, 3))
    with pytest.raises(StaleRecording):
        check_recordings(recorded)


def test_torchs_own_optimisers_and_clipping_find_the_gradient():
    network = torch.nn.Linear(3, 1)
    vector = flatten(network)
    gradient = Recorded(lambda x: network(x).square().sum(), vector)
    optimizer, before = torch.optim.SGD(network.parameters(), 0.1), vector.detach().clone()
    gradient(torch.ones(1, 3))
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
    assert norm > 0.5 and vector.grad.norm() <= 0.5
    optimizer.step()
    assert_close(vector.detach(), before - 0.1 * vector.grad)


def test_a_number_passed_in_as_a_tensor_may_change():
    vector, (w,) = weights((3,))
    recorded = Recorded(lambda x, scale: (scale * x * w).sum(), vector)
    for scale in (1.0, 2.0):
        recorded(torch.ones(3), torch.tensor(scale))
        assert vector.grad.tolist() == [scale] * 3
    check_recordings(recorded)


def test_an_error_of_the_function_itself_is_raised_as_it_is():
    vector, (w,) = weights((3,))
    with pytest.raises(RuntimeError, match="size of tensor"):
        Recorded(lambda x: (x * w).sum(), vector)(torch.ones(4))
    with pytest.raises(ZeroDivisionError):
        Recorded(lambda x: x / (1 // 0), vector)(torch.ones(4))


def test_eager_records_nothing(monkeypatch):
    monkeypatch.setattr(Recorded, "_record", None)
    vector, (w,) = weights((3,))
    seen = []
    eager = Recorded(lambda x: seen.append(x.tolist()) or (x * w).sum(), vector, eager=True)
    for value in (1.0, 2.0):
        eager(torch.full((3,), value))
        assert vector.grad.tolist() == [value] * 3
    assert seen == [[1.0] * 3, [2.0] * 3] and not eager.replays
    check_recordings(eager)


# --- What is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("loss", "x", "says"),
    [
        (lambda x, w: (x * w).sum(), torch.nan, "is nan"),
        (lambda x, w: (x * w.abs()).sum(), torch.inf, "is inf"),
        (lambda x, w: (x * w).sum(), 1e30, r"norm of its gradient"),  # its square overflows
        (lambda x, w: (w - w + x - x).sqrt().sum(), 1.0, r"norm of its gradient nan"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_adams_step(loss, x, says, eager):
    vector, (w,) = weights((3,))

    def my_loss(x):
        return loss(x, w)

    recorded, adam = Recorded(my_loss, vector, eager), Adam(vector, 0.1)
    before = vector.detach().clone()
    with pytest.raises(FloatingPointError, match=f"my_loss .*{says}"):
        recorded(torch.full((3,), x))
        adam.step()
    assert torch.equal(vector, before) and torch.equal(w, before)


def test_a_result_beside_the_loss_may_be_infinite():
    vector, (w,) = weights((3,))
    _, infinite = Recorded(lambda x: ((x * w).sum(), x / 0), vector)(torch.ones(3))
    assert infinite.isinf().all()
