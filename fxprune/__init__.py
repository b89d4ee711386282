"""Structured pruning for PyTorch as a compiler pass."""

from fxprune.api import couple, plan_of, prune, verify
from fxprune.coupling import Coupling
from fxprune.errors import PruneError
from fxprune.plan import Plan
from fxprune.report import report
from fxprune.verification import Verification

__all__ = ["Coupling", "Plan", "PruneError", "Verification", "couple", "plan_of", "prune", "report", "verify"]
__version__ = "0.1.0"
