"""The order in which units go, and the sizes of what a mask keeps, against their definitions."""

import itertools

import numpy as np
import pytest

from fxprune.passes.ir.slices import rectangle
from fxprune.selection.pools import MANY_UNITS, ranked


@pytest.mark.parametrize("shape", [(0,), (1,), (100,), (7, 50), (3, 1), (MANY_UNITS,), (3, 2 * MANY_UNITS)])
@pytest.mark.parametrize("values", [2, 10, 1 << 40])
def test_equal_values_are_ranked_in_their_own_order(shape, values):
    drawn = np.random.default_rng(0).integers(values, size=shape).astype(float)
    assert (ranked(drawn) == np.argsort(drawn, axis=-1, kind="stable")).all()


def test_nan_and_infinity_are_ranked_as_a_stable_sort_does():
    drawn = np.array([np.nan, 1.0, np.inf, np.nan, -np.inf, np.inf, 0.0, -0.0] * MANY_UNITS)
    assert ranked(drawn).tolist() == np.argsort(drawn, kind="stable").tolist()


def sizes_by_definition(mask):
    """Level by level: how many indices have anything left, for each row that has."""
    sizes = []
    for level in range(mask.ndim):
        alive = mask.reshape(*mask.shape[: level + 1], -1).any(-1)
        counts = {int(c) for c in alive.sum(-1).reshape(-1) if c}
        if len(counts) != 1:
            return None
        sizes += counts
    return tuple(sizes)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2), (2, 2, 2), (1, 4)])
def test_sizes_of_every_mask(shape):
    for bits in itertools.product([False, True], repeat=int(np.prod(shape))):
        mask = np.array(bits).reshape(shape)
        assert rectangle(mask) == sizes_by_definition(mask)
