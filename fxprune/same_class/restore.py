"""Give a pruned model the class of the original back.

The model is captured as one opaque module (see `capture/opaque.py`): its tensors are cut by the plan, and integer attributes
that turn up as sizes are corrected, layer by layer. Every forward is the class's own then. Where one does not compute what
the pruned program of that module does, because its code holds a width that no attribute has, the module gets that program as
its forward: the innermost such module, since they are tried from the inside out.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.criteria.lockstep import without_cache
from fxprune.errors import PruneWarning
from fxprune.inputs import ExampleInputs
from fxprune.module_state import take_modes
from fxprune.passes.capture.capture import capture_program
from fxprune.passes.capture.programs import programs
from fxprune.passes.coupling.couple import couple_channels, with_unread
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.errors import PruneError, surface
from fxprune.passes.ir.module_tree import named_modules, named_tensors, private_copy, set_mode, walk
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.quiet import gpus_of, own_random_state, random_state, set_random_state, unobserved
from fxprune.passes.ir.slices import Slicer, TensorSlice
from fxprune.passes.rewrite.pruned_module import PrunedModule, RewrittenForward
from fxprune.passes.rewrite.rewrite import rewrite_program, slice_tensor
from fxprune.plan import PlanData, is_pruned, kept_labels, plan_between
from fxprune.same_class.arguments import fit_arguments
from fxprune.same_class.attributes import update_attributes
from fxprune.same_class.calls import Call, call_of, noting_calls, plain, program_for
from fxprune.same_class.configuration import Attributes, Experiment, configure, conflict
from fxprune.same_class.constants import widths_in_constants
from fxprune.same_class.numbers import fit_numbers
from fxprune.same_class.saving import SavePretrained
from fxprune.same_class.silent import constants_of, drop_removed, take_program
from fxprune.selection.choice import removal_of
from fxprune.verification import Verification, difference, evaluating, restoring, tolerance_of


def restore_class(model: nn.Module, pruned: PrunedModule, inputs: ExampleInputs) -> tuple[Any, dict[str, str]]:
    """The pruned model as an object of the original's class, and the tensors that had to stay whole for a configuration.

    `meta["stale"]` names attributes that may still say an original width: `path.name` each, and `config` where no configuration
    of the class describes the pruned model. A GraphModule is of its class as it was emitted.
    """
    if isinstance(model, fx.GraphModule):
        pruned.meta["stale"] = ()
        return pruned, {}
    own = own_meta(model, pruned)
    gpus = gpus_of(model)
    with unobserved(model), own_random_state(), evaluating(pruned), restoring(pruned), torch.no_grad():
        draws = random_state(gpus)  # a model that draws numbers draws the same ones in each run
        allowed = tolerance_of(pruned)
        tolerance = allowed / 100  # the weights are the same, and so nearly is the order of additions
        with restoring(pruned):  # whose tensors the copy shares
            wanted = [t.clone() for t in collect(inputs.map(torch.clone).call(pruned), Tensor)]

        def run(other: nn.Module, given: ExampleInputs = inputs) -> Any:
            with evaluating(other), restoring(other):
                set_random_state(draws, gpus)
                return given.map(torch.clone).call(other)

        def error_of(other: Any) -> float:
            return error_of_run(lambda: run(other), wanted)

        made, known = shrunk_copy(model, pruned, inputs)
        gone = drop_removed(model, pruned, made, lambda: error_of(made) <= tolerance, run)
        found = Experiment(model), made, known, error_of, tolerance
        # no configuration says that a block has lost a branch
        configured = (None, False)[hasattr(model, "config")] if gone else configure(*found)
        error = error_of(made)
        if error > tolerance:
            made = fitted_without_cache(model, pruned, made, inputs, error_of, tolerance)
            with evaluating(made):
                try_forwards(model, pruned, made, inputs, tolerance)
            ignore_keywords(model, made, lambda: run(model))
            error = error_of(made)
        stale = ["config"] if configured is False else []
        held = {} if configured is not False or gone else widths_in_constants(found[0], made, *found[2:])
        if error > tolerance:
            if not fit_arguments(model, made, pruned, run, lambda: error_of(made) <= tolerance):
                take_program(made, pruned, vars(pruned)["_programs"])
            error = error_of(made)
        more = functools.partial(run, given=inputs.one_more())
        if error > tolerance or fails_elsewhere(model, pruned, made, more, tolerance):
            made = pruned.as_class(type(model))
        stale += update_attributes(model, made, lambda: error_of(made) <= tolerance, run, built=bool(configured))
        if error_of(made) > allowed:
            raise PruneError(
                f"the pruned model does not compute the same as a {type(model).__name__}",
                where=type(model).__name__,
                fix="take the GraphModule that prune returns without same_class, and report the model",
            )
    take_modes(made, model)
    vars(made)["meta"] = {**own, **pruned.meta, "stale": tuple(stale)}
    was = getattr(model, "verification", None)
    if was is None or isinstance(was, Verification):
        vars(made)["verification"] = pruned.meta.get("verification")
    if "config" in stale and hasattr(made, "save_pretrained"):
        vars(made)["save_pretrained"] = SavePretrained(made)
    return made, held


def fails_elsewhere(model: nn.Module, pruned: nn.Module, made: nn.Module, run: Callable[[Any], Any], tolerance: float) -> bool:
    """Whether the class computes otherwise, where `run` gives it inputs that the model and its program take.

    A width that is written in a forward may fit by chance: `view(-1, 16)` takes two rows of 8 for one.
    """
    try:
        run(model)
        wanted = [t.clone() for t in collect(run(pruned), Tensor)]
    except Exception:
        return False
    return error_of_run(lambda: run(made), wanted) > tolerance


def own_meta(model: nn.Module, pruned: PrunedModule) -> dict[str, Any]:
    """What a model keeps in an attribute `meta` of its own, where the plan goes too; raises PruneError where it cannot."""
    own = {} if is_pruned(model) else getattr(model, "meta", {})
    if not isinstance(own, dict) or own.keys() & pruned.meta.keys() or hasattr(type(model), "meta"):
        raise PruneError(
            "a member of the model is called 'meta', as is where the plan of a pruned model is kept",
            where=type(model).__name__,
            fix="rename it, or take the GraphModule that prune returns without same_class",
        )
    return own


def in_class(
    model: nn.Module, pruned: PrunedModule, inputs: ExampleInputs, options: CouplingOptions
) -> tuple[Any, CouplingOptions | None]:
    """The pruned model in the original's own class, and where a configuration needs other tensors whole, what to ask."""
    made, held = restore_class(model, pruned, inputs)
    if not held and options.uniform and "config" in made.meta["stale"]:
        warnings.warn(f"uniform=True, and {conflict(model, made)}", PruneWarning, stacklevel=3)
    if not held.keys() - options.frozen.keys():
        return made, None
    name, why = next(iter(held.items()))
    text = f"families stay whole, so that a configuration describes the model: {name} {why}"
    warnings.warn(text, PruneWarning, stacklevel=3)
    return made, replace(options, frozen={**options.frozen, **held})


def shrunk_copy(model: nn.Module, pruned: PrunedModule, inputs: ExampleInputs) -> tuple[Any, Attributes]:
    """A copy of the model with the tensors of `pruned` and its own forwards, and the attributes that they use as sizes."""
    plan, held = plan_between(model, pruned), dict(named_tensors(pruned))

    def taken(name: str, tensor: Tensor, slices: Sequence[TensorSlice]) -> Tensor:
        return held[name] if name in held else slice_tensor(tensor, slices)

    try:
        whole = capture_program(set_mode(private_copy(model), False), inputs.args, inputs.kwargs, whole="stays of its class")
        solution = couple_channels([whole], plan.coupling_options)
        if plan.slices.keys() - solution.leaves.keys():
            solution.captures[0].is_untrained = True
            with_unread(model, inputs.args, inputs.kwargs, solution)
        made: Any = rewrite_program(model, solution, kept_labels(plan, solution), cut=taken).own_model
    except Exception as error:  # couplings that it has only as one module, such as through what its Python reads
        surface(error)
        return with_own_forwards(pruned, type(model)), {}
    trees = [use.tree for found in solution.captures[0].sizes.values() for use in found]
    uses = [tree for tree in trees if len(tree) == 2]  # an attribute itself
    paths = [module.removeprefix("whole").removeprefix(".") for module, _ in uses]
    return made, {(path, name): getattr(made.get_submodule(path), name) for path, (_, name) in zip(paths, uses, strict=True)}


def with_own_forwards(pruned: PrunedModule, kind: type[nn.Module]) -> Any:
    """A copy of the pruned model, which shares its parameters, in which every module has the forward of its class."""
    made = private_copy(pruned.as_class(kind))
    for module in walk(made):
        if isinstance(vars(module).get("forward"), RewrittenForward):
            del vars(module)["forward"]
    return made


def try_forwards(model: nn.Module, pruned: PrunedModule, made: nn.Module, inputs: ExampleInputs, tolerance: float) -> None:
    """Run the pruned model; a module of `made` that computes something else than its counterpart there gets its program.

    Before that, other numbers are tried in its own forward, and parts of what it hands to the modules inside.
    """
    given: dict[str, list[Any]] = {}
    gpus, plan = gpus_of(model), plan_between(model, pruned)

    @functools.cache
    def calls() -> dict[str, list[Call]]:
        """How the original calls those of its modules that may need a program."""
        there = [path for path, m in named_modules(pruned) if path and isinstance(vars(m).get("forward"), RewrittenForward)]
        with evaluating(model), restoring(model), noting_calls(model, there) as found:
            inputs.map(torch.clone).call(model)
        return found

    def before(path: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.setdefault(path, []).append((map_tensors((args, kwargs), torch.clone), random_state(gpus)))

        return noted

    def after(path: str, programs: Any) -> Callable[..., None]:
        def compared(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            ((args, kwargs), draws), afterwards = given[path].pop(), random_state(gpus)
            original, candidate, wanted = model.get_submodule(path), made.get_submodule(path), collect(out, Tensor)

            def call(either: nn.Module) -> Any:
                a, k = map_tensors((args, kwargs), torch.clone)
                set_random_state(draws, gpus)
                return either.forward(*a, **k)

            def is_right() -> bool:
                return error_of_run(lambda: call(candidate), wanted) <= tolerance

            fits = is_right() or fit_numbers(original, candidate, is_right)
            if not fits and not fit_arguments(original, candidate, module, call, is_right):
                take_program(candidate, module, programs)
                if seen := calls().get(path):
                    add_program(candidate, original, path, seen, call_of(module, args, kwargs, out), plan)
            set_random_state(afterwards, gpus)

        return compared

    with contextlib.ExitStack() as stack:
        for path, module in named_modules(pruned):
            forward = vars(module).get("forward")
            if isinstance(forward, RewrittenForward) and path in dict(named_modules(made)):
                for handle in (
                    module.register_forward_pre_hook(before(path), prepend=True, with_kwargs=True),
                    module.register_forward_hook(after(path, forward.programs), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
        with restoring(pruned):
            inputs.map(torch.clone).call(pruned)


def fitted_without_cache(
    model: nn.Module,
    pruned: PrunedModule,
    made: nn.Module,
    inputs: ExampleInputs,
    error_of: Callable[[Any], float],
    tolerance: float,
) -> Any:
    """The pruned model with what its modules were found to need in a run without a cache, if it is right with one, too.

    A program that hands a cache on has no calls of the modules that write to it, and so does not say what they are given.
    """
    plan, given = plan_between(model, pruned), replace(inputs, kwargs=without_cache(model, inputs.kwargs))
    if given.kwargs == inputs.kwargs:
        return made
    tried = private_copy(made)
    try:
        solution = couple_channels(programs(model, given.args, given.kwargs, None), plan.coupling_options)
        kept = kept_labels(plan, solution)
        slicer = Slicer(kept, removal_of(model, solution, kept, plan.removed))
        counterpart = rewrite_program(model, solution, kept, slicer).eval()
        counterpart.meta["plan"] = plan
        with evaluating(tried):
            try_forwards(model, counterpart, tried, given, tolerance)
    except Exception as error:  # where it takes no other inputs
        surface(error)
        return made
    return tried if error_of(tried) <= tolerance else made


def add_program(candidate: nn.Module, module: nn.Module, path: str, calls: list[Call], there: Call, plan: PlanData) -> None:
    """Give a module that has a program another one for calls as the original makes them, where these are otherwise.

    Arguments:
        module: its counterpart in the original, at `path`; `calls` are those of it, and `there` is one of the pruned model.
    """
    if any(plain(call.given) != plain(calls[0].given) for call in calls):
        return
    made = program_for(module, path, calls[0], there, plan)
    inner: Any = None if made is None else made.get_submodule("module")
    forward = vars(inner).get("forward") if inner is not None else None
    if isinstance(forward, RewrittenForward) and not constants_of(inner):
        vars(candidate)["forward"].other = RewrittenForward(candidate, forward.programs)


def ignore_keywords(model: nn.Module, made: nn.Module, run: Callable[[], Any]) -> None:
    """Have programs that stand for a forward take the flags that its class takes and that change nothing there.

    Callers hand them on to all modules, such as `output_hidden_states`. What they change is seen in the original.

    Arguments:
        model: the original; `run` calls it on the example inputs.
        made: the pruned model of its class.
    """

    def tried(forward: RewrittenForward) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            wanted = collect(out, Tensor)
            for name in flags_of(module).difference(kwargs):
                if error_of_run(lambda: module.forward(*args, **kwargs, **{name: True}), wanted) == 0:  # noqa: B023
                    forward.ignored |= {name}

        return compare

    with contextlib.ExitStack() as stack:
        for path, module in named_modules(made):
            forward = vars(module).get("forward")
            if isinstance(forward, RewrittenForward) and flags_of(module):
                stack.callback(model.get_submodule(path).register_forward_hook(tried(forward), with_kwargs=True).remove)
        run()


def flags_of(module: nn.Module) -> set[str]:
    """The truth values among the keywords that a forward takes as `**kwargs: Unpack[...]`."""
    try:
        hints = typing.get_type_hints(type(module).forward)
        more = [p.name for p in inspect.signature(type(module).forward).parameters.values() if p.kind is p.VAR_KEYWORD]
        (named,) = typing.get_args(hints[more[0]])
        said = {name: getattr(hint, "__forward_arg__", str(hint)) for name, hint in named.__annotations__.items()}
        return {name for name, hint in said.items() if "bool" in re.findall(r"\w+", hint)}
    except Exception:  # it says nothing of the kind
        return set()


def error_of_run(run: Callable[[], Any], wanted: list[Tensor]) -> float:
    """The largest relative error of what is returned; infinite where that raises, or has other tensors."""
    try:
        return difference(wanted, run())
    except Exception as error:  # sizes that do not fit
        surface(error)
        return float("inf")
