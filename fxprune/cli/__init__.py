"""The command line: `fxprune` and `python -m fxprune`."""
