"""Select the units to remove, from scores, a ratio or a budget."""
