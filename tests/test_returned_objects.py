"""What a model returns in objects that are no tuples, lists or dicts: it is an output all the same, and keeps its shape."""

import enum
import functools
import itertools
import types
from collections import ChainMap, UserDict, deque

import pytest
import torch
from torch import nn

import fxprune


class Name(enum.Enum):
    LOGITS = 1


FOLLOWED = {
    "UserDict": (lambda y: UserDict(logits=y), lambda out: out["logits"]),
    "namespace": (lambda y: types.SimpleNamespace(logits=y, name="one"), lambda out: out.logits),
    "namespaces": (lambda y: [types.SimpleNamespace(inner=types.SimpleNamespace(logits=y))], lambda out: out[0].inner.logits),
    "ChainMap": (lambda y: ChainMap({"logits": y}, {}), lambda out: out["logits"]),
    "distribution": (lambda y: torch.distributions.Categorical(logits=y), lambda out: out.logits),
    "sizes as keys": (lambda y: {y.shape[1]: y, (y.shape[1], "logits"): y}, lambda out: out[5] + out[5, "logits"]),
}
UNKNOWN = {
    "members as keys": (lambda y: {Name.LOGITS: y}, lambda out: out[Name.LOGITS]),
    "deque": (lambda y: deque([1, y]), lambda out: out[1]),
    "read only": (lambda y: types.MappingProxyType({"logits": y}), lambda out: out["logits"]),
    "iterator": (lambda y: iter([y]), next),
    "generator": (lambda y: (part for part in [y]), next),
    "chain": (lambda y: itertools.chain([y], [y]), next),
    "set": (lambda y: {y}, lambda out: next(iter(out))),
    "partial": (lambda y: functools.partial(torch.mul, y), lambda out: out(2)),
    "function": (lambda y: lambda: y, lambda out: out()),
}


class Returns(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(6, 12), nn.Linear(12, 4), wrap

    def forward(self, x):
        return self.wrap(self.b(self.a(x).relu()))


@pytest.mark.parametrize("name", [*FOLLOWED, *UNKNOWN])
def test_an_output_keeps_its_shape_whatever_holds_it(name, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # which `torch.compile` turns off
    wrap, unwrap = (FOLLOWED | UNKNOWN)[name]
    torch.manual_seed(0)
    model, x = Returns(wrap).eval(), torch.randn(2, 5, 6)
    small = fxprune.prune(model, 0.5, example_inputs=x, criterion="random")
    assert small.get_submodule("a").out_features == 6 and small.get_submodule("b").out_features == 4
    assert (small.meta["capture"] == "symbolic") == (name in FOLLOWED)
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for path, tensor in model.named_parameters():
            tensor.mul_(masks.get(path, torch.ones(())))
        assert type(small(x)) is type(model(x))
        torch.testing.assert_close(unwrap(small(x)), unwrap(model(x)))
