"""Specifications of single ops agree with the ops themselves, on samples of torch's own; and a wrong one is seen.

All samples are run by `examples/benchmarks/op_validation.py`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("expecttest", reason="torch's samples need it: pip install -e .[test]")

from op_samples import check, samples

from fxprune.passes.ops import pointwise, registry

# Ops of every family, four samples each
OPS = (
    "addmm addbmm addr cross nn.functional.linear nn.functional.conv2d nn.functional.conv_transpose2d cumsum var_mean amax"
    " nn.functional.layer_norm nn.functional.group_norm nn.functional.batch_norm cat stack chunk split_with_sizes flip roll"
    " diagonal index_select narrow gather pixel_shuffle unsqueeze permute"
).split()


@pytest.mark.parametrize("name", OPS)
def test_specification_agrees_with_the_op(name: str) -> None:
    outcomes = [check(name, sample) for sample in samples(name, 4)]
    assert len(outcomes) >= 3 and any(outcome.status == "exact" for outcome in outcomes), outcomes
    assert not [outcome for outcome in outcomes if outcome.failed]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("flip", registry.OpSpec(pointwise.same)),  # labels stay where they are
        ("cumsum", registry.OpSpec(pointwise.same, masked=registry.named("aten::amax").masked)),  # another masked form
    ],
)
def test_a_wrong_specification_is_seen(name: str, spec: registry.OpSpec, own_ops: None) -> None:
    registry.register(name, spec)
    assert any(check(name, sample).status == "wrong" for sample in samples(name, 8))
