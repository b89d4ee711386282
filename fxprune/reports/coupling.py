"""The coupling, as a user reads it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from torch import nn

from fxprune.arguments import checked_class
from fxprune.entry_points import entry_point
from fxprune.passes.coupling.families import Family, listed, place_of, spells
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.coupling.structure import find_roles
from fxprune.passes.errors import PruneError
from fxprune.pipeline import Compilation
from fxprune.reports.formatting import Printable, counted, table
from fxprune.reports.group import Chains, Group, group_of
from fxprune.selection.costs import elements
from fxprune.selection.indices import parse_indices
from fxprune.selection.names import NOT_ALL_IN
from fxprune.selection.options import Options, Verify
from fxprune.selection.places import find_place
from fxprune.selection.removal import check_indices

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


SHOWN = 4


@checked_class
@dataclass(frozen=True)
class CoupledFamily:
    """Layers that are pruned together.

    Attributes:
        name: its first layer; `prune` takes it in `ratio`, `freeze` and `scopes`.
        units: how many units it has: the smallest things that can be removed.
        width: how many channels of its first member one unit takes up.
        members: (parameter or buffer, dimension) pairs it spans.
        frozen: the reason it is kept whole, or None.
        role: what it is to the program: `residual stream`, `hidden layer`, `head`, `KV group` (a key head with the query heads
            that share it), or "".
        parameters: how many parameter elements go with its units. A weight belongs to the family of its
            outputs and to that of its inputs, so the numbers of all families add up to more than the model's.
    """

    name: str
    units: int
    width: int
    members: tuple[tuple[str, int], ...]
    frozen: str | None
    parameters: int
    role: str = ""

    def __str__(self) -> str:
        units = f"{counted(self.units, 'unit')} of {counted(self.width, 'channel')}"
        why = f"; it {self.frozen}" if self.frozen else ""
        role = f" ({self.role})" if self.role else ""
        return f"{self.name}{role}: {units}, {counted(self.parameters, 'parameter')}{why}"

    def spans(self, most: int | None = None) -> str:
        """Its members as `layer:dimension`, the first `most` of them."""
        short = list(dict.fromkeys(f"{place_of(name)}:{dim}" for name, dim in self.members))
        hidden = len(short) - most if most is not None and len(short) > most + 1 else 0
        return ", ".join(short[: len(short) - hidden]) + (f", and {hidden} more" if hidden else "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "name": self.name,
            "role": self.role,
            "units": self.units,
            "width": self.width,
            "parameters": self.parameters,
            "frozen": self.frozen,
            "members": [list(m) for m in self.members],
        }


@checked_class
class Coupling(Printable):
    """Families of a model: printable, and exportable as JSON or as a graph.

    >>> import torch, fxprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> found = fxprune.couple(net, torch.randn(1, 4))
    >>> found
    Coupling(Sequential: 1 prunable family of 6 units, 2 families kept whole)
    >>> print(found.families[0])
    0 (hidden layer): 6 units of 1 channel, 42 parameters
    >>> found.families[0].members
    (('0.weight', 0), ('0.bias', 0), ('2.weight', 1))

    Attributes:
        model: the name of its class.
        families: in the order of the model's parameters.
    """

    def __init__(
        self,
        model: str,
        found: Sequence[Family],
        solution: Solution,
        compilation: Compilation,
        in_form: bool = False,
    ) -> None:
        self.model, self._in_form = model, in_form
        tensors, frozen = compilation.tensors, compilation.options.frozen
        sizes, roles = elements(solution, found, tensors), find_roles(solution, found)
        self.families: tuple[CoupledFamily, ...] = tuple(
            coupled_family(family, count, frozen, role.name) for family, count, role in zip(found, sizes, roles, strict=True)
        )
        self._found = found
        self._solution = solution
        self._compilation = compilation

    @property
    def prunable(self) -> list[CoupledFamily]:
        """The families that pruning may shrink, largest first."""
        return largest_first(f for f in self.families if f.frozen is None)

    @property
    def frozen(self) -> list[CoupledFamily]:
        """The families that stay whole, largest first."""
        return largest_first(f for f in self.families if f.frozen is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data: every family, in the order of the model's parameters."""
        return {"model": self.model, "families": [f.to_dict() for f in self.families]}

    def to_networkx(self) -> Any:
        """A `networkx.Graph` whose connected components are the families.

        Nodes are (tensor, dimension, position in `families`), with the attributes `tensor`, `dim`, `family`
        (its name), `frozen` (the reason or None) and `indices`. Edges are what the rules tied, before anything
        was solved, with `op` (the class of a layer or the name of a function) and `module` (the path of the one
        that calls it) of the first tie.
        """
        from fxprune.reports.coupling_graph import coupling_graph

        return coupling_graph(self._solution, self._found)

    def group(self, layer: str | nn.Module, indices: Sequence[int] | None = None) -> Group:
        """All that goes with some channels, as a chain of links, each with the op that causes it.

        >>> import torch, fxprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> found = fxprune.couple(net, torch.randn(1, 4)).group("0", [1, 4])
        >>> for link in found:
        ...     print(link)
        0:0 [1, 4] as asked
        0:0 [1, 4] with 0:0, by Linear 0
        2:1 [1, 4] with 0:0, by Linear 2
        >>> found.apply()[2].weight.shape
        torch.Size([2, 4])

        Arguments:
            layer: as a key of `remove` in `prune`: a layer, `layer:dim`, `tensor:dim`, or a family.
            indices: channels of it (of a family, units), each once; all of them by default.

        Raises: PruneError for a layer or indices that there are none of.
        """
        with entry_point(self._compilation.model) as model:
            place = find_place(model, self._solution, self._found, layer, "group")
            chosen = range(place.size) if indices is None else parse_indices(indices, "indices", layer)
            check_indices(place, chosen)
            return group_of(self._chains, place, chosen, self._prune)

    @functools.cached_property
    def _chains(self) -> Chains:
        return Chains(self._solution)

    def _prune(self, remove: Mapping[str, Sequence[int]], verify: Verify = "auto", same_class: bool = False) -> Any:
        if self._in_form:
            raise PruneError("the model is sharded, and a group has none of its values", fix="prune(model, remove=...)")
        with entry_point(self._compilation.model) as model:
            options = Options.parse(model, remove=remove, verify=verify)
            options = dataclasses.replace(options, coupling=self._compilation.options)
            return self._compilation.prune(options, same_class=same_class)

    def __repr__(self) -> str:
        return f"Coupling({self.headline()})"

    def headline(self) -> str:
        units = sum(f.units for f in self.prunable)
        prunable = f"{counted(len(self.prunable), 'prunable family')} of {counted(units, 'unit')}"
        whole = f"{counted(len(self.frozen), 'family')} kept whole"
        return f"{self.model}: {prunable if units else 'nothing to prune'}, {whole}"

    def tables(self) -> Iterator[RenderableType]:
        """The headline, the prunable families and those kept whole, as rich renders them."""
        yield Text(self.headline())
        if self.prunable:
            yield ""
            spans = [f.spans(SHOWN) for f in self.prunable]
            yield family_table(("prunable family", "spans"), self.prunable, spans)
        if self.frozen:
            yield ""
            reasons = [str(f.frozen) for f in self.frozen]
            yield family_table(("kept whole", "because it"), self.frozen, reasons)


def family_table(titles: tuple[str, str], found: Sequence[CoupledFamily], last: Sequence[str]) -> Table:
    """A row for each family: its name, its size, and what the last column says of it."""
    rows = [
        (f.name, f.role, f"{f.units:,}", f"{f.width:,}", f"{f.parameters:,}", text) for f, text in zip(found, last, strict=True)
    ]
    return table((titles[0], "role", "units", "width", "parameters", titles[1]), rows)


def coupled_family(family: Family, parameters: int, frozen: Collection[str] = (), role: str = "") -> CoupledFamily:
    """A family as a user reads it, without its labels; `frozen` are the tensors that stay by request."""
    why, texts = family.kept_whole, [text for text in frozen if ":" in text]
    if why is not None and why.startswith(NOT_ALL_IN):
        beyond = list(dict.fromkeys(f"{place_of(name)}:{dim}" for name, dim in family.members if name in frozen))
        if len(beyond) < len({f"{place_of(name)}:{dim}" for name, dim in family.members}):
            why += f": it holds {listed(beyond)} too"
    if why is not None and why.startswith("is frozen by "):
        named = lambda name, dim: name in frozen or any(spells(t, name, dim) for t in texts)  # noqa: E731
        others = [member for member in family.members if not named(*member)]
        if 0 < len(others) < len(family.members):
            why += f", which holds {listed(list(dict.fromkeys(f'{place_of(name)}:{dim}' for name, dim in others)))} too"
    return CoupledFamily(family.name, len(family.units), family.width, family.members, why, parameters, role)


def largest_first(families: Iterator[CoupledFamily]) -> list[CoupledFamily]:
    return sorted(families, key=lambda f: -f.parameters)
