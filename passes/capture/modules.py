"""Layers of torch.nn, which are nodes of the graph; so are the stubs of torch's quantization, which mark places."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.utils.hooks import BackwardHook

from fxprune.passes.capture.patches import not_a_models
from fxprune.passes.capture.proxy import TensorProxy
from fxprune.passes.errors import NeedsValues
from fxprune.passes.ir.module_tree import every_tensor, walk
from fxprune.passes.ir.program import keyword
from fxprune.passes.ir.pytree import ATOMS, iterate, map_tensors

AnyModule = TypeVar("AnyModule", bound=nn.Module)

# Modules of torch.nn whose forward holds sizes as literals or insists on relations that pruning changes.
TRACED_THROUGH = (
    nn.Sequential,
    nn.Unflatten,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.ChannelShuffle,
    nn.modules.padding._ConstantPadNd,
)


STANDARD = ("torch.nn.", "torch.ao.nn.", "torch.ao.quantization.stubs")


@functools.lru_cache(maxsize=4096)
def is_standard(kind: type) -> bool:
    """Whether layers of a class are nodes of the program."""
    return kind.__module__.startswith(STANDARD) and not issubclass(kind, TRACED_THROUGH)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a node of the graph: a layer of torch.nn without modules of its own."""
    alone = not module._modules or all(name == "parametrizations" for name, m in module._modules.items() if m is not None)
    return alone and is_standard(type(module))  # type: ignore[arg-type]  # a class is hashable, whatever mypy says


def form_of(module: nn.Module, args: Any, kwargs: Any) -> Hashable | None:
    """All that the Python of a layer of torch's own can look at, contents of tensors apart.

    None for a layer whose Python is somebody else's in part, by a class or a hook.
    """
    parts: list[Hashable] = []
    places: dict[int, int] = {}
    for inner, path in walk(module).items():
        own: Any = type(inner)
        if not own.__module__.startswith("torch.nn.modules.") or inner._forward_hooks or inner._forward_pre_hooks:
            return None
        for name, value in vars(inner).items():
            if type(value) in ATOMS:
                parts.append((path, name, type(value), value))
            elif name[0] != "_":
                return None
        tensors = (*inner._parameters.items(), *inner._buffers.items())
        parts += [(path, own, *((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors))]
    for value in iterate((args, kwargs)):
        if type(value) is TensorProxy:
            parts.append((value.value.shape, value.value.dtype, places.setdefault(id(value), len(places))))
        elif type(value) in ATOMS:
            parts.append((type(value), value))
        else:
            return None
    return tuple(parts)


@functools.lru_cache(maxsize=4096)
def parameters(kind: type) -> tuple[str, ...]:
    """The names of the arguments that the forward of a class takes by position, in order."""
    found = list(inspect.signature(kind.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    return tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)


def by_position(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer, by position as far as they are given without a gap."""
    left = dict(kwargs)
    for name in parameters(type(module))[len(args) :]:  # type: ignore[arg-type]
        if name not in left:
            break
        args = (*args, left.pop(name))
    return args, left


plain_call = nn.Module._call_impl  # as it is outside of a capture


def own_call(kind: type) -> type | None:
    """The class of a model's that says for a class what a call of its modules does; None where `nn.Module` does."""
    owner = next(k for k in kind.__mro__ if "__call__" in vars(k))
    return None if owner.__module__.startswith("torch.") else owner


def see_own_calls(patches: Any) -> None:
    """A call of a module whose class has a `__call__` of its own is that one call, and what it calls of `nn.Module` a part."""
    tracer = patches.tracer

    def seen(plain: Any) -> Any:
        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not patches.tracing() or module in tracer.entered:
                return plain(module, *args, **kwargs)
            tracer.entered.add(module)
            try:
                return tracer.call_module(module, functools.partial(plain, module), args, kwargs)
            finally:
                tracer.entered.discard(module)

        return called

    for owner in set(map(own_call, set(map(type, tracer.paths)))) - {None}:
        patches.patch(owner, "__call__", seen(vars(owner)["__call__"]))


def see_modules(patches: Any) -> None:
    """Calls of the model's modules, and reads of their tensors, modes and numbers, go to the tracer."""
    tracer = patches.tracer
    plain_getattr = nn.Module.__getattr__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(module) not in patches.seen or "forward" in vars(module):
            patches.look_at(module)
        return tracer.call_module(module, functools.partial(plain_call, module), args, kwargs)

    def read(module: nn.Module, name: str) -> Any:
        if threading.get_ident() != patches.thread:
            return plain_getattr(module, name)
        if tracer.plain.withdrawn and (number := tracer.plain.answer(module, name)) is not None:
            return number
        value = plain_getattr(module, name)
        return tracer.read_tensor(value) if isinstance(value, Tensor) and patches.tracing() else value

    def training(module: nn.Module) -> bool:
        if patches.tracing():
            tracer.frames[-1].asked = True
        elif threading.get_ident() == patches.thread:
            tracer.evaluator.note_mode_read(module)
        try:
            return bool(vars(module)["training"])
        except KeyError:
            raise AttributeError("training") from None

    for module in tracer.paths:  # what `__call__` calls instead of forward and the hooks, where it is there
        patches.undo.append(tracer.stored.put(module, "_compiled_call_impl", functools.partial(called, module)))
    kinds: set[Any] = set(map(type, tracer.paths))
    if any(kind.__getattr__ is not plain_getattr for kind in kinds):  # which may ask that of `nn.Module`
        kinds = {nn.Module}
    for kind in kinds:  # all subclasses are told of a change of `nn.Module` (decision 457)
        patches.patch(kind, "__getattr__", read)
    tracer.plain.read = read
    patches.patch(nn.Module, "training", property(training, lambda m, v: vars(m).__setitem__("training", v)))


def see_moves(patches: Any) -> None:
    """A forward that moves a module to where it is (`self.to(x.device)`) does nothing by that."""
    plain = nn.Module._apply

    def applied(module: nn.Module, function: Any, *args: Any, **kwargs: Any) -> Any:
        if not patches.tracing():
            return plain(module, function, *args, **kwargs)
        with patches.tracer.paused():
            try:
                stays = all(function(t) is t for _, t in every_tensor(module))
            except NotImplementedError as error:  # tensors without contents are nowhere
                raise NeedsValues from error
        return module if stays else plain(module, function, *args, **kwargs)

    patches.patch(nn.Module, "to", patches.given_values(nn.Module.to))
    patches.patch(nn.Module, "_apply", applied)


def keep_backward_hooks(patches: Any) -> None:
    """Hooks of modules for the backward pass stay those of the modules: they are no question of the model's about gradients."""
    plain = BackwardHook._apply_on_tensors

    def applied(hook: Any, function: Any, args: Any) -> Any:
        return (args, None) if patches.tracing() else plain(hook, function, args)

    patches.patch(BackwardHook, "_apply_on_tensors", applied)


def is_own(hook: Any) -> bool:
    """Whether a hook is of the model's, and not one of torch's, such as weight normalisation."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return not not_a_models({"__name__": getattr(hook, "__module__", None) or type(hook).__module__})


def has_own_hooks(module: nn.Module) -> bool:
    held = (module._forward_pre_hooks, module._forward_hooks)
    return any(held) and any(map(is_own, (hook for hooks in held if hooks for hook in hooks.values())))


def drop_own_hooks(module: nn.Module) -> None:
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        vars(module)[name] = OrderedDict((k, hook) for k, hook in vars(module)[name].items() if not is_own(hook))


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a module's hooks hand to its forward."""
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            found: Any = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if found is None else found
        elif (found := hook(module, args)) is not None:
            args = found if isinstance(found, tuple) else (found,)
    return args, kwargs


def after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """What a module's hooks make of what its forward returned for these arguments."""
    for key, hook in module._forward_hooks.items():
        given = (args, kwargs, out) if key in module._forward_hooks_with_kwargs else (args, out)
        found = hook(module, *given)
        out = out if found is None else found
    return out


def before_another(owner: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return before_forward(owner, args, kwargs)


def after_another(owner: nn.Module, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    return after_forward(owner, args, kwargs, out)


def with_hooks_of(owner: nn.Module, module: AnyModule) -> AnyModule:
    """A module with the hooks of another one, which are called with that."""
    if owner._forward_pre_hooks:
        module.register_forward_pre_hook(functools.partial(before_another, owner), with_kwargs=True)
    if owner._forward_hooks:
        module.register_forward_hook(functools.partial(after_another, owner), with_kwargs=True)
    return module


@contextlib.contextmanager
def without_own_hooks(module: nn.Module) -> Iterator[None]:
    """A layer without hooks of the model's."""
    before = module._forward_pre_hooks, module._forward_hooks
    drop_own_hooks(module)
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = before


OPTIONAL = frozenset([bool, int, float, str, type(None)])  # what is written down as a default


def defaults(signature: inspect.Signature) -> dict[str, tuple[Any, ...]]:
    """What placeholders have as arguments: a default for what may be left out, and for all after it, as in Python."""
    found, optional = dict[str, tuple[Any, ...]](), False
    for name, parameter in signature.parameters.items():
        optional = optional or parameter.default is not inspect.Parameter.empty
        found[name] = (parameter.default if type(parameter.default) in OPTIONAL else None,) if optional else ()
    return found


def handed(tracer: Any, node: fx.Node, value: Any) -> Any:
    """What a forward is handed for a placeholder: plain values among what it takes by `**` may be left out.

    A flag is itself, and so fixed, unless the forward runs as it is: it may be asked `flag is False`, which no proxy answers.
    """
    if str(node.target)[:2] == "**":
        tracer.results[node], tracer.depends[node] = map_tensors(value, tracer.recorder.ref), True
        made = lambda k, v: tracer.create_node("call_function", keyword, (node, k, v), {}, k)  # noqa: E731
        return {k: handed(tracer, made(k, v), v) if type(v) in OPTIONAL else tracer.item(node, k, v) for k, v in value.items()}
    proxy = tracer.bind(node, value)
    node.meta["fixed"] = value is None or (type(value) is bool and not tracer.is_one_module)
    return value if node.meta["fixed"] else proxy
