"""The forward of a model with masks, where zeros alone do not compute what the pruned model will.

A layer normalisation, a softmax over channels or the scale of an attention counts channels that are zero. So a model with masks
computes by the program of the pruned model, on what the masks keep of its own tensors: gradients reach those, statistics
of buffers are written back, and what it returns is by construction what the pruned model returns.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.form_programs import FormProgram, FormPrograms, Names, follow_modes, slots
from fxprune.inputs import ExampleInputs
from fxprune.iterative.plan_mapping import undo_slices
from fxprune.passes.ir.index_contents import version_of
from fxprune.passes.ir.module_tree import HOOKS, fetch, named_parameters, walk
from fxprune.passes.ir.pytree import like_dict
from fxprune.passes.ir.quiet import gpus_of, unobserved
from fxprune.passes.ir.slices import apply_slices
from fxprune.passes.verification.zero_flow import why_zeroed_does_not_apply
from fxprune.passes.verification.zeroed_model import ZeroedOriginal
from fxprune.plan import PlanData


def zeros_suffice(model: nn.Module, plan: PlanData, inputs: ExampleInputs) -> bool:
    """Whether a model computes what the pruned one does once all that a plan removes is zero."""
    with unobserved(model):
        return not why_zeroed_does_not_apply(ZeroedOriginal(model, plan.slices), inputs.args, inputs.kwargs)


class MaskedForward:
    """Takes the place of a module's `forward`.

    Arguments:
        model: the module, of the original architecture. It is reached by this attribute alone, so that a copy of the module has
            a forward of its own.
        plan: what is masked.
        grows: whether masked elements have gradients: those that they would have in the original beside what is kept. They
            are trained then, and count for nothing.
    """

    def __init__(self, model: nn.Module, plan: PlanData, *, grows: bool) -> None:
        self.model, self.plan, self.grows = model, plan, grows
        self.previous, self.ended = vars(model).get("forward"), False
        before = self.previous
        self.own: Any = before.own if isinstance(before, MaskedForward) else before  # one that somebody put there
        self.names, self.masks = Names(model), plan.masks(model) if grows else {}
        self.forms: FormPrograms | None = None
        self.places: dict[FormProgram, list[tuple[str, dict[str, Any], str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"forms": None, "places": {}}

    def end(self) -> None:
        """Give the module the forward that it had, once those that were put there since have ended, too."""
        self.ended, held = True, vars(self.model)
        while isinstance(forward := held.get("forward"), MaskedForward) and forward.ended:
            del held["forward"]
            held.update({} if forward.previous is None else {"forward": forward.previous})

    def plain(self, *, hooks: bool = True) -> nn.Module:
        """A module with the same modules and tensors in it that has its own forward."""
        made: nn.Module = object.__new__(type(self.model))
        held = vars(made)
        held.update(vars(self.model))
        del held["forward"]
        if self.own is not None:
            held["forward"] = self.own
        held.update({} if hooks else {name: type(held[name])() for name in HOOKS if name in held})
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # it may capture the model anew, which `torch.compile` would take minutes to follow
        compute = torch.compiler.disable(self.compute) if "torch._dynamo" in sys.modules else self.compute
        return compute(*args, **kwargs)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """What the pruned model returns."""
        if self.forms is None:  # hooks of the module itself run around this call
            self.forms = FormPrograms(self.plain(hooks=False), self.plan)
        inputs = ExampleInputs(args, kwargs)
        form, (out, states) = self.forms.run(inputs, functools.partial(self.run, inputs=inputs))
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()} if self.grows else {}
        if self.grows and torch.is_grad_enabled():
            out = self.with_growth(out, inputs, buffers)
        with torch.no_grad():
            for name, value in states.items():
                tensor = fetch(self.model, name)
                tensor.copy_(undo_slices(self.plan.slices.get(name, ()), value, buffers.get(name, tensor)))
        return like_dict(form.output, out) if isinstance(out, dict) and isinstance(form.output, dict) else out

    def run(self, form: FormProgram, inputs: ExampleInputs) -> tuple[Any, dict[str, Tensor]]:
        """What a program returns, and what is kept of the buffers that it may have written to, by name."""
        follow_modes(form.pruned, self.model)
        if form not in self.places:
            named = [(self.names(path), held, key) for path, _, held, key in slots(form.pruned)]
            self.places[form] = [place for place in named if place[0] in self.plan.shapes]
        taken: dict[str, Tensor] = {}
        states: dict[str, int] = {}
        for name, held, key in self.places[form]:
            if name not in taken:
                tensor, cuts = fetch(self.model, name), self.plan.slices.get(name, ())
                learned = isinstance(tensor, nn.Parameter)
                taken[name] = apply_slices(cuts, tensor) if cuts else tensor if learned else tensor.clone()
                if not learned:
                    states[name] = version_of(taken[name])
            held[key] = taken[name]
        out = inputs.call(form.pruned)
        training = any(module.training for module in walk(form.pruned))  # batch normalisation does not count what it writes
        return out, {name: taken[name] for name, old in states.items() if training or version_of(taken[name]) != old}

    def with_growth(self, out: Any, inputs: ExampleInputs, buffers: dict[str, Tensor]) -> Any:
        """The same results, with gradients for masked elements too: those of the original, in which nothing else has any."""
        parameters = named_parameters(self.model)
        mixed = {name: torch.where(self.masks[name].to(p.device), p.detach(), p) for name, p in parameters.items()}
        with torch.random.fork_rng(devices=gpus_of(self.model)):
            whole = torch.func.functional_call(self.plain(hooks=False), mixed | buffers, inputs.args, inputs.kwargs)
        return join(out, whole)


def join(out: Any, beside: Any) -> Any:
    """The same results, whose gradients go to those of another model in the same places, too."""
    if isinstance(out, Tensor):
        same = isinstance(beside, Tensor) and beside.requires_grad and beside.shape == out.shape
        return Join.apply(out, beside) if same else out
    if isinstance(out, dict) and isinstance(beside, dict):
        return {key: join(value, beside.get(key)) for key, value in out.items()}
    if type(out) in (tuple, list) and isinstance(beside, tuple | list) and len(out) == len(beside):
        return type(out)(join(a, b) for a, b in zip(out, beside, strict=True))
    return out


class Join(torch.autograd.Function):
    """Returns its first argument; both get the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, beside: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient
