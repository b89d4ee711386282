"""The folder of a sweep: the request, and for each point that is done a small file and its plan, each written all at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxprune.checkpoints.file import digest
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_tensors
from fxprune.pipeline import Plan
from fxprune.reports.files import as_path, replacing, unwritable
from fxprune.reports.sweep import ALONE, Point

FORMAT = "fxprune.sweep/1"
REQUEST = "request.json"
FIELDS = {f.name for f in dataclasses.fields(Point)} - set(ALONE)


class SweepFolder:
    """Where the points of a sweep are kept, so that it can be stopped and continued.

    Arguments:
        path: of the folder; it is made with the first point, if it is not there.
        request: all that the points depend on, but for data and `evaluate`.

    Raises: PruneError where it holds another sweep, or something else, or cannot be written.
    """

    def __init__(self, path: Any, request: Mapping[str, Any]) -> None:
        self.path = as_path(path)
        self.request = json.loads(json.dumps({"format": FORMAT, **request}))
        try:
            there = [p.name for p in self.path.iterdir()] if self.path.exists() else []
            there = [name for name in there if not name.startswith(".") and name != "__pycache__"]
        except OSError as error:
            raise unwritable(self.path, error) from error
        if REQUEST in there:
            if said := difference(self.read(REQUEST), self.request):
                raise PruneError(f"{self.path} holds another sweep: {said}", fix="another folder, or remove this one")
        elif there:
            raise PruneError(f"{self.path} holds no sweep, but {sorted(there)[0]}", fix="a new or empty folder")

    def read(self, name: str) -> Any:
        """What a file holds; None where it is none of JSON's."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def write(self, name: str, data: Any) -> None:
        with replacing(self.path / name) as unfinished:
            unfinished.write_text(json.dumps(data, indent=1, allow_nan=False), encoding="utf-8")

    def save(self, point: Point) -> None:
        """Keep a point: the request and the plan first, so that a point which is there has both."""
        if not (self.path / REQUEST).exists():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(self.path, error) from error
            self.write(REQUEST, self.request)
        if point.plan is not None:
            self.write(plan_name(point.number), point.plan.to_dict())
        self.write(point_name(point.number), point.to_dict())

    def load(self, number: int) -> Point | None:
        """A point that was evaluated before; None where it is to be done (again)."""
        data = self.read(point_name(number))
        if not isinstance(data, dict) or data.keys() != FIELDS or data["number"] != number or data["failed"]:
            return None
        if number == 0:
            return Point(**data)
        try:
            return Point(**data, plan=Plan.from_dict(self.read(plan_name(number))))
        except PruneError:
            return None


def point_name(number: int) -> str:
    return f"{number:04}.json"


def plan_name(number: int) -> str:
    return f"{number:04}.plan.json"


def difference(there: Any, here: Mapping[str, Any]) -> str:
    """What differs between the request of a folder and this one, in a sentence; empty where nothing does."""
    if not isinstance(there, dict):
        return f"its {REQUEST} cannot be read"
    for name in [*here, *(n for n in there if n not in here)]:
        a, b = there.get(name), here.get(name)
        if a == b:
            continue
        if name == "points" and isinstance(a, list) and isinstance(b, list):
            return differing_points(a, b)
        if name == "weights":
            return "the values of the model differ"
        return f"{name} is {short_text(a)} there and {short_text(b)} here"
    return ""


def differing_points(there: list[Any], here: list[Any]) -> str:
    if len(there) != len(here):
        return f"it has {len(there)} points, and here {len(here)} are asked for"
    number, (a, b) = next((i, pair) for i, pair in enumerate(zip(there, here, strict=True), 1) if pair[0] != pair[1])
    if not isinstance(a, dict):
        return f"its {REQUEST} cannot be read"
    name = next(n for n in (*b, *a) if a.get(n) != b.get(n))
    return f"of point {number} {name} is {short_text(a.get(name))} there and {short_text(b.get(name))} here"


def short_text(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def weights_of(model: nn.Module) -> str:
    """SHA-256 of the values of a model."""
    found = hashlib.sha256()
    for name, tensor in named_tensors(model):
        found.update(f"{name} {tensor.dtype} {digest(tensor.detach().cpu().contiguous())}\n".encode())
    return found.hexdigest()
