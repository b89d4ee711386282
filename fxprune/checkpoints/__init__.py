"""Saving pruned models and loading them again."""
