"""The sizes of what a mask keeps, against their definition."""

import itertools

import numpy as np
import pytest

from fxprune.passes.ir.slices import rectangle


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
