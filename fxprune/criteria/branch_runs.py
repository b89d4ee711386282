"""Run the program of an original, and look at or leave out what its residual branches add."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.inputs import ExampleInputs
from fxprune.passes.capture.modules import after_forward, before_forward
from fxprune.passes.coupling.branches import Branches
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import GuardError, PruneError
from fxprune.passes.ir.branches import Branch
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.pytree import collect

# of a branch, its stream, what it adds, the sum; whether that is all of it
Look = Callable[[int, Tensor, Tensor, Tensor, bool], None]
WholeProgram = Callable[[ExampleInputs | None], tuple[Solution, fx.GraphModule]]


class BranchRun(fx.Interpreter):
    """Runs the program of an original in evaluation mode, and looks at what is added to its streams.

    Arguments:
        program: flat, with the original's tensors.
        places: of each addition the node by name, the place of its branch among the branches, and which operand the branch is;
            several where several of the branches have it.

    Attributes:
        looks: what is called at an addition; see `Look`.
        without: branches to leave out.
    """

    def __init__(self, program: fx.GraphModule, places: Sequence[tuple[str, int, int]]) -> None:
        super().__init__(program)
        self.extra_traceback = False  # errors are said without the node
        self.at: dict[str, tuple[list[int], int]] = {}
        for name, i, which in places:
            self.at.setdefault(name, ([], which))[0].append(i)
        self.last = {i: name for name, i, _ in places}
        self.looks: Look | None = None
        self.without: Collection[int] = ()
        self.arguments: Mapping[str, Any] = {}
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the program has such arguments, which `run` then goes by."""
        try:
            args, kwargs = self.given = before_forward(self.module, args, kwargs)
            given = inspect.signature(self.module.forward).bind(*args, **kwargs)
        except TypeError:
            return False
        given.apply_defaults()
        self.arguments = given.arguments
        return True

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return after_forward(self.module, *self.given, super().output(target, args, kwargs))

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.arguments[str(target).lstrip("*")]

    def run_node(self, node: fx.Node) -> Any:
        if node.name not in self.at:
            return super().run_node(node)
        its, which = self.at[node.name]
        operands = [self.env[n] for n in node.all_input_nodes]
        branch, stream = operands[which], operands[1 - which]
        out = stream + branch if set(its).isdisjoint(self.without) else stream.clone()
        if self.looks is not None:
            for i in its:
                self.looks(i, stream, branch, out, self.last[i] == node.name)
        return out


class BranchRuns:
    """Runs an original, by one program for each kind of batches: they may have other arguments or sizes than the example.

    Attributes:
        looks, without: as of `BranchRun`.
    """

    def __init__(self, model: nn.Module, solution: Solution, branches: Sequence[Branch], program: WholeProgram) -> None:
        self.model, self.branches, self.program = model, branches, program
        self.runs = [BranchRun(program(None)[1], places_of(solution, [b.parts or (b,) for b in branches]))]
        self.by_kind: dict[Hashable, BranchRun] = {}
        self.looks: Look | None = None
        self.without: Collection[int] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = (tuple(kwargs), *((t.shape, t.dtype) for t in collect((args, kwargs), Tensor)))
        if kind not in self.by_kind:
            self.by_kind[kind] = self.find(args, kwargs)
        run = self.by_kind[kind]
        run.takes(args, kwargs)
        run.looks, run.without = self.looks, self.without
        return run.run()

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BranchRun:
        """The run whose program has such arguments and takes their sizes, captured where there is none."""
        for run in self.runs:
            run.looks, run.without = None, ()
            if run.takes(args, kwargs):
                with contextlib.suppress(GuardError), torch.no_grad():
                    run.run()
                    return run
        self.runs.append(self.capture(ExampleInputs(args, kwargs)))
        return self.runs[-1]

    def capture(self, inputs: ExampleInputs) -> BranchRun:
        """A program for other arguments; raises PruneError where a branch does not run with them."""
        solution, program = self.program(inputs)
        known = {b.parameters: b for b in Branches(solution.captures, set(named_parameters(self.model))).found}
        for branch in (part for b in self.branches for part in b.parts or (b,)):
            if branch.parameters not in known:
                raise PruneError(
                    "a residual branch of the example inputs does not run with the arguments of a batch of data",
                    where=branch.name,
                    fix="example_inputs with the keywords of the batches, or depth_criterion='weights'",
                )
        parts = [[known[part.parameters] for part in b.parts or (b,)] for b in self.branches]
        return BranchRun(program, places_of(solution, parts))


def additions(solution: Solution, parts: Sequence[Branch]) -> list[tuple[fx.Node, fx.Node]]:
    """The additions of some branches in evaluation mode, in the order in which they run, and the stream of each."""
    capture = solution.captures[0]
    cuts = {add: stream for part in parts for add, stream in part.cuts.items()}
    found = [(add, stream) for add, stream in cuts.items() if add in capture.index and not capture.only.get(add, False)]
    return sorted(found, key=lambda pair: capture.index[pair[0]])


def places_of(solution: Solution, branches: Sequence[Sequence[Branch]]) -> list[tuple[str, int, int]]:
    """The additions of all branches, each in its parts, as `BranchRun` takes them."""
    found = [(i, *pair) for i, parts in enumerate(branches) for pair in additions(solution, parts)]
    return [(add.name, i, 1 - add.all_input_nodes.index(stream)) for i, add, stream in found]
