"""Opaque modules: one node of the graph, run under the recorder, rewritten by changing what their forward reads.

The tensors inside are cut like any others. Sizes in their Python code come from integer attributes: while the module runs,
each attribute is an integer that remembers where it came from, and where one turns up as a size of a tensor, the pruned
size of that tensor is what the attribute must become. Standard layers inside have the table of attributes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.passes.attributes import changed_attributes
from fxprune.passes.tape import Ref, collect

if TYPE_CHECKING:
    from fxprune.passes.rewrite import Rewriter

# functions whose trailing integers are the sizes of the result, and how many arguments come before them
SIZED = dict.fromkeys(["view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full"], 1)
SIZED |= dict.fromkeys(["zeros", "ones", "empty", "full", "rand", "randn"], 0)


class Origin(int):
    """An integer attribute that remembers its module and name."""

    module: str
    name: str


class SizeUse:
    """An attribute found as the size of a dimension of a tensor."""

    def __init__(self, origin: Origin, ref: Ref, dim: int) -> None:
        self.module, self.name, self.ref, self.dim = origin.module, origin.name, ref, dim


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
                self.found.append(SizeUse(size, self.number(out), first + i))


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
                origin = Origin(value)
                origin.module, origin.name = ".".join(p for p in (path, inner) if p), name
                vars(part)[name] = origin
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
        module = r.capture.root.get_submodule(call.module)
        refs = collect(call.args, Ref)
        before, after = [r.before(x) for x in refs], [r.after(x) for x in refs]
        edits.setdefault(call.module, {}).update(changed_attributes(module, before, after, r.shapes_of(call.module)))
    for use in r.capture.sizes.get(path, ()):
        if r.after(use.ref)[use.dim] != r.before(use.ref)[use.dim]:
            edits.setdefault(use.module, {})[use.name] = r.after(use.ref)[use.dim]
    return edits


class Whole(nn.Module):
    """A model whose own forward reads values, as the one opaque module of a program of one node."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.whole = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.whole(*args, **kwargs)
