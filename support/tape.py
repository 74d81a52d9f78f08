"""Writes down the operations that PyTorch carries out, and turns the list into a function.

`recording.py` tells when, and what that is for. A tape sees each operation below autograd, so those
of a gradient too, and writes it into a graph of torch.fx, unless it can do without.
"""

import contextlib
import operator
import types
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.in_numpy import IN_NUMPY

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


class NoValues(TorchFunctionMode):
    """Refuses what would take the values of tensors out of a recording unseen."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function in (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__repr__):
            raise RuntimeError(f"it uses the values of a tensor (.{function.__name__}())")
        return function(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
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
        size_unknown = torch.Tag.dynamic_output_shape in target.tags
        if target is aten.index.Tensor:  # has the tag, though only masks make its size unknown
            size_unknown = any(x.dtype in (torch.bool, torch.uint8) for x in read[1:])
        if size_unknown:
            raise RuntimeError("the size of a result depends on the values of tensors")
        in_place = target._schema.is_mutable
        if in_place:
            self._check_overwriting(args[0] if args else None)
        results = target(*args, **kwargs)
        self.alive.append(results)
        if not in_place:
            storages = {_storage(x) for x in _flat(results) if isinstance(x, Tensor)}
            self.own.update(x for x in storages if x in self.own or not _is_view(target))
        changes = in_place or torch.Tag.nondeterministic_seeded in target.tags
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

    def replay(self, results: Results) -> tuple[Callable[..., Results], Callable[..., Results]]:
        """The graph as a function of the inputs, in two versions: as fast as may be, and plain.

        The plain one does what autograd does, to the last bits; it is there to be compared.

        Args:
            results: those that the recorded function returned.
        """
        self.graph.output(tuple([self.node(x) for x in results]))
        self.graph.eliminate_dead_code()
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        tensors = [*self.inputs, *self.constants.values()]
        small = sum(x.numel() for x in self.inputs) < SMALL
        # Of other dtypes numpy makes others than torch does.
        small &= all(x.is_cpu and x.dtype == torch.float32 for x in tensors)
        small &= all(node.target in IN_NUMPY and not node.kwargs for node in calls)
        if not small:
            self._overwrite(calls)
        forward, constants = self._compile(), tuple(self.constants.values())
        names, n = tuple(self.constants), len(self.inputs)  # not self: it would live on

        def in_python(*tensors: Tensor) -> Results:
            named = types.SimpleNamespace(**dict(zip(names, tensors[n:], strict=True)))
            return forward(named, *tensors[:n])

        def plain(*inputs: Tensor) -> Results:
            return in_python(*inputs, *constants)

        if small:
            return self._in_numpy(calls), plain
        # TorchScript runs the same list without Python between the operations, a fifth to a third
        # faster. It is deprecated and does not know all arguments: Python is good enough then.
        replay = in_python
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(RuntimeError):
            replay = torch.jit.trace(in_python, (*self.inputs, *constants), check_trace=False)
        return (lambda *inputs: replay(*inputs, *constants)), plain

    def _overwrite(self, calls: list[fx.Node]) -> None:
        """Put results where an input lies that is not read again: new memory costs a cache miss."""
        for node in calls:
            first = node.args[0] if node.target in IN_PLACE else None
            alone = isinstance(first, fx.Node) and len(first.users) == 1
            if alone and "made" in first.meta and first.meta["made"] == node.meta.get("made"):
                node.target = IN_PLACE[node.target]

    def _in_numpy(self, calls: list[fx.Node]) -> Callable[..., Results]:
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
