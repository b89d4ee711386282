"""Schedules, and what a pruner refuses: each with its message word for word, and nothing changed."""

import pytest
import torch
from refusals import IMAGES, net, refuses, untouched
from torch import nn

import fxprune
from fxprune.iterative.schedules import shares


def test_linear_takes_equal_shares():
    assert shares("linear", 4) == [0.25, 0.5, 0.75, 1.0]


def test_cubic_is_the_papers_formula():
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, with nothing pruned at first and s_f = 0.8."""
    first, last, start, n, dt = 0.0, 0.8, 100, 5, 20
    wanted = [last + (first - last) * (1 - (t - start) / (n * dt)) ** 3 for t in range(start + dt, start + n * dt + 1, dt)]
    assert [0.8 * s for s in shares("cubic", n)] == pytest.approx(wanted)


def test_a_function_is_asked_at_every_step():
    asked = []
    assert shares(lambda t: asked.append(t) or t**2, 4) == [1 / 16, 1 / 4, 9 / 16, 1.0]
    assert asked == [0.25, 0.5, 0.75, 1.0]
    assert shares(lambda t: 1, 3) == [1.0, 1.0, 1.0], "all at once"


def sinking(t):
    return 1 - abs(t - 0.5) if t < 1 else 1.0


def half(t):
    return t / 2


def beyond(t):
    return 2 * t


def broken(t):
    return 1 / (t - 0.5)


def no_number(t):
    return torch.tensor([t, t])


BAD = [
    (
        {"schedule": sinking, "steps": 4},
        "the schedule goes backwards: from 1 at 0.5 to 0.75 at 0.75",
        "schedule sinking",
        "what was removed does not come back: return shares that never fall",
    ),
    (
        {"schedule": half, "steps": 2},
        "the schedule ends at 0.5, not at 1",
        "schedule half",
        "return 1 at 1: all of what is asked for is done after the last step",
    ),
    (
        {"schedule": beyond, "steps": 3},
        "the schedule gives 1.3333333333333333 at 0.667, which is no share in [0, 1]",
        "schedule beyond",
        "lambda t: t is the linear one",
    ),
    (
        {"schedule": broken, "steps": 2},
        "the schedule raises ZeroDivisionError at 0.5: float division by zero",
        "schedule broken",
        "a function of one number in [0, 1] that returns one",
    ),
    ({"schedule": "quartic"}, "there is no schedule 'quartic'", None, "one of linear, cubic, or a function"),
    ({"schedule": 3}, "schedule must be a name or a function, not 3", None, "schedule='linear'"),
    ({"steps": 0}, "steps must be a positive integer, not 0", None, "steps=10"),
    ({"steps": True}, "steps must be a positive integer, not True", None, "steps=10"),
    ({"steps": 2.0}, "steps must be a positive integer, not 2.0", None, "steps=10"),
    ({"mask": "soften"}, "mask must be 'hold', 'soft' or None, not 'soften'", None, "mask='hold'"),
    (
        {"regularizer": "ridge"},
        "there is no regularizer 'ridge'",
        None,
        "one of bn_l1, group_lasso, depgraph, growing",
    ),
    ({"ratio": 1.5}, "ratio must be a number in [0, 1), not 1.5", None, "ratio=0.5 removes half of every family"),
    (
        {"params": 1e-6, "steps": 3},
        "params=1e-06 cannot be met: the least that can is 48 of 706 parameters",
        None,
        "params=0.068 or more, a lower floor, or freeze less",
    ),
    (  # the six channels of the second convolution have no scale: they stay
        {"params": 60, "criterion": "bn_scale", "steps": 2},
        "params=60 cannot be met: the least that can is 118 of 706 parameters",
        None,
        "params=0.168 or more, a lower floor, or freeze less",
    ),
    (
        {"ratio": 0.1, "round_to": 8, "steps": 3},
        "nothing in the model can be pruned by so little: no family has a whole unit to lose",
        "Net",
        "a larger ratio, or a smaller round_to",
    ),
]


@pytest.mark.parametrize(("options", "what", "where", "fix"), BAD)
def test_refused_at_once(options, what, where, fix):
    model = net()
    refuses(lambda: fxprune.Pruner(model, example_inputs=IMAGES, **options), model, what=what, where=where, fix=fix)


def test_a_schedule_that_returns_no_number():
    with pytest.raises(fxprune.PruneError, match=r"the schedule raises \w+ at 0\.5: .*converted"):
        shares(no_number, 2)


def test_no_step_after_the_last():
    model = net()
    pruner = fxprune.Pruner(model, example_inputs=IMAGES, steps=2)
    small = [pruner.step(), pruner.step()][1]
    fix = "steps= says how many there are; pruner.done tells when to stop"
    refuses(pruner.step, model, small, what="all 2 steps were taken", fix=fix)
    assert len(pruner.history) == 2 and pruner.done


INSIDE = "the module that step() returned, trained or not; of a wrapper around it, what is inside (wrapper.module)"


def test_a_step_from_another_model():
    model = net()
    pruner = fxprune.Pruner(model, example_inputs=IMAGES, steps=2)
    first = pruner.step()
    plan = pruner.plan
    what = "this is another model: stem.weight has shape (8, 3, 3, 3), not (6, 3, 3, 3)"
    refuses(lambda: pruner.step(model), model, first, what=what, where="Net", fix=INSIDE)
    what = "this is another model: it has no stem.weight"
    for other, where in ((nn.Linear(2, 2), "Linear"), (nn.Sequential(first), "Sequential")):
        refuses(lambda: pruner.step(other), first, what=what, where=where, fix=INSIDE)
    what = "model is of type str, not a torch.nn.Module"
    refuses(lambda: pruner.step("first"), first, what=what, fix="pass the module itself")
    assert pruner.plan is plan and pruner.model is first and len(pruner.history) == 1
    assert pruner.step().stem.out_channels == 4, "it goes on as if nothing had happened"


class Fussy:
    """Batches for one pass, and a loss and a criterion that fail in the second step."""

    def __init__(self):
        self.steps = 0

    def loss(self, out):
        return out if self.steps else out.square().mean()

    def criterion(self, weight):
        return weight * torch.nan if self.steps else weight.abs()

    def __iter__(self):
        return iter([] if self.steps else [IMAGES])


LATE = {
    "an empty loader": (lambda f: {"criterion": "wanda", "data": f}, "data holds no batches"),
    "a loss that is no scalar": (
        lambda f: {"criterion": "taylor", "data": [IMAGES], "loss": f.loss},
        "the loss must be a scalar, not a tensor of shape (2, 4)",
    ),
    "a criterion that gives NaN": (lambda f: {"criterion": f.criterion}, "the criterion criterion gives NaN"),
}


@pytest.mark.parametrize(("options", "what"), LATE.values(), ids=LATE.keys())
def test_a_step_that_fails_changes_nothing(options, what):
    model, fussy = net(), Fussy()
    pruner = fxprune.Pruner(model, example_inputs=IMAGES, steps=2, **options(fussy))
    first = pruner.step()
    fussy.steps += 1
    plan = pruner.plan
    with untouched(model, first), pytest.raises(fxprune.PruneError) as caught:
        pruner.step()
    assert caught.value.what == what
    assert pruner.model is first and pruner.plan is plan and len(pruner.history) == 1


@pytest.mark.parametrize("what", ["remap_optimizer", "remap_average"])
def test_nothing_to_go_along_with_before_a_step(what):
    model = net()
    pruner = fxprune.Pruner(model, example_inputs=IMAGES)
    given = torch.optim.SGD(model.parameters(), lr=0.1) if what == "remap_optimizer" else model.state_dict()
    refuses(lambda: getattr(pruner, what)(given), model, what="no step was taken yet", fix="call it after pruner.step()")
