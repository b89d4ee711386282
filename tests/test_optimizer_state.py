"""What goes along: after a step, training goes on as if the model had been masked and not cut."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error, run
from refusals import refuses
from stepping import IMAGES, MODELS, TARGETS, residual, shapes, trained, vit
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def learn(model, optimizer, steps=2, seed=0, mask=lambda: None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(IMAGES.shape, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), TARGETS).backward()
        mask()
        optimizer.step()
        mask()
    return model.eval()


@every_optimizer
def test_a_step_of_the_cut_optimizer_is_the_cut_of_a_masked_step(make):
    """The original is trained on with masked values and gradients; every rule that works element by element agrees."""
    model = residual()
    optimizer = make(model.parameters())
    pruner = fxprune.Pruner(model, 0.6, example_inputs=IMAGES, steps=2)
    learn(model, optimizer)
    wide, small = copy.deepcopy(model), pruner.step()
    wide_optimizer = make(wide.parameters())
    wide_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert pruner.remap_optimizer(optimizer) is optimizer
    for _ in range(2):
        masks = pruner.plan.masks(wide)

        def mask():
            with torch.no_grad():
                for name, p in wide.named_parameters():
                    p.mul_(masks[name])
                    if p.grad is not None:
                        p.grad.mul_(masks[name])

        mask()
        learn(wide, wide_optimizer, mask=mask)
        learn(small, optimizer)
        cut = pruner.plan.apply(wide)
        for name, value in cut.state_dict().items():
            torch.testing.assert_close(small.state_dict()[name], value, rtol=1e-9, atol=1e-12)
        if not pruner.done:
            small = pruner.step()
            pruner.remap_optimizer(optimizer)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
@every_optimizer
def test_state_is_cut_as_its_parameter_is(build, make):
    model = build()
    optimizer = make(model.parameters())
    learn(model, optimizer)
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, attention="dims")
    small = pruner.step()
    masks = pruner.plan.masks(model)
    pruner.remap_optimizer(optimizer)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert [id(p) for p in held] == [id(dict(small.named_parameters())[n]) for n, _ in model.named_parameters()]
    assert set(optimizer.state) == set(held)
    compared = 0
    for name, p in small.named_parameters():
        assert optimizer.state[p].keys() == before[name].keys()
        for key, value in optimizer.state[p].items():
            old = before[name][key]
            if isinstance(old, torch.Tensor) and old.dim():
                assert value.shape == p.shape and torch.equal(value.flatten(), old[masks[name]])
                compared += 1
            else:
                assert value == old
    assert compared >= len(held)


def test_groups_keep_their_settings_and_strangers_their_place():
    model, stranger = residual(), nn.Parameter(torch.ones(3))
    groups = [
        {"params": [("bias", model.down.bias), ("own", stranger)], "lr": 0.5, "weight_decay": 0.0},
        {"params": [("weight", model.inner.weight), ("head", model.head.weight)]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    stranger.grad = torch.ones(3)
    learn_once(model, optimizer)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES)
    small = pruner.step()
    pruner.remap_optimizer(optimizer)
    first, second = optimizer.param_groups
    assert first["params"][0] is small.down.bias and first["params"][1] is stranger
    assert second["params"][0] is small.inner.weight and second["params"][1] is small.head.weight
    assert (first["param_names"], second["param_names"]) == (["bias", "own"], ["weight", "head"])
    assert (first["lr"], first["weight_decay"], second["lr"]) == (0.5, 0.0, 0.1)
    assert torch.equal(optimizer.state[stranger]["momentum_buffer"], torch.ones(3))
    learn_once(small, optimizer)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.05]


def learn_once(model, optimizer):
    F.cross_entropy(model.train()(IMAGES), TARGETS).backward()
    optimizer.step()
    model.eval()


def test_what_the_program_does_not_use_stays_in_its_group():
    model = residual()
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES)
    small = pruner.step()
    pruner.remap_optimizer(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(small.parameters())) == len(list(model.parameters()))
    assert any(p is small.unused for p in optimizer.param_groups[0]["params"])


def test_a_number_for_each_row_or_column_is_cut():
    """Adafactor keeps, of a matrix, one for each row and one for each column."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), TARGETS).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state[model[2].weight])
    assert before["row_var"].shape == (8, 1) and before["col_var"].shape == (1, 10)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=x)
    small = pruner.step()
    kept = pruner.plan.masks(model)["2.weight"]
    pruner.remap_optimizer(optimizer)
    after = optimizer.state[small.get_parameter("2.weight")]
    assert torch.equal(after["row_var"], before["row_var"][kept.any(1)])
    assert torch.equal(after["col_var"], before["col_var"][:, kept.any(0)])
    F.cross_entropy(small(x), TARGETS).backward()
    optimizer.step()


def test_masks_that_hold_have_no_momentum():
    model = residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learn(model, optimizer)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, mask="hold")
    wide = pruner.step()
    pruner.remap_optimizer(optimizer)
    masks = pruner.plan.masks(model)
    learn(wide, optimizer)
    for name, p in wide.named_parameters():
        assert not p[~masks[name]].any(), name
        assert not optimizer.state[p]["momentum_buffer"][~masks[name]].any()
    assert optimizer.state[wide.inner.weight]["momentum_buffer"].any()


def test_an_average_goes_along():
    model = residual()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learn(model, optimizer)
    average.update_parameters(model)
    learn(model, optimizer, seed=1)
    average.update_parameters(model)
    state = copy.deepcopy(average.module.state_dict())
    wrapped = copy.deepcopy(average.state_dict())
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES)
    small = pruner.step()
    wanted = pruner.plan.apply(average.module)

    assert pruner.remap_average(average) is average
    assert shapes(average.module) == shapes(small)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in average.module.state_dict().items())
    assert torch.equal(run(average.eval(), IMAGES), run(wanted, IMAGES))
    cut = pruner.remap_average(state)
    assert cut.keys() == state.keys() and all(torch.equal(v, wanted.state_dict()[k]) for k, v in cut.items())
    cut = pruner.remap_average(wrapped)
    assert cut["n_averaged"] == 2 and torch.equal(cut["module.inner.weight"], wanted.inner.weight)
    average.update_parameters(trained(small, seed=2))
    torch.testing.assert_close(average.module.inner.weight, (wanted.inner.weight + small.inner.weight) / 2)


def test_a_module_of_averages_goes_along():
    model = vit()
    shadow = trained(vit(), seed=7)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, attention="dims", steps=2)
    for _ in range(2):
        small = pruner.step()
        shadow = pruner.remap_average(shadow)
        assert shapes(shadow) == shapes(small)
    wanted = pruner.plan.apply(trained(vit(), seed=7))
    assert relative_error(run(wanted, IMAGES), run(shadow, IMAGES)) == 0


LOST = "call remap_optimizer once after every step, before anything else is done with the optimizer"
NEW = "a new optimizer for the parameters of the model that step() returned"


def test_what_cannot_go_along():
    model = residual()
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES, steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = pruner.step()
    pruner.step()
    what = "the optimizer holds no parameter of the model that the last step was given"
    refuses(lambda: pruner.remap_optimizer(optimizer), model, what=what, where="SGD", fix=LOST)
    what = "optimizer is of type StepLR, not a torch.optim.Optimizer"
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    refuses(lambda: pruner.remap_optimizer(scheduler), what=what, fix="the optimizer itself; a scheduler keeps it")
    there = "which has shape (12, 3, 3, 3) there"
    what = f"stem.weight of shape (16, 3, 3, 3) is not of the model that the last step was given, {there}"
    fix = "call remap_average once after every step, with averages of that model"
    refuses(lambda: pruner.remap_average(model.state_dict()), model, first, what=what, fix=fix)
    what = "middle of shape (2,) is not of the model that the last step was given, which has no such tensor"
    refuses(lambda: pruner.remap_average({"middle": torch.ones(2)}), what=what, fix=fix)


def test_state_that_cannot_be_cut():
    """Nothing is changed then, not even what could be."""
    model = residual()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES), TARGETS)
        loss.backward()
        return loss

    optimizer.step(closure)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=IMAGES)
    pruner.step()
    held = list(optimizer.param_groups[0]["params"])
    n = sum(p.numel() for p in model.parameters())
    what = f"the state 'd' of stem.weight cannot be cut: it has shape ({n},), its parameter (16, 3, 3, 3)"
    refuses(lambda: pruner.remap_optimizer(optimizer), what=what, where="LBFGS", fix=NEW)
    assert all(a is b for a, b in zip(held, optimizer.param_groups[0]["params"])) and set(optimizer.state) == {held[0]}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.stem.weight]["history"] = [torch.ones(3)]
    what = "the state 'history' of stem.weight cannot be cut: it holds tensors in a list"
    refuses(lambda: pruner.remap_optimizer(optimizer), what=what, where="SGD", fix=NEW)
