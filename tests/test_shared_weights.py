"""A zeroed original that shares the weights of its model returns what one with copies of them returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs.registry import conv, linear, net, randomise
from torch import Tensor, nn

from fxprune.passes.ir.slices import TensorSlice
from fxprune.passes.verification import shared_weights, zeroed_model
from fxprune.passes.verification.zeroed_model import ZeroedOriginal

ROWS, COLUMNS = torch.tensor([0, 2, 3]), torch.tensor([1, 3])


def images() -> Tensor:
    return torch.randn(2, 4, 6, 6, dtype=torch.double)


def tokens() -> Tensor:
    return torch.randn(2, 5, 4, dtype=torch.double)


def indices() -> Tensor:
    return torch.randint(6, (2, 5))


def packed(self: Any, x: Tensor) -> Tensor:
    return torch.cat([F.linear(x, part) * (i + 1) for i, part in enumerate(self.a.weight.chunk(3))], -1)


READERS: dict[str, tuple[Callable[..., Any], nn.Module, Callable[[], Tensor]]] = {
    "linear": (lambda self, x: self.a(x), linear(4, 6), tokens),
    "no bias": (lambda self, x: self.a(x), nn.Linear(4, 6, bias=False), tokens),
    "a bias that is not zeroed": (lambda self, x: F.linear(x, self.a.weight, torch.ones(6).double()), linear(4, 6), tokens),
    "a bias of another kind": (lambda self, x: torch.addmm(x[0, :, :1], x[0], self.a.weight.t()), linear(4, 6), tokens),
    "transposed by hand": (lambda self, x: x @ self.a.weight.T, linear(4, 6), tokens),
    "read the other way": (lambda self, x: (x @ self.a.weight.T) @ self.a.weight, linear(4, 6), tokens),
    "read the other way alone": (lambda self, x: x[..., :3].repeat(1, 1, 2) @ self.a.weight, linear(4, 6), tokens),
    "in parts": (packed, linear(4, 6), tokens),
    "in parts of columns": (lambda self, x: F.linear(x[..., :2], self.a.weight[:, :2]), linear(4, 6), tokens),
    "with other rows": (lambda self, x: F.linear(x, self.a.weight[::2]), linear(4, 6), tokens),
    "as two matrices": (lambda self, x: self.a.weight @ self.a.weight.T + x.sum(), linear(4, 6), tokens),
    "element by element": (lambda self, x: x * self.a.weight.sum(0) + self.a.weight.norm(), linear(4, 6), tokens),
    "as bits": (lambda self, x: self.a.weight.view(torch.int64).bool().sum() + x, linear(4, 6), tokens),
    "convolution": (lambda self, x: self.a(x), conv(4, 6, padding=1), images),
    "convolution with groups": (lambda self, x: self.a(x), conv(8, 6, groups=2), lambda: images().repeat(1, 2, 1, 1)),
    "transposed convolution": (
        lambda self, x: self.a(x),
        nn.ConvTranspose2d(6, 4, 3),
        lambda: images().repeat(1, 2, 1, 1)[:, :6],
    ),
    "convolution as a product": (lambda self, x: F.linear(x.movedim(1, -1), self.a.weight.flatten(1)), conv(4, 6, 1), images),
    "kernel as a product": (lambda self, x: F.linear(x.flatten(1)[:, :36], self.a.weight.flatten(1)), conv(4, 6, 3), images),
    "embedding": (lambda self, x: self.a(x), nn.Embedding(6, 4), indices),
    "tied embedding": (lambda self, x: F.linear(self.a(x).exp(), self.a.weight), nn.Embedding(6, 4), indices),
    "embedding bag": (lambda self, x: self.a(x), nn.EmbeddingBag(6, 4), indices),
    "attention": (lambda self, x: self.a(x, x, x)[0], nn.MultiheadAttention(4, 2, batch_first=True), tokens),
    "recurrent": (lambda self, x: self.a(x)[0], nn.LSTM(4, 6, batch_first=True), tokens),
}


@pytest.mark.parametrize("many", [1, 10**6])
@pytest.mark.parametrize("cut", ["rows", "columns", "rows and columns"])
@pytest.mark.parametrize("reader", READERS)
def test_zeros_are_where_they_are_read(monkeypatch: pytest.MonkeyPatch, reader: str, cut: str, many: int) -> None:
    monkeypatch.setattr(zeroed_model, "LARGE", 1)
    monkeypatch.setattr(shared_weights, "MANY", many)
    forward, layer, inputs = READERS[reader]
    torch.manual_seed(0)
    model = net(forward, a=layer).double().eval()
    randomise(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    slices: dict[str, list[TensorSlice]] = {}
    for name, t in model.named_parameters():
        rows, columns = TensorSlice((0,), ROWS, (3,)), TensorSlice((1,), COLUMNS, (2,))
        both = [rows, columns] if t.dim() > 1 else [rows]
        slices[name] = [s for s in both if (s.dims == (0,) and "rows" in cut) or (s.dims == (1,) and "columns" in cut)]
    x = inputs()
    expected = ZeroedOriginal(model, slices)((x,), {})
    zeroed = ZeroedOriginal(model, slices, needed={})
    assert all(zeroed.tensors[n].data_ptr() == p.data_ptr() for n, p in model.named_parameters() if p.dim() > 1)
    if reader == "as bits":
        with pytest.raises(RuntimeError, match=r"read as torch\.int64"):
            zeroed((x,), {})
    else:
        torch.testing.assert_close(zeroed((x,), {}), expected, rtol=1e-12, atol=1e-12)
        assert not torch.equal(expected, model(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_that_share_memory_or_are_small_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    memory = torch.randn(2, 128, 128)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(3)), nn.Linear(128, 4, bias=False)).eval()
    for i in range(2):
        model[i].weight = nn.Parameter(memory[i])
    cut = {name: [TensorSlice((0,), ROWS, (3,))] for name, _ in model.named_parameters()}
    small = ZeroedOriginal(model, cut, needed={})
    assert not any(small.tensors[n].data_ptr() == p.data_ptr() for n, p in model.named_parameters())
    monkeypatch.setattr(zeroed_model, "LARGE", 128 * 128)
    zeroed = ZeroedOriginal(model, cut, needed={})
    shared = [n for n, p in model.named_parameters() if zeroed.tensors[n].data_ptr() == p.data_ptr()]
    assert shared == ["2.weight", "3.weight"]
    x = torch.randn(2, 128)
    torch.testing.assert_close(zeroed((x,), {}), ZeroedOriginal(model, cut)((x,), {}))
