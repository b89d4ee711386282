"""Many pruned models of one: a sweep over budgets and methods, and a search that improves one point."""
