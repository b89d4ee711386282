"""Every conformance graph: pruned, exact, and smaller where it must be."""

from __future__ import annotations

import copy

import pytest
import torch
from graphs import GRAPHS, Graph
from graphs.registry import randomise
from oracle import leaves, parameter_count, plain_masked, relative_error, run
from torch import Tensor, nn

import fxprune

# In float64 an exact result differs by rounding alone. A wrong index differs by about one.
TOLERANCE = 1e-8
# At a ratio of one half a family of three units gives up one, and no family that matters here has fewer.
LEAST_OF_TARGET = 0.3

every_graph = pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def shrunk(pruned: nn.Module, name: str) -> Tensor:
    """The pruned model's tensor of this name; a root that stays opaque is one level deeper."""
    found = dict(pruned.named_parameters(remove_duplicate=False)) | dict(pruned.named_buffers(remove_duplicate=False))
    matches = [found[name]] if name in found else [v for key, v in found.items() if key.endswith(f".{name}")]
    assert len(matches) == 1, f"{name} is not in the pruned model, which has {sorted(found)}"
    return matches[0]


def check_targets(graph: Graph, model: nn.Module, pruned: nn.Module, masks: dict[str, Tensor]) -> None:
    for name in graph.targets:
        mask = masks[name]
        removed = 1 - mask.double().mean().item()
        assert removed >= LEAST_OF_TARGET, f"{name} {tuple(mask.shape)} lost only {removed:.0%}"
        assert shrunk(pruned, name).numel() == mask.sum().item(), f"{name} is not what the plan says"


@every_graph
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_exact_and_smaller(graph: Graph, ratio: float) -> None:
    model, inputs = graph.make()
    before = state(model)
    pruned = fxprune.prune(model, ratio, example_inputs=inputs, verify=False)

    removed = 1 - parameter_count(pruned) / parameter_count(model)
    assert removed > 0, "nothing was pruned"
    masks = fxprune.plan_of(pruned).masks(model)
    if ratio == 0.5:
        check_targets(graph, model, pruned, masks)
        assert removed >= graph.min_removed, f"only {removed:.0%} of the parameters went"

    verification = fxprune.verify(model, pruned, inputs)
    assert verification.ok and verification.error < TOLERANCE, verification
    if not graph.stats:
        with torch.no_grad():
            reference = run(plain_masked(model, fxprune.plan_of(pruned)), inputs)
            assert relative_error(reference, run(pruned, inputs)) < TOLERANCE

    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "the original has changed"


@every_graph
def test_the_graph_is_a_fair_test(graph: Graph) -> None:
    """It runs, its outputs repeat and are of ordinary size, and every target is felt in them."""
    model, inputs = graph.make()
    kept = copy.deepcopy(inputs)
    with torch.no_grad():
        output = run(model, inputs)
        assert relative_error(output, run(model, inputs)) == 0
        assert relative_error(output, run(graph.make()[0], inputs)) == 0
        assert all(1e-3 < value.abs().max() < 1e5 for _, value in leaves(output))
        if list(leaves(inputs)):
            assert relative_error(kept, inputs) == 0, "the forward writes into its inputs"

        values = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        assert graph.targets and len(set(graph.targets)) == len(graph.targets)
        for seed, name in enumerate(graph.targets):
            holder = nn.Module()
            holder.register_buffer("value", values[name].clone())
            original = values[name].clone()
            randomise(holder, seed=100 + seed)
            values[name].copy_(holder.value if not name.endswith("mask") else 1 - original)
            assert relative_error(output, run(model, inputs)) > 1e-4, f"{name} changes nothing"
            values[name].copy_(original)


def test_there_are_enough_graphs() -> None:
    assert len(GRAPHS) >= 130
    assert sum(not graph.stats for graph in GRAPHS.values()) >= 100
    assert len({graph.family for graph in GRAPHS.values()}) >= 15
