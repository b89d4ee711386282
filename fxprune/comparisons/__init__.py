"""Comparisons of a pruned model with what it has to compute."""
