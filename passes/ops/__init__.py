"""One specification per op: labels, rewrite, masked form, products, multiply-accumulates; one file per family of ops."""

from fxprune.passes.ops import (  # noqa: F401  (each file registers its ops)
    attention,
    concat,
    convolution,
    creation,
    index_maps,
    indexing,
    matmul,
    movement,
    normalization,
    pointwise,
    pooling,
    reduction,
    view,
)
