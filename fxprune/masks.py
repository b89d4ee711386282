"""Masks instead of removal; see `fxprune.iterative.masking`."""

from fxprune.iterative.masking import hold, masked, prune_zeros, zeroed

__all__ = ["hold", "masked", "prune_zeros", "zeroed"]
