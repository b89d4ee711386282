"""prune(), couple() and verify(): the pipeline, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, fx, nn

from fxprune.arguments import checked_call
from fxprune.basis.pruning import prune_in_basis
from fxprune.comparisons.compare import compare
from fxprune.criteria.base import Criterion
from fxprune.criteria.catalog import CriterionName
from fxprune.distributed.ranks import ranks_of
from fxprune.distributed.sharded import sharding_of
from fxprune.entry_points import check_values, entry_point, without_wrappers
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.families import families
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.quiet import without_modes
from fxprune.pipeline import AnyModule, Compilation, Plan
from fxprune.plan import plan_between, plan_carried
from fxprune.repairs.request import RepairRequest, Repairs
from fxprune.repairs.ways import closest, ways_of
from fxprune.reports.coupling import Coupling
from fxprune.selection.argument_checks import check_flag
from fxprune.selection.options import (
    AskedOfPrune,
    Attention,
    Basis,
    BudgetName,
    Depth,
    DepthCriterion,
    Experts,
    Freeze,
    Options,
    Ranking,
    Ratio,
    Remove,
    Scopes,
    Verify,
)
from fxprune.verification import Verification

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fxprune.pipeline import Pruned


@overload
def prune(
    model: nn.Module,
    ratio: Ratio | None = None,
    example_inputs: Any = None,
    *,
    repair: Repairs = False,
    same_class: Literal[False] = False,
    **asked: Unpack[AskedOfPrune],
) -> Pruned: ...


@overload
def prune(
    model: AnyModule,
    ratio: Ratio | None = None,
    example_inputs: Any = None,
    *,
    repair: Repairs = False,
    same_class: Literal[True],
    **asked: Unpack[AskedOfPrune],
) -> AnyModule: ...


@overload
def prune(
    model: AnyModule,
    ratio: Ratio | None = None,
    example_inputs: Any = None,
    *,
    repair: Repairs = False,
    same_class: bool,
    **asked: Unpack[AskedOfPrune],
) -> AnyModule | Pruned: ...


@checked_call()
@without_modes()
def prune(
    model: nn.Module,
    ratio: Ratio | None = None,
    example_inputs: Any = None,
    *,
    params: float | str | None = None,
    macs: float | str | None = None,
    memory: float | str | None = None,
    latency: float | str | None = None,
    budget: Mapping[BudgetName, float | str] | Mapping[str, float | str] | None = None,
    criterion: CriterionName | str | Criterion | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    ranking: Ranking | None = None,
    scopes: Scopes | None = None,
    floor: float | None = None,
    only: Freeze = (),
    freeze: Freeze = (),
    freeze_outputs: Freeze = (),
    protect: tuple[int, int] = (0, 0),
    release: str | Sequence[str] = (),
    round_to: int = 1,
    attention: Attention | None = None,
    experts: Experts = False,
    depth: Depth = False,
    depth_criterion: DepthCriterion | None = None,
    uniform: bool = False,
    basis: Basis | None = None,
    remove: Remove | None = None,
    repair: Repairs = False,
    verify: Verify = "auto",
    same_class: bool = False,
    inplace: bool = False,
) -> Any:
    """A physically smaller copy of a model, exactly equal to it with the removed channels masked.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> small = prune(net, ratio=0.5, example_inputs=torch.randn(1, 3, 8, 8))
    >>> small.get_submodule("0").weight.shape
    torch.Size([4, 3, 3, 3])

    Arguments:
        model: any module; it is not touched, unless `inplace`. On the meta device it is coupled and cut in form alone, by a
            criterion that looks at no weights (`random`), unverified, and the plan applies to the model once it has some.
        ratio: the share of units removed from every prunable family, in (0, 1), or a mapping to shares from modules, globs
            over module names and names of families, the first match of which counts; what nothing matches stays whole. By
            default, where no budget is given, half of each goes. What has no effect is warned of (`PruneWarning`), and an error
            where nothing at all would go.
        example_inputs: a tensor, a tuple of positional arguments (or a list of as many as forward takes), or a mapping of
            keyword arguments such as a `BatchEncoding`, nested as forward takes them; what varies at run time (batch and
            image size) may have any value here.
        params, macs, memory: a budget in place of `ratio`: parameters, multiply-accumulates of one forward of the example
            inputs, or bytes of parameters and buffers. A float up to 1 is the share that may stay, a larger number absolute,
            as is a text with a unit: k, M, G and T count in thousands ("2G"), bytes are B, kB, MB and GB (thousands) or KiB,
            MiB and GiB (of 1,024). The fewest units go that meet it.
        latency: likewise the time of one forward of the example inputs on the model's device: a share of the original's, or
            a time in s, ms or us, such as "20ms". It is measured, in evaluation mode; counts of channels are multiples of 8
            where that is enough. `meta["latency"]` says what was measured.
        budget: a budget of any kind in `fxprune.selection.budgets.KINDS`, as a mapping from its name to the amount.
        criterion: how units are ranked: a name in `fxprune.criteria.CRITERIA`, one of its classes with options of its own,
            or a function of a parameter that gives the importance of each element. By default it is `magnitude`, the L2 norm
            over the whole family; with data `flap`; with data and a loss `token_taylor`. The report says what was chosen.
            A `Calibration` of `token_taylor` stands for those data: with a budget all else is chosen as they would have it.
        data: for criteria that look at data: batches, each a pair of inputs (as `example_inputs`) and target, a dict of
            keyword arguments, or inputs alone. They are read once, in evaluation mode (again for `grasp` and `repair`; `gates`
            holds them).
        loss: for criteria that look at gradients: a function of the output and the target (of the output and the dict; of
            the output alone) that returns a mean over the batch. By default it is the `loss` that the model's output holds.
        ranking: who competes: with `local` every family loses the same share; with `global` all families lose their lowest
            scored units together; with `isomorphic` (arXiv:2407.04616) those of one structure do. By default it is `local`;
            with a budget and data, where the criterion is left open too, `global`. Where it is left open with a budget, a
            residual stream through the whole model goes last.
        scopes: a mapping from names to globs over module names, or names of families: families of one scope share a ratio
            and compete. `ratio` may name them.
        floor: the share of every family that stays where families compete or a budget is given, 0.1 by default; with
            `local` ratios none by default.
        only: globs over module names, or modules: families all of whose parameters lie in them take part, nothing else does:
            `only="*mlp*"` is the hidden layers of the blocks. (`ratio={"*mlp*": 0.5}` is not: a family that is written there
            matches a glob, and so the residual stream does, which every block writes.)
        freeze: globs over module names, modules, or names of families as `couple` prints them. The parameters of a module
            stay as they are, and so do the layers that it reads: `couple` and `report` say which. With a slash behind its
            name, as in `"model.layers.0/"`, it is the families that lie within a module, and nothing beyond it stays.
        freeze_outputs: globs or modules likewise, of whose layers the outputs alone stay; what they read may shrink.
        protect: how many of the first and of the last blocks lose nothing within them, such as `(2, 1)`; a stream through all
            blocks may shrink still. Blocks are modules of one class in a `ModuleList` or a `Sequential`.
        release: globs over the names of outputs, whose channels then may go too: the keys, fields and positions that lead to
            a tensor, such as `last_hidden_state`, `hidden_states.*` or `1`; a model's one tensor is `output`. By default
            every output keeps its shape.
        round_to: what is left of a family is a multiple of this; a family that cannot be stays whole.
        attention: remove whole `heads`, by default, or `dims` within them.
        experts: with True whole experts go too, with their rows of the router, with "only" nothing else does: whatever is
            chosen by `topk` or `argmax` among scores and indexes parameters. What is left is what the original computes with
            the scores of the others at minus infinity; at least as many stay as are chosen.
        depth: with True residual branches go too, with "only" nothing else: attention, an FFN, the convolutions of a block,
            whatever is computed from a stream and added to it by parameters of its own; with "blocks" all those of a block
            at once. A `ratio` is also the share of branches; a budget is one over both.
        depth_criterion: how branches are ranked, for what they cost where there is a budget: `influence` (arXiv:2403.03853; by
            default with data), `taylor`, `loss` (measured; the slowest), `weights` (the criterion's mean over
            a branch; by default without data), or a function of the stream and what is added; see `fxprune.criteria.branches`.
        uniform: families that play the same part keep the same share of their units, so that one number says how many there
            are in every layer: those of one structure and size, and of a model with a configuration those that one number of
            it counts. Where one of them stays whole all do, and `couple(..., uniform=True)` says why.
        basis: with `principal` families that only linear maps, sums and norms touch (residual streams behind norms, bottlenecks
            with folded batch norm, with `attention="dims"` the values of each KV head) are rotated to the principal axes of
            what is read of them on `data`, and lose the axes of least energy. Elsewhere, and where nothing is rotated,
            channels are chosen as before; `meta["basis"]` says where and why. The result equals the original with the other
            axes set to zero, and `plan` holds the rotations.
        remove: exactly the channels that go, in place of a ratio or a budget: a mapping from layers to indices of their
            outputs, such as `{"layer1.0.conv1": [2, 6, 9]}`. All that is coupled to them goes too
            (`couple(...).group("layer1.0.conv1", [2, 6, 9])` shows it). In place of a layer: `layer:dim` or `tensor:dim` for
            another dimension; a family of `couple`, or `layer#2`, for its units by number. Where other channels of the same
            layer would go too, as in a head, it is an error that lists them.
        repair: put right on `data` what the cut does to the output, after all else: True, a method's name, or a dict of
            arguments of `fxprune.repair`; `merge` needs no data. The verification is that of the cut alone; `meta["repair"]`
            says what was gained. With True, a budget, up to 100 million parameters and neither `criterion`, `ranking`,
            `attention` nor `basis` given (nor `same_class`), several of these are tried, with `depth=True` each with branches
            and without, and what comes closest to the original on samples held out is returned; the report says which, and how
            close others came. A budget of latency is measured for each.
        verify: compare the result to the masked original; `auto` does so where a forward is cheap.
        same_class: return a shrunk copy of the model, of its own class, with attributes and configuration brought up to date,
            instead of a GraphModule: its caches, losses, `generate` and `save_pretrained` are as before. What is made of a
            GraphModule, such as a model that was pruned before, is one in any case.
        inplace: cut the model's own tensors, one at a time, so that memory is that of the weights and one layer where nothing
            is verified (by default above 100 million parameters) or tried (give language models `use_cache=False`). The model
            itself is returned with `same_class`; else the GraphModule has its tensors, and the model is of no more use. Make
            optimizers anew.

    A model of several processes is pruned by all of them together, which all have to call `prune`; an error in one is raised in
    all. In `DistributedDataParallel` scores are the mean over them, each with its own data. A model that `fully_shard` (FSDP2)
    or tensor parallelism spread over them stays so, in its own class; one parameter at a time is gathered. Nothing is verified
    then; criteria that look at data, latency and `depth` take the plain model. `inplace` empties the original as it goes.

    Returns: a `torch.fx.GraphModule` (with `same_class` a module of the model's class) on the model's device and in its mode;
    `meta["plan"]` and `meta["verification"]`.

    Raises: PruneError for anything that cannot be done; nothing has changed then.
    """
    asked = dict(locals())
    for own in ("model", "example_inputs", "same_class", "inplace", "repair"):
        del asked[own]
    with (
        ranks_of(model) as ranks,
        contextlib.nullcontext(sharding_of(model)) as sharded,
        entry_point(model if sharded is None else sharded.form) as model,
    ):
        check_flag("same_class", same_class)
        check_flag("inplace", inplace)
        alone = ranks is None and sharded is None
        same_class = same_class and not isinstance(model, fx.GraphModule)  # which is what is emitted
        mending = RepairRequest.parse(repair, data, inplace=inplace, alone=alone)
        if mending is not None:
            asked["data"] = None if remove is not None else mending.data
        options = Options.parse(model if sharded is None else sharded.model, **asked)
        weights = options.needs_weights or same_class or mending is not None
        inputs = ExampleInputs.parse(example_inputs, model).check(model, weights=weights)
        if sharded is not None:
            sharded.ranks, beside = ranks, inputs.beside(model)
            return sharded.prune(options, lambda coupling: Compilation(model, beside, coupling), inplace=inplace)
        if ranks is not None:
            options = dataclasses.replace(options, combine=ranks.mean)

        def make(options: Options) -> Any:
            if options.basis is not None:
                pruned = prune_in_basis(model, inputs, options, same_class=same_class, inplace=inplace)
            else:
                pruned = Compilation(model, inputs, options.coupling).prune(options, same_class=same_class, inplace=inplace)
            if ranks is not None:
                ranks.check_same(plan_carried(pruned).to_json().encode())
            return pruned if mending is None else mending.apply(model, pruned)

        tries = repair is True and not same_class
        return closest(make, ways_of(model, options, asked)) if tries else make(options)


@checked_call()
@without_modes()
def couple(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    only: Freeze = (),
    freeze: Freeze = (),
    freeze_outputs: Freeze = (),
    protect: tuple[int, int] = (0, 0),
    release: str | Sequence[str] = (),
    attention: Attention = "heads",
    experts: Experts = False,
    uniform: bool = False,
) -> Coupling:
    """Which channels of a model go together, and why the others stay.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> [f.name for f in couple(net, torch.randn(1, 4)).families if f.frozen is None]
    ['0']

    Arguments: as for `prune`; the model may be on the meta device, however large it is, or sharded, of which any process may
    ask alone. Raises: PruneError.
    """
    with contextlib.nullcontext(sharding_of(model)) as sharded, entry_point(sharded.form if sharded else model) as model:
        options = Options.parse(
            sharded.model if sharded else model,
            only=only,
            freeze=freeze,
            freeze_outputs=freeze_outputs,
            protect=protect,
            release=release,
            attention=attention,
            experts=experts,
            uniform=uniform,
        )
        inputs = ExampleInputs.parse(example_inputs, model).check(model, weights=False)
        inputs = inputs.beside(model) if sharded else inputs
        compilation = Compilation(model, inputs, options.coupling)
        solution = compilation.couple_for_good()
        found = families(solution, set(named_parameters(model)))
        for capture in solution.captures:
            capture.given.clear()  # nothing is tried any more
        return Coupling(type(model).__name__, found, solution, compilation, in_form=sharded is not None)


@checked_call()
def verify(model: nn.Module, pruned: nn.Module, example_inputs: Any, *, sizes: bool = True) -> Verification:
    """How far a pruned model is from the masked original.

    Arguments:
        model: the original, with the values it was pruned with.
        pruned: what `prune` returned for it.
        example_inputs: as for `prune`.
        sizes: also compare at a second batch size and a second image size, where the original takes them.

    Returns: the largest relative error and what was compared.
    """
    with entry_point(model) as model:
        check_flag("sizes", sizes)
        pruned = without_wrappers(pruned)
        plan = plan_between(model, pruned)
        check_values(model, pruned)
        dtypes = [
            dict.fromkeys(p.dtype for p in named_parameters(m).values() if p.is_floating_point()) for m in (model, pruned)
        ]
        if all(dtypes) and dtypes[0].keys().isdisjoint(dtypes[1]):
            own, other = (next(iter(found)) for found in dtypes)
            fix = f"both in one precision: pruned.to({own})"
            raise PruneError(f"the original is {own}, and the pruned model {other}", where=type(model).__name__, fix=fix)
        model, plan = plan.in_basis(model)
        compilation = Compilation.of_plan(model, plan, example_inputs)
        removal = compilation.choice_of(plan).removal(compilation.options.heads)
        return compare(model, pruned, removal, ExampleInputs.parse(example_inputs, model), sizes=sizes)


@checked_call()
def plan_of(pruned: nn.Module) -> Plan:
    """The plan that a pruned model was made by; raises PruneError for a model that was not."""
    found: Plan = plan_carried(without_wrappers(pruned))
    return found
