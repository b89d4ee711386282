"""Programs for a batch of any size, also where the model tells a batch of one from larger ones.

Python decides by sizes (`if positions.shape[0] != batch: positions = positions.expand(batch, -1)`), and a program is one of the
paths. The path of larger batches often does for a batch of one: so it is captured, and tried with one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from fxprune.comparisons.compare import compare
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import surface
from fxprune.passes.ir.program import Waiver
from fxprune.passes.ir.pytree import TensorRef
from fxprune.passes.ir.quiet import unobserved
from fxprune.passes.rewrite.guards import guards_of, noting
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.passes.verification.masked_model import Removal
from fxprune.passes.verification.outlook import Outlook
from fxprune.plan import PlanData
from fxprune.verification import Verification, evaluating, quietly, restoring


@dataclass(frozen=True, slots=True)
class Recompiled:
    """A plan's choice for inputs of other sizes.

    Attributes:
        solution: the coupling of the program for these inputs.
        removal: what is removed by it.
        expected: what it says of a run.
        emit: makes the pruned program, with a waiver or without.
    """

    solution: Solution
    removal: Removal
    expected: Outlook
    emit: Callable[[Waiver | None], PrunedModule]


Recompile = Callable[[ExampleInputs], Recompiled]


def for_any_batch(
    model: nn.Module, pruned: PrunedModule, inputs: ExampleInputs, recompile: Recompile, *, writes: bool = True
) -> PrunedModule:
    """The pruned model as a program that takes a batch of one and larger ones, where both are exact; else as it is.

    Arguments:
        model: the original.
        pruned: verified already.
        inputs: the example inputs.
        recompile: compiles the model anew by the same plan, for inputs of any size.
        writes: whether a forward may write to parameters.
    """
    if not guards_of(pruned):
        return pruned
    try:
        return tried_with_one(model, pruned, inputs, recompile, writes) or pruned
    except Exception as error:  # the model does not take such a batch, or couples otherwise
        surface(error)
        return pruned


def tried_with_one(
    model: nn.Module, pruned: PrunedModule, inputs: ExampleInputs, recompile: Recompile, writes: bool
) -> PrunedModule | None:
    """The program of larger batches, tried at a batch of one; None where it is no better than the one there is."""
    if not inputs.batch:
        return None
    alone = inputs.batch == 1
    if alone and not refuses_a_batch(pruned.meta["verification"]):
        return None
    one, several = inputs.first_sample(), inputs.one_more() if alone else inputs
    tried = recompile(several).emit(None) if alone else pruned
    with noting() as failing, evaluating(tried), restoring(tried, parameters=writes), torch.no_grad(), unobserved(model):
        one.call(quietly(tried))
    if not failing and not alone:
        return None
    found = recompile(several)
    argument = first_tensor(found.solution)
    if argument is None:
        return None
    waiver = Waiver(argument, 1, tuple(dict.fromkeys(failing)))
    program = found.emit(waiver)
    least = compare(model, program, found.removal, one, sizes=False, outlook=found.expected)
    verified = replace(least, error=max(pruned.meta["verification"].error, least.error))
    if alone:
        more = compare(model, program, found.removal, several, sizes=True, outlook=found.expected)
        said = [*least.compared, "another batch", *(s for s in more.compared[1:] if s != "another batch")]
        verified = replace(more, error=max(least.error, more.error), compared=tuple(said))
    else:
        verified = replace(verified, compared=(*pruned.meta["verification"].compared, "a batch of one"))
    if not verified.ok or (alone and refuses_a_batch(verified)):
        return None
    plans: dict[str, PlanData] = {key: waiving(pruned.meta[key], waiver) for key in ("plan", "step") if key in pruned.meta}
    meta = {**pruned.meta, **plans, "verification": verified}
    vars(program)["meta"] = meta
    return program


def waiving(plan: PlanData, waiver: Waiver) -> PlanData:
    """A plan with other guards waived, which are those of the program that its last step makes."""
    return replace(plan, waiver=waiver, steps=(*plan.steps[:-1], *(waiving(step, waiver) for step in plan.steps[-1:])))


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
