"""Multilayer perceptrons with their gradients written out, and Adam: what both algorithms train.

    critic = MLP(layers, "relu")            # two networks, 23 inputs -> 64 -> 64 -> 1 output each
    adam = Adam(critic.tensors, learning_rate=3e-4)
    q, tape = critic.forward(x)             # x (256, 23) -> q (2, 256, 1)
    critic.backward(tape, q_gradient)       # shaped like q; sets critic.w1.grad and all others
    adam.step()

At these sizes calling an operation costs more than its arithmetic, and autograd calls many: an
update of SAC on Walker2d-v3 takes twice as long with it. So the layers' gradients are written out
here, the losses' beside each loss in sac.py and ppo.py, and the tests hold all of them against
autograd's. A loss of your own does without:

    with torch.inference_mode(False):       # training runs in inference mode, without autograd
        q_free = q[..., 0].clone().requires_grad_()
        (d_q,) = torch.autograd.grad(my_loss(q_free, q_target.clone()), q_free)
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# In place; the derivative, as a function of the result; and for numpy.
ACTIVATIONS = {
    "relu": (torch.relu_, torch.sign, lambda x: np.maximum(x, 0, out=x)),
    "tanh": (torch.tanh_, lambda h: 1 - h * h, lambda x: np.tanh(x, out=x)),
}

Tape = tuple[Tensor, Tensor, Tensor]


def bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a[i] @ b[i]: (count, L, M), (count, M, N) -> (count, L, N).

    Where M or N is 1 it goes elementwise: 2 x (256, 64) @ (64, 1) takes MKL 28 us, this way 10.
    """
    if b.shape[-1] == 1:
        return torch.sum(a * b.mT, -1, keepdim=True, out=out)
    if a.shape[-1] == 1:
        return torch.mul(a, b, out=out)
    return torch.bmm(a, b, out=out)


class MLP:
    """`count` networks of one shape side by side, inputs -> hidden -> hidden -> outputs.

    Weights w1, w2, w3 are (count, in, out), biases b1, b2, b3 (count, 1, out), so that one batched
    product serves all networks. memory.py counts them: a change of the layers belongs there too.

    Args:
        layers: weights and biases of the three.
        activation: "relu" or "tanh", after both hidden layers.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], activation: str):
        (self.w1, self.b1), (self.w2, self.b2), (self.w3, self.b3) = layers
        self.activate_, self.derivative, self.activate_numpy = ACTIVATIONS[activation]

    @property
    def tensors(self) -> list[Tensor]:
        """Weights and biases, layer by layer."""
        return [self.w1, self.b1, self.w2, self.b2, self.w3, self.b3]

    def forward(self, x: Tensor) -> tuple[Tensor, Tape]:
        """x (B, inputs), the same for all networks -> output (count, B, outputs), and its tape."""
        x = x.expand(len(self.w1), -1, -1)
        h1 = self.activate_(torch.baddbmm(self.b1, x, self.w1))
        h2 = self.activate_(torch.baddbmm(self.b2, h1, self.w2))
        return bmm(h2, self.w3).add_(self.b3), (x, h1, h2)

    def in_numpy(self) -> Callable[[np.ndarray], np.ndarray]:
        """`forward` for a few rows, x (B, inputs) float32 -> output (count, B, outputs).

        For acting: torch takes four times as long to call. The function sees later changes of the
        weights only if these live on the CPU.
        """
        w1, b1, w2, b2, w3, b3 = (tensor.cpu().numpy() for tensor in self.tensors)
        activate = self.activate_numpy

        def forward(x: np.ndarray) -> np.ndarray:
            return activate(activate(x @ w1 + b1) @ w2 + b2) @ w3 + b3

        return forward

    def backward(self, tape: Tape, gradient: Tensor) -> None:
        """Gradient of the output (count, B, outputs) -> those of weights and biases, into .grad."""
        x, h1, h2 = tape
        gradient1, gradient2 = self._hidden_gradients(tape, gradient)
        for weight, bias, inputs, outputs in (
            (self.w1, self.b1, x, gradient1),
            (self.w2, self.b2, h1, gradient2),
            (self.w3, self.b3, h2, gradient),
        ):
            bmm(inputs.mT, outputs, out=weight.grad)
            torch.sum(outputs, 1, keepdim=True, out=bias.grad)

    def input_gradient(self, tape: Tape, gradient: Tensor, start: int) -> Tensor:
        """Gradient of the output (count, B, outputs) -> of x[:, start:], (B, inputs - start).

        Summed over the networks. Neither weights nor the other inputs cost anything here.
        """
        gradient1, _ = self._hidden_gradients(tape, gradient)
        return torch.bmm(gradient1, self.w1[:, start:].mT).sum(0)

    def _hidden_gradients(self, tape: Tape, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of what goes into the first and the second activation, (count, B, hidden)."""
        _, h1, h2 = tape
        gradient2 = bmm(gradient, self.w3.mT).mul_(self.derivative(h2))
        gradient1 = torch.bmm(gradient2, self.w2.mT).mul_(self.derivative(h1))
        return gradient1, gradient2


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
    the same steps up to rounding; calling it takes twice as long.

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


def set_threads(batch_size: int, inputs: int, hidden: int) -> None:
    """One thread for torch where products are small: a second one then waits more than it works.

    On two cores the update of SAC takes 1.8 times as long with two threads as with one for 17
    inputs and 64 hidden units, but 0.7 times as long for 376 inputs or 256 hidden units.
    """
    if 2 * batch_size * max(inputs, hidden) * hidden < 8e6:  # operations of the largest product
        torch.set_num_threads(1)
