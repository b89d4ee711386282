"""Opaque modules: one node of the graph, run under the recorder, rewritten by changing what their forward reads.

The tensors inside are cut like any others. Sizes in their Python code come from integer attributes: while the module runs,
each attribute is an integer that remembers where it came from, and where one turns up as a size of a tensor, the pruned
size of that tensor is what the attribute must become. Standard layers inside have the table of attributes.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.passes.tape import Ref, collect
from fxprune.passes.tree import fetch

if TYPE_CHECKING:
    from fxprune.passes.rewrite import Rewriter

# functions whose trailing integers are the sizes of the result, and how many arguments come before them
SIZED = dict.fromkeys(["view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full"], 1)
SIZED |= dict.fromkeys(["zeros", "ones", "empty", "full", "rand", "randn"], 0)


class Origin(int):
    """An integer that remembers the attribute it is, or the attributes and numbers it was computed from.

    Attributes:
        tree: the path of a module and the name of an attribute, or an operator and its two sides.
    """

    tree: tuple[Any, ...]

    @classmethod
    def of(cls, value: int, tree: tuple[Any, ...]) -> Origin:
        made = cls(value)
        made.tree = tree
        return made


OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv}


def remembering(name: str, *, swapped: bool) -> Any:
    function = OPERATORS[name]

    def method(self: Origin, other: Any) -> Any:
        a, b = (other, self) if swapped else (self, other)
        value = function(int(a), int(b)) if isinstance(other, int) else NotImplemented
        return value if value is NotImplemented else Origin.of(value, (name, tree_of(a), tree_of(b)))

    return method


def tree_of(number: int) -> Any:
    return number.tree if isinstance(number, Origin) else int(number)


for _name in OPERATORS:
    setattr(Origin, f"__{_name}__", remembering(_name, swapped=False))
    setattr(Origin, f"__r{_name}__", remembering(_name, swapped=True))


@dataclass(frozen=True, slots=True)
class SizeUse:
    """A number that came from attributes, found as the size of a dimension of a tensor."""

    tree: tuple[Any, ...]
    ref: Ref
    dim: int


# by which contents leave a tensor unseen by the dispatcher (`item` is seen)
LEAKS = frozenset(["tolist", "numpy", "__array__", "data_ptr", "__dlpack__", "untyped_storage", "apply_", "map_"])


class Watch(TorchFunctionMode):
    """Sees the sizes that Python code hands to torch, with the attributes they came from.

    `leaks` names the methods by which contents left a tensor: what comes back of them is no longer known.
    """

    def __init__(self, number: Callable[[Tensor], Ref], found: list[SizeUse], leaks: set[str]) -> None:
        super().__init__()
        self.number, self.found, self.leaks = number, found, leaks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in LEAKS:
            self.leaks.add(name)
        if name in SIZED and isinstance(out, Tensor):
            given = (kwargs or {}).get("size", (kwargs or {}).get("shape", args[SIZED[name] :]))
            sizes = given[0] if len(given) >= 1 and isinstance(given[0], tuple | list) else given
            self.note(sizes, out, 0)
        elif name == "unflatten":
            self.note(args[2], out, args[1] % args[0].dim())
        elif name in ("split", "split_with_sizes") and len(args) > 1:
            dim = (args[2] if len(args) > 2 else (kwargs or {}).get("dim", 0)) % args[0].dim()
            for size, part in zip(args[1] if isinstance(args[1], tuple | list) else [args[1]], out, strict=False):
                self.note([size], part, dim)
        return out

    def note(self, sizes: Any, out: Tensor, first: int) -> None:
        for i, size in enumerate(sizes):
            if isinstance(size, Origin):
                self.found.append(SizeUse(size.tree, self.number(out), first + i))


@contextlib.contextmanager
def watched(
    module: nn.Module, path: str, number: Callable[[Tensor], Ref], found: list[SizeUse], leaks: set[str]
) -> Iterator[None]:
    """Run a module with integer attributes that remember their origin."""
    changed: list[tuple[nn.Module, str, int]] = []
    for inner, part in module.named_modules():
        if type(part).__module__.startswith("torch.nn"):
            continue
        for name, value in list(vars(part).items()):
            if type(value) is int and not name.startswith("_"):
                vars(part)[name] = Origin.of(value, (".".join(p for p in (path, inner) if p), name))
                changed.append((part, name, value))
    try:
        with Watch(number, found, leaks):
            yield
    finally:
        for part, name, value in changed:
            vars(part)[name] = value


def opaque_attributes(r: Rewriter, path: str) -> dict[str, dict[str, Any]]:
    """Attribute edits by module path for everything inside an opaque module."""
    edits: dict[str, dict[str, Any]] = {}
    for call in r.capture.calls.get(path, ()):
        edits.setdefault(call.module, {}).update(r.edits(call.module, collect(call.args, Ref)))
    for (module, name), value in solved(r, r.capture.sizes.get(path, ())).items():
        edits.setdefault(module, {})[name] = value
    return edits


def solved(r: Rewriter, uses: Sequence[SizeUse]) -> dict[tuple[str, str], int]:
    """Attributes that change, so that each size comes to what is wanted of it.

    First those that are sizes themselves; then, of a size computed from attributes, one that is not known yet.
    """
    known: dict[tuple[str, str], int] = {}
    computed: list[tuple[Any, int]] = []
    for use in uses:
        wanted = r.after(use.ref)[use.dim]
        if use.tree[0] in OPERATORS:
            computed.append((use.tree, wanted))
        elif use.tree not in known or wanted != r.before(use.ref)[use.dim]:
            known[use.tree] = wanted
    for tree, wanted in sorted(computed, key=lambda item: len(attributes_of(item[0]))):
        for name, value in inverted(r, tree, wanted, known).items():
            known.setdefault(name, value)
    return {name: value for name, value in known.items() if value != original(r, name)}


def original(r: Rewriter, attribute: tuple[str, str]) -> int:
    return int(getattr(fetch(r.capture.root, attribute[0]) if attribute[0] else r.capture.root, attribute[1]))


def attributes_of(tree: Any) -> set[tuple[str, str]]:
    if isinstance(tree, int):
        return set()
    return {tree} if tree[0] not in OPERATORS else attributes_of(tree[1]) | attributes_of(tree[2])


def value_of(r: Rewriter, tree: Any, known: Mapping[tuple[str, str], int]) -> int:
    """What a tree comes to; an attribute that nothing is known of has its original value."""
    if isinstance(tree, int):
        return tree
    if tree[0] not in OPERATORS:
        return known[tree] if tree in known else original(r, tree)
    a, b = value_of(r, tree[1], known), value_of(r, tree[2], known)
    return OPERATORS[tree[0]](a, b) if b or tree[0] != "floordiv" else 0


def inverted(r: Rewriter, tree: Any, wanted: int, known: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """The value that the one unknown attribute of a tree must have; none where the tree is right already, or it cannot be."""
    if isinstance(tree, int) or value_of(r, tree, known) == wanted:
        return {}
    if tree[0] not in OPERATORS:
        return {} if tree in known else {tree: wanted}
    name, a, b = tree
    free = [side for side in (a, b) if attributes_of(side) - known.keys()]
    if len(free) != 1:
        return {}
    other = value_of(r, b if free[0] is a else a, known)
    if name == "add":
        needed = wanted - other
    elif name == "sub":
        needed = wanted + other if free[0] is a else other - wanted
    elif name == "mul":
        needed = wanted // other if other and wanted % other == 0 else 0
    else:
        needed = wanted * other if free[0] is a else (other // wanted if wanted else 0)
    return inverted(r, free[0], needed, known) if needed > 0 else {}


class Whole(nn.Module):
    """A model whose own forward reads values, as the one opaque module of a program of one node."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.whole = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)
