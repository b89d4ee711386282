"""A pruned program takes any batch that the original takes, where one path of the original does for all of them."""

import pytest
import torch
from torch import nn

import fxprune
from fxprune import Plan
from fxprune.iterative.masking import prune_zeros
from fxprune.passes.errors import GuardError


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("places", torch.randn(1, 16))

    def forward(self, x):
        return self.b(self.between(self.a(x).relu()))


class Expands(Base):
    """Expands a table for larger batches, as masks of decoders do; picks rows of it, so that one row will not do."""

    def between(self, y):
        places = self.places
        if places.shape[0] != y.shape[0]:
            places = places.expand(y.shape[0], -1)
        y = y + places.index_select(0, torch.arange(y.shape[0]))
        return y * 2 if self.training else y


class Doubles(Base):
    """Computes something else for a batch of one."""

    def between(self, y):
        return y * 2 if y.shape[0] == 1 else y


class Thirds(Base):
    """Doubles unless the batch is one, or a multiple of three."""

    def between(self, y):
        n = y.shape[0]
        if n % 3 == 0:
            return y
        return y * (1 if n == 1 else 2)


def masked(net, small, x):
    """The original with the removed hidden channels zeroed."""
    kept = small.plan.slices["a.weight"][0].keep
    mask = torch.zeros(16).index_fill(0, kept, 1.0)
    return net.b(net.between(net.a(x).relu()) * mask)


def agrees(net, small, *batches):
    for n in batches:
        x = torch.randn(n, 8)
        torch.testing.assert_close(small(x), masked(net, small, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_path_of_larger_batches_does_for_one(batch):
    net = Expands().eval()
    small = fxprune.prune(net, 0.5, example_inputs=torch.randn(batch, 8))
    assert small.verification.ok
    assert not any("refused" in said for said in small.verification.compared)
    assert small.verification.compared[-1] == ("another batch" if batch == 1 else "a batch of one")
    for mode in (False, True):
        net.train(mode), small.train(mode)
        agrees(net, small, 1, 2, 3, 5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plan_makes_the_same_program_again(batch):
    net = Expands().eval()
    example = torch.randn(batch, 8)
    small = fxprune.prune(net, 0.5, example_inputs=example)
    plan = Plan.from_json(small.plan.to_json())
    assert plan == small.plan and plan.waiver.size == 1
    for again in (plan.apply(net), plan.apply(net, example)):
        agrees(net, again, 1, 2, 5)


def test_a_batch_of_one_of_its_own_is_refused():
    net = Doubles().eval()
    small = fxprune.prune(net, 0.5, example_inputs=torch.randn(1, 8))
    agrees(net, small, 1)
    assert small.plan.waiver is None and any("refused" in said for said in small.verification.compared)
    with pytest.raises(GuardError, match="captured where %eq is True"):
        small(torch.randn(2, 8))
    small = fxprune.prune(net, 0.5, example_inputs=torch.randn(4, 8))
    agrees(net, small, 2, 4)
    assert small.plan.waiver is None
    with pytest.raises(GuardError, match="captured where %eq is False"):
        small(torch.randn(1, 8))


def test_a_guard_is_waived_where_it_was_tried_and_nowhere_else():
    net = Thirds().eval()
    small = fxprune.prune(net, 0.5, example_inputs=torch.randn(3, 8))
    agrees(net, small, 1, 3, 6)
    with pytest.raises(GuardError):
        small(torch.randn(2, 8))


class Mixes(Base):
    """Decides by the number of all rows: whether a batch of one is as in the example depends on how many it has."""

    def between(self, y):
        return y * 2 if y.shape[0] * y.shape[1] > 40 else y if y.shape[0] * y.shape[1] > 10 else y * 1


def test_a_guard_that_mixes_the_batch_with_another_dimension_is_not_waived():
    net = Mixes().eval()
    small = fxprune.prune(net, 0.5, example_inputs=torch.randn(2, 8, 8))
    assert small.plan.waiver is None
    for batch, rows in ((1, 8), (1, 60), (6, 8)):
        with pytest.raises(GuardError):
            small(torch.randn(batch, rows, 8))


def test_a_model_of_zeros_takes_any_batch_too():
    net = Expands().eval()
    with torch.no_grad():
        for part in (net.a.weight[3:9], net.a.bias[3:9], net.b.weight[:, 3:9], net.places[:, 3:9]):
            part.zero_()
    small = prune_zeros(net, torch.randn(1, 8))
    assert small.get_submodule("a").out_features == 10
    agrees(net, small, 1, 2, 5)


def test_what_is_not_verified_keeps_its_guards():
    net = Expands().eval()
    small = fxprune.prune(net, 0.5, example_inputs=torch.randn(1, 8), verify=False)
    with pytest.raises(GuardError):
        small(torch.randn(2, 8))


def test_nothing_is_printed_where_a_program_fails_at_a_batch_of_one(capsys):
    class Neighbour(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.first(x)
            return self.last(h + h[1] if x.shape[0] > 1 else h)

    pruned = fxprune.prune(Neighbour().eval(), 0.5, torch.randn(2, 4))
    assert pruned.verification.ok
    assert capsys.readouterr() == ("", "")


def test_inputs_that_a_pruned_model_refuses_are_no_fault_of_the_original():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = self.inner(x).relu()
            return self.outer(x * 2 if x.shape[1] == 5 else x)

    torch.manual_seed(0)
    model, refused = Doubles().eval(), torch.randn(2, 5, 8)
    small = fxprune.prune(model, 0.5, torch.randn(2, 4, 8))
    for ask in (lambda: fxprune.verify(model, small, refused), lambda: fxprune.count(small, refused)):
        with pytest.raises(fxprune.PruneError, match=r"^the pruned program was captured where %eq is False"):
            ask()
