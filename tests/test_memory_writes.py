"""Forwards that write to the memory of parameters by other means than torch: the original stays what it was, bit for bit."""

import ctypes

import numpy as np
import pytest
import torch
from torch import nn

import fxprune


class Writes(nn.Module):
    def __init__(self, write) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.write = nn.Linear(4, 12), nn.Linear(12, 3), write
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

    def forward(self, x):
        y = self.first(x).relu() * self.scale
        factor = self.write(self)
        return self.last(y if factor is None else y * factor)


def by_item(model):
    model.scale.data.numpy()[0] = 7.0


def by_array(model):
    np.asarray(model.scale.detach())[...] *= 2


def by_output(model):
    for parameter in model.parameters():
        memory = parameter.detach().numpy()
        np.clip(memory, -0.1, 0.1, out=memory)


def by_exchange(model):
    np.from_dlpack(model.scale.detach())[1] = 3.0


def by_torch_exchange(model):
    torch.from_dlpack(model.scale.detach())[1] = 3.0


def by_pointer(model):
    (ctypes.c_float * 12).from_address(model.scale.data_ptr())[2] = 5.0


def by_view(model):
    memoryview(model.first.weight.detach().numpy())[0, 0] = 1.0


def bits(model):
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


WRITES = [by_item, by_array, by_output, by_exchange, by_torch_exchange, by_pointer, by_view]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_the_original_stays_as_it_was(write):
    model = Writes(write).eval()
    before = bits(model)
    with pytest.raises(fxprune.PruneError, match="writes to the memory of a parameter, and not by an operator of torch"):
        fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 4))
    assert all(map(torch.equal, before, bits(model)))


def counted(model):
    model.count.numpy()[0] += 1


def read(model):
    return float(model.scale.detach().numpy().mean())


def nothing_written(model):
    memory = model.scale.detach().numpy()
    memory[...] = memory.copy()


@pytest.mark.parametrize("use", [counted, read, nothing_written], ids=lambda f: f.__name__)
def test_memory_that_is_read_or_is_a_buffers(use):
    model, x = Writes(use).eval(), torch.randn(2, 4)
    before = bits(model)
    try:
        pruned = fxprune.prune(model, 0.5, example_inputs=x)
    except fxprune.PruneError as error:  # what Python takes of a parameter stays whole, and here that is all
        assert use is not counted and "nothing in the model can be pruned" in str(error)
    else:
        assert pruned.verification.ok
    assert all(map(torch.equal, before, bits(model)))
