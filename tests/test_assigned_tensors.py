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


@pytest.mark.parametrize("state", ["buffer", "attribute"])
def test_what_is_left_for_others_to_read_is_a_line_of_the_program(state):
    """It is never read before it is assigned, as a feature that a loss takes from the model."""

    class Leaves(Averaging):
        def forward(self, h):
            self.mean = h.detach().mean(0)
            return h.relu()

    torch.manual_seed(0)
    model, x = network(Leaves("always", state)).double(), torch.randn(5, 4, dtype=torch.double)
    pruned = fxprune.prune(model, 0.5, x)
    assert pruned.meta["capture"] == "symbolic"
    pruned(x)
    torch.testing.assert_close(pruned.middle.mean, pruned.first(x).mean(0))


class Reversible(nn.Module):
    """Reversible instance norm: one call stores the statistics that another one of the same forward reads."""

    def __init__(self, channels, reads=False):
        super().__init__()
        self.scale, self.reads = nn.Parameter(torch.rand(channels) + 0.5), reads

    def forward(self, x, mode):
        if self.reads and float(x.detach().abs().max()) > 1e30:
            raise ValueError("the input has exploded")
        if mode == "norm":
            self.mean = x.mean(1, keepdim=True)
            self.std = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            return (x - self.mean) / self.std * self.scale
        return x / self.scale * self.std + self.mean


class Forecast(nn.Module):
    def __init__(self, reads=False):
        super().__init__()
        self.up, self.down = nn.Linear(3, 16), nn.Linear(16, 3)
        self.norm = Reversible(16, reads)
        self.mix, self.back = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        x = self.norm(self.up(x), "norm")
        x = x + self.back(self.mix(x.transpose(1, 2)).relu()).transpose(1, 2)
        return self.down(self.norm(x, "denorm"))


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("reads", [False, True])
def test_what_one_call_stores_and_another_one_reads(reads, same_class, tmp_path):
    torch.manual_seed(0)
    model, x = Forecast(reads).double(), torch.randn(2, 12, 3).double()
    pruned = fxprune.prune(model, 0.5, x, same_class=same_class)
    assert not {"mean", "std"} & vars(model.norm).keys()
    assert pruned.mix.weight.shape[0] == 10 and pruned.up.weight.shape[0] == (16 if reads else 8)
    wanted = pruned(x)
    assert fxprune.verify(model, fxprune.plan_of(pruned).apply(model, x), x).ok
    again = fxprune.prune(pruned, 0.5, x, same_class=same_class)
    assert again.mix.weight.shape[0] == 5 and again(x).shape == x.shape
    fxprune.save(pruned, tmp_path / "a.safetensors")  # after calls that have stored something
    ran = Forecast(reads).double()
    ran(x)
    for original, form in ((Forecast(reads).double(), same_class), (ran, same_class), (ran, not same_class)):
        loaded = fxprune.load(tmp_path / "a.safetensors", original, same_class=form)
        torch.testing.assert_close(loaded(x), wanted)


class StoredBefore(nn.Module):
    """A parent puts a tensor into a module before each call, under a name of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(3, 16), nn.Linear(16, 3), Weighted()

    def forward(self, x):
        x = self.a(x)
        self.inner._gate = x.mean(-1, keepdim=True)
        return self.b(self.inner(x))


class Weighted(nn.Module):
    def forward(self, x):
        return x * self._gate


def test_what_a_parent_stores_on_a_module():
    torch.manual_seed(0)
    model, x = StoredBefore().double(), torch.randn(2, 5, 3).double()
    pruned = fxprune.prune(model, 0.5, x)
    assert pruned.meta["verification"].ok and pruned.a.weight.shape[0] == 8
    other = torch.randn(4, 7, 3).double()
    with torch.no_grad():
        x = nn.functional.linear(other, pruned.a.weight, pruned.a.bias)
        torch.testing.assert_close(pruned(other), pruned.b(x * x.mean(-1, keepdim=True)))


class Registers(nn.Module):
    """A table that the first call computes and registers as a buffer of its own: rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rates", torch.linspace(0.1, 1, 8), persistent=False)
        self.register_buffer("table", None, persistent=False)

    def forward(self, h):
        if self.table is None:
            self.register_buffer("table", torch.outer(torch.arange(4.0), self.rates).cos(), persistent=False)
        return h * self.table


def test_a_buffer_that_a_forward_registers_is_no_part_of_what_is_saved(tmp_path):
    original, x = network(Registers()), torch.randn(4, 4)
    result = fxprune.prune(original, 0.5, example_inputs=x)
    wanted = result(x)
    fxprune.save(result, tmp_path / "a.safetensors")
    torch.testing.assert_close(fxprune.load(tmp_path / "a.safetensors", original)(x), wanted)
