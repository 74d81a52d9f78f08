"""Multilayer perceptrons with their gradients written out, and Adam: what both algorithms train.

    critic = MLP(sac.uniform(2, 23, 64, 64, 1), "relu")    # two networks of two hidden layers
    adam = Adam(critic.tensors, learning_rate=3e-4)        # gives every tensor its .grad
    q, tape = critic.forward(x)                            # x (256, 23) -> q (2, 256, 1)
    critic.backward(tape, q_gradient)                      # shaped like q; fills every .grad
    adam.step()

At these sizes calling an operation costs more than its arithmetic, and autograd calls many. So the
layers' gradients are written out here, the losses' beside each loss in sac.py and ppo.py, and the
tests hold all of them against autograd's. A loss of your own needs no derivation: README, "Change
it".
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# In place; the derivative, as a function of the result, not of the input; and for numpy.
ACTIVATIONS = {
    "relu": (torch.relu_, torch.sign, lambda x: np.maximum(x, 0, out=x)),
    "tanh": (torch.tanh_, lambda h: 1 - h * h, lambda x: np.tanh(x, out=x)),
}

Tape = list[Tensor]  # what goes into each layer, (count, B, in)


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a[i] @ b[i]: (count, L, M), (count, M, N) -> (count, L, N).

    Where M or N is 1 it goes elementwise, which takes a third of MKL's time for the critics.
    """
    if b.shape[-1] == 1:
        return torch.sum(a * b.mT, -1, keepdim=True, out=out)
    if a.shape[-1] == 1:
        return torch.mul(a, b, out=out)
    return torch.bmm(a, b, out=out)


class MLP:
    """`count` networks of one shape side by side, as many layers as are given.

    Weights are (count, in, out), biases (count, 1, out), so that one batched product serves all
    networks. memory.py counts two hidden layers: another number belongs there too.

    Args:
        layers: weights and biases of each.
        activation: "relu" or "tanh", after every layer but the last.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], activation: str):
        self.layers = layers
        self.activate_, self.derivative, self.activate_numpy = ACTIVATIONS[activation]

    @property
    def tensors(self) -> list[Tensor]:
        """Weights and biases, layer by layer."""
        return [tensor for layer in self.layers for tensor in layer]

    def forward(self, x: Tensor) -> tuple[Tensor, Tape]:
        """x (B, inputs), the same for all networks -> output (count, B, outputs), and its tape."""
        *hidden, (weight, bias) = self.layers
        tape = [x.expand(len(weight), -1, -1)]
        for w, b in hidden:
            tape.append(self.activate_(torch.baddbmm(b, tape[-1], w)))
        return bmm(tape[-1], weight).add_(bias), tape

    def in_numpy(self) -> Callable[[np.ndarray], np.ndarray]:
        """`forward` for a few rows, x (B, inputs) float32 -> output (count, B, outputs).

        For acting, where torch spends its time on calls. The function sees later changes of the
        weights only if these live on the CPU.
        """
        *hidden, (weight, bias) = [(w.cpu().numpy(), b.cpu().numpy()) for w, b in self.layers]

        def forward(x: np.ndarray) -> np.ndarray:
            for w, b in hidden:
                x = self.activate_numpy(x @ w + b)
            return x @ weight + bias

        return forward

    def backward(self, tape: Tape, gradient: Tensor) -> None:
        """Gradient of the output (count, B, outputs) -> those of weights and biases, into .grad.

        For the weights that `forward` used, so before Adam's step; it is Adam who makes the .grad.
        """
        gradients = self._gradients(tape, gradient)
        for (weight, bias), x, grad in zip(self.layers, tape, gradients, strict=True):
            bmm(x.mT, grad, out=weight.grad)
            torch.sum(grad, 1, keepdim=True, out=bias.grad)

    def input_gradient(self, tape: Tape, gradient: Tensor, start: int) -> Tensor:
        """Gradient of the output (count, B, outputs) -> of x[:, start:], (B, inputs - start).

        Summed over the networks. Neither weights nor the other inputs cost anything here.
        """
        weight, _ = self.layers[0]
        return torch.bmm(self._gradients(tape, gradient)[0], weight[:, start:].mT).sum(0)

    def _gradients(self, tape: Tape, gradient: Tensor) -> list[Tensor]:
        """Gradients of what every layer puts out, before its activation: (count, B, out) each."""
        gradients = [gradient]
        for (weight, _), h in zip(self.layers[:0:-1], tape[:0:-1], strict=True):
            gradients.append(bmm(gradients[-1], weight.mT).mul_(self.derivative(h)))
        return gradients[::-1]


def flatten(tensors: list[Tensor]) -> Tensor:
    """Move tensors into one vector, of which they become views: one operation then serves all."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    for tensor, part in zip(tensors, _parts(flat, tensors), strict=True):
        tensor.data = part
    return flat


def _parts(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of a vector, shaped like the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


class Adam:
    """Kingma & Ba, "Adam" (arXiv:1412.6980v9), Algorithm 1, for all tensors as one vector.

    In the efficient order of their section 2, eps as Algorithm 1 means it. torch.optim.Adam makes
    the same steps up to rounding, with more calls around them.

    Attributes:
        params: all parameters; the tensors become views of it.
        gradient: their gradient, likewise behind the tensors' .grad.
        mean, square: Adam's moments m and v.
        steps: taken so far.
    """

    def __init__(self, tensors: list[Tensor], learning_rate: float, eps: float = 1e-8):
        self.params = flatten(tensors)
        self.gradient, self.mean, self.square = torch.zeros(3, len(self.params)).to(self.params)
        for tensor, part in zip(tensors, _parts(self.gradient, tensors), strict=True):
            tensor.grad = part
        self.learning_rate, self.eps, self.steps = learning_rate, eps, 0

    def step(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        """Move the parameters by one step against the gradient."""
        self.steps += 1
        self.mean.lerp_(self.gradient, 1 - beta1)
        self.square.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        correction = math.sqrt(1 - beta2**self.steps)
        rate = self.learning_rate * correction / (1 - beta1**self.steps)
        scale = self.square.sqrt().add_(self.eps * correction)
        self.params.addcdiv_(self.mean, scale, value=-rate)

    def state(self) -> dict:
        """For a checkpoint: copies of params, mean and square, (3, n), and steps."""
        vectors = torch.stack([self.params, self.mean, self.square]).cpu()
        return {"vectors": vectors, "steps": self.steps}

    def load(self, saved: dict) -> None:
        """Take over what `state` returned. Raises ValueError if it is of other networks."""
        theirs, ours = saved["vectors"].shape[-1], len(self.params)
        if theirs != ours:
            raise ValueError(f"its networks have {theirs:,} parameters, these have {ours:,}")
        for vector, values in zip(
            (self.params, self.mean, self.square), saved["vectors"], strict=True
        ):
            vector.copy_(values)
        self.steps = saved["steps"]


def check_update(what: str, loss: Tensor, gradient: Tensor, step: int) -> None:
    """Stop before nan spreads: a step of Adam on it would turn every weight into nan.

    Args:
        what: whose update, for the message.
        loss: ().
        gradient: a vector. Its squares must not overflow, either, as Adam takes them.
        step: for the message.

    Raises:
        FloatingPointError: the loss or the squared norm of the gradient is nan or inf.
    """
    if not math.isfinite(loss.item() + gradient.dot(gradient).item()):
        raise FloatingPointError(
            f"at step {step} the loss of {what} is {loss:g} and the norm of its gradient "
            f"{gradient.norm():g}; training stopped before it spread"
        )


def set_threads(batch_size: int, inputs: int, hidden: int) -> None:
    """One thread for torch, in this whole process, where products are so small that a second waits.

    On two cores a second thread cost time at 17 inputs and 64 hidden units, and gained some at 376
    inputs or 256 hidden units; the bound lies between. Elsewhere OMP_NUM_THREADS decides.
    """
    if 2 * batch_size * max(inputs, hidden) * hidden < 8e6:  # operations of the largest product
        torch.set_num_threads(1)
