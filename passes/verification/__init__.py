"""Verification: the original with its removed elements masked, as the reference for the result."""
