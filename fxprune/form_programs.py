"""Programs by the form of the inputs: what a plan leaves of a model, captured anew for inputs that no program takes yet.

A program is what a model does for the arguments and the sizes that it was captured with. Batches come with other keywords (an
`attention_mask`), without optional ones, or in sizes by which Python decides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.criteria.calibration import BATCHES, batch_refused
from fxprune.inputs import ExampleInputs
from fxprune.module_state import take_modes
from fxprune.passes.capture.patches import visible
from fxprune.passes.errors import GuardError, PruneError
from fxprune.passes.ir.module_tree import every_path, named_tensors, private_copy, set_mode
from fxprune.passes.ir.pytree import map_tensors
from fxprune.passes.ir.quiet import unobserved, without_modes
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.rewrite.pruned_module import PrunedModule
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData, kept_labels
from fxprune.selection.choice import Choice, removal_of


@dataclass(frozen=True, eq=False)
class FormProgram:
    """The programs for one form of inputs.

    Attributes:
        pruned, original: what the plan leaves of the model, and the model itself; either is None where it was not asked for.
        output: what the model itself returned for the inputs; None beside a program of the original, which can be run.
    """

    pruned: PrunedModule
    original: PrunedModule | None
    output: Any


class FormPrograms:
    """Captures a model anew for each form of inputs that comes.

    Arguments:
        model: the original architecture; its values are taken when a program is made.
        plan: what is removed.
        tensors: what the plan left of tensors, by name: programs in evaluation mode share them. What tensors lose that are
            not among them is decided by what they are used with.
        originals: whether programs of the whole model are wanted, too.
    """

    def __init__(
        self, model: nn.Module, plan: PlanData, tensors: Mapping[str, Tensor] | None = None, *, originals: bool = False
    ) -> None:
        self.model, self.plan, self.tensors, self.originals = model, plan, tensors, originals
        self.found: dict[str, list[FormProgram]] = {}

    def run(self, inputs: ExampleInputs, run: Callable[[FormProgram], Any]) -> tuple[FormProgram, Any]:
        """The first program that takes the inputs, and what `run` returns for it.

        Raises: PruneError where the model does not take the inputs, or cannot be captured with them.
        """
        known = self.found.setdefault(form_of(inputs), [])
        for program in known:
            try:
                return program, run(program)
            except GuardError:
                continue
        known.append(self.compile(inputs))
        return known[-1], run(known[-1])

    @without_modes()
    def compile(self, inputs: ExampleInputs) -> FormProgram:
        """Capture the model with these inputs."""
        with unobserved(self.model), visible():
            output = None if self.originals else self.output(inputs)
            compilation = Compilation(self.model, inputs.map(lambda t: t.detach().clone()), self.plan.coupling_options)
            try:
                solution = compilation.couple()
            except PruneError:
                self.output(inputs)  # which says what is wrong with the batch, if that is it
                raise
            shapes = {n: shape for n, shape in self.plan.shapes.items() if self.tensors is None or n in self.tensors}
            slices = {name: cuts for name, cuts in self.plan.slices.items() if name in solution.leaves}
            try:
                kept = kept_labels(replace(self.plan, shapes=shapes, slices=slices), solution)
            except PruneError:
                if self.plan.attention == "dims":
                    raise
                self.plan = replace(self.plan, attention="dims")  # as in `Compilation.choice_of`
                return self.compile(inputs)
            original = compilation.emit(compilation.unpruned()) if self.originals else None
            slicer = Slicer(kept, removal_of(self.model, solution, kept, self.plan.removed))
            pruned = compilation.emit(Choice(solution, kept, slicer))
        if self.tensors is not None:
            for program in [pruned] if original is None else [original, pruned]:
                program.eval()
            names = Names(self.model)
            for path, tensor, _, _ in slots(pruned):
                if (own := self.tensors.get(names(path))) is not None:
                    tensor.data = own.data
        return FormProgram(pruned, original, output)

    def output(self, inputs: ExampleInputs) -> Any:
        """What the model itself returns in evaluation mode; raises PruneError where it does not take the inputs."""
        try:
            inspect.signature(self.model.forward).bind(*inputs.args, **inputs.kwargs)
        except TypeError as error:
            raise PruneError(f"a batch of data does not fit the model: {error}", fix=BATCHES) from error
        own = set_mode(private_copy(self.model), False)
        try:
            return inputs.map(torch.clone).call(own)
        except Exception as error:
            raise batch_refused(error) from error


class Names:
    """The names of a model's tensors.

    Arguments:
        model: whose names a plan knows.
    """

    def __init__(self, model: nn.Module) -> None:
        first = {id(t): name for name, t in named_tensors(model)}
        self.first = {path: first[id(t)] for path, t, _, _ in slots(model)}

    def __call__(self, path: str) -> str:
        """The name in the model of a tensor of its program."""
        return self.first.get(path, path)


def slots(root: nn.Module) -> Iterator[tuple[str, Tensor, dict[str, Any], str]]:
    """Every place where a module tree holds a tensor: its path, the tensor, and the dictionary and the key that hold it."""
    for path, module in every_path(root):
        for held in (module._parameters, module._buffers, vars(module)):
            for key, value in held.items():
                if isinstance(value, Tensor):
                    yield f"{path}.{key}" if path else key, value, held, key


def form_of(inputs: ExampleInputs) -> str:
    """The structure of inputs, with what is no tensor, but without sizes."""
    return repr(map_tensors((inputs.args, sorted(inputs.kwargs.items())), lambda t: (str(t.dtype), t.dim(), str(t.device))))


def follow_modes(program: fx.GraphModule, model: nn.Module) -> None:
    """Bring a program and its modules into the modes of those of a model."""
    if program.training != model.training:
        program.train(model.training)
    take_modes(program, model)
