"""Gradients by autograd, recorded once and replayed: plain PyTorch losses without the waiting.

    critic_gradient = Recorded(loss_of_critic, critic_parameters)
    loss, q = critic_gradient(obs, action, q_target)    # and critic_parameters.grad is set

With networks this small PyTorch spends more time on calling operations, and on the graph that
autograd needs, than on arithmetic. So the first call with each shape of inputs writes down the
operations of the loss and of its gradient (`_Tape`), and later calls replay that list. The list is
short: what is known beforehand is computed once, what does nothing is left out, what stands twice
is done once. It runs in TorchScript, and in numpy for the single rows of acting. Each new list is
compared with autograd before it is used. Print `code.src` in `_compile` to read one.

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

import contextlib
import math
import operator
import types
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.in_numpy import IN_NUMPY

TOLERANCE = 1e-4  # of a replay against autograd, relative to a gradient's largest entry
MOST_SHAPES = 16  # of the inputs of one function; TorchScript never frees a recording
EARLY_CHECKS = (2, 3)  # calls after which a replay is compared with autograd once more
Results = tuple[Tensor, ...]

aten = torch.ops.aten
OF_SHAPE = {aten.ones_like.default, aten.zeros_like.default}  # their input's values do not matter
UNCHANGED = {aten.detach.default, aten.alias.default}  # return their input, outside of autograd
RESHAPED = {aten.expand.default, aten.view.default}  # the same, where the shape is
ARITHMETIC = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
    *(aten.mul.Scalar, aten.div.Scalar),
}
IN_PLACE = {  # what may overwrite its first input, if nothing else reads that
    torch.relu: torch.relu_,
    torch.tanh: torch.tanh_,
    torch.exp: torch.exp_,
    torch.add: Tensor.add_,
    torch.sub: Tensor.sub_,
    torch.mul: Tensor.mul_,
}
SMALL = 4096  # numbers in the inputs; with fewer, acting is faster in numpy


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
        self.replays: dict[tuple, Callable[..., Results]] = {}  # shapes and dtypes -> replay
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
        replay = None if self.eager else self.replays.get(key) or self._record(key, inputs)
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
                tape = _Tape(copies)
                with _NoValues(), tape:
                    results = self._by_autograd(*copies)
                if tape.overwrites:
                    tape = _Tape(copies, shorten=False)
                    with _NoValues(), tape:
                        results = self._by_autograd(*copies)
                replay = tape.replay(results)
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
            return replay
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

    def _agrees(self, replay: Callable[..., Results], inputs: Results) -> bool:
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
            for i, (result, reference) in enumerate(zip(found, expected, strict=True)):
                if (result.shape, result.dtype) != (reference.shape, reference.dtype):
                    return False
                result, reference = result.double(), reference.double()
                scale = (
                    reference.abs().nan_to_num(0.0, 0.0, 0.0).amax().item()
                    if reference.numel()
                    else 0.0
                )
                if i < first_gradient:
                    scale = max(scale, 1.0)  # a value near 0 may be a difference of large ones
                tolerance = dict(rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
                if not torch.allclose(result, reference, **tolerance):
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


class _NoValues(TorchFunctionMode):
    """Refuses what would take the values of tensors out of a recording unseen."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__repr__):
            raise RuntimeError(f"it uses the values of a tensor (.{function.__name__}())")
        return function(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    """Writes down what PyTorch does with tensors while it is active, as far as a replay needs it.

    Args:
        inputs: what the replay will be called with.
        shorten: leave out what is known beforehand, does nothing or stands twice.

    Attributes:
        graph: the operations of the replay so far.
        constants: tensors that the graph reads by name: parameters, views of them, numbers.
        overwrites: whether a tensor was overwritten of which the shortened list holds something;
            then only the whole list is right.
    """

    def __init__(self, inputs: Results, shorten: bool = True):
        super().__init__()
        self.shorten, self.overwrites = shorten, False
        self.own: Counter[int] = Counter()  # storages made here -> tensors that share them
        self.inputs, self.graph, self.constants = inputs, fx.Graph(), {}
        self.nodes = {id(x): self.graph.placeholder(f"input{i}") for i, x in enumerate(inputs)}
        self.numbers: set[int] = set()  # ids of tensors that no call changes
        self.done: dict[str, fx.Node] = {}  # an operation with its inputs -> its node
        self.alive: list[Any] = []  # as an id may be given again to a new tensor

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from loading torch.compile, which takes 80 MB, to have it ignore this."""
        return False

    def __torch_dispatch__(
        self, target: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if target is aten._local_scalar_dense.default:
            raise RuntimeError("it uses the value of a tensor (if, print, float() or .item())")
        kwargs = kwargs or {}
        read = [x for x in _flat((args, kwargs)) if isinstance(x, Tensor)]
        masked = target is not aten.index.Tensor or any(
            x.dtype in (torch.bool, torch.uint8) for x in read[1:]
        )
        if torch.Tag.dynamic_output_shape in target.tags and masked:
            raise RuntimeError("the size of a result depends on the values of tensors")
        if target._schema.is_mutable:
            self._check_overwriting(args[0] if args else None)
        results = target(*args, **kwargs)
        self.alive.append(results)
        if not target._schema.is_mutable:
            storages = {_storage(x) for x in _flat(results) if isinstance(x, Tensor)}
            self.own.update(x for x in storages if x in self.own or not _is_view(target))
        changes = target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
        known = not changes and self.shorten and all(id(x) in self.numbers for x in read)
        if known or (target in OF_SHAPE and self.shorten):
            self.numbers.update(id(x) for x in _flat(results))
        elif changes or any(id(x) in self.nodes for x in read) or not _is_view(target):
            node = self._write(target, args, kwargs, results, changes)
            if isinstance(results, Tensor):
                self.nodes[id(results)] = node
            else:
                for i, result in enumerate(results):
                    self.nodes[id(result)] = self._once(operator.getitem, (node, i))
        return results

    def _check_overwriting(self, x: Any) -> None:
        """Whether the list can tell that x is changed in place; raises RuntimeError if not."""
        if not isinstance(x, Tensor) or _storage(x) not in self.own:
            raise RuntimeError("it changes a tensor in place that it has not made itself")
        node = self.nodes.get(id(x))
        shared = self.own[_storage(x)] > 1 or list(self.nodes.values()).count(node) > 1
        self.overwrites |= node is None or shared
        # The operation that made x gives another tensor from now on.
        self.done = {key: value for key, value in self.done.items() if value is not node}

    def node(self, value: Any) -> Any:
        """What stands for a tensor in the graph; anything else stands for itself."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            name = f"constant{len(self.constants)}"
            self.constants[name], self.nodes[id(value)] = value.detach(), self.graph.get_attr(name)
            self.alive.append(value)
        return self.nodes[id(value)]

    def replay(self, results: Results) -> Callable[..., Results]:
        """The graph as a function of the inputs; results are those that the function returned."""
        self.graph.output(tuple([self.node(x) for x in results]))
        self.graph.eliminate_dead_code()
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        tensors = [*self.inputs, *self.constants.values()]
        small = sum(x.numel() for x in self.inputs) < SMALL
        # Of other dtypes numpy makes others than torch does.
        small &= all(x.is_cpu and x.dtype == torch.float32 for x in tensors)
        if small and all(node.target in IN_NUMPY and not node.kwargs for node in calls):
            return self._replay_in_numpy(calls)
        self._overwrite(calls)
        forward, constants = self._compile(), tuple(self.constants.values())
        names, n = tuple(self.constants), len(self.inputs)  # not self: it would live on

        def in_python(*tensors: Tensor) -> Results:
            named = types.SimpleNamespace(**dict(zip(names, tensors[n:], strict=True)))
            return forward(named, *tensors[:n])

        # TorchScript runs the same list without Python between the operations, a fifth to a third
        # faster. It is deprecated and does not know all arguments: Python is good enough then.
        replay = in_python
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(RuntimeError):
            replay = torch.jit.trace(in_python, (*self.inputs, *constants), check_trace=False)
        return lambda *inputs: replay(*inputs, *constants)

    def _overwrite(self, calls: list[fx.Node]) -> None:
        """Put results where an input lies that is not read again: new memory costs a cache miss."""
        for node in calls:
            first = node.args[0] if node.target in IN_PLACE else None
            alone = isinstance(first, fx.Node) and len(first.users) == 1
            if alone and "made" in first.meta and first.meta["made"] == node.meta.get("made"):
                node.target = IN_PLACE[node.target]

    def _replay_in_numpy(self, calls: list[fx.Node]) -> Callable[..., Results]:
        """For the few rows of acting, where torch's calls take three times as long as numpy's."""
        for node in calls:
            node.target = IN_NUMPY[node.target]
        arrays = {name: constant.numpy() for name, constant in self.constants.items()}
        forward, named = self._compile(), types.SimpleNamespace(**arrays)

        def replay(*inputs: Tensor) -> Results:
            with np.errstate(all="ignore"):  # nan and inf go on, as in torch
                results = forward(named, *[x.numpy() for x in inputs])
            return tuple([torch.from_numpy(np.asarray(result)) for result in results])

        return replay

    def _compile(self) -> Callable:
        """The graph as a Python function of what holds the constants, and of the inputs."""
        code = self.graph.python_code("self")
        exec(code.src, code.globals)
        return code.globals["forward"]

    def _write(
        self, target: Callable, args: tuple, kwargs: dict, result: Any, changes: bool
    ) -> fx.Node:
        """The node of an operation, which may be that of a cheaper or of an earlier one."""
        nodes = map_aggregate(args, self.node)
        if changes:
            return self.graph.call_function(target, nodes, map_aggregate(kwargs, self.node))
        if target in UNCHANGED or (target in RESHAPED and result.shape == args[0].shape):
            return nodes[0]
        if target is aten.pow.Tensor_Scalar and args[1] == 1 and self.shorten:  # autograd's 2 x^1
            return nodes[0]
        if target is aten.expand.default:
            nodes = nodes[0], list(result.shape)  # without -1
        floats = target in ARITHMETIC and args[0].dtype == result.dtype == torch.float32
        if floats and isinstance(args[1], int | float):
            # Of a number PyTorch would make a tensor, and in float64, at every call.
            number = self.done.get(repr(args[1])) or self.node(torch.tensor(float(args[1])))
            nodes = nodes[0], self.done.setdefault(repr(args[1]), number)
        node = self._once(_faster(target), nodes, map_aggregate(kwargs, self.node))
        if isinstance(result, Tensor) and not _is_view(target):
            node.meta["made"] = result.shape, result.dtype
        return node

    def _once(self, target: Callable, args: tuple, kwargs: dict | None = None) -> fx.Node:
        key = repr((target, args, kwargs))  # nodes appear as their names, which are unique
        if key not in self.done or not self.shorten:
            self.done[key] = self.graph.call_function(target, args, kwargs)
        return self.done[key]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _flat(value: Any) -> list[Any]:
    """All that stands in nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    return [y for x in value for y in _flat(x)] if isinstance(value, tuple | list) else [value]


def _is_view(target: Callable) -> bool:
    """Whether its results share memory with an input, and so follow all changes of it."""
    if target is aten._unsafe_view.default:  # which does not say so
        return True
    return all(result.alias_info for result in target._schema.returns)


def _faster(target: Callable) -> Callable:
    """torch.mm for torch.ops.aten.mm.default, and the like: the same, called in less time."""
    for plain in (getattr(where, target._opname, None) for where in (torch, torch.Tensor)):
        if isinstance(plain, types.BuiltinFunctionType | types.MethodDescriptorType):
            return plain
    return target
