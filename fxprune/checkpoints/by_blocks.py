"""Calibration of a model that is on disk: its blocks are in memory one after the other, each for all batches.

What lies outside the blocks (embeddings, the last norm, the head) is in memory throughout, and of each batch what goes into one
block. A model without a list of blocks is in memory as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.criteria.activation_stats import ActivationObserver
from fxprune.criteria.base import Criterion, label
from fxprune.criteria.calibrated import Calibration
from fxprune.criteria.calibration import BATCHES, EVIDENCE_OF_INPUTS, Batch, batch_refused, held_batches
from fxprune.criteria.catalog import find, resolve
from fxprune.criteria.lockstep import Lockstep, stopping, without_cache
from fxprune.criteria.parameter_roles import Origins
from fxprune.form_programs import Names, slots
from fxprune.passes.capture.patches import visible
from fxprune.passes.coupling.leaf_labels import leaf_labels
from fxprune.passes.coupling.solution import Solution
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import every_tensor, private_copy, set_mode
from fxprune.passes.ir.progress import progress_bar
from fxprune.passes.ir.quiet import unobserved
from fxprune.selection.names import block_chains


def calibrate_by_blocks(
    model: nn.Module, value: Callable[[str], Tensor], solution: Solution, criterion: str | Criterion, data: Iterable[Any] | None
) -> Calibration:
    """What a criterion that looks at activations gathers from data.

    Arguments:
        model: the architecture, with stand-ins for its values.
        value: finds the values of a tensor of the model by its name.
        solution: its coupling.
        criterion: of activations: `wanda`, `flap`.
        data: batches as for `prune`; they are held in memory.
    """
    if data is None:
        raise PruneError(f"the criterion {label(find(criterion))} needs data", fix=BATCHES)
    batches = held_batches(data)
    with unobserved(model), visible():
        run = BlockRun(model, value, solution)
        run.observe(batches)
        inputs = run.observers[0].inputs
        values = EVIDENCE_OF_INPUTS[resolve(criterion).needs](inputs)
        like = {name: torch.empty(0, dtype=t.dtype) for name, t in every_tensor(run.model) if isinstance(t, nn.Parameter)}
        return Calibration(criterion, run.observers[0].by_parameter(values, inputs.count > 0, like))


class BlockRun:
    """A copy of a model whose blocks get their tensors when it is their turn.

    Attributes:
        paths: of the blocks.
        places: of each block, and under "" of all else, where its tensors are held: their names, and what holds them.
        observers: one for each batch; they share what they count.
    """

    def __init__(self, model: nn.Module, value: Callable[[str], Tensor], solution: Solution) -> None:
        self.model: nn.Module = set_mode(private_copy(model), False)
        self.value, self.solution = value, solution
        self.paths = [path for chain in block_chains(self.model) for path in chain]
        name = Names(model)
        self.places: dict[str, list[tuple[str, dict[str, Any], str]]] = {path: [] for path in ("", *self.paths)}
        for where, _, held, key in slots(self.model):
            block = next((path for path in self.paths if where.startswith(f"{path}.")), "")
            self.places[block].append((name(where), held, key))
        self.names: dict[int, str] = {}
        self.observers: list[ActivationObserver] = []

    def observe(self, batches: list[Batch]) -> None:
        leaves, size = leaf_labels(self.solution.captures)
        for batch in batches:
            observer = ActivationObserver(self.names, Origins(leaves, size))
            observer.begin(batch)
            self.observers.append(observer)
            observer.inputs = self.observers[0].inputs
        works = [functools.partial(self.run, o, b) for o, b in zip(self.observers, batches, strict=True)]
        self.load("")
        with stopping(self.model, self.paths), Lockstep(self.paths, works) as lockstep:
            for path, at in progress_bar(lockstep.stages(), "calibrating", "block", len(self.paths)):
                self.load(path)
                answers = []
                for i in at:
                    with self.observers[i]:
                        answers.append(lockstep.call(i).run())
                self.drop(path)
                for i, answer in zip(at, answers, strict=True):
                    lockstep.answer(i, answer)
                answers.clear()

    def run(self, observer: ActivationObserver, batch: Batch) -> None:
        with observer:
            try:
                self.model(*batch.args, **without_cache(self.model, batch.kwargs))
            except Exception as error:
                raise batch_refused(error) from error

    def load(self, path: str) -> None:
        """Read the tensors of a block, or of what is in none."""
        found: dict[str, Tensor] = {}
        for name, held, key in self.places[path]:
            if name not in found:
                found[name] = self.value(name).detach().clone()  # each that is mapped maps its whole file
                self.names[id(found[name])] = name
            if isinstance(held[key], nn.Parameter):
                own = nn.Parameter(found[name], requires_grad=False)
                self.names[id(own)] = name
                held[key] = own
            else:
                held[key] = found[name]

    def drop(self, path: str) -> None:
        """Forget the tensors of a block."""
        for _, held, key in self.places[path]:
            gone = held[key]
            held[key] = nn.Parameter(gone.to("meta"), requires_grad=False) if isinstance(gone, nn.Parameter) else gone
            for observer in self.observers:
                observer.held.pop(id(gone), None)
            if held[key] is not gone:
                self.names.pop(id(gone), None)
