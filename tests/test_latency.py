"""Budgets of latency, on clocks that the tests hold: nothing here depends on how fast the machine is."""

import itertools

import numpy as np
import pytest
import torch
from clocks import SECONDS, clock_of_calls, counting_clock
from refusals import IMAGES, net, refuses, untouched
from test_budgets import MODELS, X, macs
from torch import nn

import fxprune
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.families import families
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.ir.slices import Slicer
from fxprune.passes.rewrite.rewrite import rewrite_program
from fxprune.selection import latency
from fxprune.selection.budgets import Budget
from fxprune.selection.candidates import Group, list_candidates
from fxprune.selection.costs import Costs
from fxprune.selection.latency import PRECISE, Latency, measure_seconds
from fxprune.selection.latency_model import LatencyModel
from fxprune.selection.latency_search import ABREAST, MARGIN, ROUNDS, bracket_budget


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)


def prune(model, amount, x=X, **options):
    return fxprune.prune(model, example_inputs=x, latency=amount, **options)


def chain(*widths):
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=False), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("build, share", [("resnet", 0.5), ("vit", 0.7), ("mobilenet", 0.4)])
def test_a_share_of_the_time_is_met_in_friendly_counts(build, share):
    model = MODELS[build]()
    pruned = prune(model, share, verify=False)
    left = macs(pruned) / macs(model)
    assert 0.9 * share <= left <= share  # in steps of 8 channels of a narrow layer
    assert pruned.meta["latency"].share == pytest.approx(left)
    assert pruned.meta["latency"].original == pytest.approx(2 * macs(model) * SECONDS)
    narrowed = [
        (m.out_channels, old.out_channels)
        for (_, m), old in zip(pruned.named_modules(), model.modules())
        if isinstance(m, nn.Conv2d)
    ]
    assert all(n % 8 == 0 or n == whole for n, whole in narrowed)


def test_a_time_is_met():
    model = MODELS["vit"]()
    whole = 2 * macs(model) * SECONDS
    pruned = prune(model, f"{whole * 500:.6f}ms", ranking="global")
    assert pruned.verification.ok
    assert 0.45 <= macs(pruned) / macs(model) <= 0.5


def test_uneven_counts_where_friendly_ones_are_not_enough():
    """Twelve units go down to eight; a third of the time needs four of them or fewer."""
    model, x = chain(16, 12, 12, 16), torch.randn(2, 16)
    assert [m.out_features for m in prune(model, 0.7, x).children() if isinstance(m, nn.Linear)] == [8, 8, 16]
    few = [m.out_features for m in prune(model, 0.33, x).children() if isinstance(m, nn.Linear)]
    assert max(few[:2]) < 8


def test_multiples_that_were_asked_for_hold():
    model, x = chain(16, 32, 32, 16), torch.randn(2, 16)
    pruned = prune(model, 0.6, x, round_to=16)
    assert [m.out_features for m in pruned.children() if isinstance(m, nn.Linear)] == [16, 16, 16]


def test_all_of_the_time_may_stay():
    model = MODELS["vit"]()
    with pytest.warns(fxprune.PruneWarning, match="latency=1.0 removes nothing"):
        assert macs(prune(model, 1.0, verify=False)) == macs(model)


def convolutions():
    """A depthwise one, one of four groups, and a transposed one of two."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 24, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(24, 48, 2, groups=2), nn.ReLU(), nn.Conv2d(48, 8, 1)),
    ]
    return nn.Sequential(*layers), torch.randn(2, 8, 8, 8)


def linears():
    return chain(16, 64, 32, 16), torch.randn(4, 16)


@pytest.mark.parametrize("build", [linears, convolutions])
def test_the_table_is_what_narrowing_one_family_costs(build):
    """Against pruning that family by itself, and counting."""
    model, x = build()
    found = prune(model, 0.7, x).meta["latency"]
    assert len(found.table) == {linears: 2, convolutions: 4}[build]
    whole = 2 * macs(model, x) * SECONDS
    for name, rows in found.table:
        assert len(rows) > 2 and rows[0][1] == pytest.approx(whole, rel=0.06)
        for units, seconds in rows[1:]:
            ratio = {name.partition(".")[0]: 1 - units / rows[0][0]}
            alone = fxprune.prune(model, ratio, example_inputs=x, ranking="global", floor=0)
            # what is not a product is given a twentieth of the time, and most of it stays
            assert seconds == pytest.approx(2 * macs(alone, x) * SECONDS, abs=0.06 * whole)


def test_every_product_is_timed_and_everything_else_goes_by_size():
    """A table made by hand: one linear layer's time falls with both of its dimensions."""
    model, x = linears()
    solution = analyse(model, (x,), {}, CouplingOptions())
    costs = Costs(solution, dict(model.named_parameters()))
    free = [f for f in families(solution, set(dict(model.named_parameters()))) if f.frozen is None]
    score = np.arange(len(solution.unit_of), dtype=float)
    candidates = [list_candidates(Group([(i, f.units)], 1.0), score, [1] * len(free), 1, 0.0) for i, f in enumerate(free)]
    clock = lambda run: counting_clock([run], None)[0][0]  # noqa: E731
    products = 2 * macs(model, x) * SECONDS
    table = LatencyModel(candidates, costs, torch.device("cpu"), clock, products / 0.9)
    rest = products / 9
    for a, b in ((64, 32), (32, 32), (64, 16), (16, 8), (40, 20)):
        work = 2 * 4 * (16 * a + a * b + b * 16) * SECONDS
        share = (a + b) / (64 + 32)  # two activations, of these widths
        assert table([64 - a, 32 - b]) == pytest.approx(work + rest * share, rel=1e-6)


def test_the_same_request_gives_the_same_model():
    model, x = chain(16, 64, 32, 16), torch.randn(4, 16)
    a, b = (prune(model, 0.5, x) for _ in range(2))
    assert fxprune.plan_of(a).to_json() == fxprune.plan_of(b).to_json()


def test_the_original_is_left_alone():
    """A model that draws random numbers in every forward, too."""
    model = net()
    model.register_forward_hook(lambda module, args, output: output + 0 * torch.rand(4))
    with untouched(model):
        prune(model, 0.6, IMAGES, verify=False)


def test_the_table_of_what_is_feasible_says_what_was_measured():
    model, x = linears()
    found = fxprune.feasible(model, x, latency=0.5)
    pruned = prune(model, 0.5, x)
    assert found.latency == pruned.meta["latency"] and found.macs[1] == macs(pruned, x)
    before, now = (f"{2e3 * n * SECONDS:.3g}" for n in found.macs[:0:-1])
    share = f"({found.macs[1] / found.macs[2]:.1%})"
    assert str(found).splitlines()[-1].split() == ["latency", now, "ms", share, before, "ms"]
    assert fxprune.feasible(model, x).latency is None


# -- the search -----------------------------------------------------------------------------------------------------------


def measured_by(curve, noise=lambda: 1.0):
    """A latency of 1 s before, and of what the curve says after some steps; and the windows that were asked for."""
    asked = []

    def measured(proposals):
        asked.append(list(proposals))
        assert proposals == sorted(set(proposals)) and 1 <= len(proposals) <= ABREAST + 1
        times = [curve(steps) * noise() for steps in proposals]
        return [Latency(1.0, now, now, 7, 0.0, "cpu") for now in times]

    return measured, asked


def test_a_table_that_is_right_needs_one_window():
    curve = lambda k: 1 - k / 1000  # noqa: E731
    measured, asked = measured_by(curve)
    steps, found = bracket_budget(Budget("latency", 0.5), 0.5, 900, curve, measured)
    assert len(asked) == 1 and steps == asked[0][1] == 505 and found.pruned == pytest.approx(0.495)
    assert curve(steps) <= 0.5 * (1 - MARGIN) < curve(steps - 1)


@pytest.mark.parametrize("overhead", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_a_table_that_is_wrong_needs_a_few(overhead, power):
    """Half of the time is asked for; the table knows nothing of a fixed part, nor how time really falls."""
    truth = lambda k: overhead + (1 - overhead) * (1 - k / 1000) ** power  # noqa: E731
    measured, asked = measured_by(truth)
    steps, found = bracket_budget(Budget("latency", 0.5), 0.5, 1000, lambda k: 1 - k / 1001, measured)
    assert found.pruned == truth(steps) and 0.98 * 0.5 <= found.pruned <= 0.5
    assert len(asked) <= ROUNDS


@pytest.mark.parametrize("seed", range(20))
def test_a_clock_that_lies_still_ends_within_the_budget(seed):
    g = torch.Generator().manual_seed(seed)
    noise = lambda: 1 + 0.2 * float(torch.rand((), generator=g) - 0.5)  # noqa: E731
    measured, asked = measured_by(lambda k: 1 - k / 1000, noise)
    _, found = bracket_budget(Budget("latency", 0.5), 0.5, 950, lambda k: 1 - k / 1500, measured)
    assert found.pruned <= 0.5 and len(asked) <= ROUNDS


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_drifts_from_window_to_window(seed):
    """All models of a window are slower or faster by as much; what is returned uses its budget, as its own window has it."""
    g = torch.Generator().manual_seed(seed)
    drift = []

    def measured(proposals):
        drift.append(1 + 0.15 * float(torch.rand((), generator=g) - 0.5))
        times = [(1 - k / 1000) * drift[-1] for k in proposals]
        return [Latency(1.0, now, now, 7, 0.0, "cpu") for now in times]

    steps, found = bracket_budget(Budget("latency", 0.5), 0.5, 950, lambda k: 1 - k / 1200, measured)
    assert found.share == pytest.approx((1 - steps / 1000) * drift[-1]) and 0.49 <= found.share <= 0.5


def test_what_was_over_by_chance_is_looked_at_again():
    """Step 500 just meets the budget; in the first window it seems to be above it. Steps are far apart."""
    chance = iter([0.502])
    windows = []

    def measured(proposals):
        windows.append(list(proposals))
        times = [next(chance, 0.498) if k == 500 else 0.9 if k < 500 else 0.45 for k in proposals]
        return [Latency(1.0, now, now, 100, 0.03, "cpu") for now in times]

    table = lambda k: 1 - k / 1000 if k < 500 else 0.495 - (k - 500) / 2000  # noqa: E731
    steps, found = bracket_budget(Budget("latency", 0.5), 0.5, 600, table, measured)
    assert (steps, found.share) == (500, 0.498) and sum(500 in w for w in windows) >= 2 and len(windows) <= ROUNDS


def test_steps_too_far_apart_end_with_two_that_follow_one_another():
    """Nothing is near the budget: the last window holds the step before what is returned, and it was over."""
    measured, asked = measured_by(lambda k: 0.6 if k < 431 else 0.4)
    steps, found = bracket_budget(Budget("latency", 0.5), 0.5, 1000, lambda k: 1 - k / 1001, measured)
    assert (steps, found.share) == (431, 0.4) and {430, 431} <= set(asked[-1])


def test_time_that_does_not_fall_until_the_last_step():
    """A cliff: the table leads nowhere, and all steps are tried before it is given up."""
    cliff = lambda k: 0.4 if k == 100 else 0.9  # noqa: E731
    measured, asked = measured_by(cliff)
    steps, found = bracket_budget(Budget("latency", 0.5), 0.5, 100, lambda k: 1 - k / 101, measured)
    assert steps == 100 and found.pruned == 0.4 and len(asked) <= ROUNDS


def test_least_of_all_is_measured_before_it_is_refused():
    measured, asked = measured_by(lambda k: 1 - k / 200)
    refuses(
        lambda: bracket_budget(Budget("latency", 0.25), 0.25, 100, lambda k: 1 - k / 101, measured),
        what="latency=0.25 cannot be met: the least that can is 500 ms of 1 s",
        fix="latency=0.5 or more, a lower floor, or freeze less",
    )
    assert asked[-1][-1] == 100


def test_measuring_takes_turns_and_leaves_out_the_warm_up(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    calls = []
    slow = lambda: (calls.append("slow"), next(ticks), next(ticks))  # noqa: E731
    found = measure_seconds([slow, lambda: calls.append("fast")], torch.device("cpu"), least=3, seconds=0)
    assert found == [[3.0] * 3, [1.0] * 3]
    assert calls == ["slow", "fast"] * 5


def test_a_result_within_the_budget_is_timed_twice(monkeypatch):
    """One lucky window is not enough: what seemed to fit is timed again, and all runs count."""
    lengths = []

    def clock(runs, device, **options):
        found = counting_clock(runs, device, **options)
        if len(runs) > 2:
            lengths.append(len(found[0]))
        return found

    monkeypatch.setattr(latency, "measure_seconds", clock)
    pruned = prune(chain(16, 64, 32, 16), 0.5, torch.randn(4, 16))
    assert len(lengths) >= 2 and pruned.meta["latency"].runs == lengths[-2] + lengths[-1]


def noisy_clock(seed, scale):
    """One second for the original and half of it for any other, give or take."""
    g = torch.Generator().manual_seed(seed)

    def clock(runs, device, *, least=7, seconds=0.4):
        return [
            [mean * (1 + scale * float(torch.randn((), generator=g))) for _ in range(20)] for mean in (1.0, 0.5)[: len(runs)]
        ]

    return clock


@pytest.mark.parametrize("amount, patience, runs", [(0.7, 1e9, 40), (0.5, 1e9, None), (0.3, 1e9, 20), (0.5, 45.0, 40)])
def test_what_is_near_the_budget_is_timed_until_it_can_be_told(amount, patience, runs, monkeypatch):
    """Well within: twice. Near: until the error is small, or patience is over. Far above: once."""
    monkeypatch.setattr(latency, "PATIENCE", patience)
    model, x = linears()
    coupled = lambda: analyse(model, (x,), {}, CouplingOptions())  # noqa: E731
    emit = lambda slicer: rewrite_program(model, coupled(), slicer.kept)  # noqa: E731
    trial = latency.LatencyProbe(model, (x,), {}, emit, noisy_clock(0, 0.1))
    whole = trial.prune(Slicer(torch.ones(len(coupled().unit_of), dtype=torch.bool)))
    [found] = trial.measure([whole], Budget("latency", amount))
    if runs is None:
        assert found.runs > 40 and found.error <= PRECISE
    else:
        assert found.runs == runs and found.error > PRECISE


def test_the_error_of_a_share_is_that_of_medians():
    """Against how far shares of many such measurements are apart."""
    shares, errors = [], []
    for seed in range(400):
        before, after = noisy_clock(seed, 0.1)([None, None], None)
        found = latency.summarise(before, after, torch.device("cpu"))
        shares.append(found.share)
        errors.append(found.error * found.share)
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.15)


def test_what_was_measured_reads_well():
    found = Latency(0.0412, 0.0198, 0.481, 14, 0.03, "cuda:0")
    assert str(found) == "41.2 ms before, 19.8 ms now (48%) on cuda:0: medians of 14 runs in turns, half of them within 3%"


class Blocks(nn.Module):
    """Four residual blocks; the second and the third one add nothing, though their weights are the largest."""

    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(16, 64) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(64, 16) for _ in range(4))
        with torch.no_grad():
            for k in (1, 2):
                self.up[k].weight.mul_(30)
                self.up[k].bias.sub_(1e3)
                self.down[k].bias.zero_()

    def forward(self, x):
        for up, down in zip(self.up, self.down):
            x = x + down(up(x).relu())
        return x


@pytest.mark.parametrize(("how", "gone"), [(True, {1, 2}), ("only", {1, 2})])
def test_residual_branches_go_for_latency(how, gone):
    """Those that add nothing, by their influence; the time is that of the model that was measured."""
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(32, 16)
    small = prune(
        model, 0.55, x, depth=how, data=[x], criterion="magnitude", depth_criterion="influence", ranking="local", verify=True
    )
    found = small.meta["latency"]
    assert found.share <= 0.55 and small.meta["verification"].ok
    assert found.share == pytest.approx(macs(small, x) / macs(model, x))
    out = {k for k in range(4) if f"up.{k}.weight" in small.meta["plan"].removed}
    assert out and out <= gone
    if how == "only":
        assert out == gone and torch.equal(small(x), model(x))
    assert "residual branches" in [name for name, _ in found.table]


def test_a_block_costs_no_time_once_it_is_gone():
    """The table of predicted seconds: each residual branch that goes takes its products with it."""
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(32, 16)
    table = dict(prune(model, 0.55, x, depth="only", criterion="magnitude").meta["latency"].table)["residual branches"]
    whole = table[0][1]
    assert [left for left, _ in table] == [4, 3, 2, 1]
    assert [seconds for _, seconds in table] == pytest.approx([whole * left / 4 for left in (4, 3, 2, 1)], rel=0.06)


# -- in steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [0.5, "half"])
def test_each_step_takes_its_part_of_the_time(amount):
    model = MODELS["vit"]()
    whole = 2 * macs(model) * SECONDS
    amount = f"{whole * 500:.9f}ms" if amount == "half" else amount
    pruner = fxprune.Pruner(model, example_inputs=X, latency=amount, steps=2, verify=False)
    first = pruner.step()
    assert 0.6 < macs(first) / macs(model) <= 0.75
    second = pruner.step()
    assert 0.4 < macs(second) / macs(model) <= 0.5
    assert [step.asked for step in pruner.history] == ["latency=0.75", f"latency={amount!r}"]
    early, late = kept_of(first), kept_of(second)
    assert early and all(set(late[name]) <= set(kept) for name, kept in early.items())


def kept_of(pruned):
    """Which indices of each tensor are left, along its first dimension."""
    plan = fxprune.plan_of(pruned)
    return {name: cuts[0].keep.tolist() for name, cuts in plan.slices.items() if cuts[0].dims == (0,)}


def test_steps_towards_a_latency_that_cannot_be_met():
    model, x = chain(16, 40, 20, 16), torch.randn(4, 16)
    least = fxprune.prune(model, example_inputs=x, params=fxprune.feasible(model, x).params[0])
    now, whole = macs(least, x), macs(model, x)
    refuses(
        lambda: fxprune.Pruner(model, example_inputs=x, latency=0.01, steps=3),
        model,
        what=f"latency=0.01 cannot be met: the least that can is {2 * now * SECONDS * 1e3:.3g} ms"
        f" of {2 * whole * SECONDS * 1e3:.3g} ms",
        fix=f"latency={-(-1000 * now // whole) / 1000} or more, a lower floor, or freeze less",
    )


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_a_latency_that_cannot_be_met():
    model, x = chain(16, 40, 20, 16), torch.randn(4, 16)
    least = fxprune.prune(model, example_inputs=x, params=fxprune.feasible(model, x).params[0])
    now, whole = macs(least, x), macs(model, x)
    refuses(
        lambda: prune(model, 0.01, x),
        model,
        what=f"latency=0.01 cannot be met: the least that can is {2 * now * SECONDS * 1e3:.3g} ms"
        f" of {2 * whole * SECONDS * 1e3:.3g} ms",
        fix=f"latency={-(-1000 * now // whole) / 1000} or more, a lower floor, or freeze less",
    )


@pytest.mark.parametrize("amount", ["20ms", "1.5 s", "20s"])
def test_a_latency_above_the_original(amount):
    model, x = chain(16, 40, 20, 16), torch.randn(4, 16)
    whole = f"{2e3 * macs(model, x) * SECONDS:.3g}"
    refuses(
        lambda: prune(model, amount, x),
        model,
        what=f"latency={amount!r} is above the original, which takes {whole} ms",
        fix=f"latency=0.5 keeps half; an absolute amount is at most '{whole}ms'",
    )


@pytest.mark.parametrize("amount", ["soon", "", "20", "-3ms", "0ms", "1 hour"])
def test_what_is_no_time(amount):
    model = net()
    refuses(
        lambda: prune(model, amount),
        model,
        what=f"latency must be a share up to 1, or a time, not {amount!r}",
        fix="latency=0.5 keeps half of the original's; latency='20ms' is absolute",
    )


def test_latency_and_another_budget():
    model = net()
    refuses(
        lambda: prune(model, 0.5, macs=0.5),
        model,
        what="macs and latency are both given",
        fix="one of ratio, params, macs, memory and latency",
    )


class Pooled(nn.Module):
    """Two hidden layers of one form, the first of which runs once for each of fifty tokens."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.late, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.late(self.down(self.up(x).relu()).mean(1)).relu())


class Alike:
    """Every element is worth the same: by the loss, so that units compete by that for what they cost."""

    normalise = "loss"

    def __call__(self, parameter):
        return torch.ones_like(parameter)


def test_units_go_for_the_time_that_they_take():
    model, x = Pooled().eval(), torch.randn(2, 50, 16)
    small = prune(model, 0.6, x, criterion=Alike(), ranking="global", freeze_outputs=["down"])
    assert small.late.out_features == 32 and small.up.out_features < 20


@pytest.mark.filterwarnings("ignore:latency=1.0 removes nothing")
def test_a_share_is_one_of_the_original_where_it_was_rotated(monkeypatch):
    """A norm without a mean is written in more calls, which are counted here."""
    monkeypatch.setattr(latency, "measure_seconds", clock_of_calls)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)).eval(), torch.randn(2, 8)
    [[whole, *_]] = clock_of_calls([lambda: model(x)], None)
    small = fxprune.prune(model, None, x, latency=1.0, data=[torch.randn(64, 8)], basis="principal")
    assert small.meta["basis"].families and small.meta["latency"].original == whole
