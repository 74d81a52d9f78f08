"""The networks that SAC and PPO train, and their parameters as one vector for Adam.

    critic = Critic(obs_dim=17, act_dim=6, hidden=64)      # Q1 and Q2
    parameters = flatten(critic)                           # one vector, of which all are views
    adam = Adam(parameters, learning_rate=3e-4)            # steps against parameters.grad
    q = critic(obs, action)                                # (B, 17), (B, 6) -> (2, B)

A change made here, of a default too, is counted by `memory.py` and trained by `sac.py` and `ppo.py`
without another line: both build these classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # SB3 sac/policies.py:21


class ParallelLinear(nn.Module):
    """`count` linear layers side by side: (B, inputs) or (count, B, inputs) -> (count, B, outputs).

    One batched product serves all of them. They start as `nn.Linear` does, uniform in
    +-1 / sqrt(inputs).
    """

    def __init__(self, count: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Several inputs count as if concatenated, but it is the weight that is split.

        So a loss that wants the gradient of one of them does not pay for the others'.
        """
        if self.weight.shape[-1] == 1 and len(inputs) == 1:
            # A third of the time of a product with one column.
            return (inputs[0] * self.weight.mT).sum(-1, keepdim=True) + self.bias
        out, weights = self.bias, [self.weight]
        if len(inputs) > 1:
            weights = self.weight.split([x.shape[-1] for x in inputs], 1)
        for x, weight in zip(inputs, weights, strict=True):
            out = torch.baddbmm(out, x.expand(len(weight), -1, -1), weight)
        return out


class Critic(nn.Module):
    """Q(s, a) of SAC, `count` networks side by side: obs (B, n), action (B, k) -> (count, B).

    ReLU after both hidden layers, torch's initialisation: SB3 sac/policies.py:220.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, count: int = 2):
        super().__init__()
        self.first = ParallelLinear(count, obs_dim + act_dim, hidden)
        self.second = ParallelLinear(count, hidden, hidden)
        self.last = ParallelLinear(count, hidden, 1)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        h = F.relu(self.first(obs, action))  # (count, B, hidden)
        h = F.relu(self.second(h))
        return self.last(h).squeeze(-1)


class Actor(nn.Module):
    """SAC's policy before squashing: obs (B, n) -> mean and log_std of u, (B, k) each."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(obs_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2 * act_dim),
        )

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.layers(obs).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


class ActorCritic(nn.Module):
    """PPO's policy and value function: obs (B, n) -> mean (B, k), log_std (k,), value (B,).

    Two networks without a weight in common, tanh after both hidden layers; their hidden layers lie
    side by side. log_std depends on no observation. Weights start orthogonal: SB3 policies.py:617.
    """

    def __init__(self, obs_dim: int, act_dim: int, hidden: int):
        super().__init__()
        self.first = ParallelLinear(2, obs_dim, hidden)
        self.second = ParallelLinear(2, hidden, hidden)
        self.mean = nn.Linear(hidden, act_dim)
        self.value = nn.Linear(hidden, 1)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        for layer, gain in (
            (self.first, 2**0.5),
            (self.second, 2**0.5),
            (self.mean, 0.01),
            (self.value, 1.0),
        ):
            for weight in layer.weight.view(-1, *layer.weight.shape[-2:]).detach():
                nn.init.orthogonal_(weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(self.second(torch.tanh(self.first(obs))))
        of_policy, of_value = hidden.unbind(0)
        return self.mean(of_policy), self.log_std, self.value(of_value).squeeze(-1)


def flatten(*parts: nn.Module | nn.Parameter) -> nn.Parameter:
    """Move the parameters of modules, and lone ones, into one vector (P,), of which they are views.

    One operation on the vector then serves them all: a step of Adam, the soft update of the
    targets, the norm of a gradient. Its attribute `views` lists them. What requires no gradient is
    left out. Do not flatten a parameter twice, nor move a module afterwards by `.to`.
    """
    lists = [part.parameters() if isinstance(part, nn.Module) else [part] for part in parts]
    views = [view for views in lists for view in views if view.requires_grad]
    vector = nn.Parameter(torch.cat([view.detach().flatten() for view in views]))
    for view, values in zip(views, vector.detach().split([v.numel() for v in views]), strict=True):
        view.data = values.view_as(view)
    vector.views = views
    return vector


class Adam:
    """Kingma & Ba, "Adam" (arXiv:1412.6980v9), Algorithm 1, for one vector of parameters.

    It makes the steps of torch.optim.Adam, up to rounding and in half the time. The reason that it
    is here: torch's loads torch.compile, which takes 80 MB of memory and seconds at the start.

    Args:
        parameters: (P,), from `flatten`; its `.grad` is read at every step.
        learning_rate: may be changed between steps.
        eps: keeps a step finite where the gradient vanishes.
    """

    def __init__(self, parameters: nn.Parameter, learning_rate: float, eps: float = 1e-8):
        self.parameters, self.learning_rate, self.eps = parameters, learning_rate, eps
        self.vector = parameters.detach()  # the same numbers, out of autograd's sight
        self.mean = torch.zeros_like(self.vector)  # m_t
        self.square = torch.zeros_like(self.vector)  # v_t
        self.steps = 0  # t

    def step(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        """Move the parameters by one step against the gradient."""
        self.steps += 1
        gradient = self.parameters.grad
        self.mean.lerp_(gradient, 1 - beta1)
        self.square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # The efficient order of the paper's section 2, with eps where Algorithm 1 has it.
        correction = math.sqrt(1 - beta2**self.steps)
        rate = self.learning_rate * correction / (1 - beta1**self.steps)
        scale = self.square.sqrt().add_(self.eps * correction)
        self.vector.addcdiv_(self.mean, scale, value=-rate)

    def state_dict(self) -> dict:
        """For a checkpoint; the parameters are saved with their modules."""
        return {
            "mean": self.mean,
            "square": self.square,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Take over what `state_dict` returned. Raises RuntimeError if the sizes differ."""
        self.mean.copy_(saved["mean"])
        self.square.copy_(saved["square"])
        self.steps, self.learning_rate = saved["steps"], saved["learning_rate"]


def set_threads(batch_size: int, inputs: int, hidden: int) -> None:
    """Give torch one thread, in this whole process, where a second one would only wait.

    On two cores it cost time at 17 inputs and 64 units, gained some at 376 or 256.
    """
    threads, small = torch.get_num_threads(), torch.ones(2, 8, 8)
    torch.set_num_threads(1)
    # In its first products MKL sets itself up. Two threads at once have come to other last bits.
    torch.baddbmm(torch.addmm(small[0], *small), small, small)
    if 2 * batch_size * max(inputs, hidden) * hidden >= 8e6:  # operations of the largest product
        torch.set_num_threads(threads)
