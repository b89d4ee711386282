"""prune(), couple() and verify(): the pipeline, step by step."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxprune import inputs
from fxprune import same_class as own_class
from fxprune.analysis import analyse, described, uncollected, unobserved
from fxprune.batches import for_any_batch
from fxprune.checks import Attention, Freeze, check_attention, check_request, terms_of
from fxprune.choice import selected
from fxprune.coupling import Coupling
from fxprune.criteria.scoring import Criterion
from fxprune.errors import PruneError
from fxprune.latency import Trial
from fxprune.passes.couple import Solution, solve
from fxprune.passes.families import families
from fxprune.passes.kept import Cut
from fxprune.passes.pruned import PrunedModule
from fxprune.passes.shrink import shrink, tensor_cuts
from fxprune.passes.tape import collect
from fxprune.passes.terms import Terms
from fxprune.passes.trace import trace
from fxprune.passes.tree import named_parameters, named_tensors, private_copy
from fxprune.passes.trial import broken, opaque_sites
from fxprune.plan import Plan, kept_by
from fxprune.request import HALF, Ratio, Request, Scopes
from fxprune.verification import TOLERANCE, Verification, compare


def prune(
    model: nn.Module,
    ratio: Ratio = HALF,
    *,
    example_inputs: Any = None,
    params: float | None = None,
    macs: float | None = None,
    memory: float | None = None,
    latency: float | str | None = None,
    criterion: str | Criterion = "magnitude",
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    ranking: Literal["local", "global", "isomorphic"] = "local",
    scopes: Scopes | None = None,
    floor: float | None = None,
    freeze: Freeze = (),
    release: str | Sequence[str] = (),
    round_to: int = 1,
    attention: Attention = "heads",
    verify: bool | Literal["auto"] = "auto",
    same_class: bool = False,
) -> fx.GraphModule:
    """A physically smaller copy of a model, exactly equal to it with the removed channels masked.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> small = prune(net, ratio=0.5, example_inputs=torch.randn(1, 3, 8, 8))
    >>> small.get_submodule("0").weight.shape
    torch.Size([4, 3, 3, 3])

    Arguments:
        model: any module; it is not touched. On the meta device it is coupled and cut in form alone, by a criterion that looks
            at no weights (`random`), unverified, and the plan can be applied to the model once it has some.
        ratio: the share of units removed from every prunable family, in [0, 1), or a mapping from globs over module names
            to shares, the first match of which counts; families that no glob matches stay whole.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, nested as forward takes
            them; what varies at run time (batch and image size) may have any value here.
        params, macs, memory: a budget in place of `ratio`: parameters, multiply-accumulates of one forward of the example
            inputs, or bytes of parameters and buffers. A float up to 1 is the share that may stay, a larger number absolute.
            The fewest units go that meet it.
        latency: likewise the time of one forward of the example inputs on the model's device: a share of the original's, or
            a time such as "20ms" (a number above 1 is in seconds). It is measured, in evaluation mode; counts of channels
            are multiples of 8 where that is enough. `meta["latency"]` says what was measured.
        criterion: how units are ranked: a name in `fxprune.criteria.CRITERIA`, one of its classes with options of its own,
            or a function of a parameter that gives the importance of each element. `magnitude` is the L2 norm over the whole
            family.
        data: for criteria that look at data: batches, each a pair of inputs (as `example_inputs`) and target, a dict of
            keyword arguments, or inputs alone. They are read once (twice for `grasp`), in evaluation mode.
        loss: for criteria that look at gradients: a function of the output and the target (of the output and the dict; of
            the output alone) that returns a mean over the batch.
        ranking: who competes: with `local` every family loses the same share; with `global` all families lose their lowest
            scored units together; with `isomorphic` (arXiv:2407.04616) those of one structure do.
        scopes: a mapping from names to globs over module names: families of one scope share a ratio and compete. `ratio` may
            name them.
        floor: the share of every family that stays where families compete or a budget is given, 0.1 by default; with
            `local` ratios none by default.
        freeze: globs over module names, or modules, whose parameters stay as they are.
        release: globs over the names of outputs, whose channels then may go too: the keys, fields and positions that lead to
            a tensor, such as `last_hidden_state`, `hidden_states.*` or `1`; a model's one tensor is `output`. By default
            every output keeps its shape.
        round_to: what is left of a family is a multiple of this; a family that cannot be stays whole.
        attention: remove whole `heads`, or `dims` within them.
        verify: compare the result to the masked original; `auto` does so where a forward is cheap.
        same_class: return a shrunk copy of the model, of its own class, with attributes and configuration brought up to date,
            instead of a GraphModule: its caches, losses, `generate` and `save_pretrained` are as before.

    Returns: a `torch.fx.GraphModule` on the model's device and in its mode; `meta["plan"]` and `meta["verification"]`.

    Raises: PruneError for anything that cannot be done; nothing has changed then.
    """
    args, kwargs = inputs.arguments(example_inputs)
    budgets = {"params": params, "macs": macs, "memory": memory, "latency": latency}
    request = Request(ratio, budgets, criterion, ranking, scopes, floor, round_to, data, loss)
    check_request(model, request, attention, verify)
    inputs.check(model, args, kwargs, weights=request.reads_weights or request.runs_the_model or verify is True or same_class)
    terms = terms_of(model, attention, freeze, release)
    tensors = dict(named_tensors(model))
    with contextlib.nullcontext() if request.runs_the_model else uncollected():
        solution, kept, made, pruned, closed = shrunk(model, args, kwargs, request, terms, tensors=tensors)
        pruned.meta["plan"] = Plan(
            {name: tuple(t.shape) for name, t in tensors.items()},
            {name: parts for name, parts in made.items() if parts},
            attention,
            tuple(sorted(terms.keep)),
            inputs.describe(example_inputs),
            terms.release,
        )
        pruned.meta["capture"] = described(solution)
        pruned.meta["closed"] = closed
        check = None
        if verify is True or (verify == "auto" and is_cheap(model)):
            check = functools.partial(checked, model, pruned, solution, kept, args, kwargs, terms.heads)
        del solution, kept  # most of it goes now, before the collector looks through what is left
    if check is not None:
        pruned.meta["verification"] = check()
        coupled = functools.partial(analyse, model, terms=terms, closed=closed)
        pruned = for_any_batch(model, pruned, args, kwargs, coupled, terms.heads)
    return as_class(model, pruned, args, kwargs) if same_class else pruned


def couple(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    freeze: Freeze = (),
    release: str | Sequence[str] = (),
    attention: Attention = "heads",
) -> Coupling:
    """Which channels of a model go together, and why the others stay.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> [f.name for f in couple(net, torch.randn(1, 4)).families if f.frozen is None]
    ['0.weight:0']

    Arguments: as for `prune`; the model may be on the meta device, however large it is. Raises: PruneError.
    """
    args, kwargs = inputs.arguments(example_inputs)
    check_attention(attention)
    inputs.check(model, args, kwargs, weights=False)
    solution = analyse(model, args, kwargs, terms_of(model, attention, freeze, release))
    found = families(solution, set(named_parameters(model)))
    for capture in solution.captures:
        capture.given.clear()  # nothing is tried
    return Coupling(type(model).__name__, found, solution, dict(named_tensors(model)))


def verify(model: nn.Module, pruned: fx.GraphModule, example_inputs: Any, *, sizes: bool = True) -> Verification:
    """How far a pruned model is from the masked original.

    Arguments:
        model: the original, with the values it was pruned with.
        pruned: what `prune` returned for it.
        example_inputs: as for `prune`.
        sizes: also compare at a second batch size and a second image size, where the original takes them.

    Returns: the largest relative error and what was compared.
    """
    args, kwargs = inputs.arguments(example_inputs)
    inputs.check(model, args, kwargs)
    plan = plan_of(pruned)
    plan.check(model)
    solution = analyse(model, args, kwargs, plan.terms)
    return compare(model, pruned, solution.leaves, kept_by(plan, solution), plan.terms.heads, args, kwargs, sizes=sizes)


def plan_of(pruned: nn.Module) -> Plan:
    """The plan that a pruned model was made by; raises PruneError for a model that was not."""
    plan = getattr(pruned, "meta", {}).get("plan")
    if not isinstance(plan, Plan):
        raise PruneError("this module carries no plan", where=type(pruned).__name__, fix="pass what fxprune.prune returned")
    return plan


def apply_plan(plan: Plan, model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    plan.check(model)
    device = next((t.device for _, t in named_tensors(model)), torch.device("cpu"))
    given = inputs.imagine(plan.inputs, device) if example_inputs is None else example_inputs
    args, kwargs = inputs.arguments(given)
    inputs.check(model, args, kwargs)
    if plan.waiver is not None and inputs.batch_of(args, kwargs) == plan.waiver.size:
        args, kwargs = inputs.larger(args, kwargs)  # as it was captured
    solution = analyse(model, args, kwargs, plan.terms)
    kept = kept_by(plan, solution)
    pruned = shrink(model, solution, kept, waiver=plan.waiver)
    pruned.meta["plan"] = plan
    pruned.meta["capture"] = described(solution)
    return pruned


def as_class(model: nn.Module, pruned: PrunedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The pruned model in the original's own class; raises PruneError where it does not compute the same."""
    plan = plan_of(pruned)
    with unobserved(model):
        whole = trace(private_copy(model).eval(), args, kwargs, whole=True)
        solution = solve([whole], plan.terms)
        made, known = own_class.shrunk(model, solution, kept_by(plan, solution))
        mode = pruned.training
        wanted = collect(pruned.eval()(*args, **kwargs), Tensor)
        pruned.train(mode)
        modes = {m: m.training for m in made.modules()}
        made.eval()
        tolerance = max((TOLERANCE.get(t.dtype, 1e-3) for t in made.parameters()), default=1e-3)
        run = lambda m: m(*args, **kwargs)  # noqa: E731
        own_class.configure(model, made, known, wanted, run, tolerance)
        error = own_class.difference(made, wanted, run)
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


# -- the steps ---------------------------------------------------------------------------------------------------------


def shrunk(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    request: Request,
    terms: Terms,
    *,
    tensors: Mapping[str, Tensor],
) -> tuple[Solution, Tensor, dict[str, list[Cut]], PrunedModule, dict[str, str]]:
    """From a request to the pruned module. Opaque modules that cannot be cut are found by trying, and then stay whole.

    `tensors` are the model's own, by name.
    """
    closed: dict[str, str] = {}
    while True:
        coupled = functools.partial(analyse, model, args, kwargs, terms, closed)
        solution = coupled()
        if solution.captures[0].opaque and request.data is not None:
            request.data = list(request.data)  # it may be asked for again
        timed = request.budget is not None and request.budget.kind == "latency"
        trial = Trial(model, args, kwargs, coupled) if timed else None
        kept, cutter = selected(model, solution, request, trial)
        sites = opaque_sites(solution, cutter)
        made = tensor_cuts(solution, kept, cutter)
        with uncollected():
            pruned = shrink(model, solution, kept, cutter, made=made, values=tensors)
        if trial is not None:
            pruned.meta["latency"] = trial.found
        if not sites:
            return solution, kept, made, pruned, closed
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        tolerance = max((TOLERANCE.get(d, 1e-3) for d in dtypes), default=1e-3)
        with unobserved(model):
            found = broken(model, pruned, solution, cutter, sites, args, kwargs, heads=terms.heads, tolerance=tolerance)
        if not found.keys() - closed.keys():
            return solution, kept, made, pruned, closed
        closed |= found


def is_cheap(model: nn.Module) -> bool:
    """Whether to verify without being asked: a few forwards of a model this small take little time."""
    return sum(math.inf if p.is_meta else p.numel() for p in model.parameters()) <= 100_000_000


def checked(
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
