"""Gradients by autograd, recorded once and replayed: plain PyTorch losses without the waiting.

    critic_gradient = Recorded(loss_of_critic, critic_parameters)
    loss, q = critic_gradient(obs, action, q_target)    # and critic_parameters.grad is set

With networks this small PyTorch spends more time on calling operations, and on the graph that
autograd needs, than on arithmetic. So the first call with each shape of inputs writes down the
operations of the loss and of its gradient (`tape.py`), and later calls replay that list. The list
is short: what is known beforehand is computed once, what does nothing is left out, what stands
twice is done once. It runs in TorchScript, and in numpy for the single rows of acting. Each new
list is compared with autograd before it is used. Print `code.src` in `Tape._compile` to read one.

What to know when you write a loss:

- It takes tensors and returns the loss, or the loss and other tensors. What you want to see or log
  must be among the results: what a loss assigns to an outer variable is not assigned again by later
  calls.
- Whatever changes from call to call must be an input, or a tensor that the loop changes in place,
  as Adam does the parameters. **A Python number stays what it was while recording.** A loss is
  compared with autograd in its first calls, whenever the scripts log and at the end, by
  `check_recordings`; a difference stops the run with a line that names the loss.
- A loss that uses the values of tensors (if, print, .item()), or that changes a tensor from outside
  in place (BatchNorm's statistics), cannot be recorded. One warning says so, and then autograd runs
  at every call.
- With `--eager` it does so for all losses: prints and breakpoints work inside them, at about half
  the speed, and the numbers agree up to rounding.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.tape import NoValues, Results, Tape

TOLERANCE = 1e-4  # of a plain replay against autograd, relative to a gradient's largest entry
# Of a fast one, whose last bits differ: where actions saturate, log(1 - a^2) makes percents of
# them, and where such terms cancel out, little else is left.
FAST_TOLERANCE = 0.1  # of results
OF_ITS_NORM, OF_THE_WHOLE = 0.1, 1e-3  # of each gradient, or of 1: the difference's norm
MOST_SHAPES = 16  # of the inputs of one function; TorchScript never frees a recording
EARLY_CHECKS = (2, 3)  # calls after which a replay is compared with autograd once more


Replays = tuple[Callable[..., Results], Callable[..., Results]]  # the fast one, the plain one


class StaleRecording(Exception):
    """A replay no longer computes what its function would; the message names the function."""


class Recorded:
    """A function of tensors, and optionally the gradient of its first result, by replay.

    Args:
        function: takes tensors, returns one or several. With parameters the first is a loss, ().
        parameters: from `networks.flatten`. A call sets their `.grad` to the loss's gradient.
        eager: never record.
    """

    def __init__(
        self, function: Callable, parameters: nn.Parameter | None = None, eager: bool = False
    ):
        self.function, self.parameters, self.eager = function, parameters, eager
        self.name = getattr(function, "__name__", type(function).__name__)
        if parameters is not None:
            self._link_gradient()
        self.replays: dict[tuple, Replays] = {}  # shapes, dtypes, ... -> replay
        self.latest: dict[tuple, Results] = {}  # the same -> latest inputs
        self.replayed = 0  # how often
        self.problem: str | None = None  # why it is not recorded, until that was said

    def __call__(self, *inputs: Tensor) -> Any:
        """The function's results, without a graph. Fastest within `torch.inference_mode`.

        Raises:
            FloatingPointError: the loss, or its gradient squared, is not finite. A step of Adam
                would turn every parameter into nan.
        """
        key = tuple([(x.shape, x.dtype, x.is_contiguous(), x.requires_grad) for x in inputs])
        replay = None
        if not self.eager:
            replay = self.replays[key][0] if key in self.replays else self._record(key, inputs)
        if replay is None:
            results = self._by_autograd(*inputs)  # before the warning, if it is itself at fault
            self._warn_once()
        else:
            results = replay(*inputs)
            self.latest[key] = inputs
            self.replayed += 1
            if self.replayed in EARLY_CHECKS:
                check_recordings(self)
        if self.parameters is not None:
            if not self._linked():
                self._link_gradient()  # a zero_grad() has cut it off
            count, gradient = len(self.parameters.views), self.parameters.grad
            results, parts = results[:-count], results[-count:]
            torch.cat(parts, out=gradient)
            if not math.isfinite(results[0].item() + gradient.dot(gradient).item()):
                raise FloatingPointError(
                    f"{self.name} is {results[0]:g} and the norm of its gradient "
                    f"{gradient.norm():g}; training stopped before it spread"
                )
        return results[0] if len(results) == 1 else results

    def _linked(self) -> bool:
        """Whether the views' gradients are those of the vector."""
        vector, views = self.parameters, self.parameters.views
        if vector.grad is None or any(view.grad is None for view in views):
            return False
        return vector.grad.data_ptr() == views[0].grad.data_ptr()

    def _link_gradient(self) -> None:
        """Give the vector a gradient and every view its part of it, for torch's own optimisers."""
        vector = self.parameters
        with torch.inference_mode(False):
            vector.grad = torch.zeros_like(vector) if vector.grad is None else vector.grad
        sizes = [view.numel() for view in vector.views]
        for view, grad in zip(vector.views, vector.grad.split(sizes), strict=True):
            view.grad = grad.view_as(view)

    def _by_autograd(self, *inputs: Tensor) -> Results:
        """The results and, with parameters, behind them the gradient of each as a vector."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.parameters is not None):
            # Autograd refuses tensors made in inference mode, as all in the scripts' loops are.
            inputs = [x.clone() if x.is_inference() else x for x in inputs]
            results = self.function(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            if self.parameters is None:
                return results
            if results[0].shape != () or not results[0].requires_grad:
                raise ValueError(
                    f"{self.name} must return a loss of shape () that depends on the parameters "
                    f"it was recorded with, not {tuple(results[0].shape)}"
                )
            gradients = torch.autograd.grad(
                results[0], self.parameters.views, materialize_grads=True
            )
        vectors = [gradient.reshape(-1) for gradient in gradients]
        return (*(result.detach() for result in results), *vectors)

    def _record(self, key: tuple, inputs: Results) -> Callable[..., Results] | None:
        """Trace the function for these inputs; None and a warning if it has to be autograd."""
        try:
            if len(self.replays) == MOST_SHAPES:
                raise RuntimeError(f"it is called with more than {MOST_SHAPES} shapes of inputs")
            with torch.inference_mode(False), _same_random_numbers():
                copies = [x.clone() for x in inputs]
                tape = Tape(copies)
                with NoValues(), tape:
                    results = self._by_autograd(*copies)
                if tape.overwrites:
                    tape = Tape(copies, shorten=False)
                    with NoValues(), tape:
                        results = self._by_autograd(*copies)
                replay = tape.replay(results)  # the fast one and the plain one
                # Inputs whose values cannot be in the tape, even if they have only one row.
                others = [
                    ~x if x.dtype == torch.bool else 0.9 * x.flip(0) if x.is_floating_point() else x
                    for x in copies
                ]
            agrees = self._agrees(replay, inputs) and self._agrees(replay, others)
            problem = None if agrees else "its replay gives other numbers"
        except Exception as error:  # whatever tracing makes of code that it cannot follow
            problem = (str(error).splitlines() or [type(error).__name__])[0]
        if problem is None:
            self.replays[key] = replay
            return replay[0]
        self.eager, self.problem = True, problem
        return None

    def _warn_once(self) -> None:
        if self.problem:
            warnings.warn(
                f"{self.name} cannot be recorded, so it runs through autograd, slower: "
                f"{self.problem}",
                stacklevel=3,
            )
        self.problem = None

    def _agrees(self, replays: Replays, inputs: Results) -> bool:
        """Whether both versions of a replay give what autograd gives, for these inputs."""
        fast, plain = replays
        return self._agree(plain, inputs) and self._agree(fast, inputs, fast=True)

    def _agree(self, replay: Callable[..., Results], inputs: Results, fast: bool = False) -> bool:
        """Whether a replay gives what autograd gives, roughly if it is a fast one."""
        tolerance = FAST_TOLERANCE if fast else TOLERANCE
        with torch.inference_mode(False), torch.no_grad():
            with _same_random_numbers():
                # Other numbers than while recording: those may have got into the tape.
                torch.rand(1, device=inputs[0].device)
                expected = self._by_autograd(*inputs)
            with _same_random_numbers():
                torch.rand(1, device=inputs[0].device)
                found = replay(*inputs)
            gradients = [] if self.parameters is None else self.parameters.views
            first_gradient = len(expected) - len(gradients)
            whole = torch.cat(expected[first_gradient:]).norm().item() if gradients else 0.0
            for i, (result, reference) in enumerate(zip(found, expected, strict=True)):
                if (result.shape, result.dtype) != (reference.shape, reference.dtype):
                    return False
                result, reference = result.double(), reference.double()
                if fast and i >= first_gradient:
                    allowed = OF_ITS_NORM * reference.norm() + OF_THE_WHOLE * max(whole, 1.0)
                    if allowed.isfinite() and not (result - reference).norm() <= allowed:
                        return False
                    continue
                scale = (
                    reference.abs().nan_to_num(0.0, 0.0, 0.0).amax().item()
                    if reference.numel()
                    else 0.0
                )
                if i < first_gradient:
                    scale = max(scale, 1.0)  # a value near 0 may be a difference of large ones
                allowed = dict(rtol=tolerance, atol=tolerance * scale, equal_nan=True)
                if not torch.allclose(result, reference, **allowed):
                    return False
        return True


def check_recordings(*functions: Recorded) -> None:
    """Compare replays with autograd, for the latest inputs of every function.

    Raises:
        StaleRecording: they differ, or the parameters are no longer those that Adam changes.
    """
    for function in functions:
        if function.parameters is not None:
            views = [view.detach().flatten() for view in function.parameters.views]
            if not torch.equal(torch.cat(views).cpu(), function.parameters.detach().cpu()):
                raise StaleRecording(
                    f"the parameters of {function.name} have left the vector that Adam changes: "
                    "call `flatten` after .to(), and only once for each of them"
                )
        for key, inputs in function.latest.items():
            if not function.eager and not function._agrees(function.replays[key], inputs):
                raise StaleRecording(
                    f"{function.name} gives other numbers than when it was recorded: something it "
                    "reads has been replaced since, a Python number for example; make it an input, "
                    "or use --eager"
                )


def _same_random_numbers() -> Any:
    """A context after which random generators are as before: looking must not change a run."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))
