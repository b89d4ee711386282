"""Structured pruning for PyTorch as a compiler pass."""

from fxprune import criteria, layers, masks, regularizers
from fxprune.api import couple, prune, verify
from fxprune.checkpoints.checkpoint import load, save
from fxprune.checkpoints.prune_checkpoint import prune_checkpoint
from fxprune.criteria import Magnitude
from fxprune.criteria.calibrated import Calibration
from fxprune.custom_ops import register_op
from fxprune.errors import PruneError, PruneWarning
from fxprune.iterative.pruner import Pruner
from fxprune.passes.ir.progress import progress
from fxprune.pipeline import Plan
from fxprune.plan import plan_of
from fxprune.repairs import Repair, repair
from fxprune.reports.count import Count, count
from fxprune.reports.coupling import Coupling
from fxprune.reports.feasibility import Feasibility, feasible
from fxprune.reports.report import Report
from fxprune.reports.reporter import report
from fxprune.reports.sensitivity import Sensitivity, sensitivity
from fxprune.reports.sweep import Point, Search, Sweep
from fxprune.sweeps.calibrate import calibrate
from fxprune.sweeps.search import search
from fxprune.sweeps.sweep import sweep
from fxprune.verification import Verification

__all__ = [
    "Calibration",
    "Count",
    "Coupling",
    "Feasibility",
    "Magnitude",
    "Plan",
    "Point",
    "PruneError",
    "PruneWarning",
    "Pruner",
    "Repair",
    "Report",
    "Search",
    "Sensitivity",
    "Sweep",
    "Verification",
    "calibrate",
    "count",
    "couple",
    "criteria",
    "feasible",
    "layers",
    "load",
    "masks",
    "plan_of",
    "progress",
    "prune",
    "prune_checkpoint",
    "register_op",
    "regularizers",
    "repair",
    "report",
    "save",
    "search",
    "sensitivity",
    "sweep",
    "verify",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """What is public, for editors and consoles."""
    return sorted(__all__)
