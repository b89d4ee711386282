"""Select the units that stay: from the coupling, the scores and the options to a mask over labels, within a budget."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from fxprune.criteria.calibration import Target
from fxprune.criteria.catalog import find
from fxprune.criteria.unit_scores import normalise_scores, score_units
from fxprune.entry_points import why_unprunable
from fxprune.errors import PruneWarning
from fxprune.passes.coupling.families import Family, families, listed, place_of
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.allocation import Allocator, levels_after, match_globs, match_ratios, match_scopes, tied_to_whole
from fxprune.selection.budgets import Budget
from fxprune.selection.costs import Costs
from fxprune.selection.expected_cost import expected_use
from fxprune.selection.latency import FRIENDLY, LatencyProbe
from fxprune.selection.latency_search import meet_latency
from fxprune.selection.names import NOT_ALL_IN
from fxprune.selection.options import Options
from fxprune.selection.removal import select_given


def select_units(
    model: nn.Module,
    solution: Solution,
    options: Options,
    tensors: Mapping[str, Tensor],
    probe: LatencyProbe | None = None,
) -> tuple[Tensor, Slicer]:
    """Which labels stay; `tensors` are the model's, by name, and for a budget of latency `probe` measures it.

    Raises PruneError where nothing can be removed.
    """
    if options.remove is not None:
        return select_given(model, solution, options.remove)
    free, score = score_families(model, solution, options)
    costs = Costs(solution, tensors)
    kept, slicer = allocate(free, score, costs, options, probe)
    check_effect(model, free, score, solution, options, kept)
    return kept, slicer


def check_effect(
    model: nn.Module, free: Sequence[Family], score: np.ndarray, solution: Solution, options: Options, kept: Tensor
) -> None:
    """Raise PruneError where a ratio removes nothing, and warn of its globs, and of a budget, that change nothing.

    Arguments: as for `allocate`; `kept` is what it returned, shape (labels,).
    """
    scopes = match_scopes(free, options.scopes, solution)
    for scope in [scope for scope in options.scopes or () if scope not in scopes]:
        warnings.warn(f"{scope!r} in scopes names nothing that may lose units", PruneWarning, stacklevel=2)
    nothing = bool(kept.all())
    if options.budget is not None:
        if nothing:
            warnings.warn(f"{options.budget.kind}={options.budget.amount!r} removes nothing", PruneWarning, stacklevel=2)
        return
    if not nothing and not isinstance(options.ratio, Mapping):
        return
    tied = tied_to_whole(free, solution, options)
    if nothing and not tied and any(match_ratios(free, options.ratio, solution, options.scopes)):
        wanted = any(Allocator(free, score, solution, options).allocate_ratio())
        raise PruneError(
            "nothing in the model can be pruned by so little: "
            + ("what would go cannot go alone" if wanted else "no family has a whole unit to lose"),
            where=type(model).__name__,
            fix=f"a larger ratio, {'a lower floor, ' if options.floor else ''}or a smaller round_to",
        )
    if isinstance(options.ratio, Mapping):
        said = idle_globs(model, free, solution, options, kept, tied)
        if said and nothing:
            both = f"ratio={{{', '.join(f'{name!r}: 0.5' for name in next(iter(tied.items())))}}}" if tied else ""
            fix = both or "the name of a layer that may lose outputs; print(fxprune.couple(model, example_inputs)) shows them"
            raise PruneError("; ".join(said), where=type(model).__name__, fix=fix)
        for text in said:
            warnings.warn(text, PruneWarning, stacklevel=2)


def idle_globs(
    model: nn.Module,
    free: Sequence[Family],
    solution: Solution,
    options: Options,
    kept: Tensor,
    tied: Mapping[str, str],
) -> list[str]:
    """A sentence for each glob of a ratio that changes nothing, with the reason; `tied` is what `tied_to_whole` found."""
    assert isinstance(options.ratio, Mapping)
    matched = match_globs(free, list(options.ratio), solution, options.scopes)
    busy = {globs[0] for globs, f in zip(matched, free, strict=True) if globs and not bool(kept[f.units].all())}
    idle = [glob for glob, share in options.ratio.items() if share and glob not in busy]
    if not idle:
        return []
    may_go = {f.name for f in free}
    held = [f for f in families(solution, set(named_parameters(model))) if f.name not in may_go]
    stays = list(zip(match_globs(held, idle, solution, options.scopes), held, strict=True))
    said = []
    for glob in idle:
        reasons = [f"{f.name} {f.kept_whole or 'has no score by this criterion'}" for globs, f in stays if glob in globs]
        mine = [f.name for globs, f in zip(matched, free, strict=True) if globs and globs[0] == glob]
        if mine:
            held_by = [
                f"{name} keeps as many units as {tied[name]}, which the ratio leaves whole" for name in mine if name in tied
            ]
            why = next(iter(held_by), "what it names has no whole unit to lose")
        elif any(glob in globs for globs in matched):
            why = "what it names is named by an earlier glob, which counts"
        else:
            why = reasons[0] if reasons else "no channels are made there"
        said.append(f"{glob!r} in ratio changes nothing: {why}")
    return said


def allocate(
    free: Sequence[Family],
    score: np.ndarray,
    costs: Costs,
    options: Options,
    probe: LatencyProbe | None = None,
    removed: np.ndarray | None = None,
) -> tuple[Tensor, Slicer]:
    """Which labels stay by a ratio or a budget, where units with the lowest scores go.

    Arguments:
        free: the families that may lose units.
        score: the score of every unit, shape (labels,).
        costs: of the coupling.
        options: what to remove.
        probe: measures latency, where that is the budget.
        removed: for each unit whether an earlier step removed it; these stay removed.
    """
    if options.budget is not None and options.budget.measured:
        assert probe is not None

        def make(round_to: int) -> Allocator:
            return Allocator(free, score, costs.solution, options, round_to=round_to, removed=removed)

        return allocate_by_latency(make, costs, options, probe)
    allocator = Allocator(free, score, costs.solution, options, removed=removed)
    budget = options.budget
    if budget is None:
        return allocator.apply(allocator.allocate_ratio())
    return meet_budget(budget, allocator, costs)


def allocate_by_latency(
    make: Callable[[int], Allocator], costs: Costs, options: Options, probe: LatencyProbe
) -> tuple[Tensor, Slicer]:
    """Which labels stay by a budget of latency: with channel counts that kernels are written for, where that is enough.

    `make` returns the allocator by which counts of channels that stay are multiples of a number.
    """
    assert options.budget is not None
    budget = options.budget

    def met(round_to: int) -> tuple[Tensor, Slicer]:
        with probe.restore_random_state():
            return meet_latency(budget, make(round_to), costs, probe)

    if options.round_to == 1:
        with contextlib.suppress(PruneError):
            return met(FRIENDLY)
    return met(options.round_to)


def select_half(model: nn.Module, solution: Solution) -> tuple[Tensor, Slicer]:
    """Which labels stay where each family loses half of its units, whichever they are."""
    found = families(solution, set(named_parameters(model)))
    free = [f for f in found if f.kept_whole is None]
    allocator = Allocator(free, np.zeros(len(solution.unit_of)), solution, Options())
    return allocator.apply(allocator.allocate_ratio())


def select_least(model: nn.Module, solution: Solution, options: Options) -> tuple[Tensor, Slicer]:
    """Which labels stay where as much is removed as any budget could remove."""
    free, score = score_families(model, solution, options)
    allocator = Allocator(free, score, solution, options, competes=True)
    return allocator.apply(allocator.allocate_all())


def score_families(model: nn.Module, solution: Solution, options: Options) -> tuple[list[Family], np.ndarray]:
    """The families that may lose units, and the score of every unit, comparable between families where they compete."""
    free = find_free_families(model, solution, options)
    criterion = find(options.criterion)
    use = lambda: expected_use(solution, options, free, dict(named_tensors(model)))  # noqa: E731
    target = Target(options.coupling.heads, use)
    evidence = options.data, options.loss, options.read, target
    score, seen = options.scored(solution, "units", lambda: score_units(model, solution, free, criterion, *evidence))
    score = score if options.combine is None else options.combine(score)
    score = score if options.rescore is None else options.rescore(solution, score)
    free = [f for f in free if seen[f.units].any()]
    return free, normalise_scores(score, free, criterion) if options.competes else score


def find_free_families(model: nn.Module, solution: Solution, options: Options) -> list[Family]:
    """The families that may lose units; raises PruneError where there are none."""
    found = families(solution, set(named_parameters(model)))
    free = [f for f in found if f.kept_whole is None]
    if not free:
        reasons = sorted({f.kept_whole for f in found if f.kept_whole})
        if text := next((why for why in reasons if why.startswith(NOT_ALL_IN)), None):
            raise too_narrow(model, found, options, text.removeprefix(NOT_ALL_IN))
        kinds = list({why.partition(" (at ")[0]: why for why in reversed(reasons)}.values())[::-1]  # each by its first place
        raise why_unprunable(model) or PruneError(
            "nothing in the model can be pruned" + (f": every family {', or '.join(kinds[:3])}" if kinds else ""),
            where=type(model).__name__,
            fix=f"{way_out(reasons)}print(fxprune.couple(model, example_inputs)) says why each family stays",
        )
    largest = max(len(f.units) * f.width for f in free)
    if options.round_to > largest:
        raise PruneError(
            f"round_to={options.round_to} is larger than every family (the largest has {largest} channels)",
            fix=f"round_to<={largest}",
        )
    return free


def way_out(reasons: Sequence[str]) -> str:
    """What to ask for so that less stays whole for these reasons, as the beginning of a sentence."""
    if any(why.startswith("is frozen by ") for why in reasons):
        return "freeze less; "
    return "release='*' lets outputs shrink; " if any(why.startswith("is an output ") for why in reasons) else ""


def too_narrow(model: nn.Module, found: Sequence[Family], options: Options, said: str) -> PruneError:
    """The error for modules of which no family is a part as a whole: what those that reach in have outside."""
    beyond = options.coupling.frozen
    held = [f for f in found if f.frozen is not None and f.frozen.startswith(NOT_ALL_IN)]
    missing = [list(dict.fromkeys(place_of(name) for name, _ in f.members if name in beyond)) for f in held]
    near = [(f, m) for f, m in zip(held, missing, strict=True) if any(name not in beyond for name, _ in f.members)]
    if not near:
        return PruneError(f"nothing in only={said} can be pruned", where=type(model).__name__, fix="other modules")
    family, places = min(near, key=lambda pair: len(pair[1]))
    return PruneError(
        f"nothing lies wholly in only={said}: {family.name} also holds {listed(places)}",
        where=type(model).__name__,
        fix="name these too, or a module around all of them",
    )


CLOSE = 0.995  # the share of its budget that an allocation has to use to be left as it is


class Attempt(NamedTuple):
    """What an allocation keeps, the slicer of it, and its cost."""

    kept: Tensor
    slicer: Slicer
    cost: float


def meet_budget(budget: Budget, allocator: Allocator, costs: Costs) -> tuple[Tensor, Slicer]:
    """What is kept after the fewest steps that bring the cost within the budget, less those that turn out not to be needed.

    Raises: PruneError where the budget is above the original or below the least cost there can be.
    """
    original = budget.cost(costs)
    limit = budget.limit(original)
    left = functools.partial(budget.cost, costs)
    allocator.weigh(lambda levels: left(allocator.apply(levels)[1]), left)

    def attempt(levels: Sequence[int]) -> Attempt:
        kept, slicer = allocator.apply(levels)
        return Attempt(kept, slicer, budget.cost(costs, slicer))

    start = attempt([0] * len(allocator.candidates))
    if start.cost <= limit:
        return start.kept, start.slicer

    def met_by(steps: Sequence[int], low: int) -> tuple[int, Attempt] | None:
        """How many steps, more than `low`, meet the budget, and what comes of them; None where all do not."""
        high = len(steps)  # over the budget after `low` steps, within it after `high`
        found = attempt(levels_after(allocator.candidates, steps))
        if high <= low or found.cost > limit:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            tried = attempt(levels_after(allocator.candidates, steps[:middle]))
            if tried.cost <= limit:
                high, found = middle, tried
            else:
                low = middle
        if found.cost < CLOSE * limit:
            found = return_surplus(levels_after(allocator.candidates, steps[:high]), steps[:high], found, attempt, limit)
        return high, found

    steps = allocator.order_steps()
    met = met_by(steps, 0)
    if met is None:
        raise budget.unreachable(attempt(allocator.allocate_all()).cost, original)
    count, found = met
    if found.cost < CLOSE * limit:  # the last step was a large one, which smaller ones of others may save
        last = steps[count - 1]
        met = met_by([*steps[: count - 1], *[i for i in steps[count:] if i != last]], count - 1)
        if met is not None and met[1].cost > found.cost:
            found = met[1]
    return found.kept, found.slicer


def return_surplus(
    levels: list[int], steps: Sequence[int], found: Attempt, attempt: Callable[[Sequence[int]], Attempt], limit: float
) -> Attempt:
    """Use what a large last step left of the budget: the level of each group is lowered as far as the budget allows.

    The group of the last step comes first, since what it lost is the most important.

    Arguments:
        levels: of each group after `steps`; changed.
        found: what they come to.
        attempt: from levels to what they come to.
        limit: the largest cost.
    """
    for i in dict.fromkeys(reversed(steps)):
        low, high = 0, levels[i]  # over the budget below `low`, within it at `high`
        while low < high:
            middle = (low + high) // 2
            tried = attempt([*levels[:i], middle, *levels[i + 1 :]])
            if found.cost <= tried.cost <= limit:
                high, found = middle, tried
            else:
                low = middle + 1
        levels[i] = high
        if found.cost >= CLOSE * limit:
            break
    return found
