"""The registry of ops: one `OpSpec` holds everything that fxprune knows of an op.

Each file of this folder ends with the specifications of its ops. `find(func)` answers for a dispatcher function, `find_node`
for a node of a captured graph. Ops that torch tags as pointwise need no entry.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxprune.passes.ir.op_trace import OpCall
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ops.call import OpView, RuleContext
from fxprune.passes.ops.masking import MaskContext
from fxprune.passes.ops.rewriting import RewriteContext, SizeArguments, function_name, resize_result


@dataclass(frozen=True, slots=True)
class Product:
    """A weight in a contraction: which of its dimensions is summed, which becomes one of the result's.

    Attributes:
        weight, source: the two operands.
        summed, kept: dimensions of the weight; `kept` is None where it adds none to the result.
        along: the dimension of the source that is summed.
        out: the dimension of the result that `kept` becomes.
        groups: of a convolution.
        added: what the result also has added to it: the bias.
    """

    weight: TensorRef
    source: TensorRef
    summed: int
    kept: int | None
    along: int
    out: int
    groups: int = 1
    added: TensorRef | None = None


Rule = Callable[[RuleContext], Any]
Rewrite = Callable[[RewriteContext, fx.Node], fx.Node | None]
Masked = Callable[[MaskContext, OpView, Any, Any], Any]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """What is known of an op.

    Attributes:
        labels: the labels of its results (a list of them for several results) from those of its arguments.
        rewrite: what a call becomes once its tensors shrink, as a new node; None where the call stays as it is.
        always: whether calls that lose nothing are rewritten, too.
        sizes: which arguments are sizes of the result; `rewrite` then follows from it.
        masked: what the op computes of kept elements, where that is not what it computes with zeros for the others.
        products: the ways in which it multiplies one operand by another, as a layer by its weight.
        groups: the weight of a grouped product and the number of groups.
        macs: multiply-accumulates, from the shapes of its tensors.
        filled_with: what each element of its results equals, where that is one number, or those of one argument.
        within: the least that an element of its results can be, and a bound that none of them reaches.
        moves: whether its results hold elements of its first argument and nothing else.
        views: whether its results may share the memory of that argument.
        heads: whether batch dimensions of its operands may be attention heads.
        normalizes: whether its result is normalised and scaled by an argument named `weight`.
        counts: whether a call of a Python function of this name computes with a size that is not among its arguments: then what
            it is made of holds a number that would have to change, and all that it reads is kept.
        recorded_as: the dispatcher function that a Python function of this name is recorded as, instead of what it is made of.
    """

    labels: Rule | None = None
    rewrite: Rewrite | None = None
    always: bool = False
    sizes: SizeArguments | None = None
    masked: Masked | None = None
    products: Callable[[OpView], Iterable[Product]] | None = None
    groups: Callable[[OpView], tuple[TensorRef, int]] | None = None
    macs: Callable[[OpView], int] | None = None
    filled_with: Callable[[OpView], Any] | None = None
    within: tuple[float, float] | None = None
    moves: bool = False
    views: bool = False
    heads: bool = False
    normalizes: bool = False
    counts: Callable[[fx.Node], bool] | None = None
    recorded_as: Any = None

    def products_of(self, call: OpView) -> Iterable[Product]:
        """The products of one call; none where the op is no product."""
        return () if self.products is None else self.products(call)


UNKNOWN = OpSpec()
SPECS: dict[str, OpSpec] = {}  # by the name of the op's schema; those that end in `*` serve all that begin so
FUNCTIONS: dict[str, OpSpec] = {}  # by the name of a function or method in a captured graph
TAGGED: dict[torch.Tag, OpSpec] = {}  # by a tag of torch, for ops with no entry of their own


def register(names: str, spec: OpSpec, *, functions: str = "") -> None:
    """Add a specification to the registry.

    Arguments:
        names: schema names of the ops it is for, in one string; `aten::` where no namespace is given. A `*` at the end
            matches any ending.
        functions: names of further Python functions and methods that are rewritten like the ops.
    """
    if spec.sizes is not None and spec.rewrite is None:
        spec = dataclasses.replace(spec, rewrite=resize_result(spec.sizes))
    for name in names.split():
        SPECS[name if "::" in name else f"aten::{name}"] = spec
        if "::" not in name:
            FUNCTIONS[name] = spec
    for name in functions.split():
        FUNCTIONS[name] = spec
    forget()


def forget() -> None:
    """Look specifications up again."""
    find.cache_clear()
    named.cache_clear()


@functools.lru_cache(maxsize=4096)
def find(func: Any) -> OpSpec:
    """The specification of a dispatcher function; `UNKNOWN` where there is none."""
    schema = getattr(func, "_schema", None)
    found = UNKNOWN if schema is None else named(schema.name)
    if found is UNKNOWN:
        found = next((TAGGED[tag] for tag in tags_of(func) if tag in TAGGED), UNKNOWN)
    return found


def tags_of(func: Any) -> Iterable[torch.Tag]:
    """The tags of a dispatcher function; one of `prims`, which have none, does what the op of its name in `aten` does."""
    space, _, name = getattr(getattr(func, "_schema", None), "name", "").partition("::")
    packet = getattr(torch.ops.aten, name, None) if space == "prims" else None
    forms = [func] if packet is None else [getattr(packet, form) for form in packet.overloads()]
    return [tag for form in forms for tag in getattr(form, "tags", ())]


def spec_of(op: OpCall) -> OpSpec:
    """The specification of what a call calls, looked up once."""
    found: OpSpec | None = op.spec
    if found is None:
        found = op.spec = find(op.func)
    return found


@functools.lru_cache(maxsize=4096)
def named(name: str) -> OpSpec:
    """The specification for a schema name: its own, that of its out-of-place form, or one for names that begin alike."""
    found = SPECS.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = SPECS.get(name[:-1])
    if found is None:
        found = next((spec for key, spec in SPECS.items() if key.endswith("*") and name.startswith(key[:-1])), None)
    return UNKNOWN if found is None else found


def find_node(node: fx.Node) -> OpSpec:
    """The specification of what a node of a captured graph calls."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return find(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return named(target._qualified_op_name)
    return FUNCTIONS.get(function_name(node), UNKNOWN) if node.op in ("call_function", "call_method") else UNKNOWN


def as_another(spec: OpSpec, other: Any) -> OpSpec:
    """A specification for an op that takes the arguments of another one, the dispatcher function `other`, by position."""

    def renamed(function: Callable[..., Any] | None, at: int) -> Callable[..., Any] | None:
        if function is None:
            return None
        return lambda *args: function(*args[:at], args[at].under(other), *args[at + 1 :])

    places = {"labels": 0, "masked": 1, "products": 0, "groups": 0, "macs": 0, "filled_with": 0}
    changed: dict[str, Any] = {name: renamed(getattr(spec, name), at) for name, at in places.items()}
    return dataclasses.replace(spec, **changed)
