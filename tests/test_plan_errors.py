"""Plans that are none, or are another model's: the exact message, and a model that is what it was."""

import json

import pytest
import torch
from refusals import IMAGES, Net, net, refuses, untouched
from torch import nn

import fxprune
from fxprune import Plan, PruneError


@pytest.fixture(scope="module")
def plan():
    return fxprune.plan_of(fxprune.prune(net(), example_inputs=IMAGES))


def without_head(model):
    del model.head
    return "this one has no head.weight", "apply it to the original architecture"


def with_other_shape(model):
    model.head = nn.Linear(6, 5)
    return "head.weight has shape (5, 6), not (4, 6)", "apply it to the original, unpruned architecture"


def with_extra(model):
    model.tail = nn.Parameter(torch.zeros(3))
    return "it knows nothing of tail", "apply it to the original architecture"


@pytest.mark.parametrize("change", [without_head, with_other_shape, with_extra])
def test_plan_for_another_model(plan, change):
    model = net()
    why, fix = change(model)
    refuses(lambda: plan.apply(model), model, what=f"the plan is for another model: {why}", fix=fix)


def test_plan_applied_to_what_it_pruned(plan):
    small = plan.apply(net())
    why = "stem.weight has shape (4, 3, 3, 3), not (8, 3, 3, 3)"
    fix = "apply it to the original, unpruned architecture"
    refuses(lambda: plan.apply(small), small, what=f"the plan is for another model: {why}", fix=fix)


def test_plan_for_a_model_of_the_same_shapes_wired_otherwise(plan):
    class Rewired(Net):
        def forward(self, x):
            # no half of eight channels is the same one place further on
            return self.head(self.body(self.stem(x).roll(1, 1)).mean((2, 3))) + self.norm(self.stem(x)).sum()

    model = Rewired()
    with untouched(model), pytest.raises(PruneError, match="the plan does not fit the model"):
        plan.apply(model)


def test_plan_applied_to_no_module(plan):
    what = "model is of type int, not a torch.nn.Module"
    refuses(lambda: plan.apply(3), what=what, fix="pass the module itself")


def test_plan_of_an_unpruned_module():
    model = net()
    refuses(
        lambda: fxprune.plan_of(model),
        model,
        what="this module carries no plan",
        where="Net",
        fix="pass what fxprune.prune returned",
    )


def test_verification_and_report_of_an_unpruned_module():
    model, other = net(), net()
    for call in (lambda: fxprune.verify(model, other, IMAGES), lambda: fxprune.report(model, other)):
        what, fix = "this module carries no plan", "pass what fxprune.prune returned"
        refuses(call, model, what=what, where="Net", fix=fix)


TEXT, DATA = "the text that Plan.to_json() returned", "what Plan.to_dict() returned"


@pytest.mark.parametrize(
    "text, why, fix",
    [
        ("", "Expecting value: line 1 column 1 (char 0)", TEXT),
        ("[]", "not a JSON object", TEXT),
        ("{}", "its format is None", "a file of format fxprune.plan/1 or fxprune.plan/2 or fxprune.plan/3"),
        (
            '{"format": "fxprune.plan/4"}',
            "its format is 'fxprune.plan/4'",
            "a file of format fxprune.plan/1 or fxprune.plan/2 or fxprune.plan/3",
        ),
        ('{"format": "fxprune.plan/1"}', "it has no 'shapes'", DATA),
    ],
)
def test_text_that_is_no_plan(text, why, fix):
    refuses(lambda: Plan.from_json(text), what=f"this is no plan: {why}", fix=fix)


@pytest.mark.parametrize(
    "edit, why",
    [
        ({"dims": [7]}, "a tensor of shape (8,) has no dimensions (7,)"),
        ({"keep": [0, 1]}, "2 kept indices do not fill (4,)"),
        ({"keep": [0, 1, 2, 99]}, "kept indices of a tensor of shape (8,) reach from 0 to 99"),
        ({"sizes": None}, "sizes of stem.bias must be a list of at most 64 integers from 0"),
    ],
)
def test_plan_with_a_cut_that_makes_no_sense(plan, edit, why):
    data = json.loads(plan.to_json())
    data["keep"]["stem.bias"][0].update(edit)
    refuses(lambda: Plan.from_dict(data), what=f"this is no plan: {why}", fix=DATA)


class Pairs(nn.Module):
    """A layer reads magnitudes of pairs of copies: its inputs belong to rows that are kept, and to channels that go."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Conv1d(4, 6, 1, bias=False), nn.Parameter(torch.rand(1, 6, 1))
        self.read, self.last = nn.Linear(54, 2), nn.Conv1d(18, 2, 1)

    def forward(self, x):
        t = (self.first(x) * self.scale).repeat_interleave(3, dim=1).movedim(1, -1)
        t = (torch.tanh(t @ t.mT) @ t).movedim(-1, 1)
        pairs = (t.unflatten(1, (9, 2)).square().sum(2) + 1e-3).sqrt()
        return self.read(pairs.flatten(1)), self.last(t)


def test_entries_of_a_frozen_row_go_with_channels_that_share_their_places():
    model, x = Pairs().double().eval(), torch.randn(2, 4, 6, dtype=torch.double)
    pruned = fxprune.prune(model, 0.5, x, verify=False)
    assert pruned.read.weight.shape[1] == 36
    assert fxprune.verify(model, pruned, x).ok
    torch.testing.assert_close(fxprune.plan_of(pruned).apply(model)(x), pruned(x))
