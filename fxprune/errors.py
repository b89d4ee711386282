"""The one exception type; it lives in the compiler, which raises it too."""

from fxprune.passes.errors import PruneError

__all__ = ["PruneError"]
