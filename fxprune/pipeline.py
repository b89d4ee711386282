"""prune(), couple() and verify(): the pipeline, step by step."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxprune.batch_guards import for_any_batch
from fxprune.inputs import batch_of, check_inputs, describe_inputs, empty_inputs, larger, parse_inputs
from fxprune.model_class import configure, difference, shrink_class
from fxprune.options import Options
from fxprune.passes.capture.capture import capture_program
from fxprune.passes.coupling.analysis import analyse, describe_capture
from fxprune.passes.coupling.couple import couple_channels
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors, private_copy
from fxprune.passes.ir.options import CouplingOptions
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.passes.ir.quiet import uncollected, unobserved
from fxprune.passes.ir.slices import Slicer, TensorSlice
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.passes.rewrite.rewrite import rewrite_program, tensor_cuts
from fxprune.passes.verification.opaque_check import broken, opaque_sites
from fxprune.plan import Plan, kept_by, plan_of
from fxprune.selection.latency import LatencyProbe
from fxprune.selection.select import selected
from fxprune.verification import TOLERANCE, Verification, compare


def apply_plan(plan: Plan, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    plan.check(model)
    device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
    given = empty_inputs(plan.inputs, device) if example_inputs is None else example_inputs
    args, kwargs = parse_inputs(given)
    check_inputs(model, args, kwargs)
    if plan.waiver is not None and batch_of(args, kwargs) == plan.waiver.size:
        args, kwargs = larger(args, kwargs)  # as it was captured
    solution = analyse(model, args, kwargs, plan.coupling_options)
    kept = kept_by(plan, solution)
    pruned = rewrite_program(model, solution, kept, waiver=plan.waiver)
    pruned.meta["plan"] = plan
    pruned.meta["capture"] = describe_capture(solution)
    return pruned


def as_class(model: nn.Module, pruned: PrunedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The pruned model in the original's own class; raises PruneError where it does not compute the same."""
    plan = plan_of(pruned)
    with unobserved(model):
        whole = capture_program(private_copy(model).eval(), args, kwargs, whole=True)
        solution = couple_channels([whole], plan.coupling_options)
        made, known = shrink_class(model, solution, kept_by(plan, solution))
        mode = pruned.training
        wanted = collect(pruned.eval()(*args, **kwargs), Tensor)
        pruned.train(mode)
        modes = {m: m.training for m in made.modules()}
        made.eval()
        tolerance = max((TOLERANCE.get(t.dtype, 1e-3) for t in made.parameters()), default=1e-3)
        run = lambda m: m(*args, **kwargs)  # noqa: E731
        configure(model, made, known, wanted, run, tolerance)
        error = difference(made, wanted, run)
        for m, training in modes.items():
            m.training = training
    if error > tolerance:
        raise PruneError(
            f"the pruned model cannot stay a {type(model).__name__}: its own forward holds sizes that no attribute has",
            where=type(model).__name__,
            fix="take the GraphModule that prune returns without same_class",
        )
    made.__dict__["meta"] = dict(pruned.meta)
    return made


def prune_once(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    coupling_options: CouplingOptions,
    *,
    tensors: Mapping[str, Tensor],
) -> tuple[Solution, Tensor, dict[str, list[TensorSlice]], PrunedModule, dict[str, str]]:
    """From a request to the pruned module. Opaque modules that cannot be cut are found by trying, and then stay whole.

    `tensors` are the model's own, by name.
    """
    frozen_modules: dict[str, str] = {}
    while True:
        coupled = functools.partial(analyse, model, args, kwargs, coupling_options, frozen_modules)
        solution = coupled()
        if solution.captures[0].opaque and options.data is not None:
            options.data = list(options.data)  # it may be asked for again
        timed = options.budget is not None and options.budget.kind == "latency"
        trial = LatencyProbe(model, args, kwargs, coupled) if timed else None
        kept, slicer = selected(model, solution, options, trial)
        sites = opaque_sites(solution, slicer)
        made = tensor_cuts(solution, kept, slicer)
        with uncollected():
            pruned = rewrite_program(model, solution, kept, slicer, made=made, values=tensors)
        if trial is not None:
            pruned.meta["latency"] = trial.found
        if not sites:
            return solution, kept, made, pruned, frozen_modules
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        tolerance = max((TOLERANCE.get(d, 1e-3) for d in dtypes), default=1e-3)
        with unobserved(model):
            found = broken(
                model, pruned, solution, slicer, sites, args, kwargs, heads=coupling_options.heads, tolerance=tolerance
            )
        if not found.keys() - frozen_modules.keys():
            return solution, kept, made, pruned, frozen_modules
        frozen_modules |= found


def is_cheap(model: nn.Module) -> bool:
    """Whether to verify without being asked: a few forwards of a model this small take little time."""
    return sum(math.inf if p.is_meta else p.numel() for p in model.parameters()) <= 100_000_000


def checked_verification(
    model: nn.Module,
    pruned: PrunedModule,
    solution: Solution,
    kept: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    heads: bool,
) -> Verification:
    try:
        found = compare(model, pruned, solution.leaves, kept, heads, args, kwargs, sizes=True)
    except Exception as error:
        raise PruneError(
            f"the pruned model could not be verified: {type(error).__name__}: {error}",
            where=type(model).__name__,
            fix="freeze= the module it names, or verify=False to get the model as it is",
        ) from error
    if not found.ok:
        raise PruneError(
            f"the pruned model is not exact: its relative error is {found.error:.1e}, and {found.tolerance:.0e} is allowed",
            where=type(model).__name__,
            fix="report it with the model; verify=False returns the model as it is",
        )
    return found


def beside(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs on the device where the model is by now."""
    device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
    moved: tuple[tuple[Any, ...], dict[str, Any]] = map_tensors((args, kwargs), lambda t: t.to(device))
    return moved


def built(
    model: nn.Module,
    solution: Solution,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    verify: bool | Literal["auto"] = False,
) -> PrunedModule:
    """The pruned model that a plan makes, verified if asked for.

    Arguments:
        model: the original architecture, with the values to take.
        solution: its coupling, whose captured program becomes the result.
        plan: what is kept.
        args, kwargs: example inputs.
        verify: as for `prune`.
    """
    kept = kept_by(plan, solution)
    pruned = rewrite_program(model, solution, kept)
    device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
    pruned.to(device)  # constants of a program that was captured elsewhere
    pruned.meta["plan"] = plan
    pruned.meta["capture"] = describe_capture(solution)
    if verify is True or (verify == "auto" and is_cheap(model)):
        args, kwargs = beside(model, args, kwargs)
        pruned.meta["verification"] = checked_verification(
            model, pruned, solution, kept, args, kwargs, plan.coupling_options.heads
        )
        coupled = functools.partial(analyse, model, coupling_options=plan.coupling_options)
        pruned = for_any_batch(model, pruned, args, kwargs, coupled, plan.coupling_options.heads)
    return pruned


def planned(
    model: nn.Module,
    solution: Solution,
    choice: tuple[Tensor, Slicer],
    coupling_options: CouplingOptions,
    example_inputs: Any,
) -> Plan:
    """A choice as plain data.

    Arguments:
        model: the original.
        solution: its coupling.
        choice: which labels are kept, and their cutter.
        coupling_options: those of the coupling.
        example_inputs: as for `prune`.
    """
    return Plan(
        {name: tuple(t.shape) for name, t in named_tensors(model)},
        {name: cuts for name, cuts in tensor_cuts(solution, *choice).items() if cuts},
        "heads" if coupling_options.heads else "dims",
        tuple(sorted(coupling_options.keep)),
        describe_inputs(example_inputs),
        coupling_options.release,
    )
