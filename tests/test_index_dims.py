"""Constant indices of several dimensions, or along several: the positions that are left are those that the result keeps."""

import numpy as np
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
    "nested_list": (lambda y: y[:, [[0, 1], [2, 3]]].flatten(1), 4),
    "two_lists": (lambda y: y.unflatten(1, (4, 2))[:, [[0, 1], [2, 3]], [[0], [1]]].flatten(1), 4),
    "negative_list": (lambda y: y[:, [[-1, -2], [0, 1]]].flatten(1), 4),
    "list_of_sizes": (lambda y: y[:, [y.shape[1] - 1, 0]], 2),
    "tuple_in_a_tuple": (lambda y: y[:, (0, 2, 4)], 3),
    "range": (lambda y: y[:, range(0, 8, 2)], 4),
    "array": (lambda y: y[:, np.array([[0, 1], [2, 3]])].flatten(1), 4),
    "empty_list": (lambda y: torch.cat([y[:, []], y[:, :4]], 1), 4),
    "flags_of_two_dims": (lambda y: y.unflatten(1, (2, 4))[:, i([[1, 0, 1, 0], [0, 1, 0, 1]]).bool()], 4),
    "list_of_flags": (lambda y: y.unflatten(1, (2, 4))[:, [[True, False, True, True], [False, True, False, True]]], 5),
    "flags_in_space": (lambda y: (y[:, :, None, None] * torch.ones(3, 3))[:, :, torch.eye(3).bool()].flatten(1), 24),
    "triangle": (lambda y: (y[:, :, None] * y[:, None])[:, torch.triu_indices(8, 8)[0], torch.triu_indices(8, 8)[1]], 36),
}


class Picks(nn.Module):
    def __init__(self, pick, width, made=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.pick, self.a, self.b = pick, nn.Linear(4, made), nn.Linear(width, 2)

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


def written(y, places, value):
    y = y.clone()
    y[:, places] = value(y)
    return y


WRITES = {
    "number": (lambda y: written(y, [[0, 1], [2, 3]], lambda y: 0.0), 8),
    "scaled": (lambda y: written(y, [[0, 1], [2, 3]], lambda y: y[:, [[0, 1], [2, 3]]] * 0.5), 8),
    "others": (lambda y: written(y, [[0, 1], [2, 3]], lambda y: y[:, [[4, 5], [6, 7]]]), 8),
    "range": (lambda y: written(y, range(0, 8, 2), lambda y: y[:, 1::2]), 8),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_by_lists_is_exact(name):
    model, x = Picks(*WRITES[name]).eval(), torch.randn(4, 4)
    small = fxprune.prune(model, 0.5, x)
    assert small.verification.ok and small.meta["capture"] == "symbolic" and small.a.out_features < 8


def test_a_list_of_sizes_follows_them():
    """Along a dimension that loses nothing the list stays one of sizes."""

    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x)[:, [0, x.shape[1] - 1]])

    model = Ends().eval()
    small = fxprune.prune(model, 0.5, torch.randn(2, 5, 4))
    masks, longer = fxprune.plan_of(small).masks(model), torch.randn(3, 9, 4)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.mul_(masks.get(key, torch.ones(())))
    assert small.verification.ok and small.a.out_features == 4
    torch.testing.assert_close(small(longer), model(longer))


def rows(y):
    return y.unflatten(1, (4, 8))


def filled(y):
    z = torch.zeros_like(rows(y))
    z[:, 1, 2:6] = rows(y)[:, 0, :4]
    return z.flatten(1)


ROWS = {  # of what is seen as four rows of eight, parts are taken of rows which may keep other columns than the first one does
    "a_part": (lambda y: torch.cat([rows(y)[:, 0, :4], rows(y)[:, 1, 2:6], rows(y)[:, 2:].flatten(1)], 1), 24),
    "every_second": (lambda y: torch.cat([rows(y)[:, 0, :4], rows(y)[:, 1, ::2], rows(y)[:, 2:].flatten(1)], 1), 24),
    "of_two_rows": (lambda y: rows(y)[:, 1:3, ::2].flatten(1), 8),
    "from_the_end": (lambda y: torch.cat([rows(y)[:, -1, -3:], rows(y)[:, 0]], 1), 11),
    "between_ends": (lambda y: torch.cat([rows(y)[:, 1:3, 2:6].flatten(1), rows(y)[:, 3]], 1), 16),
    "listed": (lambda y: torch.cat([rows(y)[:, 1, [1, 3, 5]], rows(y)[:, 0]], 1), 11),
    "written": (filled, 32),
}


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", ROWS)
def test_columns_are_those_of_the_rows_that_are_taken(name, ratio):
    for seed in range(3):
        model, x = Picks(*ROWS[name], made=32, seed=seed).eval(), torch.randn(2, 4)
        small = fxprune.prune(model, ratio, example_inputs=x, criterion="random")
        assert small.a.out_features < 32
        masks = fxprune.plan_of(small).masks(model)
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                tensor.mul_(masks.get(key, torch.ones(())))
            torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
