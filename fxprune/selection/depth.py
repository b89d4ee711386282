"""Select residual branches, alone or with the units of families, within one ratio or budget.

A model's branches are one more group of candidates. By a ratio those with the lowest scores go, for a budget those with the
lowest scores for what they cost. By a local ranking the group loses the share that every family loses; by a global one branches
compete with units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.criteria.branch_runs import WholeProgram
from fxprune.criteria.branches import score_branches
from fxprune.criteria.calibrated import Calibration
from fxprune.passes.coupling.branches import Branches
from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.branches import Branch
from fxprune.passes.ir.module_tree import named_modules, named_parameters
from fxprune.passes.ir.slices import Slicer
from fxprune.selection.allocation import FLOOR, FREE, Allocator, matches
from fxprune.selection.budgets import Budget
from fxprune.selection.candidates import Candidates, Group
from fxprune.selection.costs import Costs
from fxprune.selection.latency import LatencyProbe
from fxprune.selection.names import NOT_ALL_IN, block_chains
from fxprune.selection.options import Options
from fxprune.selection.select import allocate_by_latency, check_effect, meet_budget, score_families

BRANCHES = "residual branches"  # the name of their group among those of families


def speed_name(branch: Branch) -> str:
    """What stands for a branch among the speeds of families."""
    return f"branch {branch.name}"


class DepthAllocator(Allocator):
    """An allocator that also removes branches: the candidates behind those of the families.

    Arguments:
        free, score, solution, options: as for `Allocator`.
        branches: of the model.
        groups: branches that lose the same share, with their scores and the share.
        round_to: in place of that of `options`.
    """

    def __init__(
        self,
        free: Sequence[Family],
        score: np.ndarray,
        solution: Solution,
        options: Options,
        branches: Branches,
        groups: Sequence[tuple[list[Branch], np.ndarray, float]],
        round_to: int | None = None,
    ) -> None:
        super().__init__(free, score, solution, options, round_to=round_to)
        self.branches, self.groups, self.options = branches, groups, options
        self.lists: list[list[Branch]] = [[] for _ in groups]
        self.names += [BRANCHES] * len(groups)
        self.widths = len(self.candidates)
        floor = (FLOOR if options.competes else 0.0) if options.floor is None else options.floor
        for which, (found, _, share) in enumerate(groups):
            most = min(len(found), int((1 - floor) * len(found) + 1e-9))
            group, levels = Group([(-1, np.arange(len(found)))], share), list(range(most + 1))
            self.candidates.append(Candidates(group, lambda level: np.zeros(0, np.int64), levels, [0.0] * len(levels)))
            self.order(which, np.ones(len(found)))
            if options.ranking == "global" and self.rivals and options.scopes is None and len(groups) == 1:
                self.rivals[0].append(len(self.candidates) - 1)
            else:
                self.rivals.append([len(self.candidates) - 1])

    def order(self, which: int, prices: np.ndarray, worth: float | None = None) -> None:
        """Order the branches of a group by their scores for a price of each.

        Arguments:
            which: of the groups.
            prices: what each of its branches costs.
            worth: what one unit of price is worth to the rivals; by default what the mean branch is by the mean step of theirs.
        """
        found, scores, _ = self.groups[which]
        each = scores / (prices / prices.mean())
        order = np.argsort(each, kind="stable").tolist()
        importance, scale = each[order], 1.0
        if (speeds := self.options.speeds) is not None:
            place = {i: (k + 1) / speeds.get(speed_name(found[i]), 1.0) for k, i in enumerate(order)}
            order.sort(key=place.__getitem__)
        self.lists[which] = [found[i] for i in order]
        steps = [step for steps in self.scores for step in steps]
        if worth is not None:
            scale = worth / (float(np.abs(scores).mean()) or 1.0)
        elif self.options.ranking == "global" and steps and float(np.abs(importance).mean()) > 0:
            scale = float(np.mean(steps)) / float(np.abs(importance).mean())
        held = self.candidates[self.widths + which]
        held.importance[1:] = (importance[: len(held.count) - 1] * scale).tolist()

    def weigh(self, cost: Callable[[Sequence[int]], float], left: Callable[[Slicer], float]) -> list[float]:
        """Likewise, and order branches by their scores for what they cost.

        Scores of branches have no scale of their own: what all of them cost is worth as much as it is to units, on the mean of
        the way to the floor, since nothing is left of what a branch computes.
        """
        prices, units = super().weigh(cost, left), self.candidates[: self.widths]
        whole = cost([0] * len(self.candidates))
        worth = sum(float(np.maximum(self.score[mine], 0).sum()) for c in units for _, mine in c.group.strata) / FLOOR
        spent = sum(c.total * price for c, price in zip(units, prices, strict=False))
        for which, (found, _, _) in enumerate(self.groups):
            price = prices_of(found, self.branches, whole, left, self.solution)
            self.order(which, price, worth / spent if self.weighs_cost and worth > 0 and spent > 0 else None)
        return prices

    def lost(self, group: int, level: int) -> Collection[fx.Node]:
        return self.branches.remove(self.lists[group - self.widths][:level]).nodes if group >= self.widths else ()

    def apply(self, levels: Sequence[int]) -> tuple[Tensor, Slicer]:
        kept, slicer = super().apply(levels)
        gone = [b for found, level in zip(self.lists, levels[self.widths :], strict=True) for b in found[:level]]
        slicer.removed = self.branches.remove(gone)
        return kept, self.solution.complete(slicer)


def select_with_depth(
    model: nn.Module,
    solution: Solution,
    options: Options,
    tensors: Mapping[str, Tensor],
    program: WholeProgram,
    probe: LatencyProbe | None = None,
) -> tuple[Tensor, Slicer]:
    """Which labels and branches stay; arguments as for `select_units` and `score_branches`.

    Raises PruneError where nothing can be removed.
    """
    branches = Branches(solution.captures, set(named_parameters(model)))
    found = free_branches(model, branches, options)
    how = options.depth_criterion or ("weights" if options.data is None else "influence")
    costs, seen = Costs(solution, tensors), options.criterion
    evidence = options.criterion, options.data, options.loss, program
    if options.depth_criterion is None and isinstance(seen, Calibration) and seen.branches is not None:
        scores = seen.scores_of(found)
    else:
        aimed = lambda: aims(found, branches, options, costs) if how == "loss" else ()  # noqa: E731
        scores = options.scored(solution, "branches", lambda: score_branches(model, solution, found, how, *evidence, *aimed()))
    scores = scores if options.combine is None else options.combine(scores)
    if not np.isfinite(scores).all():
        name = found[int(np.flatnonzero(~np.isfinite(scores))[0])].name
        raise PruneError("the score of a residual branch is not finite", where=name, fix="look for NaN among its parameters")
    if not options.narrows:
        free, score = list[Family](), np.zeros(len(solution.unit_of))
    else:
        free, score = score_families(model, solution, options)
    groups = grouped(found, scores, options)
    make = lambda n=None: DepthAllocator(free, score, solution, options, branches, groups, n)  # noqa: E731
    allocator = make()
    if options.budget is None:
        slicer = allocator.apply(allocator.allocate_ratio())[1]
    elif probe is not None:
        slicer = allocate_by_latency(make, costs, options, probe)[1]
    else:
        slicer = give_back(meet_budget(options.budget, allocator, costs)[1], branches, options.budget, costs)
    if not slicer.removed and not options.narrows and options.budget is None:
        least = f"ratio={math.ceil(100 / len(found)) / 100:g} or more"
        fix = least if options.floor is None else "a larger ratio, or a lower floor"
        raise PruneError(
            f"no residual branch can be removed by so little: the model has {len(found)}",
            where=type(model).__name__,
            fix=fix if len(found) > 1 else "a budget, such as params=; a ratio leaves the only one",
        )
    if not slicer.removed and options.narrows:
        check_effect(model, free, score, solution, options, slicer.kept)
    kept = without_idle(solution, slicer)
    return kept, Slicer(kept, slicer.removed)


def aims(
    found: Sequence[Branch], branches: Branches, options: Options, costs: Costs
) -> tuple[np.ndarray | None, Callable[[Sequence[int]], bool] | None]:
    """What each branch costs, and whether no more than some of them need to go; None where it is not known before they do."""
    budget, solution = options.budget, costs.solution
    if budget is None:
        share = max(options.ratio.values(), default=0.0) if isinstance(options.ratio, Mapping) else options.ratio
        return np.ones(len(found)), lambda gone: len(gone) >= int(share * len(found) + 1e-9)
    if budget.measured:
        return None, None
    left, whole = functools.partial(budget.cost, costs), budget.cost(costs)
    prices, limit = prices_of(found, branches, whole, left, solution), budget.limit(whole)
    return prices, lambda gone: left(without(solution, branches, [found[i] for i in gone])) <= limit


def prices_of(
    found: Sequence[Branch], branches: Branches, whole: float, left: Callable[[Slicer], float], solution: Solution
) -> np.ndarray:
    """What each branch costs, shape (branches,): of `whole` what `left` says a slicer leaves less."""
    return np.array([max(whole - left(without(solution, branches, [branch])), FREE * whole) for branch in found])


def without(solution: Solution, branches: Branches, gone: Sequence[Branch]) -> Slicer:
    """A slicer that removes some branches and nothing else."""
    return solution.complete(Slicer(torch.ones(len(solution.unit_of), dtype=torch.bool), branches.remove(gone)))


def give_back(slicer: Slicer, branches: Branches, budget: Budget, costs: Costs) -> Slicer:
    """The same with those branches back that need not go for the budget, the most important first."""
    gone, limit = [b for b in slicer.removed.branches if b.parameters], budget.limit(budget.cost(costs))
    for branch in reversed(gone.copy()):
        fewer = [b for b in gone if b is not branch]
        tried = costs.solution.complete(Slicer(slicer.kept, branches.remove(fewer)))
        if budget.cost(costs, tried) <= limit:
            gone, slicer = fewer, tried
    return slicer


def free_branches(model: nn.Module, branches: Branches, options: Options) -> list[Branch]:
    """The branches that nothing freezes; raises PruneError where there are none.

    With `only`, vectors go with the layers of their branch: `only="*mlp*"` names no norm in front of an FFN.
    """
    named, vectors = options.coupling.frozen, {name for name, p in named_parameters(model).items() if p.dim() < 2}
    frozen = {text.partition(":")[0].partition("#")[0] for text in named}
    frozen -= {name for name in frozen & vectors if named.get(name, "").startswith(NOT_ALL_IN)}
    within = tuple(f"{text[:-1]}." for text in options.coupling.frozen if text.endswith("/"))
    inside = [b for b in branches.found if b.tensors - set(named) or not b.tensors]
    found = [b for b in inside if not frozen & b.tensors and not any(name.startswith(within) for name in b.tensors)]
    if found and options.depth != "blocks":
        return found
    if blocks := whole_blocks(model, branches, found):
        return blocks
    opaque = branches.captures[0].opaque
    if found:
        why, fix = "no block of a list of blocks is made of residual branches that may go", "depth='only'"
    elif branches.found:
        one = branches.found[0]
        held = next(
            (n for n in sorted(one.tensors) if n in frozen or n.startswith(within)), next(iter(sorted(one.tensors)), "")
        )
        why, fix = f"every residual branch holds a tensor that is frozen ({one.name}: {held})", "freeze less"
    elif opaque:
        place, reason = next(iter(opaque.items()))
        why = f"its program is not seen within {place if place in dict(named_modules(model)) else 'the model'} ({reason})"
        fix = "inputs without a cache (use_cache=False), or code that reads no contents of tensors"
    else:
        why = "no addition has an operand that is computed from the other one by parameters that nothing else uses"
        fix = "depth=False"
    raise PruneError(f"nothing can be removed by depth: {why}", where=type(model).__name__, fix=fix)


def whole_blocks(model: nn.Module, branches: Branches, free: Sequence[Branch]) -> list[Branch]:
    """All branches of each block as one, where all of them are free; what lies in no list of blocks is none."""
    blocks = []
    for path in (path for chain in block_chains(model) for path in chain):
        mine = [b for b in branches.found if b.tensors and all(name.startswith(f"{path}.") for name in b.tensors)]
        if mine and all(b in free for b in mine):
            blocks.append(branches.join(path, mine))
    return blocks


def grouped(found: Sequence[Branch], scores: np.ndarray, options: Options) -> list[tuple[list[Branch], np.ndarray, float]]:
    """The branches by the share that goes of them, with their scores."""
    shares: dict[object, list[int]] = {}
    for i, branch in enumerate(found):
        if options.budget is not None or not isinstance(options.ratio, Mapping):
            key: object = None
        else:
            key = next((glob for glob in options.ratio if matches(branch.name, glob)), "")
        shares.setdefault(key, []).append(i)
    groups = []
    for key, mine in shares.items():
        if options.budget is not None:
            share = 1.0
        else:
            share = options.ratio.get(str(key), 0.0) if isinstance(options.ratio, Mapping) else options.ratio
        if share > 0:
            groups.append(([found[i] for i in mine], scores[mine], float(share)))
    return groups


def without_idle(solution: Solution, slicer: Slicer) -> Tensor:
    """Which labels are kept where those stay that occur in nothing but what goes with branches, shape (labels,)."""
    unit = solution.unit_of.numpy()
    used = np.zeros(len(unit), bool)
    lost = np.zeros(len(unit), bool)
    for name, labels in solution.leaves.items():
        mask = lost if name in slicer.removed.tensors else used
        for f in labels:
            mask[unit[f.compressed]] = True
    return slicer.kept | torch.from_numpy((lost & ~used)[unit])
