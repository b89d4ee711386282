"""prune(), couple() and verify(): the pipeline, step by step."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune import inputs
from fxprune import same_class as own_class
from fxprune.choice import selected
from fxprune.coupling import Coupling
from fxprune.criteria.scoring import Criterion
from fxprune.errors import PruneError
from fxprune.latency import Trial
from fxprune.passes.capture import Capture
from fxprune.passes.couple import Solution, solve
from fxprune.passes.families import families
from fxprune.passes.faults import surface
from fxprune.passes.kept import Cut, NotARectangle
from fxprune.passes.pruned import PrunedModule
from fxprune.passes.shrink import shrink, tensor_cuts
from fxprune.passes.tape import NeedsValues, collect, map_tensors
from fxprune.passes.terms import Terms
from fxprune.passes.trace import trace
from fxprune.passes.tree import named_parameters, named_tensors, on_meta, private_copy
from fxprune.passes.trial import broken, opaque_sites
from fxprune.plan import Plan
from fxprune.request import HALF, Ratio, Request, Scopes
from fxprune.verification import TOLERANCE, Verification, compare

Freeze = str | nn.Module | Sequence[str | nn.Module]
Attention = Literal["heads", "dims"]


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
    solution = analyse(model, args, kwargs, plan.terms)
    kept = kept_by(plan, solution)
    pruned = shrink(model, solution, kept)
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


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    terms: Terms,
    closed: Mapping[str, str] | None = None,
) -> Solution:
    """Trace and couple: in evaluation mode, and in training mode too where the program asks which one it is in."""
    with unobserved(model), uncollected():
        try:
            found = programs(model, args, kwargs, on_meta)
        except Exception as error:  # the program reads values, or runs code that knows nothing of meta tensors
            surface(error)
            found = None
        if found is not None:
            terms.check([name for capture in found for name, _ in capture.outputs])
            try:
                return solve(found, terms, closed)
            except NeedsValues:  # the contents of a constant
                pass
            except Exception as error:
                surface(error, ours=True)
        found = programs(model, args, kwargs, None)
        terms.check([name for capture in found for name, _ in capture.outputs])
        return solve(found, terms, closed)


def programs(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stand_in: Callable[[Tensor], Tensor] | None,
) -> list[Capture]:
    """The captured program for evaluation, and for training where that is another one.

    Shapes are all that coupling needs, so the run is first tried without values.
    """
    if stand_in is not None:
        swap = lambda t: stand_in(t) if t.is_floating_point() else t  # noqa: E731
        args, kwargs = map_tensors((args, kwargs), swap)
    found = [captured(private_copy(model, stand_in).eval(), args, kwargs, final=stand_in is None)]
    if found[0].reads_training:
        try:
            other = captured(private_copy(model, stand_in).train(), args, kwargs, final=True)
        except PruneError as error:  # a model may need targets to train: then it is captured for evaluation
            found[0].note = f"training mode is as evaluation: {error.what}"
            return found
        if other.prefix != found[0].prefix:
            found[0].note = f"training mode is as evaluation: {', '.join(other.opaque.values())}"
        elif code(other) != code(found[0]):
            found.append(other)
    return found


def captured(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, final: bool) -> Capture:
    try:
        return trace(root, args, kwargs, retry=final)
    except PruneError:
        raise
    except Exception as error:
        surface(error)
        raise PruneError(
            f"the model's own forward raises {type(error).__name__}: {error}",
            where=getattr(error, "fxprune_where", type(root).__name__),
            fix="example_inputs on which model(*example_inputs) runs",
        ) from error


def code(capture: Capture) -> list[Any]:
    """What a captured program does, for comparison."""
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in capture.graph.nodes]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Put the garbage collector off: what is made here is many small objects without cycles, and a full collection over a
    session's modules takes longer than a model does."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """Leave random state and gradient mode as they are."""
    devices = sorted({t.device.index or 0 for t in named_parameters(model).values() if t.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def kept_by(plan: Plan, solution: Solution) -> Tensor:
    """Which labels a plan keeps; raises PruneError where it does not fit the model's coupling."""
    unit = solution.unit.numpy()
    occurs, stays = np.zeros(len(unit), bool), np.zeros(len(unit), bool)  # a class that is left in any tensor stays
    for name, labels in solution.leaves.items():
        shape = solution.shapes.get(name, plan.shapes.get(name, ()))
        for f in labels:
            occurs[unit[f.brief]] = True
            cut = next((c for c in plan.keep.get(name, ()) if f.dims <= set(c.dims)), None)
            if cut is None:
                stays[unit[f.brief]] = True
                continue
            mask = torch.zeros([shape[d] for d in cut.dims], dtype=torch.bool)
            mask.view(-1)[cut.keep] = True
            order = sorted(range(len(cut.dims)), key=lambda i, c=cut: c.dims[i])  # type: ignore[misc]
            full = mask.permute(order).reshape([n if d in cut.dims else 1 for d, n in enumerate(shape)])
            spread = f.labels.expand(torch.broadcast_shapes(f.labels.shape, full.shape))
            stays[unit[spread[full.expand(spread.shape)].numpy()]] = True
    removed = occurs & ~stays
    kept = torch.from_numpy(~removed[unit])
    try:
        made_now = {name: c for name, c in tensor_cuts(solution, kept).items() if c}
    except NotARectangle as error:
        raise PruneError("the plan does not fit the model: rows would differ in length", fix="make a new plan") from error
    for name in sorted({*plan.keep, *made_now}):
        if not same_cuts(plan.keep.get(name, []), made_now.get(name, [])):
            raise PruneError(
                f"the plan does not fit the model: it cuts {name} in another way than the model's coupling allows",
                where=name,
                fix="apply it to the architecture it was made for, unchanged",
            )
    return kept


def same_cuts(a: Sequence[Any], b: Sequence[Any]) -> bool:
    left, right = ({c.dims: c.keep for c in cuts} for cuts in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[d], right[d]) for d in left)


def check_attention(attention: str) -> None:
    if attention not in ("heads", "dims"):
        raise PruneError(f"attention must be 'heads' or 'dims', not {attention!r}", fix="attention='heads'")


def check_request(model: Any, request: Request, attention: str, verify: Any) -> None:
    if not isinstance(model, nn.Module):
        raise PruneError(f"model is of type {type(model).__name__}, not a torch.nn.Module", fix="pass the module itself")
    ratio, round_to = request.ratio, request.round_to
    named = dict(ratio) if isinstance(ratio, Mapping) else {"": ratio}
    if not named:
        raise PruneError("ratio is an empty mapping, which removes nothing", fix="ratio={'layer1': 0.5}, or ratio=0.5")
    for glob, value in named.items():
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1
        if not ok:
            what = f"ratio[{glob!r}]" if glob else "ratio"
            raise PruneError(
                f"{what} must be a number in [0, 1), not {value!r}",
                fix="ratio=0.5 removes half of every family",
            )
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise PruneError(f"round_to must be a positive integer, not {round_to!r}", fix="round_to=8")
    check_attention(attention)
    if verify not in (True, False, "auto"):
        raise PruneError(f"verify must be True, False or 'auto', not {verify!r}", fix="verify='auto'")
    request.check()
    check_globs(model, request)


def check_globs(model: nn.Module, request: Request) -> None:
    scopes = request.scopes or {}
    modules = [name for name, _ in model.named_modules()] if scopes or isinstance(request.ratio, Mapping) else []
    asked = [("ratio", glob) for glob in request.ratio if glob not in scopes] if isinstance(request.ratio, Mapping) else []
    asked += [("scopes", glob) for globs in scopes.values() for glob in ([globs] if isinstance(globs, str) else globs)]
    for argument, glob in asked:
        if not any(fnmatch.fnmatchcase(name, glob) for name in modules):
            raise PruneError(f"the glob {glob!r} in {argument} matches no module", fix=did_you_mean(glob, modules))


def did_you_mean(glob: str, modules: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(glob, [m for m in modules if m], n=3, cutoff=0.4)
    return f"one of the names of model.named_modules(){', such as ' + ', '.join(close) if close else ''}"


def terms_of(model: nn.Module, attention: Attention, freeze: Freeze, release: str | Sequence[str]) -> Terms:
    """What may go of a model and what may not; raises PruneError for what means nothing."""
    globs = [release] if isinstance(release, str) else release
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise PruneError(f"release must be globs over names of outputs, not {release!r}", fix="release='hidden_states'")
    return Terms(attention == "heads", frozen_names(model, freeze), tuple(globs))


def frozen_names(model: nn.Module, freeze: Freeze) -> dict[str, str]:
    """Names of the tensors that stay by request, with the reason."""
    asked = [freeze] if isinstance(freeze, str | nn.Module) or not isinstance(freeze, Iterable) else list(freeze)
    for item in asked:
        if not isinstance(item, str | nn.Module):
            raise PruneError(
                f"freeze names {item!r}, which is neither a glob nor a module", fix="freeze='layer1', or model.layer1"
            )
    keep: dict[str, str] = {}
    if not asked:
        return keep
    modules = dict(model.named_modules())
    for item in asked:
        if isinstance(item, nn.Module):
            paths = [path for path, m in modules.items() if m is item]
            if not paths:
                raise PruneError(f"freeze names a {type(item).__name__} that is not part of the model", fix="model.layer1")
            why = f"is frozen by freeze={type(item).__name__} ({paths[0]})"
        else:
            paths = [path for path in modules if fnmatch.fnmatchcase(path, item)]
            if not paths:
                raise PruneError(f"the glob {item!r} in freeze matches no module", fix=did_you_mean(item, list(modules)))
            why = f"is frozen by freeze={item!r}"
        for path in paths:
            inside = {id(t) for _, t in named_tensors(modules[path])}
            keep.update({name: why for name, t in named_tensors(model) if id(t) in inside})
    return keep


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


def described(solution: Solution) -> str:
    """How the model was captured, in a phrase."""
    opaque, note = solution.captures[0].opaque, solution.captures[0].note
    how = "opaque: " + ", ".join(f"{path or 'the root'} ({why})" for path, why in opaque.items()) if opaque else "symbolic"
    return f"{how}; {note}" if note else how
