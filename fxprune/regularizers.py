"""Penalties for sparse training; see `fxprune.iterative.regularizers`."""

from fxprune.iterative.regularizers import BNL1, REGULARIZERS, DepGraph, GroupLasso, Growing, Regularizer, Units

__all__ = ["BNL1", "REGULARIZERS", "DepGraph", "GroupLasso", "Growing", "Regularizer", "Units"]
