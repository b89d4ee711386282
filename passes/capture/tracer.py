"""The tracer: decides for each module call whether it becomes a node or is traced through."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fxprune.passes.capture.builder import GraphBuilder
from fxprune.passes.capture.frames import Frame
from fxprune.passes.capture.modules import (
    by_position,
    defaults,
    drop_own_hooks,
    handed,
    has_own_hooks,
    is_layer,
    own_call,
    plain_call,
    without_own_hooks,
)
from fxprune.passes.capture.opaque import RootWrapper
from fxprune.passes.capture.plain_modules import PlainModules, is_plain
from fxprune.passes.capture.proxy import unwrap
from fxprune.passes.capture.proxy_attributes import internal
from fxprune.passes.capture.rollback import facts_written, written_in_place
from fxprune.passes.capture.train_eval import Modes, captured_in_both, same_in_training
from fxprune.passes.errors import PruneError, ReadsValue, WritesWhatItReads, surface
from fxprune.passes.ir.index_contents import version_of
from fxprune.passes.ir.module_tree import walk
from fxprune.passes.ir.outputs import named_outputs
from fxprune.passes.ir.program import IS_GRAD_ENABLED, SET_GRAD_ENABLED, CapturedProgram, assigned
from fxprune.passes.ir.pytree import TensorRef, tensors
from fxprune.passes.ir.quiet import undrawn

UNWATCHED: contextlib.nullcontext[dict[str, int]] = contextlib.nullcontext({})
COUNTED = "numbers that the forward changes on modules are those of the capture, in every call:"


class ValueTracer(GraphBuilder):
    """Traces a module tree on example arguments.

    Arguments:
        root: the module tree; a private copy.
        args, kwargs: of the forward.
        retry: whether a module whose forward raises becomes opaque.
    """

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, retry: bool = True) -> None:
        super().__init__(root, retry=retry)
        self.example_args, self.example_kwargs = args, kwargs
        self.forward: Callable[..., Any] = root.forward  # whose signature the program gets
        self.is_one_module = False  # whether that is the forward of a module which is all there is in the root, and one node
        self.paths = walk(root)
        self.watches_draws = False  # whether modules that draw from Python's or NumPy's generator are one node each
        self.plain = PlainModules()
        self.modes = Modes.of(root)
        self.inputs: list[TensorRef] = []
        self.hooked: dict[str, nn.Module] = {}  # layers whose hooks are steps of the program
        self.entered: set[nn.Module] = set()  # modules whose own `__call__` is running

    def run(self) -> None:
        """Trace; `Patches` must be in force."""
        args, kwargs = self.placeholders()
        self.frames = [root := Frame("", self.root, tuple(args), kwargs, len(self.index))]
        with self.interception:
            self.recorder.tracing = True
            try:
                returned = self.root_call(*args, **kwargs)
                for module in self.stored.before:
                    self.note_assigned(module)
                root.asked = root.asked and not same_in_training(self, self.modes, root, self.root_call, returned)
            finally:
                self.recorder.tracing = False
        self.create_node("output", "output", () if self.is_one_module else (self.create_arg(returned),), {})

    @property
    def root_call(self) -> Callable[..., Any]:
        """The root's forward; where a call of it does more, that."""
        if own_call(type(self.root)) is None:
            return self.root.forward
        self.entered.add(self.root)
        return self.root

    def placeholders(self) -> tuple[list[Any], dict[str, Any]]:
        """Placeholders for exactly the arguments that were given, by the names that forward gives them."""
        signature = inspect.signature(self.forward)
        bound = signature.bind(*self.example_args, **self.example_kwargs)
        args, kwargs = list[Any](), dict[str, Any]()
        order, complete, default = list(signature.parameters), True, defaults(signature)
        for i, (name, value) in enumerate(bound.arguments.items()):
            complete = complete and order[i] == name  # no argument before it was left out
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(self.placeholder("*" + name, value))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(self.placeholder("**" + name, value))
            elif complete and kind is not inspect.Parameter.KEYWORD_ONLY:
                args.append(self.placeholder(name, value, default[name]))
            else:
                kwargs[name] = self.placeholder(name, value, default[name])
        return args, kwargs

    def placeholder(self, name: str, value: Any, default: tuple[Any, ...] = ()) -> Any:
        node = self.create_node("placeholder", name, default, {}, name.lstrip("*"))
        self.inputs += [self.recorder.add(tensor, from_input=True) for tensor in tensors(value)]
        return handed(self, node, value)

    # -- the state of the thread ------------------------------------------------------------------------------------

    def read_grad_mode(self) -> Any:
        """Whether gradients are on at this point of the program, which nobody knows before it runs."""
        node = self.create_node("call_function", IS_GRAD_ENABLED, (), {})
        return self.bind(node, self.grad_modes[-1][1] if self.grad_modes else False)

    def note_region(self, target: Any, *given: Any) -> fx.Node:
        """A node that changes the state of the thread; nothing but what leaves the region uses its value."""
        args = tuple(g if isinstance(g, fx.Node) else self.create_arg(g) for g in given)
        node = self.create_node("call_function", target, args, {})
        self.results[node], self.depends[node] = None, False
        return node

    def set_grad_mode(self, mode: Any) -> None:
        node = self.note_region(SET_GRAD_ENABLED, mode)
        self.grad_modes.append((self.index[node], bool(unwrap(mode))))

    # -- module calls -----------------------------------------------------------------------------------------------

    def call_module(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.paths.get(module)
        if module in self.entered and getattr(forward, "func", None) is plain_call:
            return forward(*args, **kwargs)
        if self.evaluator.running is not None:
            return self.evaluator.inner_call(path, forward, args, kwargs)
        if path is None:  # created inside forward: it has no name in the tree
            return forward(*args, **kwargs)
        if is_layer(module):
            if has_own_hooks(module):  # which may ask what is given by which name
                found = self.hooked_call(path, module, forward, args, kwargs)
                if found is not None:
                    return found[0]
            elif kwargs:
                args, kwargs = by_position(module, args, kwargs)
        elif path not in self.evaluator.opaque:
            state = self.pause()
            try:
                kind = self.plain.kind(module, args, kwargs, in_training=self.modes.in_training)
            finally:
                self.resume(state)
            if kind is None or kind not in self.plain.kinds:
                return self.traced_call(path, module, forward, kind, args, kwargs)
        else:
            return self.opaque_node(Frame(path, module, args, kwargs, len(self.index), len(self.recorder.op_trace.ops)))
        return self.create_proxy("call_module", path, args, kwargs)

    def traced_call(self, path: str, module: nn.Module, forward: Any, kind: Any, args: Any, kwargs: Any) -> Any:
        """Trace through a module; where that cannot be done, or is not worth it, it becomes a node after all."""
        frame = Frame(path, module, args, kwargs, len(self.index), len(self.recorder.op_trace.ops), kind is not None)
        stored = dict(vars(module)) if kind is not None else {}
        run = functools.partial(self.run_frame, module, forward)
        reason, where = "", None
        self.frames.append(frame)
        try:
            with self.plain.watching(module) if kind is not None else UNWATCHED as unread:
                out = run(*args, **kwargs)
                if frame.asked:
                    out = captured_in_both(self, self.modes, frame, run, out)
            with self.paused():
                if kind is None or not frame.asked or not is_plain(self, self.modes, frame, stored):
                    self.module_calls.append(frame.finished(out, len(self.index), self.names))
                    return out
        except Exception as error:
            self.abandon(frame)
            if not self.retry or isinstance(error, PruneError) or hasattr(error, "fxprune_plain"):
                raise
            surface(error)
            reason, where = reason_of(error), getattr(error, "fxprune_where", None)
        finally:
            self.frames.pop()
        if reason:
            return self.opaque_call(frame, reason, where)
        self.abandon(frame)
        self.plain.add(module, args, unread)
        return self.create_proxy("call_module", path, frame.args, frame.kwargs)

    def run_frame(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a forward returns, traced, with what it assigns to the module's tensors."""
        with undrawn() if self.watches_draws else UNWATCHED:
            out = forward(*args, **kwargs)
        self.note_assigned(module)
        return out

    def hooked_call(self, path: str, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """Trace the hooks of a layer, which is a node without them; None where that cannot be done: they are part of it."""
        frame = Frame(path, module, args, kwargs, len(self.index), len(self.recorder.op_trace.ops))
        held = vars(module)

        def node(*args: Any, **kwargs: Any) -> Any:
            del held["forward"]
            try:
                args, kwargs = by_position(module, args, kwargs) if kwargs else (args, kwargs)
                with without_own_hooks(module):
                    return self.create_proxy("call_module", path, args, kwargs)
            finally:
                held["forward"] = node

        self.frames.append(frame)
        held["forward"] = node
        try:
            out = forward(*args, **kwargs)
            if not frame.asked:  # for the mode
                self.hooked[path] = module
                return (out,)
        except Exception as error:
            surface(error)
        finally:
            del held["forward"]
            self.frames.pop()
        self.abandon(frame)
        return None

    def abandon(self, frame: Frame) -> None:
        """Take back all that a frame did."""
        self.roll_back(frame.begin, frame.first_op)
        self.modes.forget(frame.begin)

    def opaque_call(self, frame: Frame, reason: str, where: str | None) -> Any:
        """Call a module that cannot be traced through as one node."""
        self.evaluator.opaque[frame.path] = reason
        try:
            return self.opaque_node(frame)
        except ReadsValue:  # not as one node either: what is around becomes one
            del self.evaluator.opaque[frame.path]
            raise
        except Exception as plain:  # an error of the model's own, which what is around may expect
            del self.evaluator.opaque[frame.path]
            plain.fxprune_plain = True  # type: ignore[attr-defined]
            plain.fxprune_where = where or getattr(plain, "fxprune_where", frame.path)  # type: ignore[attr-defined]
            raise

    def opaque_node(self, frame: Frame) -> Any:
        """One node for a module that is not traced through; where its Python asks for the mode, one for each mode."""

        def node(*args: Any, **kwargs: Any) -> Any:
            self.calls_opaque = True
            try:
                return self.create_proxy("call_module", frame.path, args, kwargs)
            finally:
                self.calls_opaque = False

        out = node(*frame.args, **frame.kwargs)
        if frame.path in self.evaluator.asking and not isinstance(self.root, RootWrapper):
            return captured_in_both(self, self.modes, frame, node, out)
        self.frames[0].asked |= frame.path in self.evaluator.asking  # of a wrapper, whose program is this one node
        return out

    # -- tensors that are assigned anew ------------------------------------------------------------------------------

    @internal
    def note_assigned(self, module: nn.Module) -> None:
        """Lines that write what a forward has put in the place of a module's tensors into these."""
        for tensor, value in self.stored.assigned(module):
            name, form = self.names.get(id(tensor)), (value.value.shape, value.value.dtype)
            if name is None or self.assigned.get(name) is value or form != (tensor.shape, tensor.dtype):
                continue
            read = name in self.attributes  # else it is not where it was
            held = self.attributes[name] if read else self.bind(self.create_node("get_attr", name, (), {}), tensor)
            self.attributes[name], self.assigned[name] = held, value
            if self.results[held.node] is not self.results[value.node]:  # it was moved to where it is, say
                self.create_proxy("call_function", assigned, (held, value), {})

    @property
    def assigned_alone(self) -> frozenset[str]:
        """The names of tensors that the forward assigns anew and does not write to in place."""
        if not self.assigned:
            return frozenset()
        mine = {self.index[node] for node in self.graph.nodes if node.target is assigned}
        return frozenset(self.assigned) - written_in_place(self.recorder.op_trace, mine)

    @property
    def wrote_constants(self) -> bool:
        return any(map(version_of, self.kept))

    def check_writes(self) -> None:
        """Raises WritesWhatItReads where the program would find what it wrote to a constant in the last call, or write to what
        it has read of a tensor: as it was, where that is assigned anew, and as a fact, where Python has read it.
        """
        again = self.assigned_alone - self.read_as_copies | facts_written(self)
        if again or (self.wrote_constants and not self.writes_constants):
            raise WritesWhatItReads

    # -- the result -------------------------------------------------------------------------------------------------

    def program(self, prefix: str) -> CapturedProgram:
        """What was captured; the tracer holds nothing of it afterwards."""
        self.stored.restore_all(self.index)
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        whole = next((n for n in self.graph.nodes if prefix and n.target == prefix.rstrip(".")), None)
        if whole is not None:  # what the model returns, however many values that is
            output.args = (whole,)
            for guard in [g for g in self.guards if g.how == "len"]:
                self.guards.remove(guard)
                self.graph.erase_node(guard.node)
        only = self.modes.membership(self.graph, self.index)
        evaluator = self.evaluator
        hooked = {p for p in self.hooked if not any(p.startswith(f"{outer}.") for outer in evaluator.opaque)}
        for path in hooked:
            drop_own_hooks(self.hooked[path])
        made = CapturedProgram(
            root=self.root,
            graph=self.graph,
            op_trace=self.recorder.op_trace,
            results=self.results,
            guards=self.guards,
            opaque=evaluator.opaque,
            asking=evaluator.asking,
            functions=frozenset(evaluator.functions),
            calls=evaluator.calls,
            sizes={path: [use for use in uses if use.attributes] for path, uses in evaluator.sizes.items()},
            followed=[use for uses in evaluator.sizes.values() for use in uses if use.is_plain],
            leaks=evaluator.leaks,
            inputs=self.inputs,
            tensor_names=list(self.names.values()),
            outputs=list(named_outputs(output.args[0], self.results)),
            reads_training=self.modes.separate or self.frames[0].asked or only is None,
            only=only or {},
            untracked=evaluator.untracked,
            index=self.index,
            prefix=prefix,
            modules=self.modules,
            apart=self.modes.apart(self.modules),
            given=evaluator.given,
            trains_on_values=self.modes.trains_on_values,
            module_calls=self.module_calls,
            hooked=frozenset(hooked),
            note=f"{COUNTED} {', '.join(self.stored.counted)}" if self.stored.counted and not evaluator.opaque else "",
        )
        self.discard()
        return made


def reason_of(error: Exception) -> str:
    """Why a module is opaque."""
    return f"reads {error}" if isinstance(error, ReadsValue) else f"{type(error).__name__}: {error}"
