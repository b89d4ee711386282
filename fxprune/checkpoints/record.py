"""What a checkpoint says beside its tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from fxprune.basis.pruning import Rotation
from fxprune.checkpoints.file import WHOLE
from fxprune.module_state import ModuleState
from fxprune.passes.errors import PruneError
from fxprune.pipeline import Plan
from fxprune.plan import PlanData
from fxprune.plan_format import restore_indices, share_indices
from fxprune.records import parse_record, plain_record
from fxprune.repairs import Repair
from fxprune.selection.latency import Latency
from fxprune.verification import Verification

META = {"verification": Verification, "latency": Latency, "repair": Repair, "basis": Rotation}


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says beside its tensors.

    Attributes:
        plan: of the original.
        graph: whether a GraphModule was saved, and not a module of the original's class.
        state: modes and all else of the saved module.
        capture: how the original was captured (`meta["capture"]`).
        frozen_modules: as in `meta`.
        meta: records by name: see `META`.
    """

    plan: Plan
    graph: bool
    state: ModuleState
    capture: str
    frozen_modules: dict[str, str]
    meta: dict[str, Any]

    @classmethod
    def of(cls, pruned: nn.Module, plan: PlanData) -> Record:
        meta: Any = pruned.meta
        return cls(
            plan if isinstance(plan, Plan) else Plan(**vars(plan)),
            isinstance(pruned, fx.GraphModule),
            ModuleState.of(pruned),
            str(meta.get("capture", "")),
            dict(meta.get("frozen_modules", {})),
            {name: meta[name] for name, kind in META.items() if isinstance(meta.get(name), kind)},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "plan": share_indices(self.plan.to_dict()),
            "fingerprint": fingerprint(self.plan),
            "graph": self.graph,
            "state": self.state.to_dict(),
            "capture": self.capture,
            "frozen_modules": self.frozen_modules,
            "meta": {name: plain_record(found) for name, found in self.meta.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], size: int, rotations: Sequence[Tensor] = ()) -> Record:
        """The record of a file of that many bytes, with the rotations of its plan; raises PruneError for anything else."""
        for name, kind in (("graph", bool), ("capture", str), ("frozen_modules", dict), ("meta", dict)):
            if not isinstance(data.get(name), kind):
                raise PruneError(f"this is no checkpoint: {name} is no {kind.__name__}", fix=WHOLE)
        if not all(isinstance(text, str) for pair in data["frozen_modules"].items() for text in pair):
            raise PruneError("this is no checkpoint: frozen_modules are reasons by name", fix=WHOLE)
        if not data["meta"].keys() <= META.keys():
            raise PruneError("this is no checkpoint: its meta holds what fxprune does not save", fix=WHOLE)
        said = restore_indices(data.get("plan"), size + (1 << 20))
        if isinstance(said.get("basis"), Mapping):
            said["basis"] = {**said["basis"], "rotations": list(rotations)}
        plan = Plan.from_dict(said)
        if data.get("fingerprint") != fingerprint(plan):
            raise PruneError("this is no checkpoint: its plan was changed, by its fingerprint", fix=WHOLE)
        meta = {name: parse_record(META[name], found) for name, found in data["meta"].items()}
        state = ModuleState.from_dict(data.get("state"))
        return cls(plan, data["graph"], state, data["capture"], dict(data["frozen_modules"]), meta)


def fingerprint(plan: PlanData) -> str:
    """SHA-256 of the names and shapes of the original's tensors."""
    return hashlib.sha256(json.dumps(sorted(plan.shapes.items())).encode()).hexdigest()
