"""Tuning block by block: what is left of each block is trained to return what the whole block returned, without labels.

Each block is a small regression of its own (Layer-wise and block-wise reconstruction after pruning: arXiv:2510.14444). One
block at a time has gradients, and what goes into one block is all that is kept of a forward.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fxprune.criteria.activation_stats import wide
from fxprune.criteria.lockstep import BlockCall, Lockstep, no_blocks, stopping
from fxprune.form_programs import slots
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_modules, named_parameters
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.pytree import TensorRef, collect, map_tensors
from fxprune.passes.ir.slices import TensorSlice, apply_slices
from fxprune.pipeline import Compilation
from fxprune.plan import PlanData
from fxprune.repairs.both_models import BothModels, call, uncached
from fxprune.repairs.held_out import Outcome
from fxprune.repairs.least_squares import relative
from fxprune.repairs.repairer import NO_DATA, NOT_FINITE, WORSE, RepairStep
from fxprune.selection.names import block_chains

NAME = "block"
RATE = 3e-3  # of a step, as a share of the root mean square of a weight
LOOKS = 8  # how often the error on the data held out is looked at
FIX = "method='refit', or 'reconstruct'"
SHAPE = "its result has other channels than the original's"

BlockInputs = Literal["pruned", "dense"]


@dataclass(frozen=True)
class Tuning:
    """What is asked for: as for `repair`."""

    steps: int = 200
    inputs: BlockInputs = "pruned"
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One batch at one block: the module that runs there, what it is given, what is wanted, and whether it is held out."""

    block: nn.Module
    given: BlockCall
    wanted: list[Tensor]
    held: bool

    def error(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The squared error of what comes out, each tensor's as a share of its size."""
        args, kwargs = map_tensors((self.given.args, self.given.kwargs), lambda t: t.detach().clone())
        found = tensors_of(functional_call(self.block, dict(weights), args, kwargs))
        parts = [(wide_of(a) - wide(b)).square().sum() / size_of(b) for a, b in zip(found, self.wanted, strict=True)]
        return torch.stack(parts).sum()


class BlockTuning:
    """Tunes the blocks of the pruned model; `both` are the models and the data."""

    def __init__(self, both: BothModels, asked: Tuning) -> None:
        self.both, self.asked = both, asked
        self.paths = [path for chain in block_chains(both.model) for path in chain]
        if not self.paths:
            raise no_blocks(both.model, f"method={NAME!r}", FIX)
        self.generator = torch.Generator().manual_seed(asked.seed)
        self.times: Counter[str] = Counter()  # how often blocks are called in one forward

    def run(self) -> tuple[list[RepairStep], Outcome]:
        """Tune every block, then go as far as the output on the samples held out comes closer."""
        start: dict[str, Tensor] = {}
        parts = [(uncached(self.both.model, batch), held) for batch, held in self.both.parts]
        programs = [self.both.run(batch)[0] for batch, _ in parts]
        steps = list(self.tune(programs, parts, start))
        if not steps:
            what = f"what is left of {type(self.both.model).__name__} calls none of its blocks as modules"
            raise PruneError(what, fix=f"same_class=True for `prune`; or {FIX}")
        return steps, self.both.choose_share(start)

    def tune(self, programs: Sequence[nn.Module], parts: Sequence[Any], start: dict[str, Tensor]) -> Iterator[RepairStep]:
        whole, batches = self.both.whole, [batch for batch, _ in parts]
        self.count(programs[0], batches[0])
        new = [functools.partial(call, program, batch) for program, batch in zip(programs, batches, strict=True)]
        old = [functools.partial(call, whole, batch) for batch in batches]
        left, wanted = Lockstep(self.paths, new), Lockstep(self.paths, old)
        with Stopped({id(p): p for p in [whole, *programs]}, self.paths), left, wanted:
            stages = wanted.stages()
            for path, at in progress_bar(left.stages(), "tuning", "block", len(self.paths)):
                targets = self.wait_for(path, at, wanted, stages)
                blocks = {i: programs[i].get_submodule(path) for i in at}
                yield self.tune_block(path, blocks, {i: left.call(i) for i in at}, targets, parts, start)
                for i in at:
                    left.answer(i, self.answer(left.call(i), targets[i], path))
                    wanted.answer(i, targets[i])

    def count(self, program: nn.Module, batch: Any) -> None:
        """How often each block is called in the forward of a batch."""
        with Stopped({0: program}, self.paths), Lockstep(self.paths, [functools.partial(call, program, batch)]) as one:
            for path, _ in one.stages():
                self.times[path] += 1
                one.answer(0, one.call(0).run())

    def wait_for(self, path: str, at: Sequence[int], wanted: Lockstep, stages: Iterator[Any]) -> dict[int, Any]:
        """What the original's block returns for each batch; blocks before it that the pruned model lost run on their own."""
        for other, numbers in stages:
            results = {i: wanted.call(i).run() for i in numbers}
            if other == path and set(numbers) == set(at):
                return results
            for i, result in results.items():
                wanted.answer(i, result)
        raise PruneError(f"the original does not call {path} where the pruned model does", where=path, fix=FIX)

    def answer(self, given: BlockCall, target: Any, path: str) -> Any:
        """What the pruned model goes on with behind a block."""
        found = given.run()
        if self.asked.inputs == "pruned":
            return found
        cut = iter(self.cut(target, found, path) or ())
        return map_tensors(found, lambda t: next(cut, t) if t.is_floating_point() else t)

    def cut(self, target: Any, found: Any, path: str) -> list[Tensor] | None:
        """The tensors that the original's block returned, without the channels that the pruned one's have lost."""
        mine, its = tensors_of(target), tensors_of(found)
        if [t.shape for t in mine] != [t.shape for t in its]:
            cuts = self.cuts.get(path, [])
            if len(cuts) != len(mine):
                return None
            mine = [apply_slices(slices, t) for slices, t in zip(cuts, mine, strict=True)]
        return mine if [t.shape for t in mine] == [t.shape for t in its] else None

    @functools.cached_property
    def cuts(self) -> dict[str, list[list[TensorSlice]]]:
        return cuts_of_results(self.both.model, self.both.plan)

    def tune_block(
        self,
        path: str,
        blocks: Mapping[int, nn.Module],
        given: Mapping[int, BlockCall],
        targets: Mapping[int, Any],
        parts: Sequence[Any],
        start: dict[str, Tensor],
    ) -> RepairStep:
        """Tune one block, and keep what comes of it where its error on the data held out falls."""
        step = RepairStep(path, NAME, None, False, self.both.refused)
        if step.note:
            return step
        samples: list[Sample] = []
        for i, block in blocks.items():
            wanted = self.cut(targets[i], given[i].run(), path)
            if wanted is None:
                return replace(step, note=SHAPE)
            samples.append(Sample(block, given[i], wanted, parts[i][1]))
        names = self.weights(path, samples[0].block)
        if not names:
            return replace(step, note="it has no weights of its own, or is called more than once")
        fitted, judges = [s for s in samples if not s.held], [s for s in samples if s.held]
        if not fitted:
            return replace(step, note=NO_DATA)
        masters = {key: wide(self.both.own[name]).clone().requires_grad_() for key, name in names.items()}
        error, best = self.descend(masters, names, fitted, judges or fitted)
        if best is None:
            return replace(step, error=error, note=WORSE if math.isfinite(error[0]) else NOT_FINITE)
        for key, name in names.items():
            start[name] = self.both.own[name].detach().clone()
            self.both.own[name].data.copy_(best[key])
        return replace(step, error=error, done=True)

    def weights(self, path: str, block: nn.Module) -> dict[str, str]:
        """The parameters to tune, as the block calls them, with their names in the model: none that others use, too."""
        users: dict[str, set[bool]] = {}
        for where, _, _, _ in slots(self.both.made):
            users.setdefault(self.both.name(where), set()).add(where.startswith(f"{path}."))
        found = {key: self.both.name(f"{path}.{key}") for key, p in named_parameters(block).items() if p.is_floating_point()}
        return {key: name for key, name in found.items() if self.times[path] == 1 and users.get(name) == {True}}

    def descend(
        self, masters: dict[str, Tensor], names: Mapping[str, str], fitted: Sequence[Sample], judges: Sequence[Sample]
    ) -> tuple[tuple[float, float], dict[str, Tensor] | None]:
        """The relative errors before and after by the judges, and the best weights; None where none are better.

        Adam in single precision, with steps by the size of each weight, along a cosine.
        """
        dtypes = {key: self.both.own[name].dtype for key, name in names.items()}
        squares = [(m.detach().square().sum(), m.numel()) for m in masters.values()]
        mean = math.sqrt(sum(float(s) for s, _ in squares) / max(sum(n for _, n in squares), 1))
        if not math.isfinite(mean):
            return (math.nan, math.nan), None
        rates = [RATE * (math.sqrt(float(s) / max(n, 1)) or mean) for s, n in squares]
        groups: list[dict[str, Any]] = [{"params": [m], "lr": r} for m, r in zip(masters.values(), rates, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        steps = self.asked.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))

        def typed() -> dict[str, Tensor]:
            return {key: master.to(dtypes[key]) for key, master in masters.items()}

        def judged() -> float:
            with torch.no_grad():
                return relative(sum(float(s.error(typed())) for s in judges), len(judges))

        before = judged()
        least, best = before, None
        looks = {round(steps * (i + 1) / LOOKS) for i in range(LOOKS)}
        order: list[int] = []
        for step in range(1, steps + 1):
            order = order or torch.randperm(len(fitted), generator=self.generator).tolist()
            with torch.enable_grad():
                loss = fitted[order.pop()].error(typed())
                if not loss.requires_grad:
                    break
                for master, g in zip(masters.values(), gradients(loss, masters), strict=True):
                    master.grad = g
            optimizer.step()
            schedule.step()
            if step in looks and (now := judged()) < least:
                least, best = now, {key: master.detach().clone() for key, master in masters.items()}
        return (before, least), best


def gradients(loss: Tensor, masters: Mapping[str, Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, list(masters.values()), allow_unused=True)


class Stopped:
    """`stopping` for the modules at those paths that each of several models has."""

    def __init__(self, models: Mapping[int, nn.Module], paths: Sequence[str]) -> None:
        trees = [(model, dict(named_modules(model))) for model in models.values()]
        self.inner = [stopping(model, [path for path in paths if path in tree]) for model, tree in trees]

    def __enter__(self) -> None:
        for each in self.inner:
            each.__enter__()

    def __exit__(self, *error: Any) -> None:
        for each in reversed(self.inner):
            each.__exit__(None, None, None)


def tensors_of(out: Any) -> list[Tensor]:
    """The floating tensors in a result."""
    return [t for t in collect([out], Tensor) if t.is_floating_point()]


def wide_of(x: Tensor) -> Tensor:
    """In at least single precision, with its history."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def size_of(x: Tensor) -> Tensor:
    return wide(x).square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def cuts_of_results(model: nn.Module, plan: PlanData) -> dict[str, list[list[TensorSlice]]]:
    """What is left of the floating tensors that modules return, by the path of a module that is called once."""
    choice = Compilation.of_plan(model, plan).choice_of(plan)
    capture, labels = choice.solution.captures[0], choice.solution.values[0]
    found: dict[str, list[list[TensorSlice]]] = {}
    times = Counter(traced.path for traced in capture.module_calls)
    for traced in capture.module_calls:
        refs = [r for node in collect([traced.out], fx.Node) for r in collect([capture.results[node]], TensorRef)]
        infos = [(r, capture.op_trace.values[r.id]) for r in refs]
        if times[traced.path] == 1:
            path = traced.path.removeprefix(capture.prefix)
            found[path] = [choice.slicer(labels.get(r.id, ()), i.shape) for r, i in infos if i.dtype.is_floating_point]
    return found
