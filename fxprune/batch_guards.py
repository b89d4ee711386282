"""Any batch: a pruned program that takes a batch of one and larger ones, also where the model tells them apart.

Python decides by sizes (`if positions.shape[0] != batch: positions = positions.expand(batch, -1)`), and a program is one of the
paths. The path of larger batches often does for a batch of one: so it is captured, and tried with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.inputs import batch_of, batch_of_one, larger
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import surface
from fxprune.passes.ir.labels import Labels
from fxprune.passes.ir.program import Waiver
from fxprune.passes.ir.quiet import unobserved
from fxprune.passes.ir.tensor_ref import TensorRef
from fxprune.passes.rewrite.guards import guards_of, noting
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.passes.rewrite.rewrite import rewrite_program
from fxprune.plan import Plan, kept_by
from fxprune.verification import Verification, compare, evaluating, restoring

Coupled = Callable[[tuple[Any, ...], dict[str, Any]], Solution]


def for_any_batch(
    model: nn.Module, pruned: PrunedModule, args: tuple[Any, ...], kwargs: dict[str, Any], coupled: Coupled, heads: bool
) -> PrunedModule:
    """The pruned model as a program that takes a batch of one and larger ones, where both are exact; else as it is.

    Arguments:
        model: the original.
        pruned: verified already.
        args, kwargs: the example inputs.
        coupled: couples the model anew, on inputs of any size.
        heads: whether heads go whole.
    """
    if not guards_of(pruned):
        return pruned
    try:
        return tried_with_one(model, pruned, args, kwargs, coupled, heads) or pruned
    except Exception as error:  # the model does not take such a batch, or couples otherwise
        surface(error)
        return pruned


def tried_with_one(
    model: nn.Module, pruned: PrunedModule, args: tuple[Any, ...], kwargs: dict[str, Any], coupled: Coupled, heads: bool
) -> PrunedModule | None:
    """The program of larger batches, tried at a batch of one; None where it is no better than the one there is."""
    batch = batch_of(args, kwargs)
    if not batch:
        return None
    alone = batch == 1
    if alone and not refuses_a_batch(pruned.verification):
        return None
    one, several = batch_of_one(args, kwargs), larger(args, kwargs) if alone else (args, kwargs)
    tried = made(model, pruned.plan, coupled(*several), None).program if alone else pruned
    with noting(tried) as failing, evaluating(tried), restoring(tried, parameters=True), torch.no_grad(), unobserved(model):
        tried(*one[0], **one[1])
    if not failing and not alone:
        return None
    solution = coupled(*several)
    argument = first_tensor(solution)
    if argument is None:
        return None
    waiver = Waiver(argument, 1, tuple(dict.fromkeys(failing)))
    found = made(model, pruned.plan, solution, waiver)
    least = compare(model, found.program, found.leaves, found.kept, heads, *one, sizes=False)
    verified = replace(least, error=max(pruned.verification.error, least.error))
    if alone:
        more = compare(model, found.program, found.leaves, found.kept, heads, *several, sizes=True)
        said = [*least.compared, "another batch", *(s for s in more.compared[1:] if s != "another batch")]
        verified = replace(more, error=max(least.error, more.error), compared=tuple(said))
    else:
        verified = replace(verified, compared=(*pruned.verification.compared, "a batch of one"))
    if not verified.ok or (alone and refuses_a_batch(verified)):
        return None
    meta = {**pruned.meta, "plan": replace(pruned.plan, waiver=waiver), "verification": verified}
    vars(found.program)["meta"] = meta
    return found.program


@dataclass(slots=True)
class Made:
    """A pruned program, with what it takes to verify it."""

    program: PrunedModule
    leaves: Mapping[str, Labels]
    kept: Tensor


def made(model: nn.Module, plan: Plan, solution: Solution, waiver: Waiver | None) -> Made:
    kept = kept_by(plan, solution)
    return Made(rewrite_program(model, solution, kept, waiver=waiver), solution.leaves, kept)


def refuses_a_batch(found: Verification) -> bool:
    """Whether the program was found not to take another batch."""
    return any(said.startswith("another batch") for said in found.refused)


def first_tensor(solution: Solution) -> str | None:
    """The program's first argument that is a tensor with dimensions, by name; None where tensors lie in containers."""
    capture = solution.captures[0]
    for node in capture.graph.nodes:
        ref = capture.results.get(node)
        if node.op == "placeholder" and type(ref) is TensorRef and capture.op_trace.shape(ref):
            return str(node.name)
    return None
