"""What `examples/benchmarks/native.py` says of the calls that two models make."""

import pytest
import torch
from torch import nn

import fxprune


class Net(nn.Module):
    def __init__(self, width: int, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, width), nn.Linear(width, 3), twice

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y + y if self.twice else y)


@pytest.mark.usefixtures("benchmarks")
def test_calls_are_compared_one_for_one():
    """A pruned model makes those of the class built smaller; another width or another op is seen."""
    import native

    x = torch.randn(2, 4)
    made = {"native": Net(4)}
    for form, same_class in ((native.GRAPH, False), (native.CLASS, True)):
        made[form] = fxprune.prune(Net(8), 0.5, x, same_class=same_class)
    with torch.no_grad():
        ways = {"eager": True, "compiled": True}
        assert native.same_calls(made, x) == {native.GRAPH: ways, native.CLASS: ways}
        others = {"native": Net(4), native.GRAPH: Net(5), native.CLASS: Net(4, twice=True)}
        ways = {"eager": False, "compiled": False}
        assert native.same_calls(others, x) == {native.GRAPH: ways, native.CLASS: ways}


@pytest.mark.usefixtures("benchmarks")
def test_compiled_code_is_compared_without_comments(monkeypatch):
    import native

    x, codes = torch.randn(2, 4), iter(["# a\nf(x)\n", " # b\nf(x)\n", "# a\ng(x)\n"])
    monkeypatch.setattr("torch._inductor.utils.run_and_get_code", lambda run: (None, [next(codes)]))
    assert native.same_code(dict.fromkeys(("native", native.GRAPH, native.CLASS), Net(4)), x) == {
        native.GRAPH: True,
        native.CLASS: False,
    }
