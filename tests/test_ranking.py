"""Who competes with whom: floors, ties, scopes, and constraints that hold whatever the scores say."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torchvision
from graphs import GRAPHS
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import IMAGES, net, refuses
from torch import nn

import fxprune
from fxprune.selection.allocation import allocate_share, levels_after, merge_steps, order_by_importance
from fxprune.selection.candidates import Group, list_candidates, remove_share


def chain(*widths, scale=()):
    """Linear layers; the weights of layer i are random, times scale[i]."""
    torch.manual_seed(0)
    layers = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
        if scale:
            nn.init.normal_(layers[-2].weight, std=scale[i])
    return nn.Sequential(*layers[:-1])


def kept(model, **options):
    """How many units of each hidden layer are left."""
    x = torch.randn(2, model[0].in_features)
    pruned = fxprune.prune(model, example_inputs=x, **options)
    assert pruned.verification.ok
    return [m.out_features for m in pruned.children() if isinstance(m, nn.Linear)][:-1]


def l1(**options):
    """Magnitude as it is, with nothing made comparable."""
    return fxprune.Magnitude(p=1, normalise="none", **options)


def test_local_takes_the_same_share_of_every_family():
    model = chain(4, 10, 20, 30, 3, scale=(1, 100, 1, 100))
    assert kept(model, ratio=0.5) == [5, 10, 15]


def test_global_takes_the_lowest_scored_units_of_all():
    """Against sorting every unit of the model by hand."""
    model = chain(4, 10, 20, 30, 3, scale=(1, 2, 1, 2))
    linear = [m.weight.detach().abs() for m in model if isinstance(m, nn.Linear)]
    scores = [(a.sum(1) + b.sum(0)).tolist() for a, b in pairwise(linear)]
    lowest = sorted(s for family in scores for s in family)[:30]
    wanted = [sum(s > lowest[-1] for s in family) for family in scores]
    assert kept(model, ratio=0.5, ranking="global", criterion=l1(), floor=0) == wanted
    assert sum(wanted) == 30 and wanted != [5, 10, 15]


def as_loss(weight: torch.Tensor) -> torch.Tensor:
    """A criterion whose scores are changes of the loss."""
    return weight.abs()


as_loss.normalise = "loss"


@pytest.mark.parametrize("budget", [{"ratio": 0.5}, {"params": 0.5}])
def test_a_change_of_the_loss_competes_by_what_is_left_and_for_what_it_costs(budget):
    """Against sorting by hand: what a family has lost, g of t, counts t g / (t - g); a unit costs what all of them do."""
    widths, model = (4, 10, 20, 30, 3), chain(4, 10, 20, 30, 3, scale=(1, 2, 1, 2))
    linear = [m.weight.detach().abs().double() for m in model if isinstance(m, nn.Linear)]
    steps = []
    for i, (a, b) in enumerate(pairwise(linear)):
        each = (a.sum(1) + b.sum(0)).sort().values
        lost = torch.cat([torch.zeros(1).double(), each[:-1].cumsum(0)])
        counts = each.sum() * lost / (each.sum() - lost)
        cost = widths[i] + widths[i + 2] if "params" in budget else 1
        steps += [(float(c), i) for c in counts.diff().cummax(0).values / cost]
    left, taken = [10, 20, 30], []

    def fits(left):
        cost = sum(a * b for a, b in pairwise([4, *left, 3])) if "params" in budget else sum(left)
        return cost <= (sum(w.numel() for w in linear) if "params" in budget else 60) / 2

    for _, i in sorted(steps):
        if not fits(left):
            left[i] -= 1
            taken.append(i)
    for i in reversed(taken):  # what the last steps left of the budget is used
        left[i] += fits([*left[:i], left[i] + 1, *left[i + 1 :]])
    assert kept(model, ranking="global", criterion=as_loss, floor=0, **budget) == left
    assert kept(model, ranking="global", criterion=torch.abs, floor=0, **budget) != left


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_ties_do_not_over_prune(ratio):
    """All scores are equal: a threshold would take all or nothing. A share is a share."""
    model = chain(4, 16, 16, 16, 3)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.constant_(m.weight, 0.5)
    for ranking in ("global", "isomorphic"):
        left = kept(model, ratio=ratio, ranking=ranking, criterion=torch.zeros_like)
        assert sum(left) == 48 - int(ratio * 48)
        assert left == kept(model, ratio=ratio, ranking=ranking, criterion=torch.zeros_like), "deterministic"


def test_no_family_collapses():
    model = chain(4, 40, 20, 10, 3, scale=(1e-6, 1e-6, 1, 100))  # the first two are worth nothing
    options = {"ratio": 0.7, "ranking": "global", "criterion": l1()}
    assert kept(model, **options) == [4, 7, 10], "a tenth of the first family stays, by default"
    assert kept(model, floor=0.25, **options)[0] == 10
    assert kept(model, floor=0, **options)[0] == 1, "one unit stays whatever the floor"


def test_a_floor_under_local_ratios():
    assert kept(chain(4, 10, 20, 3), ratio=0.9, floor=0.5) == [5, 10]


def test_floors_that_leave_no_room():
    model = chain(4, 10, 20, 3)
    with pytest.raises(fxprune.PruneError, match=r"nothing in the model can be pruned by so little(.|\n)*a lower floor"):
        kept(model, ratio=0.5, ranking="global", floor=1.0)


def test_normalising_makes_families_comparable():
    """Weights a thousand times as large are not a thousand times as important."""
    model = chain(4, 16, 16, 16, 3, scale=(1, 1, 1000, 1000))
    wild = kept(model, ratio=0.5, ranking="global", criterion=l1())
    fair = kept(model, ratio=0.5, ranking="global", criterion="magnitude")
    assert wild[0] == 2, "the floor"
    assert all(4 <= n <= 12 for n in fair)


def test_isomorphic_families_lose_the_same_share_together():
    """Two kinds of family: each kind loses its half, whatever the other scores."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Linear(3, 8)
            self.plain = nn.ModuleList([self.block(s) for s in (1.0, 5.0)])
            self.normed = nn.ModuleList([self.block(s, nn.LayerNorm(12)) for s in (1000.0, 5000.0)])
            self.head = nn.Linear(8, 2)

        def block(self, scale, *middle):
            block = nn.Sequential(nn.Linear(8, 12), *middle, nn.ReLU(), nn.Linear(12, 8))
            for m in (block[0], block[-1]):
                nn.init.normal_(m.weight, std=scale)
                nn.init.zeros_(m.bias)
            return block

        def forward(self, x):
            x = self.stem(x)
            for block in [*self.plain, *self.normed]:
                x = x + block(x)
            return self.head(x)

    model, x = Two(), torch.randn(2, 3)
    options = {"example_inputs": x, "criterion": l1(), "freeze": ["stem", "head"], "verify": False}
    pruned = fxprune.prune(model, 0.5, ranking="isomorphic", **options)
    widths = lambda m: [[b.get_submodule("0").out_features for b in kind.children()] for kind in (m.plain, m.normed)]  # noqa: E731
    plain, normed = widths(pruned)
    assert sum(plain) == sum(normed) == 12
    assert plain[0] < plain[1] and normed[0] < normed[1]
    everyone = widths(fxprune.prune(model, 0.5, ranking="global", **options))
    assert sum(everyone[0]) < sum(everyone[1])


def test_scopes_share_a_ratio_and_compete():
    model = chain(4, 20, 20, 20, 20, 3, scale=(1, 1, 100, 1, 1))
    left = kept(model, ratio=0.5, scopes={"early": ["0", "2"]}, criterion=l1())
    assert left[0] + left[1] == 20 and left[0] != 10
    assert left[2:] == [10, 10], "what no scope names is pruned by itself"
    left = kept(model, ratio={"early": 0.25, "*": 0.5}, scopes={"early": ["0", "2"]}, criterion=l1())
    assert left[0] + left[1] == 30 and left[2:] == [10, 10]
    left = kept(model, ratio={"early": 0.25}, scopes={"early": "0"}, criterion=l1())
    assert left == [15, 20, 20, 20]


def test_globs_of_ratio_compete_by_glob():
    model = chain(4, 20, 20, 20, 20, 3, scale=(1, 10, 1, 10, 1))
    left = kept(model, ratio={"[02]": 0.5, "[46]": 0.25}, ranking="global", criterion=l1())
    assert left[0] + left[1] == 20 and left[2] + left[3] == 30


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
def test_counts_are_multiples(ranking, round_to):
    model = chain(4, 32, 64, 24, 3, scale=(1, 2, 3, 1))
    left = kept(model, ratio=0.5, ranking=ranking, round_to=round_to)
    assert all(n % round_to == 0 for n in left) and sum(left) < 120


@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
@pytest.mark.parametrize("name", sorted(GRAPHS)[::11])
def test_every_tensor_stays_a_rectangle(name, ranking):
    model, inputs = GRAPHS[name].make()
    pruned = fxprune.prune(model, 0.5, example_inputs=inputs, ranking=ranking, verify=True)
    assert pruned.verification.ok


@pytest.mark.parametrize("build", ["resnext50_32x4d", "shufflenet_v2_x0_5"])
def test_groups_and_shuffles_compete(build):
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(build, weights=None, num_classes=10).eval(), torch.randn(1, 3, 32, 32)
    pruned = fxprune.prune(model, 0.5, example_inputs=x, ranking="global", verify=False)
    left = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.1 < left < 0.75
    with torch.no_grad():
        assert pruned(x).isfinite().all()


# -- candidates --------------------------------------------------------------------------------------------------------------

sizes = st.lists(st.sampled_from([4, 6, 12, 16]), min_size=1, max_size=4)


def make_groups(widths, seed, levels=1000):
    """Groups of one family each, with scores of which few or many are equal."""
    score = np.random.default_rng(seed).integers(0, levels, sum(widths)).astype(float)
    cuts = np.cumsum([0, *widths])
    return [Group([(i, np.arange(a, b))], 0.5) for i, (a, b) in enumerate(pairwise(cuts))], score


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 99), st.sampled_from([1, 2, 3, 1000]), st.floats(0, 0.9), st.sampled_from([1, 2, 4]))
def test_candidates_are_the_lowest_and_keep_the_floor(widths, seed, levels, floor, round_to):
    made, score = make_groups(widths, seed, levels)
    for group in made:
        units = group.strata[0][1]
        candidates = list_candidates(group, score, [1] * len(widths), round_to, floor)
        assert candidates.importance[1:] == sorted(candidates.importance[1:])
        for level, count in enumerate(candidates.count):
            gone = candidates.removed(level)
            assert len(gone) == len(set(gone.tolist())) == count
            assert count == 0 or (len(units) - count) % round_to == 0
            assert len(units) - count >= max(1, floor * len(units) - 1e-6)
            stays = np.setdiff1d(units, gone)
            assert count == 0 or score[gone].max() <= score[stays].min()


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 99), st.sampled_from([1, 2, 1000]), st.floats(0, 0.89))
def test_a_share_is_never_gone_past_and_reached_where_it_can_be(widths, seed, levels, ratio):
    made, score = make_groups(widths, seed, levels)
    candidates = [list_candidates(g, score, [1] * len(widths), 1, 0.0) for g in made]
    gone = sum(c.count[level] for c, level in zip(candidates, allocate_share(candidates, ratio)))
    reachable = sum(c.count[-1] for c in candidates)
    assert gone == min(int(ratio * sum(widths) + 1e-9), reachable)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 99), st.floats(0, 0.99))
def test_one_family_by_itself_is_local(widths, seed, ratio):
    """A competition of one is what `local` does."""
    made, score = make_groups(widths[:1], seed)
    alone = list_candidates(made[0], score, [1], 1, 0.0)
    assert sorted(alone.removed(allocate_share([alone], ratio)[0])) == sorted(remove_share(made[0], score, [1], 1, ratio))


def test_one_order_for_several_groups_keeps_their_shares_alike():
    made, score = make_groups([4, 16], 0)
    candidates = [list_candidates(g, score, [1, 1], 1, 0.0) for g in made]
    order = merge_steps([[0], [1]], candidates)
    for steps in range(len(order) + 1):
        a, b = (c.count[level] / c.total for c, level in zip(candidates, levels_after(candidates, order[:steps])))
        assert abs(a - b) <= 1 / 4
    assert merge_steps([[0, 1]], candidates) == order_by_importance(candidates)


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_a_ranking_that_does_not_exist():
    model = net()
    refuses(
        lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, ranking="best"),
        model,
        what="ranking must be one of local, global, isomorphic, not 'best'",
        fix="ranking='local'",
    )


@pytest.mark.parametrize("floor", [-0.1, 1.5, "none", True, float("nan")])
def test_a_floor_out_of_range(floor):
    model = net()
    what, fix = f"floor must be a number in [0, 1], not {floor!r}", "floor=0.1 keeps a tenth"
    refuses(lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, floor=floor), model, what=what, fix=fix)


@pytest.mark.parametrize("scopes", [{}, ["stem"], "stem"])
def test_scopes_that_name_nothing(scopes):
    model = net()
    what, fix = f"scopes must name globs, not {scopes!r}", "scopes={'early': ['layer1', 'layer2']}"
    refuses(lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, scopes=scopes), model, what=what, fix=fix)


def test_a_glob_of_a_scope_that_matches_nothing():
    model = net()
    refuses(
        lambda: fxprune.prune(model, 0.5, example_inputs=IMAGES, scopes={"early": ["stem", "bdy"]}),
        model,
        what="the glob 'bdy' in scopes matches no module",
        fix="one of the names of model.named_modules(), such as body",
    )
