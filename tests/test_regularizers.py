"""Every regulariser against the penalty as its paper writes it, differentiated by autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import GRAPHS
from oracle import run
from refusals import refuses
from stepping import IMAGES, TARGETS, residual, trained
from torch import nn

import fxprune
from fxprune.iterative.regularizers import BNL1, DepGraph, GroupLasso, Growing, Units

STEM = [("stem.weight", 0), ("norm.weight", 0), ("norm.bias", 0), ("inner.weight", 1)]
STEM += [("outer.weight", 0), ("outer_norm.weight", 0), ("outer_norm.bias", 0), ("down.weight", 1)]
INNER = [("inner.weight", 0), ("inner_norm.weight", 0), ("inner_norm.bias", 0), ("outer.weight", 1)]
DOWN = [("down.weight", 0), ("down.bias", 0), ("head.weight", 1)]
FAMILIES = {"stem": STEM, "inner": INNER, "down": DOWN}


def squares(model, places):
    """For each unit the sum of its squared elements, unit by unit, place by place."""
    units = model.get_parameter(places[0][0]).shape[places[0][1]]
    return torch.stack([sum(model.get_parameter(n).select(d, i).square().sum() for n, d in places) for i in range(units)])


def bn_l1(model):
    """lambda * sum |gamma| (1708.06519, equation 1)."""
    return 0.3 * sum(m.weight.abs().sum() for m in (model.norm, model.inner_norm, model.outer_norm))


def group_lasso(model):
    """lambda * sum over groups of the L2 norm (1608.03665, equation 1)."""
    return 0.3 * sum(squares(model, places).sqrt().sum() for places in FAMILIES.values())


def depgraph(model):
    """lambda * sum over k of gamma_k * I_k, gamma_k = 2 ** (alpha * (I_max - I_k) / (I_max - I_min)) (2301.12900, 4)."""
    total = 0
    for places in FAMILIES.values():
        importance = squares(model, places)
        fixed = importance.detach()
        gamma = 2 ** (3.0 * (fixed.max() - fixed) / (fixed.max() - fixed.min()))
        total = total + 0.3 * (gamma * importance).sum()
    return total


PENALTIES = {
    "bn_l1": (BNL1(strength=0.3), bn_l1),
    "group_lasso": (GroupLasso(strength=0.3), group_lasso),
    "depgraph": (DepGraph(strength=0.3, alpha=3.0), depgraph),
}
every_penalty = pytest.mark.parametrize(("regularizer", "penalty"), PENALTIES.values(), ids=PENALTIES.keys())


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def backward(model, extra=lambda model: 0.0):
    model.zero_grad()
    (F.cross_entropy(model(IMAGES), TARGETS) + extra(model)).backward()
    return gradients(model)


def agree(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@every_penalty
def test_as_the_paper_writes_it(regularizer, penalty):
    """On the original, then on what two steps leave of it: the formula over its own tensors."""
    model = residual()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, regularizer=regularizer, steps=2)
    while True:
        wanted = backward(model, penalty)
        plain = backward(model)
        pruner.regularize(model)
        agree(gradients(model), wanted)
        assert any(not torch.equal(plain[n], wanted[n]) for n in plain)
        if pruner.done:
            break
        model = trained(pruner.step(), seed=len(pruner.history))


def test_growing_pulls_at_what_goes_next():
    """lambda / 2 * squared norm of the units that the next step removes; lambda grows by delta every k-th call (2012.09243)."""
    model = residual()
    options = {"example_inputs": IMAGES, "steps": 2}
    pruner = fxprune.Pruner(model, 0.5, regularizer=Growing(strength=0.1, every=2, ceiling=0.25), **options)
    other = fxprune.Pruner(model, 0.5, **options)
    for _ in range(2):
        now = other.step(interactive=True)
        going = {c.family.name.split(".")[0]: c.units[0] for c in now}
        gone = {c.family.name.split(".")[0]: c.gone[0] for c in now}
        for growth in (0.1, 0.1, 0.2, 0.2, 0.25, 0.25):

            def penalty(model):
                total = 0
                for name, places in FAMILIES.items():
                    left = [i for i in range({"stem": 16, "inner": 24, "down": 20}[name]) if i not in gone[name]]
                    total = total + squares(model, places)[[left.index(i) for i in going[name]]].sum()
                return growth / 2 * total

            wanted = backward(model, penalty)
            backward(model)
            pruner.regularize(model)
            agree(gradients(model), wanted)
        for candidate in now:
            candidate.apply()
        now.finish()
        model = pruner.step()
        assert other.plan == pruner.plan
        if not pruner.done:
            trained(model, seed=1), trained(other.model, seed=1)
    plain = backward(model)
    pruner.regularize(model)
    agree(gradients(model), plain)  # nothing goes next


def test_growing_brings_units_to_zero_before_they_go():
    model = residual()
    regularizer = Growing(strength=0.1, every=5, ceiling=5.0)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, regularizer=regularizer)
    going = {c.family.name: c.units[0] for c in pruner.step(interactive=True)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(400):
        backward(model)
        pruner.regularize(model)
        optimizer.step()
    for name, places in FAMILIES.items():
        units = going[places[0][0].rpartition(".")[0]]
        left = [i for i in range(len(squares(model, places))) if i not in units]
        assert squares(model, places)[units].max() < 1e-6 < 1e-2 < squares(model, places)[left].max(), name
    small = pruner.step()
    torch.testing.assert_close(run(small, IMAGES), run(model.eval(), IMAGES), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(GRAPHS)[::37])
def test_group_lasso_of_any_graph(name):
    """Against one unit after the other: labels that belong to it, element by element."""
    model, x = GRAPHS[name].make()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=x, regularizer=GroupLasso(strength=0.3))
    planner = pruner._planner
    unit = planner.unit_of
    total = 0
    for family in planner.free:
        for one in family.units.tolist():
            square = 0
            for parameter_name, labels in planner.solution.leaves.items():
                parameter = dict(model.named_parameters()).get(parameter_name)
                if parameter is not None:
                    for f in labels:
                        mine = torch.from_numpy(unit[f.labels.numpy()] == one).expand(parameter.shape)
                        square = square + parameter[mine].square().sum()
            total = total + 0.3 * square.sqrt()
    model.zero_grad()
    total.backward()
    wanted = gradients(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pruner.regularize(model)
    found = gradients(model)
    for key, value in wanted.items():
        value = torch.zeros_like(found[key]) if value is None else value
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


def test_a_function_of_the_units():
    seen = []

    def steady(units):
        """Weight decay of 0.1, on what may go alone."""
        seen.append(units)
        return torch.full_like(units.squares, 0.1)

    model = residual()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, regularizer=steady)
    wanted = backward(model, lambda m: 0.05 * sum(squares(m, places).sum() for places in FAMILIES.values()))
    backward(model)
    pruner.regularize(model)
    agree(gradients(model), wanted)
    assert isinstance(seen[0], Units) and seen[0].families == 3
    assert seen[0].family.bincount().tolist() == [16, 24, 20]
    stem = torch.cat([squares(model, places) for places in FAMILIES.values()])
    torch.testing.assert_close(seen[0].squares, stem.detach())


def test_zeros_frozen_parameters_and_low_precision():
    model = residual()
    with torch.no_grad():
        for name, dim in INNER:
            model.get_parameter(name).select(dim, 3).zero_()
    model.stem.weight.requires_grad_(False)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, regularizer=GroupLasso(strength=0.3))
    plain = backward(model)
    pruner.regularize(model)
    assert model.stem.weight.grad is None
    for name, dim in INNER:
        assert torch.equal(model.get_parameter(name).grad.select(dim, 3), plain[name].select(dim, 3)), "zero is left alone"
    low = copy.deepcopy(model).bfloat16()
    for p in low.parameters():
        p.grad = torch.zeros_like(p)
    pruner.regularize(low)
    high = copy.deepcopy(low).double()
    for p in high.parameters():
        p.grad = torch.zeros_like(p)
    pruner.regularize(high)
    for (name, a), (_, b) in zip(low.named_parameters(), high.named_parameters()):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2**-7, atol=1e-4, msg=name)


def test_what_regularize_refuses():
    model = residual()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES)
    refuses(
        lambda: pruner.regularize(model),
        model,
        what="no parameter has a gradient",
        where="Residual",
        fix="loss.backward() first",
    )
    backward(model)
    small = pruner.step()
    what = "this is another model: stem.weight has shape (16, 3, 3, 3), not (8, 3, 3, 3)"
    fix = "the module that step() returned, trained or not; of a wrapper around it, what is inside (wrapper.module)"
    refuses(lambda: pruner.regularize(model), model, small, what=what, where="Residual", fix=fix)

    bare = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(2, 3)
    bare(x).sum().backward()
    pruner = fxprune.Pruner(bare, 0.5, example_inputs=x, regularizer="bn_l1")
    what = "the regularizer pulls at nothing in this model: no parameter scales a normalised activation"
    refuses(lambda: pruner.regularize(bare), bare, what=what, fix="regularizer='group_lasso'")

    def short(units):
        return units.squares[:2]

    def wild(units):
        return units.squares / 0

    fix = "return one number for each unit: what its elements are multiplied by to give the gradient"
    what = "the regularizer short returns shape (2,) for 6 units"
    pruner = fxprune.Pruner(bare, 0.5, example_inputs=x, regularizer=short)
    refuses(lambda: pruner.regularize(bare), bare, what=what, fix=fix)
    pruner = fxprune.Pruner(bare, 0.5, example_inputs=x, regularizer=wild)
    what = "the regularizer wild gives numbers that are not finite"
    refuses(lambda: pruner.regularize(bare), bare, what=what, fix="look for NaN among the parameters")
    for make, name in ((GroupLasso, "strength"), (DepGraph, "alpha"), (Growing, "every"), (Growing, "ceiling")):
        what = f"{name} must be a positive number, not 0"
        refuses(lambda: make(**{name: 0}), what=what, where=f"regularizer {make.__name__}")
