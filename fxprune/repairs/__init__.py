"""Repair: least squares on a little data without labels, instead of training."""

from fxprune.repairs.repair import Repair, repair

__all__ = ["Repair", "repair"]
