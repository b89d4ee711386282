"""The one exception type, which lives in the compiler as that raises it too, and the one warning."""

from fxprune.passes.errors import PruneError

__all__ = ["PruneError", "PruneWarning"]


class PruneWarning(UserWarning):
    """Part of a request has no effect, and the rest was carried out."""
