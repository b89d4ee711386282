"""Masks: zeros in the original stand for what is gone, stay where they are in training, and become a pruned model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import GRAPHS
from oracle import plain_masked, relative_error, run
from refusals import refuses, untouched
from stepping import IMAGES, TARGETS, residual, shapes, trained
from torch import nn

import fxprune
from fxprune.iterative.masking import hold, masked, prune_zeros


def plan_of(model, ratio=0.5):
    return fxprune.plan_of(fxprune.prune(model, ratio, example_inputs=IMAGES, verify=False))


def learn(model, optimizer, steps=3, seed=0):
    """A few steps of training on noise."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        x = torch.randn(IMAGES.shape, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), TARGETS).backward()
        optimizer.step()
    return model.eval()


def zero_where_masked(model, plan, original):
    masks = plan.masks(original)
    values = dict(model.named_parameters())
    return all(not value[~masks[name]].any() for name, value in values.items())


def test_masked_is_the_plain_reference():
    model = residual()
    plan = plan_of(model)
    with untouched(model):
        made = masked(model, plan)
    wanted = plain_masked(model, plan).state_dict()
    assert type(made) is type(model) and wanted.keys() == made.state_dict().keys()
    assert all(torch.equal(value, wanted[name]) for name, value in made.state_dict().items())
    assert relative_error(run(made, IMAGES), run(plan.apply(model), IMAGES)) < 1e-12


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_held_elements_stay_zero(make):
    model, original = residual(), residual()
    plan = plan_of(model)
    hold(model, plan)
    assert zero_where_masked(model, plan, original)
    before = copy.deepcopy(model.state_dict())
    optimizer = make(model.parameters())
    learn(model, optimizer)
    assert zero_where_masked(model, plan, original)
    assert not torch.equal(before["stem.weight"], model.stem.weight), "the rest learns"


def test_gradients_are_let_go():
    model, plan = residual(), plan_of(residual())
    gone = ~plan.masks(model)["stem.weight"]
    held = hold(model, plan)
    trained(model, seed=3)  # an all-zero unit has no gradients anyway

    def gradient():
        model.zero_grad()
        F.cross_entropy(model(IMAGES), TARGETS).backward()
        return model.stem.weight.grad

    assert not gradient()[gone].any() and gradient()[~gone].all()
    held.remove()
    assert gradient()[gone].all()


def test_training_with_masks_is_training_the_pruned_model():
    model = residual()
    plan = plan_of(model)
    small = plan.apply(model)
    hold(model, plan)
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)  # noqa: E731
    learn(model, make(model)), learn(small, make(small))
    assert relative_error(run(model, IMAGES), run(small, IMAGES)) < 1e-10
    assert relative_error(run(plan.apply(model), IMAGES), run(small, IMAGES)) < 1e-10


def test_gradients_that_are_no_numbers_are_masked_too():
    model = residual()
    plan = plan_of(model)
    hold(model, plan)
    model.stem.weight.grad = None
    (model.stem.weight * torch.nan).sum().backward()
    kept = plan.masks(model)["stem.weight"]
    assert not model.stem.weight.grad[~kept].any() and model.stem.weight.grad[kept].isnan().all()


@pytest.mark.parametrize("criterion", ["magnitude", "fpgm"])
def test_a_pruner_with_masks_agrees_with_one_that_cuts(criterion):
    """The same units, and after the same training the same values; fpgm would see the filters that are zero."""
    options = {"example_inputs": IMAGES, "steps": 3, "macs": 0.3, "ranking": "global", "criterion": criterion}
    soft, hard = fxprune.Pruner(residual(), mask="hold", **options), fxprune.Pruner(residual(), **options)
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)  # noqa: E731
    while not hard.done:
        wide, small = soft.step(), hard.step()
        assert soft.plan == hard.plan
        assert shapes(wide) == shapes(residual()) and type(wide) is type(residual())
        learn(wide, make(wide)), learn(small, make(small))
        assert zero_where_masked(wide, soft.plan, residual())
        assert relative_error(run(wide, IMAGES), run(small, IMAGES)) < 1e-9
    made = soft.shrink()
    assert shapes(made) == shapes(small) and made.verification.error < 1e-8
    assert relative_error(run(made, IMAGES), run(small, IMAGES)) < 1e-9
    assert [s.to_dict() | {"error": None} for s in soft.history] == [s.to_dict() | {"error": None} for s in hard.history]


def test_soft_masks_let_units_come_back():
    pruner = fxprune.Pruner(residual(), 0.5, example_inputs=IMAGES, mask="soft", schedule=lambda t: 1, steps=3)
    wide = pruner.step()
    first = pruner.plan.masks(wide)["inner.weight"].flatten(1).any(1)
    assert first.sum() == 12
    assert not wide.outer.weight[:, ~first].any() and wide.outer.weight[:, first].flatten(1).any(1).all()
    assert wide.inner.weight.flatten(1).any(1).all(), "what writes is left"
    assert torch.equal(wide.inner_norm.weight, residual().inner_norm.weight)
    assert relative_error(run(wide, IMAGES), run(pruner.shrink(), IMAGES)) < 1e-12, "it counts for nothing all the same"
    learn(wide, torch.optim.SGD(wide.parameters(), lr=0.1))
    assert wide.outer.weight[:, ~first].any(), "it grows"
    with torch.no_grad():
        wide.outer.weight[:, ~first] += 100
    grown = copy.deepcopy(wide)
    wide = pruner.step(grown)
    second = pruner.plan.masks(wide)["inner.weight"].flatten(1).any(1)
    assert torch.equal(second, ~first)
    small = pruner.shrink()
    assert small.verification.error < 1e-8 and relative_error(run(wide, IMAGES), run(small, IMAGES)) < 1e-12


def test_zeros_become_a_pruned_model():
    model = residual()
    plan = plan_of(model)
    made = masked(model, plan)
    small = prune_zeros(made, IMAGES)
    assert fxprune.plan_of(small) == plan
    assert relative_error(run(made, IMAGES), run(small, IMAGES)) < 1e-12
    assert torch.equal(run(small, IMAGES), run(plan.apply(model), IMAGES))


@pytest.mark.parametrize("name", sorted(n for n, g in GRAPHS.items() if not g.stats)[::40])
def test_zeros_of_any_graph_become_what_prune_makes(name):
    model, x = GRAPHS[name].make()
    plan = fxprune.plan_of(fxprune.prune(model, 0.5, example_inputs=x, verify=False))
    small = prune_zeros(masked(model, plan), x, verify=True)
    assert fxprune.plan_of(small) == plan and small.verification.error < 1e-8


def test_zeros_in_some_layers_are_not_enough():
    model = residual()
    with torch.no_grad():
        model.inner.weight[2:5] = 0
        for part in (model.inner_norm.weight, model.inner_norm.bias):
            part[2:4] = 0
        model.outer.weight[:, 3:5] = 0  # 2: still read; 4: still shifted; 3: gone
    small = prune_zeros(model, IMAGES)
    assert torch.equal(small.inner.weight, model.inner.weight[[i for i in range(24) if i != 3]])
    assert relative_error(run(model, IMAGES), run(small, IMAGES)) < 1e-12


def test_nothing_is_zero():
    model = residual()
    what = "no unit of the model is zero in all the layers it spans"
    fix = "fxprune.masks.masked(model, plan) zeroes all that belongs to a unit"
    refuses(lambda: prune_zeros(model, IMAGES), model, what=what, where="Residual", fix=fix)
    other = nn.Linear(2, 2)
    what = "the plan is for another model: this one has no stem.weight"
    for call in (masked, hold):
        refuses(lambda: call(other, plan_of(model)), other, what=what, fix="apply it to the original architecture")


class Shares(nn.Module):
    """Calls a layer under several names, and has a tied weight."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 8), nn.Linear(8, 8)
        self.again = nn.Sequential(self.layer, nn.ReLU())
        self.out, self.twin = nn.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False)
        self.twin.weight = self.out.weight

    def forward(self, x):
        x = self.again(self.layer(self.first(x)))
        return self.out(x) + self.twin(x.tanh())


def test_masks_of_tensors_under_several_names():
    torch.manual_seed(0)
    model, x = Shares().eval(), torch.randn(5, 4)
    small = fxprune.prune(model, 0.5, x)
    masks = small.plan.masks(model)
    assert {"again.0.weight", "layer.weight", "twin.weight", "out.weight"} <= masks.keys()
    for made in (masked(model, small.plan), fxprune.masks.zeroed(model, masks)):
        torch.testing.assert_close(made(x), small(x))
        assert made.layer is made.again[0] and made.twin.weight is made.out.weight


WRONG_MASKS = {
    "numbers": torch.ones(8, 4),
    "meta": torch.ones(8, 4, dtype=torch.bool, device="meta"),
    "sparse": torch.ones(8, 4, dtype=torch.bool).to_sparse(),
    "another shape": torch.ones(7, 4, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", WRONG_MASKS.values(), ids=WRONG_MASKS.keys())
def test_a_mask_is_a_boolean_tensor_with_values(mask):
    with pytest.raises(fxprune.PruneError, match=r"at first\.weight\n  fix: a boolean tensor of its shape"):
        fxprune.masks.zeroed(Shares(), {"first.weight": mask})


def test_a_model_that_cannot_be_written_to_is_left_as_it_is():
    model, x = Shares().eval(), torch.randn(5, 4)
    plan = fxprune.prune(model, 0.5, x).plan
    with torch.inference_mode():
        fixed = copy.deepcopy(model)
    before = {name: value.clone() for name, value in fixed.state_dict().items()}
    with pytest.raises(fxprune.PruneError, match="was made in inference mode"):
        hold(fixed, plan)
    assert all(torch.equal(value, before[name]) for name, value in fixed.state_dict().items())
    with pytest.raises(fxprune.PruneError, match="is on the meta device"):
        hold(copy.deepcopy(model).to("meta"), plan)
