"""The pruned model: a GraphModule over the module tree of the original, with one program for each mode."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from fxprune.passes.capture.modules import with_hooks_of
from fxprune.passes.errors import GuardError, PruneError
from fxprune.passes.ir.module_tree import Apart, fetch, named_modules
from fxprune.passes.ir.program import IS_GRAD_ENABLED, REGIONS, SET_GRAD_ENABLED
from fxprune.passes.rewrite.changes import tree_text
from fxprune.passes.rewrite.guards import with_texts_as_arguments
from fxprune.passes.rewrite.programs import OWN_MODEL, Forwards, Program, numbered, without_dead

CASTING = ("cpu", "cuda", "mps", "xpu")  # devices that autocast knows
# the attributes of a `PrunedModule` itself
OWN = ("_programs", "_flat", "_apart", "_mode", "_other", "_sequence", "_takes", OWN_MODEL)


class Member:
    """A module, parameter or buffer of the model under a name that a GraphModule has a use for, too: read as the model does."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module, kind: type | None = None) -> Any:
        return nn.Module.__getattr__(module, self.name)


def restoring(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that leaves gradients and autocast as they were where it raises: a program has no `finally`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = IS_GRAD_ENABLED()
        casts = None if torch.compiler.is_compiling() else autocast_state()
        try:
            return function(*args, **kwargs)
        except BaseException:
            SET_GRAD_ENABLED(before)
            if casts is not None:
                set_autocast_state(*casts)
            raise

    return run


def autocast_state() -> tuple[int, bool, dict[str, tuple[bool, torch.dtype]]]:
    """How many regions the thread is in, whether casts are remembered, and for each device whether and to what is cast."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    casts = {device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in CASTING}
    return depth, torch.is_autocast_cache_enabled(), casts


def set_autocast_state(depth: int, remembers: bool, casts: Mapping[str, tuple[bool, torch.dtype]]) -> None:
    for _ in range(autocast_state()[0] - depth):
        torch.autocast_decrement_nesting()
    torch.set_autocast_cache_enabled(remembers)
    for device, (enabled, dtype) in casts.items():
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


class Functions:
    """The functions generated for programs: one for all that do the same, as those of repeated blocks do.

    Guards of such blocks differ in what they say, which names the block: these texts are the first arguments of a function.
    """

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], list[tuple[list[Any], tuple[Any, list[str]]]]] = {}

    def of(self, program: Program) -> tuple[Any, list[str], tuple[str, ...]]:
        """The function of a program, the names of its arguments, and the texts that it is given before these."""
        program, texts = with_texts_as_arguments(program)
        form, found = numbered(program), None
        candidates = self.known.setdefault(tuple([(line.op, line.target) for line in program.lines]), [])
        for other, generated in candidates:
            found = generated if other == form else found
        if found is None:
            code = program.graph().python_code("self")
            function = fx.graph_module._forward_from_src(code.src, code.globals)
            function = restoring(function) if any(line.target in REGIONS for line in program.lines) else function
            taken = [*inspect.signature(function).parameters.values()][1 + len(texts) :]
            found = function, [f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name for p in taken]
            candidates.append((form, found))
        return *found, texts


class RewrittenForward:
    """The forward of one module of a pruned model: a program for each of its modes, in place of that of its class.

    Attributes:
        module: the module.
        programs: by whether it is in training; one alone where both modes have the same.
        ignored: keywords that its class takes, and that change nothing of what it computes, whether true or false.
        other: the forward for calls that are otherwise than at capture, if there is one.
    """

    other: RewrittenForward | None = None

    def __init__(
        self,
        module: nn.Module,
        programs: Mapping[bool, Program],
        generated: Functions | None = None,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        self.module, self.programs, self.ignored = module, dict(programs), ignored
        self.generated = generated or Functions()
        self.functions: dict[bool, list[Any]] = {False: [], True: []}

    def prepare(self, mode: bool) -> None:
        """Generate the function of a mode, where that has not been done."""
        if not self.functions[mode]:
            self.functions[mode][:] = self.generated.of(self.programs.get(mode, next(iter(self.programs.values()))))

    # as `torch.compiler.assume_constant_result` does, which imports the compiler: that runs this where it traces a call
    prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.prepare(mode := self.module.training)
        function, taken, texts = self.functions[mode]
        if kwargs:
            kwargs = {name: v for name, v in kwargs.items() if name not in self.ignored or not isinstance(v, bool | None)}
            check_keywords(type(self.module).__name__, kwargs, taken)
        if self.other is None:
            return function(self.module, *texts, *args, **kwargs)
        try:
            return function(self.module, *texts, *args, **kwargs)
        except GuardError as error:  # which comes before anything is computed, where plain arguments differ
            try:
                return self.other(*args, **kwargs)
            except GuardError:
                raise error from None

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def __getattr__(self, name: str) -> Any:
        return said_of_forward(self, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "functions": {False: [], True: []}, "generated": Functions()}


def said_of_forward(stand_in: Any, name: str) -> Any:
    """What functions say of themselves, such as their name and source, of the forward that an object stands in for."""
    if name in vars(types.FunctionType) and "module" in vars(stand_in):
        return getattr(type(stand_in.module).forward, name)
    raise AttributeError(f"{type(stand_in).__name__!r} object has no attribute {name!r}")


def check_keywords(module: str, given: Iterable[str], taken: Iterable[str]) -> None:
    """Raise GuardError for a keyword that a program was not captured with."""
    unknown = [name for name in given if name not in taken]
    if unknown and not any(name.startswith("**") for name in taken):
        raise GuardError(
            f"{module} was not captured with {', '.join(unknown)}, and takes {', '.join(taken) or 'nothing'}: "
            "prune with that in example_inputs, or with same_class=True"
        )


def layers_at(module: nn.Module, index: int | slice) -> nn.Module:
    """What `nn.Sequential` has at an index, or a Sequential of several."""
    found: Any = list(module.children())[index]
    return nn.Sequential(*found) if isinstance(index, slice) else found


# which an object may have been given in place of those of its class
METHODS = frozenset(["forward", "train", "eval", "recompile"])
SEQUENCE = {"__len__": lambda m: len(m._modules), "__iter__": lambda m: iter(m.children()), "__getitem__": layers_at}


class PrunedModule(fx.GraphModule):
    """A pruned model.

    Its submodules are those of the original, under their names and of their classes, with smaller tensors: each can be
    called, indexed and hooked as there. The graph calls them; `flat()` is the same program without those calls. Where
    training runs another program than evaluation, `train()` and `eval()` switch; modules that they leave in the other mode in
    the original they leave so here.

    It prints as its module tree, with what changed. `meta["plan"]` says what was removed, `meta["verification"]` how exact the
    result is. Copies, and what `torch.save` stores
    of it, keep both programs and `meta`.
    """

    _takes: list[str]  # names of the program's inputs

    def __init__(
        self,
        tree: nn.Module,
        programs: dict[bool, Program],
        flat: dict[bool, Program],
        forwards: Forwards,
        apart: Apart,
        name: str = "Pruned",
        own_model: nn.Module | None = None,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        held = vars(self)
        for taken in own_attributes().intersection((*tree._modules, *tree._parameters, *tree._buffers)):
            raise PruneError(
                f"a member of the model is called {taken!r}, as is what a GraphModule keeps", where=name, fix="rename it"
            )
        held.update({k: v for k, v in vars(tree).items() if k not in own_attributes() and k not in METHODS})
        generated = Functions()
        for path, found in forwards.items():
            module = fetch(tree, path)
            vars(module)["forward"] = RewrittenForward(module, found, generated)
        held |= {"_programs": programs, "_flat": flat, "_apart": apart, "_mode": False, "_other": None, OWN_MODEL: own_model}
        before = bool(vars(tree).get("_sequence"))  # of one that was pruned before
        held["_sequence"] = isinstance(tree, nn.Sequential) or before
        self._run(programs[False].graph())

    def recompile(self) -> PythonCode:
        if not len(self._graph.nodes):  # the empty one that `__init__` starts with
            return PythonCode("", {}, None)
        vars(self)["_takes"] = [str(node.target) for node in self._graph.nodes if node.op == "placeholder"]
        code = super().recompile()
        if any(node.target in REGIONS for node in self._graph.nodes):
            type(self).forward = restoring(type(self).forward)
        return code

    def train(self, mode: bool = True) -> PrunedModule:
        super().train(mode)
        apart = vars(self)["_apart"].get(mode, frozenset())
        if self.own_model is not None:
            vars(self.own_model)["training"] = mode != ("" in apart)
        for path, module in named_modules(self) if apart else ():
            if path:
                module.training = mode != (path in apart)
        self._choose(mode)
        return self

    def _run(self, graph: fx.Graph) -> None:
        """Have this graph; a member of the model that is called as something that only a GraphModule has comes before that."""
        fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]
        only = set(dir(PrunedModule)).difference(dir(nn.Module))
        for name in only.intersection((*self._modules, *self._parameters, *self._buffers)):
            setattr(type(self), name, Member(name))
        for name, method in SEQUENCE.items() if vars(self)["_sequence"] else ():
            setattr(type(self), name, method)  # the class is this object's alone

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs:
            check_keywords(type(self).__name__, kwargs, self._takes)
        return super()._call_impl(*args, **kwargs)

    def _choose(self, mode: bool) -> None:
        """Switch to the program of a mode."""
        held = vars(self)
        if mode != held["_mode"] and len(held["_programs"]) > 1:
            graph = held["_other"] or held["_programs"][mode].graph()
            held["_other"], held["_mode"] = self._graph, mode
            self._run(graph)

    def flat(self) -> fx.GraphModule:
        """The program of the present mode as one flat graph of layers and functions, which shares this module's tensors."""
        if self.own_model is not None:
            return self
        programs = vars(self)["_flat"]
        lines = without_dead(programs.get(self.training, programs[False]).lines)
        return with_hooks_of(self, fx.GraphModule(self, Program(tuple(lines)).graph(), type(self).__name__))

    def as_class(self, cls: type[nn.Module]) -> Any:
        """An object of another class with all that this module holds, and its programs as forward."""
        if self.own_model is not None:
            return self.own_model
        made: Any = object.__new__(cls)
        vars(made).update({k: v for k, v in vars(self).items() if k not in own_attributes()})
        vars(made)["forward"] = RewrittenForward(made, vars(self)["_programs"])
        return made

    @property
    def own_model(self) -> Any:
        """Of a model that was captured as one node: what runs its forward, over the same tensors and modules. Else None."""
        return vars(self)[OWN_MODEL]

    @property
    def plan(self) -> Any:
        return self.meta.get("plan")

    @property
    def verification(self) -> Any:
        return self.meta.get("verification")

    def __repr__(self) -> str:
        """The module tree with what pruning changed of it; `code` is the program."""
        return tree_text(self, self.meta.get("before", {}))

    __str__ = __repr__

    # -- copies ---------------------------------------------------------------------------------------------------------

    def _written(self) -> dict[str, Any]:
        """All attributes, with the graphs as they are by now written down."""
        held = dict(vars(self))
        graph, other, mode = held.pop("_graph"), held.pop("_other"), held["_mode"]
        programs = dict(held["_programs"])
        programs[mode] = Program.of(graph)
        if other is not None:
            programs[not mode] = Program.of(other)
        return held | {"_programs": programs, "_other": None}

    def _filled(self, state: dict[str, Any], name: str) -> PrunedModule:
        type(self).__name__ = name
        vars(self).update(state)
        self._run(state["_programs"][state["_mode"]].graph())
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self._written(), type(self).__name__)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        made = memo[id(self)] = PrunedModule.__new__(PrunedModule)
        return made._filled(copy.deepcopy(self._written(), memo), type(self).__name__)

    def __copy__(self) -> PrunedModule:
        state = {k: copy.copy(v) if type(v) is dict else v for k, v in self._written().items()}
        return restored(state, type(self).__name__)


@functools.cache
def own_attributes() -> frozenset[str]:
    """The attributes of a `PrunedModule` that a module of another class does not have."""
    return frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module())) | frozenset(OWN)


def restored(state: dict[str, Any], name: str) -> PrunedModule:
    """A pruned model of its attributes; what unpickling calls."""
    made: PrunedModule = PrunedModule.__new__(PrunedModule)
    return made._filled(state, name)
