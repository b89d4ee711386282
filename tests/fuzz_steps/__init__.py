"""The vocabulary of random programs: importing the package registers every step."""

from . import attention, channels, layers, mixing, modal
from .writer import OPS, RANKS, SCOPE, Op, Step, Value, Writer

__all__ = ["OPS", "RANKS", "SCOPE", "Op", "Step", "Value", "Writer", "attention", "channels", "layers", "mixing", "modal"]
