"""Structured pruning for PyTorch as a compiler pass."""

from fxprune import criteria
from fxprune.api import couple, plan_of, prune, verify
from fxprune.coupling import Coupling
from fxprune.criteria import Magnitude
from fxprune.errors import PruneError
from fxprune.feasibility import Feasibility, feasible
from fxprune.ops import register_op
from fxprune.plan import Plan
from fxprune.pruner import Pruner
from fxprune.repair import Repair, repair
from fxprune.report import report
from fxprune.sensitivity import Sensitivity, sensitivity
from fxprune.verification import Verification

__all__ = [
    "Coupling",
    "Feasibility",
    "Magnitude",
    "Plan",
    "PruneError",
    "Pruner",
    "Repair",
    "Sensitivity",
    "Verification",
    "couple",
    "criteria",
    "feasible",
    "plan_of",
    "prune",
    "register_op",
    "repair",
    "report",
    "sensitivity",
    "verify",
]
__version__ = "0.1.0"
