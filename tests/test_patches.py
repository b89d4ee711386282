"""What is switched off in torch and Python while a model is traced is back in its place afterwards."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune


def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones([1], dtype=x.dtype) * math.sqrt(4.0)


@functools.lru_cache
def remembered(size):
    return size


class Net(nn.Module):
    def __init__(self, fails=False):
        super().__init__()
        self.up, self.down, self.fails = nn.Linear(8, 16), nn.Linear(16, 4), fails

    def forward(self, x):
        if self.fails:
            raise ValueError("no")
        return self.down(self.up(x) * math.sqrt(x.shape[-1]) + remembered(x.shape[0]))


def places():
    """Everything that a trace may put something else in the place of."""
    owners = {"torch": torch, "math": math, "F": F, "Module": nn.Module, "Function": torch.autograd.Function, "test": globals()}
    found = {
        f"{owner}.{name}": value
        for owner, held in owners.items()
        for name, value in dict(held if isinstance(held, dict) else vars(held)).items()
    }
    found |= {f"RNN.{name}": value for name, value in vars(nn.RNNBase).items()}
    found["fastpath"] = torch.backends.mha.get_fastpath_enabled()
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_torch_is_as_it_was(fails):
    model, before = Net(fails), places()
    if fails:
        with pytest.raises(fxprune.PruneError, match="no"):
            fxprune.prune(model, example_inputs=torch.randn(2, 8))
    else:
        fxprune.prune(model, example_inputs=torch.randn(2, 8))
    after = places()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_while_a_model_is_traced_every_module_answers_for_its_parameters(wrapped, monkeypatch):
    if wrapped:  # by another library, with a function that closes over torch's own
        plain, asked = nn.Module.__getattr__, []
        monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: (asked.append(name), plain(self, name))[1])

    class Nosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
            self.scale = nn.Parameter(torch.rand(16))

        def forward(self, x):
            # through the method itself, through getattr, and past both
            scale = nn.Module.__getattr__(self, "scale") + getattr(self, "scale") + self._parameters["scale"]
            assert not hasattr(self, "nothing")
            return self.down(self.up(x) * scale)

    model = Nosy()
    small = fxprune.prune(model, example_inputs=torch.randn(2, 8), verify=True)
    assert small.scale.shape == (8,) and small.meta["verification"].ok
    if wrapped:
        assert "scale" in asked


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_compiled_within_a_forward():
    """The compiler finds functions of torch by identity, and others stand for them meanwhile."""

    class Compiles(Net):
        def forward(self, x):
            return self.down(torch.jit.script(shifted)(self.up(x)))

    table = dict(torch.jit._builtins._builtin_table)
    model, x = Compiles(), torch.randn(2, 8)
    pruned = fxprune.prune(model, example_inputs=x)
    assert pruned.up.weight.shape == (8, 8)
    assert fxprune.verify(model, pruned, x).ok
    assert torch.jit._builtins._builtin_table == table
