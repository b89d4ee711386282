"""Capture: run a model once into an FX graph and a trace of its dispatcher calls."""
