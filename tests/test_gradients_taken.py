"""Forwards that take gradients: forces of an energy, scores, steps down a loss."""

import pytest
import torch
from refusals import refuses
from torch import Tensor, nn

import fxprune


def energy(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))


class Forces(nn.Module):
    """The energy of each row, and its slope."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = energy(6, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = self.energy(x)
            (slope,) = torch.autograd.grad(found.sum(), x, create_graph=self.training)
        return found, -slope


class Within(nn.Module):
    """What takes gradients is one module among others."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.forces = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 6)), Forces()
        self.leave = nn.Sequential(nn.Linear(7, 24), nn.ReLU(), nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.cat(self.forces(self.enter(x)), -1))


class Jacobian(Forces):
    """Torch asks here whether the result needs gradients, and returns zeros where it does not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(lambda y: self.energy(y).sum(0), x)


class Backward(Forces):
    """Parameters get gradients on the way."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self.energy(x).sum().backward()
        return x.grad


class Adapted(nn.Module):
    """A layer after a step down a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        own = dict(self.net.named_parameters())
        with torch.enable_grad():
            slopes = torch.autograd.grad(self.net(x).square().mean(), list(own.values()), create_graph=self.training)
        stepped = {name: p - 0.1 * slope for (name, p), slope in zip(own.items(), slopes, strict=True)}
        return torch.func.functional_call(self.net, stepped, x)


class Score(nn.Module):
    """An image, and the slope of an energy that convolutions compute of it."""

    def __init__(self, *energy: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.energy = nn.Sequential(*energy)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=self.training)
        return self.head(x + slope)


def around(*between: nn.Module, before: nn.Module | None = None) -> tuple[nn.Module, ...]:
    return before or nn.Conv2d(8, 12, 3, padding=1), *between, nn.Tanh(), nn.Conv2d(12, 1, 3, padding=1)


SCORES = {
    "plain": around,
    "groups": lambda: around(before=nn.Conv2d(8, 12, 3, groups=4)),
    "each channel": lambda: around(nn.Tanh(), nn.Conv2d(12, 12, 3, groups=12)),
    "transposed": lambda: around(before=nn.ConvTranspose2d(8, 12, 2, stride=2)),
    "batch norm": lambda: around(nn.BatchNorm2d(12)),
    "instance norm": lambda: around(nn.InstanceNorm2d(12, affine=True)),
    "largest": lambda: around(nn.MaxPool2d(2)),
    "resized": lambda: around(nn.Upsample(scale_factor=2, mode="bilinear")),
    "softmax": lambda: around(nn.Softmax(1)),
}


@pytest.mark.parametrize("energy", SCORES)
def test_gradients_of_convolutions(energy):
    torch.manual_seed(0)
    model, x = Score(*SCORES[energy]()).double(), torch.rand(2, 3, 8, 8).double()
    for name, buffer in model.named_buffers():
        buffer.uniform_(0.5, 2) if "running" in name else None
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    found = fxprune.verify(model, pruned, x)
    assert found.ok
    assert found.masked is not None
    assert (found.zeroed is not None and found.zeroed <= found.tolerance) or energy == "softmax"
    assert pruned.energy[0].weight.numel() < 0.5 * model.energy[0].weight.numel()


@pytest.mark.parametrize("kind", [Forces, Within, Jacobian, Backward, Adapted])
def test_gradients_are_taken_in_what_is_pruned(kind):
    model, x = kind().double(), torch.rand(4, 5 if kind is Within else 6).double()
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    found = fxprune.verify(model, pruned, x)
    assert found.ok
    assert found.masked is not None
    assert found.zeroed is not None
    assert sum(p.numel() for p in pruned.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert all(p.grad is None for p in (*model.parameters(), *pruned.parameters()))


def test_gradients_stay_while_a_forward_adds_to_them():
    model, x = Backward(), torch.rand(4, 6)
    model(x)
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert fxprune.verify(model, pruned, x).ok
    for p, (held, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is held
        assert torch.equal(held, value)


def test_parts_that_take_gradients_train():
    torch.manual_seed(0)
    model, x = Within().double(), torch.rand(4, 5).double()
    pruned = fxprune.prune(model, 0.5, example_inputs=x).train()
    with torch.no_grad():
        for name, mask in fxprune.plan_of(pruned).masks(model).items():
            model.get_parameter(name).mul_(mask)
    model.train()(x).sum().backward()
    pruned(x).sum().backward()
    for name, p in pruned.named_parameters():
        wanted = model.get_parameter(name).grad
        if wanted is None:  # before what is detached
            assert p.grad is None
            continue
        kept = fxprune.plan_of(pruned).masks(model)[name].expand_as(wanted) if p.shape != wanted.shape else slice(None)
        assert torch.allclose(p.grad.flatten(), wanted[kept].flatten(), rtol=1e-9)


def test_gradients_that_the_caller_has_to_turn_on():
    class Careless(Forces):
        def forward(self, x):
            x.requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x)[0]

    model, x = Careless(), torch.rand(4, 6)
    refuses(
        lambda: fxprune.prune(model, 0.5, example_inputs=x),
        model,
        what="the model's forward needs gradients, which are off while it is captured: RuntimeError: element 0 of tensors does"
        " not require grad and does not have a grad_fn",
        where="Careless",
        fix="with torch.enable_grad(): in the forward, around what takes gradients",
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch calls when it is asked first
def test_slopes_in_forward_mode():
    class Directional(Forces):
        def forward(self, x):
            return torch.func.jvp(self.energy, (x,), (torch.ones_like(x),))[1]

    torch.manual_seed(0)
    model, x = Directional().double(), torch.rand(4, 6).double()
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.energy[0].out_features == 8
    with torch.no_grad():
        for name, mask in fxprune.plan_of(pruned).masks(model).items():
            model.get_parameter(name).mul_(mask)
        assert torch.allclose(pruned(x), model(x), rtol=1e-9)


class Watched(nn.Module):
    """Does something else, or more, where what it is given has gradients."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.ask, self.seen = ask, []

    def forward(self, y):
        if self.ask(y):
            y.register_hook(lambda gradient: self.seen.append(gradient.shape))
        return y


@pytest.mark.parametrize("ask", [lambda y: y.requires_grad, lambda y: y.grad_fn is not None, lambda y: not y.is_leaf])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_done_where_there_are_gradients_is_done(ask, inside):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Watched(ask), nn.ReLU(), nn.Linear(8, 2))
    if not inside:  # the model itself asks
        watched, model.forward = model[1], lambda x: model[3](watched.forward(model[0](x)).relu())
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.rand(3, 4))
    for training in (True, False):
        pruned.train(training)(torch.rand(5, 4)).sum().backward()
    assert pruned[1].seen == [(5, 4)] * 2 and "gradients" in pruned.meta["capture"]


@pytest.mark.parametrize("part", ["", "0", "1"])
def test_hooks_of_modules_for_the_backward_pass_make_them_no_single_node(part):
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2)), []
    model.get_submodule(part).register_full_backward_hook(lambda module, given, found: seen.append(found[0].shape))
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.rand(3, 4))
    assert pruned.meta["capture"] == "symbolic"
    pruned(torch.rand(5, 4, requires_grad=True)).sum().backward()
    assert seen == [(5, 2 if not part else 4)]
