"""Constant indices of several dimensions, or along several: the positions that are left are those that the result keeps."""

import pytest
import torch
from torch import nn

import fxprune

i = torch.tensor
FORMS = {
    "two_dims": (lambda y: y[:, i([[0, 1], [2, 3]])].flatten(1), 4),
    "overlapping": (lambda y: y[:, i([[0, 1, 2], [1, 2, 3]])].sum(-1), 2),
    "transposed": (lambda y: y[:, torch.arange(8).view(4, 2).t()].flatten(1), 8),
    "after_an_ellipsis": (lambda y: y.unflatten(1, (4, 2))[..., i([0, 2, 3]), i([1, 0, 1])], 3),
    "with_one_between": (lambda y: y.unflatten(1, (4, 2))[i([0, 1, 2])[:, None], :, i([0, 1])[None]].flatten(1), 8),
    "pairs_of_a_product": (lambda y: (y[:, :, None] * y[:, None])[:, i([0, 1, 2, 3]), i([1, 2, 3, 0])], 4),
    "triangle": (lambda y: (y[:, :, None] * y[:, None])[:, torch.triu_indices(8, 8)[0], torch.triu_indices(8, 8)[1]], 36),
}


class Picks(nn.Module):
    def __init__(self, pick, width):
        super().__init__()
        torch.manual_seed(0)
        self.pick, self.a, self.b = pick, nn.Linear(4, 8), nn.Linear(width, 2)

    def forward(self, x):
        return self.b(self.pick(self.a(x)))


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_zeroed_original(name):
    model, x = Picks(*FORMS[name]).double().eval(), torch.randn(4, 4, dtype=torch.float64)
    small = fxprune.prune(model, 0.5, x, verify=False)
    assert small.a.out_features < 8
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.mul_(masks.get(key, torch.ones(())))
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
