"""Coupling: propagate labels along the op trace and solve the constraints once."""
