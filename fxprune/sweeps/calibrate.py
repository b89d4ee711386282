"""calibrate(): what a criterion sees in data, once, for any number of budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from fxprune.arguments import checked_call
from fxprune.criteria.base import Criterion
from fxprune.criteria.branches import SCORES, score_branches
from fxprune.criteria.calibrated import Calibration, key_of
from fxprune.criteria.calibration import BATCHES, GATHER, check_source, held_batches, prepare_source, read
from fxprune.criteria.catalog import CriterionName, resolve
from fxprune.entry_points import entry_point
from fxprune.inputs import ExampleInputs
from fxprune.passes.coupling.branches import Branches
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.pipeline import Compilation
from fxprune.selection.argument_checks import check_word
from fxprune.selection.depth import free_branches, whole_blocks
from fxprune.selection.options import Attention, DepthCriterion, Options


@checked_call()
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    criterion: CriterionName | str | Criterion = "token_taylor",
    example_inputs: Any = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    attention: Attention = "heads",
    depth_criterion: DepthCriterion | None = None,
) -> Calibration:
    """What a criterion gathers from data, as a criterion that needs none any more.

    >>> import torch, fxprune
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> x = torch.randn(8, 4)
    >>> seen = calibrate(net, [x], "flap", x)
    >>> sizes = [fxprune.prune(net, ratio, x, criterion=seen).get_submodule("0").out_features for ratio in (0.5, 0.7)]
    >>> sizes
    [3, 2]

    Arguments:
        model: the original; it is not touched.
        data, loss: as for `prune`; batches are read once (twice for `grasp`), and no output is held; with `depth_criterion` the
            batches are.
        criterion: a name, or one of the classes, of a criterion that looks at data; not `fisher`, which needs a score of each
            sample.
        example_inputs: as for `prune`; by default those of the first batch.
        attention: as for `prune`, where it is to be given the same.
        depth_criterion: as for `prune`: residual branches and whole blocks are scored, too, for `prune` with any `depth`, which
            then needs neither the data nor this argument. By default they are not.

    Returns: a `Calibration`, for the `criterion` of `prune`, `prune_checkpoint` and others; `save` and `Calibration.load`.

    Raises: PruneError where the data or the loss cannot be used, or the criterion looks at none.
    """
    with entry_point(model) as module:
        check_source(data, loss)
        if depth_criterion is not None and not callable(depth_criterion):
            check_word("depth_criterion", depth_criterion, [how for how in SCORES if how != "weights"])
        spec = resolve(criterion)
        if spec.needs not in GATHER or spec.score_families is not None:
            known = "nothing that could be kept" if spec.runs else "no data"
            raise PruneError(f"the criterion {spec.name} gathers {known}", fix="criterion='wanda', 'flap' or 'token_taylor'")
        if data is None:
            raise PruneError(f"the criterion {spec.name} needs data", fix=BATCHES)
        batches: Any = list(read(data)) if example_inputs is None or depth_criterion is not None else data
        if example_inputs is None:
            first = held_batches(batches[:1])[0]
            example_inputs = first.kwargs or first.args
        inputs = ExampleInputs.parse(example_inputs, module).check(module)
        options = Options.parse(module, attention=attention)
        compilation = Compilation(module, inputs, options.coupling)
        solution = compilation.couple()
        scores: dict[str, float] | None = None
        if depth_criterion is not None:
            branches = Branches(solution.captures, set(named_parameters(module)))
            found = free_branches(module, branches, options)
            blocks = whole_blocks(module, branches, found)
            # by a loss those are measured together that go together, else all in one run
            alone = [found, blocks] if depth_criterion == "loss" else [[*found, *blocks]]
            scores = dict[str, float]()
            for some in filter(None, alone):
                each = score_branches(module, solution, some, depth_criterion, "", batches, loss, compilation.whole_program)
                scores |= dict(zip(map(key_of, some), each.tolist(), strict=True))
        with prepare_source(module, batches, loss, spec.name, solution) as source:
            evidence = GATHER[spec.needs](source)
        return Calibration(criterion, {name: tensor.detach() for name, tensor in evidence.items()}, attention, scores)
