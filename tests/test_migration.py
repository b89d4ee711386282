"""The tables of docs/from-torch-pruning.md: complete, and every row runs."""

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
import torch_pruning
from clocks import counting_clock

from fxprune.selection import latency
from tests.test_readme import code_blocks

PAGE = (Path(__file__).parents[1] / "docs" / "from-torch-pruning.md").read_text()
ROW = re.compile(r"^\| (`[^|]*`) \| (`[^|]*)\|$", re.MULTILINE)
NAMES = re.compile(r"`([^`]+)`")
TABLES = PAGE[PAGE.index("### Pruners") :]
ROWS = [(NAMES.findall(theirs), NAMES.findall(ours)[0]) for theirs, ours in ROW.findall(TABLES)]
LISTED = {name for names, _ in ROWS for name in names}


def classes_and_functions(namespace, prefix=""):
    """Names in a namespace of Torch-Pruning that are its own, and not one of its modules."""
    for name in dir(namespace):
        value = getattr(namespace, name)
        own = str(getattr(value, "__module__", "torch_pruning")).startswith("torch_pruning")
        if not name.startswith("_") and own and not isinstance(value, type(torch)):
            yield prefix + name, value


MODULES = {"": torch_pruning, "importance.": torch_pruning.importance, "utils.benchmark.": torch_pruning.utils.benchmark}
CLASSES = ("BasePruner", "GrowingRegPruner", "DependencyGraph", "Group", "Dependency")
# helpers of the modules that are not for users, and what stands under the name of its base class
LEFT_OUT = {"BasePruningFunc", "importance.Group", "importance.ComputeMatGrad"}
LEFT_OUT |= {"GrowingRegPruner.regularize", "GrowingRegPruner.update_regularizer"}


def public_names():
    """What `dir` shows without modules, the methods of the classes that users call, and the arguments of a pruner."""
    found = {name for prefix, module in MODULES.items() for name, _ in classes_and_functions(module, prefix)}
    utils = classes_and_functions(torch_pruning.utils.utils, "utils.")
    found |= {name for name, value in utils if getattr(value, "__module__", "").endswith(".utils.utils")}
    found |= {"utils.count_ops_and_params", "scheduler.linear_scheduler", "save", "load"}
    for kind in CLASSES:
        found |= {f"{kind}.{name}" for name in vars(getattr(torch_pruning, kind)) if not name.startswith("_")}
    return found | set(inspect.signature(torch_pruning.BasePruner).parameters)


def test_every_public_name_has_a_row():
    layers = {name for name in public_names() if re.fullmatch(r"prune_\w+_channels", name)}  # test_layers.py has these
    assert public_names() - layers - LEFT_OUT - LISTED == set()
    assert LISTED - public_names() == set(), "names that Torch-Pruning does not have"


@pytest.fixture(scope="module")
def names():
    """What the block above the tables defines."""
    found = {}
    for block in code_blocks(PAGE):
        exec(block.code, found)
    return found


@pytest.mark.parametrize("code", [code for _, code in ROWS], ids=[names[0] for names, _ in ROWS])
def test_row_runs(code, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    exec(code, dict(names, pruner=copy.deepcopy(names["pruner"])))


def test_every_row_is_found():
    assert len(ROWS) == sum(line.startswith("| `") for line in TABLES.splitlines())


def test_ignored_layers_is_freeze_outputs(names):
    """The same layer is left alone, so the same number of parameters stays."""
    model, x, fxprune = names["model"], names["x"], names["fxprune"]
    theirs = copy.deepcopy(model)
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    ignored = [theirs.fc, theirs.layer1[0].conv1]
    torch_pruning.BasePruner(theirs, x, importance, pruning_ratio=0.5, ignored_layers=ignored).step()
    ours = fxprune.prune(model, 0.5, x, freeze_outputs=[model.fc, model.layer1[0].conv1])
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
