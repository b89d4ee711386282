"""Opaque modules: one node of the graph, run under the recorder, rewritten by changing what their forward reads.

The tensors inside are cut like any others. Sizes in their Python code come from integer attributes: while the module runs,
each attribute is an integer that remembers where it came from, as is each size of a tensor, and where one turns up as a size of
a tensor, the pruned size of that tensor is what the attribute must become. Standard layers inside have the table of attributes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxprune.passes.errors import ReadsValue
from fxprune.passes.ir.input_sizes import slices_of
from fxprune.passes.ir.module_tree import named_modules
from fxprune.passes.ir.program import SizeUse, TensorSize
from fxprune.passes.ir.pytree import TensorRef, collect, iterate
from fxprune.passes.ops.registry import FUNCTIONS, find_node

# functions that make a tensor, of sizes and numbers
MAKING = (
    "zeros ones full empty arange linspace logspace eye rand randn randint randperm tensor as_tensor range"
    " tril_indices triu_indices hann_window"
).split()


class TracedInt(int):
    """An integer that remembers the attribute or the size of a tensor it is, or the numbers it was computed from.

    Attributes:
        tree: see `SizeUse`.
    """

    tree: Any

    @classmethod
    def of(cls, value: int, tree: Any) -> TracedInt:
        made = cls(value)
        made.tree = tree
        return made


OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv}


def remembering(name: str, *, swapped: bool) -> Any:
    function = OPERATORS[name]

    def method(self: TracedInt, other: Any) -> Any:
        a, b = (other, self) if swapped else (self, other)
        value = function(int(a), int(b)) if isinstance(other, int) else NotImplemented
        return value if value is NotImplemented else TracedInt.of(value, (name, tree_of(a), tree_of(b)))

    return method


def tree_of(number: int) -> Any:
    return number.tree if isinstance(number, TracedInt) else int(number)


for _name in OPERATORS:
    setattr(TracedInt, f"__{_name}__", remembering(_name, swapped=False))
    setattr(TracedInt, f"__r{_name}__", remembering(_name, swapped=True))
# by which contents leave a tensor unseen by the dispatcher (`item` is seen)
LEAKS = frozenset(["tolist", "numpy", "__array__", "data_ptr", "__dlpack__", "untyped_storage", "apply_", "map_"])


class SizeObserver(TorchFunctionMode):
    """Sees the sizes that Python code hands to torch, with the attributes they came from.

    `leaks` collects tensors whose contents are taken: what comes back of them is no longer known.
    """

    def __init__(self, number: Callable[[Tensor], TensorRef], found: list[SizeUse], leaks: list[TensorRef]) -> None:
        super().__init__()
        self.number, self.found, self.leaks = number, found, leaks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return out  # under vmap tensors have no memory of their own, and operators see them later
        name = getattr(func, "__name__", "")
        if name == "size" or getattr(func, "__self__", None) is Tensor.shape:
            return self.sizes(args[0], out, args[1:] or tuple((kwargs or {}).values()))
        if name in LEAKS:
            self.leaks += [self.number(t) for t in collect(args, Tensor)]
        sizes = FUNCTIONS[name].sizes if name in FUNCTIONS else None
        if sizes is not None and isinstance(out, Tensor):
            self.note(sizes.numbered(args, kwargs or {}, out.dim()), out)
        elif name == "__getitem__" and isinstance(out, Tensor):
            self.slices(args[0], args[1], out)
        elif name in ("split", "split_with_sizes") and len(args) > 1:
            dim = (args[2] if len(args) > 2 else (kwargs or {}).get("dim", 0)) % args[0].dim()
            for size, part in zip(args[1] if isinstance(args[1], tuple | list) else [args[1]], out, strict=False):
                self.note([(size, dim)], part)
        return out

    def sizes(self, tensor: Tensor, found: Any, dims: tuple[Any, ...]) -> Any:
        """The shape of a tensor, or its size along a dimension, as numbers that remember it."""
        ref = self.number(tensor)
        if isinstance(found, int):
            return TracedInt.of(found, TensorSize(ref, dims[0] % tensor.dim()))
        return Size([TracedInt.of(n, TensorSize(ref, dim)) for dim, n in enumerate(found)])

    def slices(self, tensor: Tensor, index: Any, out: Tensor) -> None:
        """Bounds of slices: how many entries are taken says what they are."""
        items = index if isinstance(index, tuple) else (index,)
        if not all(item is None or item is ... or isinstance(item, int | slice) for item in items):
            return  # tensors choose by their values
        for source, dim, item in slices_of(index, tensor.dim()):
            if item.step in (None, 1):
                self.bounds(tensor, source, item, out, dim)

    def bounds(self, tensor: Tensor, source: int, item: slice, out: Tensor, dim: int) -> None:
        size = TracedInt.of(tensor.shape[source], TensorSize(self.number(tensor), source))
        start, stop = item.start, item.stop
        if all(n is None or 0 <= n <= size for n in (start, stop)):
            self.note([((size if stop is None else stop) - (start or 0), dim)], out)

    def note(self, sizes: Sequence[tuple[Any, int]], out: Tensor) -> None:
        """Sizes of a result, each with its dimension."""
        for size, dim in sizes:
            if isinstance(size, TracedInt):
                self.found.append(SizeUse(size.tree, self.number(out), dim))


READING = frozenset([Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.__float__, Tensor.item, Tensor.tolist])
FAR = 10.0  # how many times as large a fraction is, to be beyond what it is compared with, and small enough for a size
MOST_TURNED = 6
Turn = tuple[int, int]  # the number of a reading, the first of which is 0, and whether it gives less (-1) or more (1)


class Decisions(TorchFunctionMode):
    """Notes what Python reads of tensors that inputs make, and so may decide by (`if x.max() > 1`, `while`).

    Arguments:
        from_input: whether a tensor depends on the inputs.
        turn: a reading that gives something else, so that what is decided by it is decided otherwise.

    Attributes:
        turns: all that there could be.
    """

    def __init__(self, from_input: Callable[[Tensor], bool], turn: Turn | None = None) -> None:
        super().__init__()
        self.from_input, self.turn, self.number = from_input, turn, 0
        self.turns: list[Turn] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in READING or not isinstance(out, bool | int | float | list) or not self.from_input(args[0]):
            return out
        truth = args[0].dtype == torch.bool
        signs = (-1 if out else 1,) if truth else (1, -1)
        self.turns += [(self.number, sign) for sign in signs]
        self.number += 1
        turned = next((sign for sign in signs if self.turn == (self.number - 1, sign)), 0)
        return turned_round(out, turned, truth) if turned else out


def turned_round(number: Any, sign: int, truth: bool) -> Any:
    """Another number that could have been read, or others in the place of a list of them; the other truth value."""
    if isinstance(number, list):
        return [turned_round(n, sign, truth) for n in number]
    if truth or isinstance(number, bool):
        return type(number)(not number)
    if isinstance(number, int):
        return number + sign
    return sign * FAR * (1 + abs(number) if math.isfinite(number) else 1)


def some_turns(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Those that are tried: of the first readings, and of the last one, which may end a loop."""
    return turns if len(turns) <= MOST_TURNED else (*turns[: MOST_TURNED - 2], *turns[-2:])


@contextlib.contextmanager
def watched(
    module: nn.Module, path: str, number: Callable[[Tensor], TensorRef], found: list[SizeUse], leaks: list[TensorRef]
) -> Iterator[None]:
    """Run a module with integer attributes that remember their origin."""
    changed: list[tuple[nn.Module, str, int]] = []
    for inner, part in named_modules(module):
        if type(part).__module__.startswith("torch.nn"):
            continue
        for name, value in list(vars(part).items()):
            if type(value) is int and not name.startswith("_"):
                vars(part)[name] = TracedInt.of(value, (".".join(p for p in (path, inner) if p), name))
                changed.append((part, name, value))
    try:
        with SizeObserver(number, found, leaks):
            yield
    finally:
        for part, name, value in changed:
            vars(part)[name] = value


@functools.lru_cache(maxsize=4096)
def draws(method: Callable[..., Any] | str) -> bool:
    """Whether a function of torch, or a method of tensors by its name, draws from a generator."""
    op = getattr(torch.ops.aten, method if isinstance(method, str) else getattr(method, "__name__", ""), None)
    found = op.overloads() if isinstance(op, torch._ops.OpOverloadPacket) else ()
    return any(torch.Tag.nondeterministic_seeded in getattr(op, name).tags for name in found)


def makes(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch makes a tensor of numbers, and of no array of NumPy's."""
    return getattr(method, "__name__", "") in MAKING and not any(isinstance(v, np.ndarray) for v in iterate((args, kwargs)))


def is_fraction(value: Any) -> bool:
    """Whether a value is a tensor with contents, and they are no whole numbers."""
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta


def tensors_behind(node: fx.Node, how: str) -> frozenset[str]:
    """The names of the model's tensors that a node is computed from; raises ReadsValue where numbers are drawn on the way."""
    pending, seen = [node], {node}
    while pending:
        new = [m for m in pending.pop().all_input_nodes if m not in seen]
        seen.update(new)
        pending += new
    if any(n.op in ("call_function", "call_method") and draws(n.target) for n in seen):
        raise ReadsValue(f"{how}() of %{node.name}, which is drawn")
    return frozenset(str(n.target) for n in seen if n.op == "get_attr")


TAKING = (operator.getitem, "item", float)  # an element of what they are given
COMPARISONS = {"lt": (False, True), "le": (False, True), "gt": (True, False), "ge": (True, False)}


def outcome(node: fx.Node) -> bool | None:
    """What a comparison comes to, whatever is drawn: `torch.rand([]) < 0.0` never holds. None where that is open.

    A number is compared with elements of a tensor that lie between bounds by what made them, and that nothing else has read.
    """
    name = getattr(node.target, "__name__", node.target)
    if name not in COMPARISONS or len(node.args) != 2 or isinstance(node.args[1], fx.Node):
        return None
    drawn, number = node.args
    while isinstance(drawn, fx.Node) and len(drawn.users) == 1 and (find_node(drawn).moves or drawn.target in TAKING):
        drawn = drawn.args[0] if drawn.args else None
    within = find_node(drawn).within if isinstance(drawn, fx.Node) and len(drawn.users) == 1 else None
    if within is None or not isinstance(number, int | float):
        return None
    below, above = COMPARISONS[name]
    if number >= within[1]:
        return above
    return below if number < within[0] or (number == within[0] and name in ("lt", "ge")) else None


class RootWrapper(nn.Module):
    """A model whose own forward reads values, as the one opaque module of a program of one node."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.whole = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)
