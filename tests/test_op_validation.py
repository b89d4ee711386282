"""Specifications of single ops agree with the ops themselves, on samples of torch's own; and a wrong one is seen.

All samples are run by `examples/benchmarks/op_validation.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("expecttest", reason="torch's samples need it: pip install -e .[test]")

from brute_force import Judge
from op_samples import LAYOUTS, Outcome, check, layouts_of, samples
from torch import Tensor

from fxprune.passes.ir.labels import NONE, Factor
from fxprune.passes.ir.slices import TensorSlice
from fxprune.passes.ops import registry
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.masking import with_zeros
from fxprune.passes.ops.pointwise import same

# Ops of every family, with a hundred samples together
OPS = (
    "addmm addbmm baddbmm cross nn.functional.linear nn.functional.conv2d nn.functional.conv_transpose1d cumsum var_mean amax"
    " nn.functional.layer_norm nn.functional.group_norm nn.functional.batch_norm cat stack chunk split_with_sizes flip roll"
    " index_select narrow gather unfold unsqueeze permute diff fft.fftshift"
).split()


def largest(name: str, count: int) -> list[Any]:
    """Of the samples of an op those with most elements: some have none, or only one."""
    return sorted(samples(name, 12), key=lambda sample: -sample.input.numel() if isinstance(sample.input, Tensor) else 0)[
        :count
    ]


def outcomes_of(name: str) -> Iterator[Outcome]:
    return (outcome for sample in largest(name, 6) for _, outcome in layouts_of(name, sample))


@pytest.mark.parametrize("name", OPS)
def test_specification_agrees_with_the_op(name: str) -> None:
    laid_out = zip(largest(name, len(LAYOUTS)), LAYOUTS, range(len(LAYOUTS)), strict=False)
    outcomes = [check(name, sample, layout, seed) or check(name, sample, seed=seed) for sample, layout, seed in laid_out]

    assert any(outcome.status == "exact" for outcome in outcomes), outcomes
    assert not [outcome for outcome in outcomes if outcome.failed]


def shifted(rule: Callable[[RuleContext], Any]) -> Callable[[RuleContext], Any]:
    """A rule whose labels belong to the entry before."""

    def wrong(call: RuleContext) -> Any:
        found = rule(call)
        several = found if isinstance(found, list) else [found]
        moved = [tuple(Factor(f.labels.roll(1, f.major_to_minor[0]), f.major_to_minor) for f in labels) for labels in several]
        return moved if isinstance(found, list) else moved[0]

    return wrong


@pytest.mark.parametrize("name", "addmm amax cat cumsum flip index_select permute roll unfold".split())
def test_labels_of_the_wrong_entries_are_seen(name: str, own_ops: None) -> None:
    spec = registry.named(f"aten::{name}")
    registry.register(name, dataclasses.replace(spec, labels=shifted(spec.labels)))
    assert any(outcome.failed for outcome in outcomes_of(name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flip", {"labels": same}),  # labels stay where they are
        ("cat", {"labels": lambda call: NONE}),  # what is removed is forgotten
        ("mm", {"labels": same}),  # the contracted dimension is taken for one of the result
        ("roll", {"rewrite": None}),  # neighbours are others than before
        ("mean", {"masked": with_zeros}),  # divides by the number of all entries
        ("cumsum", {"masked": registry.named("aten::amax").masked}),  # minus infinity is not nothing in a sum
        ("softmax", {"masked": None}),  # removed entries take part
    ],
)
def test_a_wrong_specification_is_seen(name: str, changes: dict[str, Any], own_ops: None) -> None:
    names = "_softmax softmax" if name == "softmax" else name
    registry.register(names, dataclasses.replace(registry.named(f"aten::{name}"), **changes))
    assert any(outcome.failed for outcome in outcomes_of(name))


# -- brute force by itself, on what is known by hand: x (4,), of which the second and the last entry are removed ---------

KEPT = TensorSlice((0,), torch.tensor([0, 2]), (2,))
X = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)


def judged(function: Callable[[Tensor], Tensor], outputs: list[TensorSlice]) -> Judge:
    return Judge(
        lambda values: [function(values["x"])],
        lambda values, kept, integers: [function(values["x"][kept["x"]])],
        [],
        {"x": X},
        {"x": [KEPT]},
        [outputs],
    )


@pytest.mark.parametrize(
    ("function", "outputs", "right", "reference"),
    [
        (lambda x: 2 * x, [KEPT], [2.0, 6.0], "entries"),
        (lambda x: x.sum(), [], 4.0, "zeros"),
        (lambda x: x.mean(), [], 2.0, "alone"),
        (lambda x: x.cumsum(0), [KEPT], [1.0, 4.0], "zeros"),
    ],
)
def test_brute_force(function: Any, outputs: list[TensorSlice], right: Any, reference: str) -> None:
    judge = judged(function, outputs)
    assert judge.references([torch.tensor(right, dtype=torch.float64)]) == [reference]
    assert judge.references([torch.tensor(right, dtype=torch.float64) + 0.01]) == [""]
    assert judge.lost() == ""


def test_a_result_that_loses_what_is_kept() -> None:
    assert judged(lambda x: x.flip(0), [TensorSlice((0,), torch.tensor([1, 3]), (2,))]).lost() == ""
    assert "loses entries" in judged(lambda x: x.flip(0), [KEPT]).lost()
