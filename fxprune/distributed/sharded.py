"""Prune a model whose parameters are spread over processes, as DTensors: by `fully_shard` (FSDP2), tensor parallelism, or both.

Each process follows the model in form, with stand-ins for its values. Parameters are gathered one at a time: once for their
scores, and once to be cut and spread again. So a process holds its shards and one parameter, and scores are those that one
process finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.criteria.catalog import resolve
from fxprune.distributed.ranks import Ranks, dtensors, is_dtensor, ranks_of, taken_off
from fxprune.distributed.units import UNSHARDED, give_hooks, give_methods, is_unit, let_go, plain_tree, shard_again, units_of
from fxprune.entry_points import entry_point
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors, replace_tensors, walk
from fxprune.passes.ir.quiet import without_modes
from fxprune.passes.rewrite.rewrite import slice_tensor
from fxprune.plan import PlanData, plan_between
from fxprune.same_class.restore import in_class
from fxprune.same_class.stand_ins import StandIns
from fxprune.selection.options import Options


def sharding_of(model: Any) -> Sharded | None:
    """What is needed to prune a model that is sharded; None for any other one."""
    inner = taken_off(model) if isinstance(model, nn.Module) else None
    return Sharded(inner) if inner is not None and dtensors(inner) else None


@contextlib.contextmanager
def in_shards(model: Any) -> Iterator[Sharded | None]:
    """A sharded model, while the processes that hold it fail together; None for any other one."""
    if isinstance(model, nn.Module) and dtensors(taken_off(model)):
        with ranks_of(model) as ranks:
            sharded = sharding_of(model)
            assert sharded is not None
            sharded.ranks = ranks
            yield sharded
    else:
        yield None


@contextlib.contextmanager
def entered(model: Any, before: Ranks | None = None) -> Iterator[tuple[Ranks | None, Sharded | None, Any]]:
    """The processes of a model (see `ranks_of`), what is sharded of it, and the model or its form as compilers take it."""
    with without_modes(), ranks_of(model, before) as ranks:
        sharded = sharding_of(model)
        with entry_point(model if sharded is None else sharded.form) as inner:
            if sharded is not None:
                sharded.ranks = ranks
            yield ranks, sharded, inner


class Sharded:
    """A sharded model on its way to a smaller one.

    Attributes:
        model: the original; its parameters are sharded.
        units: what `fully_shard` was told.
        tensors: its tensors by name.
        form: a copy for this process alone, with stand-ins in place of what is sharded.
        ranks: the processes that prune it together; None where nothing is gathered.
    """

    ranks: Ranks | None = None

    def __init__(self, model: nn.Module) -> None:
        reshard(model)
        self.model, self.units = model, units_of(model)
        self.tensors = dict(named_tensors(model))
        self.stand_ins = StandIns()
        self.form: nn.Module = self.stand_ins.fill(plain_tree(model, {id(t): in_form(t) for t in self.tensors.values()}), {})

    def prune(self, options: Options, compiled: Callable[[CouplingOptions], Any], *, inplace: bool) -> Any:
        """The pruned model, of the same class and sharded as this one is; all processes call it together.

        Arguments:
            options: what to remove.
            compiled: gives a `Compilation` of the form.
            inplace: as for `cut`.
        """
        check_options(options)
        options = dataclasses.replace(options, read=self.gather)
        while True:
            compilation = compiled(options.coupling)
            with options.gc_paused():
                pruned = compilation.emit(compilation.choose(options), cut=self.stand_ins.cut)
            pruned.meta["chosen"] = options.chosen
            made, coupling = in_class(compilation.model, pruned, compilation.inputs, compilation.options)
            if coupling is None:
                break
            options = dataclasses.replace(options, coupling=coupling)
        return self.cut(made, plan_between(self.form, pruned), inplace=inplace)

    def gather(self, name: str) -> Tensor:
        """All values of a parameter; all processes call it together."""
        if self.ranks is not None:
            self.ranks.exchange(f"values of {name}", None)  # where others learn of one that has failed
        if self.tensors[name].is_meta:
            fix = "to_empty() and load the weights first; Plan.apply, and criterion='random', need none"
            raise PruneError(f"the criterion looks at {name}, whose shards are on the meta device", where=name, fix=fix)
        return whole(self.tensors[name])

    def taking(self, plan: PlanData) -> PlanData:
        """A plan that can be applied in form; raises PruneError for one that begins with a change of basis."""
        if plan.basis is not None:
            what = "the plan begins with a change of basis, which takes the model in one process, and it is sharded"
            raise PruneError(what, fix="apply it to the plain model, before fully_shard() or parallelize_module()")
        return plan

    def check_even(self, plan: PlanData) -> None:
        """Raise PruneError where what is left of a parameter cannot be shared as it has to be.

        Layers of tensor parallelism take it that the processes hold equally much, and so does FSDP but in the first dimension.
        """
        inner = self.inner
        dims = {name: (unit, dim) for unit in self.units for name, dim in unit.dims.items()}
        for name, tensor in self.tensors.items():
            if not is_dtensor(tensor):
                continue
            mesh, placements = inner.get(name, (None, ()))
            shares = [(p.dim % tensor.dim(), mesh.size(i)) for i, p in enumerate(placements) if p.is_shard()]
            if name in dims:
                shares.append((dims[name][1], dims[name][0].mesh.size(-1)))
            for dim, processes in shares:
                before, left = tensor.shape[dim], plan.kept_shape(name)[dim]
                if left % processes and not before % processes:
                    raise PruneError(
                        f"{left} of {before} would be left of {name} in dimension {dim}, which {processes} processes share",
                        where=name,
                        fix=f"round_to={processes}, so that each of them has equally many",
                    )

    @property
    def inner(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Mesh and placements of what is sharded by another than FSDP, by name."""
        by_unit = frozenset[str]().union(*(unit.names for unit in self.units))
        found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        for name, tensor in self.tensors.items():
            if is_dtensor(tensor) and name not in by_unit:
                found[name] = (tensor.device_mesh, tuple(tensor.placements))  # type: ignore[attr-defined]
        for unit in self.units:
            found |= unit.inner
        return found

    def cut(
        self, made: nn.Module, plan: PlanData, *, inplace: bool = False, left_of: Callable[[str, Tensor], Tensor] | None = None
    ) -> nn.Module:
        """Give a pruned copy of the form the values that are left, spread as they were; `inplace` empties the original.

        `left_of` says what is left of a tensor by its name, where that is not what the plan leaves of it.

        Where the shards are on the meta device, so are those that are left. All processes call it together, and raise
        PruneError where their plans differ, or where what is left cannot be shared.
        """
        self.check_even(plan)
        if self.ranks is not None:
            self.ranks.check_same(plan.to_json().encode())
        inner, left_of = self.inner, left_of or (lambda name, tensor: slice_tensor(tensor, plan.slices.get(name, ())))

        def spread(name: str, tensor: Tensor) -> Tensor:
            source = self.tensors.get(name)
            if source is None:
                return tensor
            if not is_dtensor(source):
                return left_of(name, source)
            empty = torch.empty(plan.kept_shape(name), dtype=source.dtype, device="meta")
            return nn.Parameter(distributed(empty, *inner[name]) if name in inner else empty, source.requires_grad)

        replace_tensors(made, spread)
        give_hooks(self.model, made)
        shard_again(made, self.units)
        give_methods(self.model, made)
        places = places_of(made)
        for name, parameter in named_parameters(made).items():
            source = self.tensors[name]
            if is_dtensor(source) and not source.is_meta:
                with torch.no_grad():
                    left = left_of(name, whole(source).detach())
                    shard: Any = distributed(left, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
                    shard = shard.to(source.to_local().device)  # type: ignore[attr-defined]  # it may be offloaded
                del left
                filled = nn.Parameter(shard, source.requires_grad)
                for module, key in places[id(parameter)]:
                    module._parameters[key] = filled
                if inplace:
                    let_go(self.model, self.tensors.pop(name))  # type: ignore[arg-type]
        return made


def reshard(model: nn.Module) -> None:
    """Have a model hold its shards alone: the last forward may have left parameters gathered."""
    for module in walk(model):
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def in_form(tensor: Tensor) -> Tensor:
    """What stands for a tensor in form: of a sharded one, one of its shape without values; of others, their values."""
    if is_dtensor(tensor):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    elif tensor.is_cpu or tensor.is_meta:
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    else:
        empty = tensor.detach().cpu()
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def whole(tensor: Any) -> Tensor:
    """All values of a tensor, gathered if it is sharded; all processes call it together."""
    if not is_dtensor(tensor):
        found: Tensor = tensor
        return found
    gathered: Tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    return gathered


def distributed(tensor: Tensor, mesh: Any, placements: Any) -> Tensor:
    """The shard of a tensor, which every process has whole, as a DTensor; nothing is communicated."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def part_for(values: Tensor, shard: Any) -> Tensor:
    """Of values that broadcast to a tensor those that belong to this process's shard of it; all where it is not sharded."""
    if not is_dtensor(shard):
        return values
    part: Any = distributed(values.expand(shard.shape), shard.device_mesh, shard.placements)
    found: Tensor = part.to_local().to(shard.to_local().device)  # it may be offloaded
    return found


def as_shard(values: Tensor, like: Any) -> Tensor:
    """This process's shard as a tensor of all processes, spread as another one is; the shard itself where that is not."""
    if not is_dtensor(like):
        return values
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    found: Tensor = tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()
    return found


def places_of(model: nn.Module) -> Mapping[int, list[tuple[nn.Module, str]]]:
    """Where each parameter is held, by its identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, key, parameter in held_parameters(model):
        found.setdefault(id(parameter), []).append((module, key))
    return found


def held_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in walk(model):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module, key, parameter


def check_options(options: Options) -> None:
    """Raise PruneError for what cannot be asked of a sharded model."""
    fix = UNSHARDED + " or parallelize_module()"
    what = None
    if options.measures_latency:
        what = "latency is measured"
    elif options.depth:
        what = "residual branches are removed"
    elif options.remove is None and (resolve(options.criterion).runs or options.data is not None):
        what, fix = f"the criterion {options.criterion} looks at data", f"criterion='magnitude', or {fix}"
    elif options.verify is True:
        what, fix = "the result is compared with the original", "verify=False, or " + fix
    if what is not None:
        raise PruneError(f"{what}, which takes the model in one process, and it is sharded", fix=fix)
