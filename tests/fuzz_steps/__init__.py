"""The vocabulary of random programs: importing the package registers every step."""

from . import attention, calls, channels, layers, mixing, modules
from .writer import OPS, PARTS, RANKS, SCOPE, Op, Step, Value, Writer

__all__ = [
    "OPS",
    "PARTS",
    "RANKS",
    "SCOPE",
    "Op",
    "Step",
    "Value",
    "Writer",
    "attention",
    "calls",
    "channels",
    "layers",
    "mixing",
    "modules",
]
