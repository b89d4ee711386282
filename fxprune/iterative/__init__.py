"""Pruning in steps, with training in between."""
