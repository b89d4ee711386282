"""Regions with and without gradients in a forward: every parameter gets the gradient that it gets in the masked original."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Gated(nn.Module):
    """Two layers, one of which scales the channels of the other, and a layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 3)

    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).relu() * self.gate(x))


class Without(Gated):
    def gate(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().gate(x)


class Decorated(Gated):
    @torch.no_grad()
    def gate(self, x: Tensor) -> Tensor:
        return super().gate(x)


class ForInference(Gated):
    """What is scaled is without gradients, and nothing that needs them reads it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            hidden = self.a(x).relu() * self.gate(x)
        return self.out(hidden.clone()) if not torch.is_grad_enabled() else self.out(hidden.detach().clone())


class Within(Gated):
    def gate(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            with torch.enable_grad():
                found = self.b(x)
            scale = torch.sigmoid(found)
        return scale * found


class ByMode(Gated):
    def gate(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return super().gate(x)


class ByFunction(Gated):
    def gate(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        found = super().gate(x)
        torch.set_grad_enabled(before)
        return found


class AroundParts(nn.Module):
    """A region around calls of modules, of which one has another region in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), Within(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + self.inner(self.first(x)).sum(-1, keepdim=True)
        return self.last(self.inner(x))


class Fails(Gated):
    """Catches inside of a region, and around one, what fails there."""

    def gate(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            try:
                found = self.b(x[:, :3])
            except RuntimeError:
                found = self.b(x)
        try:
            with torch.no_grad():
                found = found + self.b(x[:, :2])
        except RuntimeError:
            found = found * 2
        return found.sigmoid()


class Updated(Gated):
    """Writes to a parameter in a region, which it may only do there."""

    def gate(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.mul_(0.5)
        return super().gate(x)


KINDS = (Gated, Without, Decorated, Within, ByMode, ByFunction, AroundParts, Fails, Updated)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pruned_and_masked(kind: type[nn.Module], *, same_class: bool = False) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A result, the original with its removed parameters at zero, and by name which elements stay."""
    torch.manual_seed(0)
    model = kind().double()
    pruned = fxprune.prune(model, ratio=0.5, example_inputs=X, same_class=same_class)
    stays: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        stays[name] = torch.ones_like(tensor, dtype=torch.bool)
        for cut in fxprune.plan_of(pruned).slices.get(name, ()):
            (dim,) = cut.dims
            gone = [i for i in range(tensor.shape[dim]) if i not in cut.keep]
            stays[name].index_fill_(dim, torch.tensor(gone), False)
        tensor.data.mul_(stays[name])
    assert any(not kept.all() for kept in stays.values())
    return pruned, model, stays


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    out = model(X)
    if out.requires_grad:
        out.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check(pruned: nn.Module, masked: nn.Module, stays: dict[str, Tensor]) -> None:
    for mode in (True, False):
        for model in (pruned, masked):
            model.zero_grad()
            model.train(mode)
        found, wanted = gradients(pruned), gradients(masked)
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            have = found[name]
            assert (have is None) == (want is None), (name, mode)
            if have is not None and want is not None:
                torch.testing.assert_close(have, want[stays[name]].view(have.shape))


@pytest.mark.parametrize(("kind", "same_class"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in KINDS[:-1])])
def test_gradients_are_those_of_the_masked_original(kind: type[nn.Module], same_class: bool) -> None:
    pruned, masked, stays = pruned_and_masked(kind, same_class=same_class)
    assert same_class or pruned.meta["capture"] == "symbolic"
    check(pruned, masked, stays)
    if not same_class:
        masked.zero_grad()
        pruned.zero_grad()
        pruned.train()
        assert gradients(pruned.flat()).keys() == gradients(masked.train()).keys()


def saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: nn.Module = torch.load(stream, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("kind", [Within, ByMode, AroundParts])
def test_copies_keep_regions(kind: type[nn.Module], copied: Callable[[nn.Module], nn.Module]) -> None:
    pruned, masked, stays = pruned_and_masked(kind)
    check(copied(pruned), masked, stays)


@pytest.mark.parametrize("kind", KINDS)
def test_a_region_ends_as_it_began(kind: type[nn.Module]) -> None:
    """Whoever runs the result without gradients gets none, and after an error they are on or off as before."""
    pruned = pruned_and_masked(kind)[0]
    for on in (True, False):
        with torch.set_grad_enabled(on):
            assert pruned(X).requires_grad == on
            assert torch.is_grad_enabled() == on
            with pytest.raises(RuntimeError):
                pruned(X[:, :3])
            assert torch.is_grad_enabled() == on


def test_what_is_for_inference_gets_no_gradients() -> None:
    check(*pruned_and_masked(ForInference))


def test_a_result_with_regions_compiles_and_exports() -> None:
    pruned, masked, stays = pruned_and_masked(Within)
    wanted = pruned(X)
    exported = torch.export.export(pruned, (X,)).module()
    torch.testing.assert_close(exported(X), wanted)
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), wanted)
    masked.zero_grad()
    have, want = gradients(compiled)["_orig_mod.b.weight"], gradients(masked)["b.weight"]
    assert have is not None and want is not None
    torch.testing.assert_close(have, want[stays["b.weight"]].view(have.shape))
