"""Tensors of modules that a forward assigns anew: `self.mean = 0.9 * self.mean + ...`."""

import pytest
import torch
from torch import nn

import fxprune


class Averaging(nn.Module):
    """Subtracts a running mean that it assigns anew; the mean it has read is needed for the backward."""

    def __init__(self, when, state="buffer"):
        super().__init__()
        self.when, self.width = when, 8
        if state == "buffer":
            self.register_buffer("mean", torch.full((8,), 0.5))
        else:
            self.mean = torch.full((8,), 0.5, dtype=torch.double)

    def forward(self, h):
        out = h.view(-1, self.width) * self.mean
        if self.when == "always" or self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return out


class Counting(Averaging):
    """Writes to its mean in place in evaluation, and assigns it anew in training."""

    def forward(self, h):
        if self.training:
            self.mean = self.mean + 0.1 * h.detach().mean(0)
        else:
            self.mean.mul_(0.5)
        return h.view(-1, self.width) + self.mean


class Recurrent(Averaging):
    """Its state is carried, with its gradient, from one call in a forward to the next one."""

    def forward(self, h):
        self.mean = torch.tanh(self.mean + h.mean(0))
        return h.view(-1, self.width) * self.mean


def network(middle, calls=1):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 8), middle, nn.Linear(8, 2)

        def forward(self, x):
            h = self.first(x)
            for _ in range(calls):
                h = self.middle(h)
            return self.last(h)

    return Network().eval()


def trained(model, batches):
    """Outputs and gradients of a few steps in both modes."""
    seen = []
    for i, x in enumerate(batches):
        model.train(i % 2 == 0)
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        seen += [out.detach(), *(p.grad.clone() for _, p in sorted(model.named_parameters()))]
        with torch.no_grad():
            model.middle.mean = model.middle.mean.detach()  # as one does between steps with a state that carries gradients
    return [*seen, model.middle.mean]


@pytest.mark.parametrize(
    ("middle", "calls"),
    [
        (lambda: Averaging("training"), 1),
        (lambda: Averaging("always"), 1),
        (lambda: Averaging("always", "attribute"), 1),
        (lambda: Averaging("always"), 2),
        (lambda: Counting("training"), 1),
        (lambda: Recurrent("always"), 2),
    ],
    ids=["training", "always", "attribute", "twice", "in place too", "recurrent"],
)
def test_is_as_the_models_own_forward_leaves_it(middle, calls):
    torch.manual_seed(0)
    model = network(middle(), calls).double()
    x = torch.randn(5, 4, dtype=torch.double)
    before = model.middle.mean
    pruned = fxprune.prune(model, 0.5, x)
    own = fxprune.prune(model, 0.5, x, same_class=True)  # with the forward of its class
    assert "forward" not in vars(own.middle)
    assert calls == 2 or "forward" in vars(pruned.middle)  # where it is called twice, its lines stay in the program around
    assert model.middle.mean is before
    assert pruned.middle.mean.shape == (4,)
    batches = torch.randn(4, 6, 4, dtype=torch.double).unbind()
    for a, b in zip(trained(pruned, batches), trained(own, batches), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(own.middle.mean, before[:4])


def test_of_another_shape_is_not_kept():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("seen", torch.zeros(0, 4))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x.detach()])
            return self.last(self.first(x).relu())

    x = torch.randn(3, 4)
    pruned = fxprune.prune(Growing().eval(), 0.5, x)
    pruned(x)
    assert pruned.seen.shape == (0, 4)


def test_of_a_size_that_varies_is_kept_where_it_fits():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("seen", torch.zeros(3, 4))

        def forward(self, x):
            self.seen = x + 0
            return self.last(self.first(x).relu())

    x = torch.randn(3, 4)
    pruned = fxprune.prune(Last().eval(), 0.5, x)
    pruned(x)
    assert torch.equal(pruned.seen, x)
    pruned(torch.randn(7, 4))
    assert torch.equal(pruned.seen, x)
