"""Regions of autocast in a forward: the pruned model computes in the precisions of the original, call by call."""

import pytest
import torch
from torch import Tensor, nn

import fxprune


class Mixed(nn.Module):
    """Two layers in half the precision, with one between them that is computed in full."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.middle, self.out = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.a(x).relu()
            with torch.autocast(device_type=x.device.type, enabled=False):
                full = self.middle(hidden.float()).relu()
            return self.out(full), full


class Decorated(Mixed):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.middle(self.a(x).relu())
        return self.out(hidden), hidden


class InTraining(Mixed):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.training):
            hidden = self.middle(self.a(x).relu())
            return self.out(hidden), hidden


class AsksForPrecision(Mixed):
    """Decides by the precision that a layer has computed in, in the region and behind it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.a(x).relu()
            hidden = hidden.sin() if hidden.dtype == torch.bfloat16 else hidden.cos()
            hidden = self.middle(hidden)
        hidden = hidden.clamp(torch.finfo(hidden.dtype).min / 2)
        return self.out(hidden.float() if hidden.dtype != torch.float32 else hidden - 1), hidden


class Around(nn.Module):
    """A region around a module that has regions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), Mixed()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(self.first(x))


def state() -> tuple[bool, torch.dtype, int]:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), depth


def zeroed(model: nn.Module, small: nn.Module) -> nn.Module:
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
    return model


@pytest.mark.parametrize("kind", [Mixed, Decorated, InTraining, AsksForPrecision, Around])
def test_precisions_are_those_of_the_original(kind):
    torch.manual_seed(0)
    model, x, before = kind().eval(), torch.randn(5, 4), state()
    small = fxprune.prune(model, 0.5, x, release="*1")
    assert small.get_submodule("inner" if kind is Around else "").middle.in_features == 6
    small = fxprune.prune(model, 0.5, x)
    reference = zeroed(model, small)
    for mode in (False, True):
        wanted, got = reference.train(mode)(x), small.train(mode)(x)
        assert [t.dtype for t in got] == [t.dtype for t in wanted]
        for one, two in zip(wanted, got, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    assert state() == before


def test_the_outer_precision_does_not_reach_into_a_region_without():
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(5, 4)
    small = fxprune.prune(model, 0.5, x)
    with torch.autocast("cpu", dtype=torch.float16):
        assert [t.dtype for t in small(x)] == [t.dtype for t in model(x)] == [torch.bfloat16, torch.float32]


def test_a_region_is_left_where_the_program_raises():
    small, before = fxprune.prune(Decorated().eval(), 0.5, torch.randn(2, 4)), state()
    for model in (small, small.as_class(Decorated)):
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(2, 9))
        assert state() == before


def test_compiled_and_exported():
    torch.manual_seed(0)
    model, x = Decorated().eval(), torch.randn(5, 4)
    small = fxprune.prune(model, 0.5, x)
    compiled, program = torch.compile(small, backend="eager", fullgraph=True), torch.export.export(small, (x,)).module()
    for other in (compiled, program):
        for one, two in zip(small(x), other(x), strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=0)


def test_repair_looks_at_full_precision():
    torch.manual_seed(0)
    model, x, before = Decorated().eval(), torch.randn(64, 4), state()
    small = fxprune.prune(model, 0.5, x)
    repaired = fxprune.repair(model, small, [x])
    assert state() == before
    assert repaired.out.weight.dtype == torch.float32
    assert repaired(x)[0].dtype == torch.bfloat16
