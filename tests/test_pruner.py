"""Iterative pruning: every step is exact, adds to the last one, and is part of one plan of the original."""

import copy
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphs import GRAPHS
from oracle import run
from refusals import untouched
from scored import GRADIENTS, NEED_DATA, batch, built
from scored import scores as scores_of
from stepping import IMAGES, MODELS, TARGETS, put_back, residual, shapes, trained, vit
from torch import nn

import fxprune
from fxprune.inputs import ExampleInputs
from fxprune.iterative.plan_mapping import tensors_of, widened
from fxprune.selection.candidates import Group, remove_share

every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
HEADED = sorted(name for name, graph in GRAPHS.items() if graph.heads)
STRIDE = int(os.environ.get("GRAPH_STRIDE", "24"))  # 1 takes every graph
CASES = [(name, "heads") for name in sorted(GRAPHS)[::STRIDE]] + [(n, "dims") for n in HEADED[:: max(1, STRIDE // 3)]]


# (a table of positions for each head keeps the dimensions within heads: see the limits in passes/README.md)
WHOLE = {("relative_position_table", "dims")}


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_step_is_exact_and_adds_to_the_last(name, attention):
    model, x = GRAPHS[name].make()
    if (name, attention) in WHOLE:
        with pytest.raises(fxprune.PruneError, match="nothing in the model can be pruned by so little"):
            fxprune.Pruner(model, 0.5, example_inputs=x, attention=attention, steps=3)
        return
    pruner = fxprune.Pruner(model, 0.5, example_inputs=x, attention=attention, steps=3, verify=True)
    kept = []
    while not pruner.done:
        small = pruner.step()
        assert small.verification.error < 1e-8
        kept.append(pruner.plan.masks(model))
        again = pruner.plan.apply(GRAPHS[name].make()[0])
        assert shapes(again) == shapes(small)
        assert again.code == small.code
        trained(small, seed=len(kept))
    for before, after in pairwise(kept):
        assert not any((after[n] & ~before[n]).any() for n in after), "nothing comes back"


@every_model
def test_a_step_keeps_what_was_trained(build):
    """Against values put back into the original by their masks, with NaN in place of all that is gone."""
    model = build()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, steps=3, attention="dims")
    small = trained(pruner.step(), seed=1)
    for seed in (2, 3):
        whole = put_back(build(), small, pruner.plan)
        small = pruner.step()
        assert shapes(pruner.plan.apply(whole)) == shapes(small)
        for name, value in pruner.plan.apply(whole).state_dict().items():
            assert torch.equal(value, small.state_dict()[name]), name
        assert torch.equal(run(pruner.plan.apply(whole), IMAGES), run(small, IMAGES))
        trained(small, seed)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"macs": 0.4, "ranking": "global"}, {"params": 3_000}])
@every_model
def test_one_step_is_prune(build, options):
    model = build()
    once = fxprune.prune(model, example_inputs=IMAGES, verify=False, **options)
    pruner = fxprune.Pruner(model, example_inputs=IMAGES, **options)
    step = pruner.step()
    assert pruner.plan == fxprune.plan_of(step) == fxprune.plan_of(once)
    assert step.verification.ok and pruner.done
    assert torch.equal(run(step, IMAGES), run(once, IMAGES))


@pytest.mark.parametrize("attention", ["heads", "dims"])
@every_model
def test_several_steps_remove_as_much_as_one(build, attention):
    model, options = build(), {"example_inputs": IMAGES, "attention": attention}
    pruner = fxprune.Pruner(model, 0.5, steps=3, **options)
    while not pruner.done:
        small = trained(pruner.step(), seed=len(pruner.history))
    assert shapes(small) == shapes(fxprune.prune(model, 0.5, verify=False, **options))


@pytest.mark.parametrize("kind", ["params", "macs", "memory"])
@pytest.mark.parametrize("ranking", ["local", "global", "isomorphic"])
def test_budgets_fall_step_by_step(kind, ranking):
    model = residual()
    pruner = fxprune.Pruner(model, example_inputs=IMAGES, **{kind: 0.4}, ranking=ranking, schedule="cubic", steps=3)
    costs = lambda m: getattr(fxprune.feasible(m, IMAGES), kind)[2]  # noqa: E731
    whole, kept = costs(model), [pruner.plan.masks(model)]
    for t in (1 / 3, 2 / 3, 1):
        small = trained(pruner.step(), seed=3)
        limit = 1 - 0.6 * (1 - (1 - t) ** 3)
        assert limit - 0.1 < costs(small) / whole <= limit
        kept.append(pruner.plan.masks(model))
    for before, after in pairwise(kept):
        assert not any((after[n] & ~before[n]).any() for n in after)


@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
def test_shares_of_the_original_compete(ranking):
    model = residual()
    pruner = fxprune.Pruner(model, 0.6, example_inputs=IMAGES, ranking=ranking, steps=4)
    for k in range(1, 5):
        trained(pruner.step(), seed=k)
        gone, total = pruner.history[-1].units
        assert 0.15 * k - 0.04 < gone / total <= 0.15 * k + 1e-9


def test_ratios_by_glob_are_scaled():
    pruner = fxprune.Pruner(residual(), {"inner_norm": 0.5, "down": 0.4}, example_inputs=IMAGES, steps=2)
    counts = [[len(m.weight) for m in (s.inner, s.down, s.stem)] for s in (pruner.step(), pruner.step())]
    assert counts == [[18, 16, 16], [12, 12, 16]]


@pytest.mark.parametrize("criterion", ["magnitude", "bn_scale", "lamp", "fpgm", *NEED_DATA])
def test_a_step_scores_the_present_model(criterion):
    """By what the criterion says of that model itself, coupled anew."""
    model = built()
    data = [batch(8, seed=s) for s in (1, 2)]
    loss = F.cross_entropy if criterion in GRADIENTS else None
    options = {"data": data if criterion in NEED_DATA else None, "loss": loss}
    x = data[0][0]
    pruner = fxprune.Pruner(model, 0.5, example_inputs=x, criterion=criterion, steps=2, **options)
    small = trained(pruner.step(), seed=1)
    wanted = scores_of(small, x, criterion, **options)
    proposal = pruner.step(interactive=True)
    compared = 0
    for candidate in proposal.candidates:
        found = candidate.scores[0][~np.isnan(candidate.scores[0])]
        if candidate.family.name in wanted:
            np.testing.assert_allclose(found, wanted[candidate.family.name].numpy(), rtol=1e-9, atol=1e-12)
            compared += len(set(found.tolist())) > 1
    assert compared == (1 if criterion == "bn_scale" else 2)


class Mixed(nn.Module):
    """It drops out in training, and has a frozen parameter and a tied one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.randn(8), requires_grad=False)
        self.norm = nn.BatchNorm1d(12)
        self.mix, self.back = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        x = self.embed(words) * self.scale
        x = self.norm(F.relu(self.mix(x)).transpose(1, 2)).transpose(1, 2)
        return self.head(F.dropout(self.back(x), 0.5, self.training))


WORDS = torch.arange(14).remainder(11).view(2, 7)


def test_modes_ties_and_flags_are_taken_over():
    torch.manual_seed(0)
    pruner = fxprune.Pruner(Mixed().train(), 0.5, example_inputs=WORDS, steps=2)
    first = pruner.step()
    assert first.training and not torch.equal(run(first, WORDS), run(first, WORDS)), "it drops out"
    first.norm.eval()
    first.mix.bias.requires_grad_(False)
    program = first.code
    second = pruner.step()
    assert first.training and not first.norm.training and first.code == program, "the last model is left alone"
    assert not torch.equal(run(first, WORDS), run(first, WORDS))
    assert second.training and not second.norm.training
    assert not torch.equal(run(second, WORDS), run(second, WORDS)), "it still drops out, unlike a model traced again"
    assert torch.equal(run(second.eval(), WORDS), run(second, WORDS))
    frozen = [name for name, p in second.named_parameters() if not p.requires_grad]
    assert frozen == ["scale", "mix.bias"]
    assert second.embed.weight is second.head.weight
    assert second.embed.weight.shape == (11, 4)


def test_scoring_by_data_leaves_the_program_for_training():
    torch.manual_seed(0)
    data = [(WORDS, WORDS)]
    options = {"criterion": "wanda", "data": data, "example_inputs": WORDS}
    pruner = fxprune.Pruner(Mixed().train(), 0.5, steps=2, **options)
    first = pruner.step()
    pruner.step()
    assert not torch.equal(run(first, WORDS), run(first, WORDS))
    quiet = fxprune.Pruner(Mixed().eval(), 0.5, steps=2, **options)
    first = quiet.step()
    quiet.step()
    assert torch.equal(run(first, WORDS), run(first, WORDS))


def test_a_copy_of_the_last_model_will_do():
    model = residual()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, steps=2)
    other = trained(copy.deepcopy(pruner.step()), seed=9)
    small = pruner.step(other)
    whole = put_back(residual(), other, fxprune.plan_of(other))
    assert torch.equal(run(pruner.plan.apply(whole), IMAGES), run(small, IMAGES))


@pytest.mark.parametrize("mask", [None, "hold", "soft"])
def test_a_step_leaves_the_last_model_and_random_numbers_alone(mask):
    model = residual().train()
    model.outer_norm.eval()
    data = [(IMAGES, TARGETS)]
    options = {"criterion": "taylor", "data": data, "loss": F.cross_entropy, "mask": mask}
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, steps=2, **options)
    with untouched(model):
        first = pruner.step()
    first(IMAGES).sum().backward()
    with untouched(model, first):
        second = pruner.step()
    assert all(p.grad is None for p in second.parameters())
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (second, first))
    assert not mine & theirs, "nothing is shared"
    assert [n for n, m in second.named_modules() if not m.training] == ["outer_norm"]


def test_example_inputs_go_where_the_model_went():
    """It may have been moved to another device since."""
    x = torch.randn(2, 3)
    moved = ExampleInputs((x, 5), {"more": [x]}).beside(nn.Linear(3, 2, device="meta"))
    assert moved.args[0].is_meta and moved.args[1] == 5 and moved.kwargs["more"][0].is_meta and not x.is_meta
    model = residual()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES)
    small = pruner.step().to("meta")
    whole = widened(model, small, tensors_of(small, pruner.plan), pruner.plan)
    assert all(t.is_meta for t in whole.state_dict().values()) and shapes(whole) == shapes(model)


def test_small_shares_wait_until_a_unit_goes():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    pruner = fxprune.Pruner(model, 0.5, example_inputs=torch.randn(1, 3), steps=8)
    assert [pruner.step().get_submodule("0").out_features for _ in range(8)] == [4, 4, 4, 3, 3, 3, 3, 2]


def test_history_counts_what_the_models_have():
    model = residual()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, steps=2, schedule="cubic")
    models = [model, pruner.step(), pruner.step()]
    count = [sum(p.numel() for p in m.parameters()) for m in models]
    macs = [fxprune.report(model, m, IMAGES).macs[1] for m in models[1:]]
    assert [s.params for s in pruner.history] == list(pairwise(count))
    assert [s.macs[1] for s in pruner.history] == macs and pruner.history[1].macs[0] == macs[0]
    assert [s.asked for s in pruner.history] == ["ratio=0.4375", "ratio=0.5"]
    assert [s.units[0] for s in pruner.history] == list(np.cumsum([s.fresh for s in pruner.history]))
    assert pruner.history[-1].units == (30, 60)
    assert all(s.error < 1e-8 for s in pruner.history)
    lines = str(pruner.history).splitlines()
    assert lines[0] == "2 steps" and lines[-1].startswith("2 ") and lines[-1].endswith("ratio=0.5")
    assert repr(pruner) == f"Pruner(Residual: step 2 of 2, {pruner.plan!r})"
    assert pruner.history[1].to_dict()["params"] == (count[1], count[2])


# -- what a step adds to the last one -------------------------------------------------------------------------------------


def chain(*widths):
    torch.manual_seed(0)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_what_is_gone_counts_first_whatever_others_cost():
    """A family that lost units becomes a thousand times as important: the share of the whole stays what was asked for."""
    model = chain(4, 20, 20, 3)
    with torch.no_grad():
        model[2].weight.fill_(1.0)
        model[0].weight.fill_(1.0)
        model[4].weight.fill_(3.0)
    criterion = fxprune.Magnitude(p=1, normalise="none")
    options = {"ranking": "global", "criterion": criterion, "example_inputs": torch.randn(1, 4), "floor": 0.0}
    pruner = fxprune.Pruner(model, 0.5, steps=2, **options)
    small = pruner.step()
    assert [small.get_submodule("0").out_features, small.get_submodule("2").out_features] == [10, 20]
    with torch.no_grad():
        small.get_submodule("0").weight.fill_(1000.0)  # all alike: what is gone would be worth nearly as much
    small = pruner.step()
    assert [small.get_submodule("0").out_features, small.get_submodule("2").out_features] == [10, 10]


@pytest.mark.parametrize("options", [{}, {"ranking": "global"}, {"params": 0.4, "ranking": "global"}])
def test_what_is_gone_counts_first_where_scores_are_negative(options):
    def inverted(weight):
        return -weight.abs()

    model, x = chain(4, 20, 20, 3), torch.randn(1, 4)
    pruner = fxprune.Pruner(model, example_inputs=x, criterion=inverted, steps=3, **options)
    plans = []
    while not pruner.done:
        with torch.no_grad():
            for p in pruner.step().parameters():
                p.copy_(torch.randn(p.shape))
        plans.append(pruner.plan.masks(model)["2.weight"])
    gone, total = pruner.history[-1].units
    if "params" in options:
        assert 0.36 < pruner.history[-1].params[1] / pruner.history[0].params[0] <= 0.4
    else:
        assert gone == total // 2
    assert all((before | ~after).all() for before, after in pairwise(plans))


def test_families_are_compared_by_what_is_left_of_them():
    model = residual()
    pruner = fxprune.Pruner(model, 0.6, example_inputs=IMAGES, ranking="global", steps=2)
    trained(pruner.step(), seed=3)
    for candidate in pruner.step(interactive=True).candidates:
        left = candidate.scores[0][~np.isnan(candidate.scores[0])]
        assert len(left) < candidate.family.units
        np.testing.assert_allclose(left.mean(), 1.0)  # magnitudes are over their mean


def test_what_is_gone_stays_where_rows_must_be_equal():
    """In the second step too much of one head is asked for: all of that is taken back, and nothing of the first step."""
    pruner = fxprune.Pruner(vit(), 0.5, example_inputs=IMAGES, attention="dims", steps=2)
    pruner.step()
    planner, gone = pruner._planner, pruner._gone
    family = next(f for f in planner.free if "in_proj_weight" in f.name and gone[f.units].any())
    asked = gone.copy()
    asked[next(u for u in family.units if not gone[u])] = True
    kept, _ = planner.settle(asked, np.zeros(len(gone)), gone)
    assert not kept.numpy()[np.flatnonzero(gone)].any()
    assert (~kept.numpy()[family.units]).sum() == gone[family.units].sum()


def test_rows_that_overlap_go_on_from_what_is_gone():
    """Two rows of four that share a unit: 1 and 4 went first, so they go, although 0 and 5 score lower."""
    score = np.array([0.0, 9.0, 5.0, 5.0, 9.0, 0.0, 5.0])
    strata = [(0, np.array([0, 1, 2])), (0, np.array([3])), (0, np.array([4, 5, 6]))]
    equal = [np.array([[0, 1, 2, 3], [3, 4, 5, 6]])]
    fresh, begun = Group(strata, 1.0, equal), Group(strata, 1.0, equal, np.array([1, 4]))
    assert sorted(remove_share(fresh, score, [1], 1, 2 / 7)) == [0, 5]
    assert sorted(remove_share(begun, score, [1], 1, 2 / 7)) == [1, 4]
    assert sorted(remove_share(begun, score, [1], 1, 4 / 7)) == [0, 1, 4, 5]


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(6, 4)


def test_a_criterion_without_its_data_is_refused_before_the_first_step():
    model, x = perceptron()
    with pytest.raises(fxprune.PruneError, match="the criterion FLAP needs data"):
        fxprune.Pruner(model, 0.5, x, steps=2, criterion="flap")


def test_what_a_generator_yields_is_held_for_every_step():
    model, x = perceptron()
    plans = []
    for data in ([x], iter([x])):
        pruner = fxprune.Pruner(model, 0.5, x, steps=2, criterion="flap", data=data)
        while not pruner.done:
            pruner.step()
        plans.append(pruner.plan)
    assert plans[0] == plans[1]


def test_units_of_an_edit_may_come_from_a_generator():
    model, x = perceptron()
    candidate = fxprune.Pruner(model, 0.5, x).step(interactive=True)["0"]
    assert candidate.edit(unit for unit in (5, 2)).units == ([2, 5],)
    with pytest.raises(fxprune.PruneError, match="units come in lists, and 3 is none"):
        candidate.edit(3)
