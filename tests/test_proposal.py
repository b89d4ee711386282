"""A step taken by hand: families are looked at, edited, applied or skipped one by one."""

import numpy as np
import pytest
import torch
from oracle import run
from refusals import refuses
from stepping import IMAGES, residual, shapes, trained, vit

import fxprune


def proposed(build=residual, ratio=0.5, steps=2, **options):
    pruner = fxprune.Pruner(build(), ratio, example_inputs=IMAGES, steps=steps, **options)
    return pruner, pruner.step(interactive=True)


def test_all_applied_is_the_step_itself():
    pruner, proposal = proposed()
    for candidate in proposal:
        candidate.apply()
    small = proposal.finish()
    other = fxprune.Pruner(residual(), 0.5, example_inputs=IMAGES, steps=2)
    assert torch.equal(run(other.step(), IMAGES), run(small, IMAGES))
    assert other.plan == pruner.plan and pruner.model is small
    assert [s.to_dict() for s in pruner.history] == [s.to_dict() for s in other.history]


def test_candidates_say_what_would_go():
    _, proposal = proposed()
    assert [c.family.name for c in proposal] == ["stem", "inner", "down"]
    assert len(proposal) == 3
    inner = proposal["inner"]
    assert inner.gone == ([],) and len(inner.units[0]) == 6
    model = residual()
    own = model.inner.weight.square().sum((1, 2, 3)) + model.outer.weight.square().sum((0, 2, 3))
    own += model.inner_norm.weight.square() + model.inner_norm.bias.square()
    np.testing.assert_allclose(inner.scores[0], own.detach().numpy())
    assert sorted(own.argsort()[:6].tolist()) == inner.units[0]
    assert repr(inner) == "Candidate(inner: 6 of 24 units)"
    assert repr(inner.apply()) == "Candidate(inner: 6 of 24 units, applied)"


def test_only_what_is_applied_goes():
    pruner, proposal = proposed()
    for candidate in proposal:
        candidate.apply()
    proposal["stem"].skip()
    small = proposal.finish()
    assert (small.stem.out_channels, small.inner.out_channels, small.down.out_channels) == (16, 18, 15)
    assert pruner.history[0].fresh == 11
    small = pruner.step()
    assert (small.stem.out_channels, small.inner.out_channels, small.down.out_channels) == (8, 12, 10), "it catches up"


def test_edited_units_go_and_stay_gone():
    pruner, proposal = proposed()
    proposal["inner"].edit([5, 3, 3]).apply()
    small = proposal.finish()
    kept = [i for i in range(24) if i not in (3, 5)]
    assert torch.equal(small.inner.weight, residual().inner.weight[kept])
    second = trained(small, seed=5) and pruner.step(interactive=True)
    inner = second["inner"]
    assert inner.gone == ([3, 5],) and np.isnan(inner.scores[0][[3, 5]]).all()
    assert len(inner.units[0]) == 10 and not {3, 5} & set(inner.units[0])
    inner.apply()
    last = second.finish()
    model = residual()
    assert fxprune.plan_of(last).masks(model)["inner.weight"].flatten(1).all(1).sum() == 12
    assert last.verification.error < 1e-8


def test_a_proposal_that_is_not_finished_changes_nothing():
    pruner, proposal = proposed()
    for candidate in proposal:
        candidate.apply()
    assert not pruner.plan.slices and not pruner.history
    assert shapes(pruner.step()) == shapes(proposed()[0].step())


def test_a_step_is_taken_once():
    pruner, proposal = proposed()
    pruner.step()
    fix = "a new proposal: pruner.step(interactive=True)"
    refuses(proposal.finish, pruner.model, what="this step was taken already", fix=fix)


NO_UNITS = [
    ([[24]], "24 is no unit of this family", "numbers from 0 to 23"),
    ([[-1]], "-1 is no unit of this family", "numbers from 0 to 23"),
    ([[1.0]], "1.0 is no unit of this family", "numbers from 0 to 23"),
    ([[True]], "True is no unit of this family", "numbers from 0 to 23"),
    ([[1], [2]], "2 lists of units for 1 family", "one list for each of candidate.families"),
]


@pytest.mark.parametrize(("units", "what", "fix"), NO_UNITS)
def test_edits_that_mean_nothing(units, what, fix):
    _, proposal = proposed()
    inner = proposal["inner"]
    before = inner.units
    refuses(lambda: inner.edit(*units), what=what, where="inner", fix=fix)
    assert inner.units is before


def test_units_that_cannot_go():
    pruner, proposal = proposed()
    inner = proposal["inner"].edit(range(24))
    why = "a tensor would be left empty or with rows of different lengths"
    what = f"1 unit of this family cannot go alone, the first is {inner.scores[0].argmax()}: {why}"
    fix = "the same number of units in every row, and at least one that stays"
    refuses(inner.apply, what=what, where="inner", fix=fix)
    assert not inner.applied
    inner.edit([2]).apply()
    proposal.finish()
    again = pruner.step(interactive=True)["inner"]
    fix = "a unit that is not in candidate.gone"
    refuses(lambda: again.edit([2]), what="unit 2 is gone already", where="inner", fix=fix)
    refuses(
        lambda: proposal["middle"],
        what="no family is called 'middle'",
        fix="a name such as stem, inner, down",
    )


def test_rows_of_one_length_are_edited_together():
    """Every head keeps equally many dimensions."""
    pruner = fxprune.Pruner(vit(), 0.5, example_inputs=IMAGES, attention="dims")
    proposal = pruner.step(interactive=True)
    qkv = next(c for c in proposal if "in_proj_weight" in c.family.name)
    assert len(qkv.families) == 2, "queries with keys, and values: both are rows of one packed weight"
    with pytest.raises(fxprune.PruneError, match="cannot go alone"):
        qkv.edit([0], []).apply()
    one_of_each = [6 * head + head for head in range(4)]
    qkv.edit(one_of_each, one_of_each[::-1]).apply()
    small = proposal.finish()
    assert small.verification.error < 1e-8
    assert pruner.history[0].fresh == 8
