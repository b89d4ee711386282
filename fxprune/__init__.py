"""Structured pruning for PyTorch as a compiler pass."""

import importlib
import importlib.util
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxprune import criteria, layers, masks, regularizers
    from fxprune.api import couple, plan_of, prune, verify
    from fxprune.checkpoints.checkpoint import load, save
    from fxprune.checkpoints.prune_checkpoint import prune_checkpoint
    from fxprune.criteria import Magnitude
    from fxprune.criteria.calibrated import Calibration
    from fxprune.custom_ops import register_op
    from fxprune.entry_points import progress
    from fxprune.errors import PruneError, PruneWarning
    from fxprune.iterative.pruner import Pruner
    from fxprune.pipeline import Plan
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

# where each public name is from; its module is imported when the name is first used
HOMES = {
    "Calibration": "fxprune.criteria.calibrated",
    "Count": "fxprune.reports.count",
    "Coupling": "fxprune.reports.coupling",
    "Feasibility": "fxprune.reports.feasibility",
    "Magnitude": "fxprune.criteria",
    "Plan": "fxprune.pipeline",
    "Point": "fxprune.reports.sweep",
    "PruneError": "fxprune.errors",
    "PruneWarning": "fxprune.errors",
    "Pruner": "fxprune.iterative.pruner",
    "Repair": "fxprune.repairs",
    "Report": "fxprune.reports.report",
    "Search": "fxprune.reports.sweep",
    "Sensitivity": "fxprune.reports.sensitivity",
    "Sweep": "fxprune.reports.sweep",
    "Verification": "fxprune.verification",
    "calibrate": "fxprune.sweeps.calibrate",
    "count": "fxprune.reports.count",
    "couple": "fxprune.api",
    "criteria": "fxprune.criteria",
    "feasible": "fxprune.reports.feasibility",
    "layers": "fxprune.layers",
    "load": "fxprune.checkpoints.checkpoint",
    "masks": "fxprune.masks",
    "plan_of": "fxprune.api",
    "progress": "fxprune.entry_points",
    "prune": "fxprune.api",
    "prune_checkpoint": "fxprune.checkpoints.prune_checkpoint",
    "register_op": "fxprune.custom_ops",
    "regularizers": "fxprune.regularizers",
    "repair": "fxprune.repairs",
    "report": "fxprune.reports.reporter",
    "save": "fxprune.checkpoints.checkpoint",
    "search": "fxprune.sweeps.search",
    "sensitivity": "fxprune.reports.sensitivity",
    "sweep": "fxprune.sweeps.sweep",
    "verify": "fxprune.api",
}
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


def __getattr__(name: str) -> Any:
    """A public name, or a submodule, at its first use."""
    home = HOMES.get(name, f"{__name__}.{name}")
    if name not in HOMES and (name.startswith("_") or importlib.util.find_spec(home) is None):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    state = random.getstate()  # importing rich draws from Python's generator
    module = importlib.import_module(home)
    random.setstate(state)
    found = module if home == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """What is public, for editors and consoles."""
    return sorted(__all__)
