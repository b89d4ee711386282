"""Values that the stages hand on: labels, constraints, the op trace, the captured program, slices."""
