"""networks.py against nn.Sequential under autograd, torch.bmm and torch.optim.Adam."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from networks import MLP, Adam, bmm, flatten, set_threads

LAYERS = {"relu": nn.ReLU, "tanh": nn.Tanh}
activations = pytest.mark.parametrize("activation", LAYERS)
shapes = pytest.mark.parametrize(
    ("count", "rows", "inputs", "hidden", "outputs"),
    [
        (1, 7, 5, 8, 3),  # SAC's actor, PPO's policy
        (1, 7, 5, 8, 1),  # PPO's value function
        (2, 7, 5, 8, 1),  # SAC's critics
        (2, 7, 5, 8, 4),
        (1, 1, 5, 8, 3),  # a minibatch of one
        (2, 1, 5, 8, 1),
        (1, 6, 1, 1, 1),
        (2, 6, 1, 1, 2),
        (2, 256, 23, 64, 1),  # as trained
    ],
)


def random_mlp(count, inputs, hidden, outputs, activation, dtype=torch.float64) -> MLP:
    """Weights and biases of about 1. One unit of every hidden layer is 0 for any input."""
    torch.manual_seed(count + inputs + hidden + outputs)
    layers = []
    for n, m in ((inputs, hidden), (hidden, hidden), (hidden, outputs)):
        weight = torch.randn(count, n, m, dtype=dtype) / n**0.5
        bias = torch.randn(count, 1, m, dtype=dtype)
        if m == hidden > 1:  # relu has no derivative there; torch takes 0
            weight[..., 0], bias[..., 0] = 0, 0
        layers.append((weight, bias))
    return MLP(layers, activation)


def separate(mlp: MLP, activation: str) -> list[nn.Sequential]:
    """The same networks, one by one, for autograd."""
    nets, layers = [], list(zip(mlp.tensors[::2], mlp.tensors[1::2], strict=True))
    for i in range(len(mlp.layers[0][0])):
        net = nn.Sequential()
        for weight, bias in layers:
            linear = nn.Linear(*weight.shape[1:], dtype=weight.dtype)
            linear.weight.data.copy_(weight[i].T)
            linear.bias.data.copy_(bias[i, 0])
            net.extend([linear, LAYERS[activation]()])
        nets.append(net[:-1])
    return nets


def assert_gradients(mlp: MLP, nets: list[nn.Sequential]) -> None:
    """.grad of every network's weights and biases is what autograd left in the separate ones."""
    for i, net in enumerate(nets):
        theirs = [p.grad for p in net.parameters()]
        for ours, expected in zip(mlp.tensors, theirs, strict=True):
            expected = expected.T if expected.ndim == 2 else expected[None]
            torch.testing.assert_close(ours.grad[i], expected, rtol=1e-12, atol=1e-13)


# --- MLP -----------------------------------------------------------------------------------------


@activations
@shapes
def test_forward_equals_separate_networks(count, rows, inputs, hidden, outputs, activation):
    mlp = random_mlp(count, inputs, hidden, outputs, activation)
    x = torch.randn(rows, inputs, dtype=torch.float64)
    before = x.clone()
    out, _ = mlp.forward(x)
    expected = torch.stack([net(x) for net in separate(mlp, activation)]).detach()
    assert out.shape == (count, rows, outputs)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(x, before)  # the activations work in place, but on their own


@activations
@shapes
def test_backward_equals_autograd(count, rows, inputs, hidden, outputs, activation):
    mlp = random_mlp(count, inputs, hidden, outputs, activation)
    nets = separate(mlp, activation)
    Adam(mlp.tensors, learning_rate=0.0).gradient.fill_(torch.nan)  # replaced, not added to
    for _ in range(2):
        x = torch.randn(rows, inputs, dtype=torch.float64)
        gradient = torch.randn(count, rows, outputs, dtype=torch.float64)
        _, tape = mlp.forward(x)
        mlp.backward(tape, gradient)
        for net, one in zip(nets, gradient, strict=True):
            net.zero_grad()
            net(x).backward(one)
        assert_gradients(mlp, nets)


@activations
@shapes
def test_input_gradient_equals_autograd(count, rows, inputs, hidden, outputs, activation):
    mlp = random_mlp(count, inputs, hidden, outputs, activation)
    before = Adam(mlp.tensors, learning_rate=0.0).gradient
    x = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(count, rows, outputs, dtype=torch.float64)
    nets = separate(mlp, activation)
    loss = sum((net(x) * one).sum() for net, one in zip(nets, gradient, strict=True))
    (expected,) = torch.autograd.grad(loss, x)
    _, tape = mlp.forward(x.detach())
    for start in {0, inputs // 2, inputs - 1}:
        ours = mlp.input_gradient(tape, gradient, start)
        torch.testing.assert_close(ours, expected[:, start:], rtol=1e-12, atol=1e-13)
    assert not before.any()  # the weights' gradients are left alone


@activations
def test_a_tape_of_some_rows_is_enough_for_their_gradient(activation):
    """SAC's actor sees s and s' in one pass and learns from s alone."""
    mlp, half = random_mlp(1, 5, 8, 4, activation), slice(3)
    Adam(mlp.tensors, learning_rate=0.0)
    x = torch.randn(6, 5, dtype=torch.float64)
    gradient = torch.randn(1, 3, 4, dtype=torch.float64)
    _, tape = mlp.forward(x)
    mlp.backward(tuple(layer[:, half] for layer in tape), gradient)
    nets = separate(mlp, activation)
    nets[0](x[half]).backward(gradient[0])
    assert_gradients(mlp, nets)


@activations
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("count", "outputs"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_in_numpy_equals_forward(rows, count, outputs, activation):
    mlp = random_mlp(count, 17, 64, outputs, activation, torch.float32)
    x = torch.randn(rows, 17)
    given_x = x.numpy().copy()
    out = mlp.in_numpy()(given_x)
    assert out.dtype == np.float32 and out.shape == (count, rows, outputs)
    np.testing.assert_allclose(out, mlp.forward(x)[0], rtol=1e-6, atol=1e-6)
    assert (given_x == x.numpy()).all()


@activations
def test_in_numpy_sees_later_steps(activation):
    mlp, x = random_mlp(2, 3, 8, 2, activation, torch.float32), torch.randn(4, 3)
    adam = Adam(mlp.tensors, learning_rate=0.1)
    function = mlp.in_numpy()
    before = function(x.numpy())
    adam.gradient.normal_()
    adam.step()
    after = function(x.numpy())
    np.testing.assert_allclose(after, mlp.forward(x)[0], rtol=1e-5, atol=1e-5)
    assert np.abs(after - before).max() > 0.1


# --- bmm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("left", "middle", "right"),
    [(4, 3, 5), (4, 3, 1), (4, 1, 5), (1, 3, 5), (4, 1, 1), (1, 3, 1), (1, 1, 5), (1, 1, 1)],
)
def test_bmm_equals_torchs(count, left, middle, right, transposed, into):
    torch.manual_seed(0)
    a = torch.randn(count, left, middle, dtype=torch.float64)
    b = torch.randn(count, middle, right, dtype=torch.float64)
    if transposed:  # as the gradients are taken
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    out = torch.full((count, left, right), torch.nan, dtype=torch.float64) if into else None
    product = bmm(a, b, out=out)
    torch.testing.assert_close(product, torch.bmm(a, b), rtol=1e-13, atol=1e-13)
    assert out is None or torch.equal(out, product)


# --- Adam ----------------------------------------------------------------------------------------

SHAPES = [(2, 3, 4), (2, 1, 4), (5,), (1,), ()]


def test_flatten_gives_views_of_one_vector():
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in SHAPES]
    before = [tensor.clone() for tensor in tensors]
    flat = flatten(tensors)
    assert flat.shape == (24 + 8 + 5 + 1 + 1,)
    for tensor, same in zip(tensors, before, strict=True):
        assert tensor.shape == same.shape and torch.equal(tensor, same)
    assert torch.equal(flat, torch.cat([tensor.flatten() for tensor in before]))
    flat += 1
    for tensor, same in zip(tensors, before, strict=True):
        assert torch.equal(tensor, same + 1)
    tensors[-1].fill_(7.0)
    assert flat[-1] == 7


def test_adams_parameters_and_gradients_are_views():
    tensors = [torch.randn(shape) for shape in SHAPES]
    adam = Adam(tensors, learning_rate=0.1)
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()
        storages = tensor.untyped_storage().data_ptr(), tensor.grad.untyped_storage().data_ptr()
        assert storages[0] == adam.params.untyped_storage().data_ptr()
        assert storages[1] == adam.gradient.untyped_storage().data_ptr()
    adam.gradient[:] = torch.arange(len(adam.params))
    numbers = torch.cat([tensor.grad.flatten() for tensor in tensors])
    assert numbers.tolist() == [*range(len(adam.params))]
    adam.params[:] = torch.arange(len(adam.params))
    assert torch.cat([tensor.flatten() for tensor in tensors]).equal(numbers)


@pytest.mark.parametrize("eps", [{}, {"eps": 1e-5}], ids=["default", "1e-5"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_adam_equals_torchs_over_separate_tensors(dtype, rtol, eps):
    torch.manual_seed(0)
    ours = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    theirs = [tensor.clone() for tensor in ours]
    adam, plain = Adam(ours, 0.01, **eps), torch.optim.Adam(theirs, lr=0.01, **eps)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad.normal_().mul_(10.0 ** torch.randint(-9, 4, mine.shape))  # around eps, too
            other.grad = mine.grad.clone()
        adam.step()
        plain.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol / 100)
    for moment, name in ((adam.mean, "exp_avg"), (adam.square, "exp_avg_sq")):
        expected = torch.cat([plain.state[other][name].flatten() for other in theirs])
        torch.testing.assert_close(moment, expected, rtol=rtol, atol=0)


finite = st.sampled_from([0.0, 1e-9, 1e-6]) | st.floats(-1e6, 1e6, allow_subnormal=False)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    gradients=st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=12),
    learning_rate=st.sampled_from([0.0, 3e-4, 1.0]),
    eps=st.sampled_from([1e-8, 1e-5, 1.0]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.9)]),
)
def test_adam_equals_torchs_for_any_gradients(gradients, learning_rate, eps, betas):
    ours, theirs = (torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64) for _ in range(2))
    adam = Adam([ours], learning_rate, eps)
    plain = torch.optim.Adam([theirs], lr=learning_rate, eps=eps, betas=betas)
    for gradient in gradients:
        ours.grad[:] = theirs.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step(*betas)
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


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


# --- Checkpoints ---------------------------------------------------------------------------------


def test_adam_goes_on_from_what_it_saved():
    torch.manual_seed(0)
    adams = [Adam([torch.randn(3, 2), torch.randn(4)], 0.01) for _ in range(2)]
    for step in range(6):
        if step == 3:
            assert not torch.equal(adams[0].params, adams[1].params)
            saved = adams[0].state()
            adams[0].step()  # what was saved is a copy
            adams[1].load(saved)
            adams[0].load(saved)
        for adam in adams[: 1 + (step >= 3)]:
            adam.gradient.copy_(torch.arange(10.0) - step)
            adam.step()
    for name in ("params", "mean", "square"):
        assert torch.equal(getattr(adams[0], name), getattr(adams[1], name))
    assert adams[0].steps == adams[1].steps == 6


def test_adam_refuses_what_other_networks_saved():
    saved = Adam([torch.zeros(10)], 0.1).state()
    with pytest.raises(ValueError, match="its networks have 10 parameters, these have 1,001"):
        Adam([torch.zeros(1001)], 0.1).load(saved)
