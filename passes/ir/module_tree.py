"""Module trees: the tensors they hold, and copies of them with tensors swapped."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.closures import rebound, weakly_held
from fxprune.passes.ir.contents import CONTAINERS
from fxprune.passes.ir.pytree import collect

empty, empty_strided = torch.empty, torch.empty_strided  # the originals: a capture replaces factories of torch
META = torch.device("meta")
NOTHING = empty(0, device=META)
PLAIN_TENSORS = frozenset([Tensor, torch.nn.Parameter, torch.nn.Buffer])


def like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same form on the meta device (`torch.empty_like` takes a detour through Python there)."""
    return empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


# what a copy can share with the original: nothing in it can be changed
SHARED: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), type)
SHARED += (types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size, torch.memory_format)
ATOMS = frozenset(SHARED)
FIXED, PLAIN = ATOMS - {types.FunctionType}, ATOMS | CONTAINERS
HOOKS = frozenset(["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"])
CHILDREN = frozenset(["_parameters", "_buffers", "_modules"])


def check_module(model: Any) -> None:
    """Raise PruneError for what is no module."""
    if not isinstance(model, nn.Module):
        raise PruneError(f"model is of type {type(model).__name__}, not a torch.nn.Module", fix="pass the module itself")


def walk(root: nn.Module) -> dict[nn.Module, str]:
    """Every module of a tree with its (first) path, in the order of `named_modules`, which takes a generator per level."""
    found: dict[nn.Module, str] = {root: ""}
    add_children(root, "", found)
    return found


def named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those of `walk`, paths first. A model may have an attribute `named_modules`, or `parameters`, of its own."""
    return [(path, module) for module, path in walk(root).items()]


def add_children(module: nn.Module, start: str, found: dict[nn.Module, str]) -> None:
    for name, child in module._modules.items():
        if child is not None and child not in found:
            found[child] = path = start + name
            if child._modules:
                add_children(child, path + ".", found)


def every_path(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under all of its paths."""
    pending: list[tuple[str, nn.Module]] = [("", root)]
    while pending:
        path, module = pending.pop()
        yield path, module
        if module._modules:
            start = f"{path}." if path else ""
            pending += [(start + n, m) for n, m in reversed(module._modules.items()) if m is not None]


def every_tensor(root: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter, and then every buffer, under all of its names."""
    paths = [(f"{path}." if path else "", module) for path, module in every_path(root)]
    parameters = [(start + name, t) for start, m in paths for name, t in m._parameters.items() if t is not None]
    return [*parameters, *((start + name, t) for start, m in paths for name, t in m._buffers.items() if t is not None)]


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that a module holds itself, by their (first) names."""
    found = {child: name for name, child in reversed(module._modules.items()) if child is not None}
    return {name: child for name, child in module._modules.items() if child is not None and found[child] == name}


class TreeNames:
    """The module tree that programs refer to: what a module is called where another one is the root."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(every_path(root))

    @functools.cached_property
    def names(self) -> dict[int, list[str]]:
        """The names of modules and tensors, by identity; few programs refer to what is outside of their module."""
        found: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            found.setdefault(id(module), []).append(path)
            start, state = f"{path}." if path else "", vars(module)
            plain = () if PLAIN.issuperset(map(type, state.values())) else state.items()
            for name, tensor in (*module._parameters.items(), *module._buffers.items(), *plain):
                if isinstance(tensor, Tensor):
                    found.setdefault(id(tensor), []).append(start + name)
        return found

    def relative(self, target: str, path: str, *, module: bool) -> str | None:
        """The name by which the module at `path` knows a module or a tensor; None where it has none."""
        start = f"{path}." if path else ""
        if target.startswith(start):
            return target[len(start) :]
        owner, _, name = target.rpartition(".")
        found = self.modules.get(target) if module else getattr(self.modules.get(owner), name, None)
        return next((name[len(start) :] for name in self.names.get(id(found), ()) if name.startswith(start)), None)


def with_outer(path: str) -> list[str]:
    """A path and those of what it is in, from the outermost on, but for the root."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def fetch(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module tree holds: parameters, buffers and plain attributes; tied ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for module, prefix in walk(root).items():
        start = f"{prefix}." if prefix else ""
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items() if held else ():
                if tensor is not None and id(tensor) not in found:
                    found[id(tensor)] = (start + name, tensor)
        state = vars(module)
        if not PLAIN.issuperset(map(type, state.values())):
            for name, value in state.items():
                if type(value) not in PLAIN and isinstance(value, Tensor) and id(value) not in found:
                    found[id(value)] = (start + name, value)
    return iter(found.values())


def named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """What `named_parameters` says, without a generator per level."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for module, prefix in walk(root).items():
        for name, parameter in module._parameters.items() if module._parameters else ():
            if parameter is not None and id(parameter) not in found:
                found[id(parameter)] = (f"{prefix}.{name}" if prefix else name, parameter)
    return dict(found.values())


def copy_tree(root: nn.Module, swap: Mapping[int, Tensor]) -> Any:
    """A copy in which the tensors with the given identities are replaced; gradients are not copied.

    Hooks are part of what a module computes (weight normalisation is one), and so are functions that it holds, such as a
    `forward` of its own: the copy calls the same ones, with what the copy holds in place of what the tree does (`rebound`).
    """
    memo, modules = dict[int, Any](swap), list(walk(root))
    for module in modules:
        kind = module.__class__  # a GraphModule would make a class without its forward
        if isinstance(module, fx.GraphModule):  # whose class holds its forward, which another mode puts another one in place of
            kind = type(kind.__name__, (kind,), {"__module__": kind.__module__})
        memo[id(module)] = object.__new__(kind)
    memo |= weakly_held(modules, memo)
    called: list[tuple[dict[str, Any], str]] = []
    for module in modules:
        state = vars(memo[id(module)])
        state.update(vars(module))
        state.pop("_compiled_call_impl", None)  # of `module.compile()`: it calls the original
        for key, value in [item for item in state.items() if type(item[1]) not in FIXED]:
            kind = type(value)
            if kind in CONTAINERS and not value:
                state[key] = memo.setdefault(id(value), kind())  # several modules may hold it
            elif kind is types.FunctionType:
                called += [(state, key)] if value.__closure__ or value.__defaults__ else []
            elif kind is tuple and ATOMS.issuperset(map(type, value)):
                continue
            elif key in HOOKS:
                called.append((state, key))
            elif key in CHILDREN:
                state[key] = kind([(k, None if v is None else duplicate(v, memo)) for k, v in value.items()])
            else:
                state[key] = duplicate(value, memo)
        inner = module._modules.get("_orig_mod")
        if inner is not None and "forward" in state:  # what `torch.compile` returned: it calls the original
            state["forward"] = memo[id(inner)].__call__
    for state, key in called:  # last, when it is known what else the tree holds
        held = state[key]
        state[key] = OrderedDict((k, rebound(h, memo)) for k, h in held.items()) if key in HOOKS else rebound(held, memo)
    return memo[id(root)]


def replace_tensors(root: nn.Module, change: Callable[[str, Tensor], Tensor]) -> None:
    """Put what `change` makes of it in the place of each tensor of a tree; it is called with the (first) name of each.

    A tensor that is a plain attribute becomes what a GraphModule makes of it when it is read: a buffer that is not saved.
    """
    modules = walk(root)
    memo: dict[int, Any] = {}
    replaced: list[Tensor] = []  # held on to, so that their identity stays theirs

    def changed(name: str, tensor: Tensor) -> Tensor:
        made = memo.get(id(tensor))
        if made is None:
            made = memo[id(tensor)] = change(name, tensor)
            replaced.append(tensor)
        return made

    others: list[tuple[nn.Module, str, Any]] = []  # attributes that may hold tensors, also such as are parameters elsewhere
    for module, path in modules.items():
        start = f"{path}." if path else ""
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items() if held else ():
                if tensor is not None:
                    held[key] = changed(start + key, tensor)  # type: ignore[assignment]
        for key, value in [item for item in vars(module).items() if type(item[1]) not in ATOMS]:
            kind = type(value)
            if (kind in CONTAINERS and not value) or key in CHILDREN or key in HOOKS:
                continue
            if kind is tuple and ATOMS.issuperset(map(type, value)):
                continue
            if isinstance(value, Tensor):
                changed(start + key, value)
            others.append((module, key, value))
    memo |= {id(module): module for module in modules} if others else {}
    for module, key, value in others:
        vars(module)[key] = duplicate(value, memo)
        if isinstance(value, Tensor):
            module._non_persistent_buffers_set.add(key)


def duplicate(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute's value; what cannot change is shared."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, SHARED):
        return value
    if type(value) in CONTAINERS and not value:
        return type(value)()
    if type(value) is tuple and all(isinstance(v, SHARED) for v in value):
        return value
    for handle in collect(value, RemovableHandle):
        memo[id(handle)] = RemovableHandle(OrderedDict())  # those of a copy must not remove the original's hooks
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a lock, a process group, a stream: what cannot be copied is shared
        while len(memo) > known:  # what has been copied in part
            memo.popitem()
        if isinstance(value, Tensor):  # computed by the last forward
            return value.detach().clone()
        kind: Any = type(value)
        own = not kind.__module__.startswith("torch.")  # what torch keeps of a module (FSDP does) is shared
        plain = kind.__new__ is object.__new__ and kind.__reduce_ex__ is object.__reduce_ex__
        if own and plain and hasattr(value, "__dict__"):
            made = memo[id(value)] = object.__new__(kind)
            vars(made).update({key: duplicate(v, memo) for key, v in vars(value).items()})
            return made
        if type(value) is dict or type(value) is OrderedDict:
            return type(value)((key, duplicate(v, memo)) for key, v in value.items())
        return type(value)(duplicate(v, memo) for v in value) if type(value) in (set, list, tuple) else value


def own_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor, without its gradient; a parameter where that is one."""
    made = tensor.detach().clone()
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def private_copy(root: nn.Module, stand_in: Callable[[Tensor], Tensor] | None = None) -> Any:
    """A copy to trace: its parameters are the original's, everything that a forward might change is its own.

    Arguments:
        stand_in: what to put in place of each floating tensor, such as an empty one on the meta device.
    """
    swap: dict[int, Tensor] = {}
    for _, tensor in named_tensors(root):
        if stand_in is not None and tensor.dtype.is_floating_point:
            swap[id(tensor)] = stand_in(tensor)
        elif isinstance(tensor, nn.Parameter):
            swap[id(tensor)] = tensor
        elif type(tensor) is Tensor or not tensor.is_leaf:  # (a parameter computed by a hook, left over from the last forward)
            swap[id(tensor)] = tensor.detach().clone()
    return copy_tree(root, swap)


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without contents.

    Parameters ask for gradients whether or not the original does: torch takes a linear layer apart in another way if not.
    """
    empty = like(tensor) if tensor.layout is torch.strided else torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def set_mode(root: nn.Module, training: bool) -> Any:
    """The tree in evaluation or in training mode; what `train()` does, where no module has one of its own."""
    modules = walk(root)
    if has_own_train(modules) or any("training" not in vars(m) for m in modules):
        return root.train(training)
    for module in modules:
        vars(module)["training"] = training
    return root


def modes_in_training(root: nn.Module) -> dict[nn.Module, bool] | None:
    """The mode of every module of a tree once it is told to train; None where telling it does more than that.

    Where a module has a `train` of its own, it is called, and the tree told to evaluate again: `root` is a private copy that
    was told so before.
    """
    modules = walk(root)
    if not has_own_train(modules):
        return dict.fromkeys(modules, True)

    def states() -> list[Any]:
        found: list[Any] = []
        for module in walk(root):
            held = vars(module)
            found += [id(module), len(held), *[id(v) for name, v in held.items() if name != "training"]]
            for box in [v for v in held.values() if type(v) in CONTAINERS and v]:
                found += map(id, box.values() if isinstance(box, dict) else box)
        return found

    evaluated, before = {m: m.training for m in modules}, states()
    try:
        root.train(True)
        trained = {m: m.training for m in modules}
        same = states() == before
        root.train(False)
    except Exception:  # one that is not to be trained
        return None
    return trained if same and states() == before and {m: m.training for m in modules} == evaluated else None


def has_own_train(modules: Iterable[nn.Module]) -> bool:
    kinds: set[Any] = set(map(type, modules))
    return any(kind.train is not nn.Module.train or kind.eval is not nn.Module.eval for kind in kinds)


Apart = dict[bool, frozenset[str]]  # for either mode the paths of modules that are in the other one
