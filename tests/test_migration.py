"""The tables of docs/from-torch-pruning.md and docs/from-others.md: the first is complete, and every row of both runs."""

import copy
import inspect
import re
from pathlib import Path

import claims
import pytest
import torch
import torch_pruning
from clocks import counting_clock

import fxprune
from fxprune.selection import latency
from tests.test_readme import code_blocks

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"from-torch-pruning.md": "### Pruners", "from-others.md": "## NVIDIA ModelOpt"}  # and where the tables begin
TEXTS = {page: (DOCS / page).read_text() for page in PAGES}
TABLES = {page: TEXTS[page][TEXTS[page].index(start) :] for page, start in PAGES.items()}
ROW = re.compile(r"^\| (?!-)([^|]+) \| (`[^|]*)\|$", re.MULTILINE)
NAMES = re.compile(r"`([^`]+)`")
ROWS = [(page, theirs, NAMES.findall(ours)[0]) for page, text in TABLES.items() for theirs, ours in ROW.findall(text)]
LINES = {(page, code): theirs for page, theirs, code in reversed(ROWS)}  # rows of a page that are the same code run once
LISTED = {name for page, theirs, _ in ROWS if page == "from-torch-pruning.md" for name in NAMES.findall(theirs)}


def classes_and_functions(namespace, prefix=""):
    """Names in a namespace of Torch-Pruning that are its own, and not one of its modules."""
    for name in dir(namespace):
        value = getattr(namespace, name)
        own = str(getattr(value, "__module__", "torch_pruning")).startswith("torch_pruning")
        if not name.startswith("_") and own and not isinstance(value, type(torch)):
            yield prefix + name, value


MODULES = {"": torch_pruning, "importance.": torch_pruning.importance, "utils.benchmark.": torch_pruning.utils.benchmark}
CLASSES = ("BasePruner", "BasePruningFunc", "GrowingRegPruner", "DependencyGraph", "Group", "Dependency", "Node")
# helpers of the modules that are not for users, and what stands under the name of its base class
LEFT_OUT = {"importance.Group", "importance.ComputeMatGrad", "function.BasePruningFunc", "BasePruningFunc.TARGET_MODULES"}
LEFT_OUT |= {"GrowingRegPruner.regularize", "GrowingRegPruner.update_regularizer"}


def public_names():
    """What `dir` shows without modules, the methods of the classes that users call, and the arguments of a pruner."""
    found = {name for prefix, module in MODULES.items() for name, _ in classes_and_functions(module, prefix)}
    utils = classes_and_functions(torch_pruning.utils.utils, "utils.")
    found |= {name for name, value in utils if getattr(value, "__module__", "").endswith(".utils.utils")}
    for prefix, module in {"function.": torch_pruning.function, "ops.": torch_pruning.ops}.items():
        found |= {name for name, value in classes_and_functions(module, prefix) if isinstance(value, type)}
    found |= {"ops.module2type", "ops.type2class"}
    found |= {"utils.count_ops_and_params", "scheduler.linear_scheduler", "save", "load"}
    for kind in CLASSES:
        found |= {f"{kind}.{name}" for name in vars(getattr(torch_pruning, kind)) if not name.startswith("_")}
    return found | set(inspect.signature(torch_pruning.BasePruner).parameters)


def test_every_public_name_has_a_row():
    assert public_names() - LEFT_OUT - LISTED == set()
    older = set(NAMES.findall(TEXTS["from-torch-pruning.md"].partition("### Version 0.2.7")[2]))
    assert LISTED - public_names() - older == set(), "names that Torch-Pruning does not have"


def test_every_argument_is_said_to_be_called_otherwise():
    """What `prune` says of an argument of a pruner of theirs, unless it has the same name here."""
    page = TEXTS["from-torch-pruning.md"]
    table = page[page.index("### Arguments of a pruner") : page.index("### Importance")]
    given = {name for theirs, _ in ROW.findall(table) for name in NAMES.findall(theirs)}
    shared = given & set(inspect.signature(fxprune.prune).parameters)
    assert shared == {"model", "example_inputs", "round_to"}
    for name in given - shared:
        with pytest.raises(fxprune.PruneError, match=f"prune has no argument {name!r}") as caught:
            fxprune.prune(torch.nn.Linear(2, 2), **{name: 1})
        assert caught.value.fix.startswith(("here it is", "nothing to pass")), name


@pytest.fixture(scope="module")
def names():
    """What the block above the tables of each page defines."""
    found = {page: {} for page in PAGES}
    for page, text in TEXTS.items():
        for block in code_blocks(text):
            exec(block.code, found[page])
    return found


@pytest.fixture(scope="module")
def folders(names, tmp_path_factory):
    """Where the rows of each page run; there is a file to load."""
    found = {page: tmp_path_factory.mktemp("rows") for page in PAGES}
    for page, folder in found.items():
        given = names[page]
        given["fxprune"].save(given["fxprune"].prune(given["model"], 0.5, given["x"]), folder / "small.safetensors")
    return found


@pytest.mark.parametrize(("page", "code"), LINES, ids=[f"{page}: {theirs}" for (page, _), theirs in LINES.items()])
def test_row_does_what_it_says(page, code, names, folders, monkeypatch):
    monkeypatch.chdir(folders[page])
    monkeypatch.setattr(latency, "measure_seconds", counting_clock)
    claims.check(code, dict(names[page]))


@pytest.mark.parametrize("page", PAGES)
def test_every_row_is_found(page):
    lines = [line for line in TABLES[page].splitlines() if line.startswith("|")]
    heads = sum(line.startswith("|---") for line in lines)
    assert sum(p == page for p, _, _ in ROWS) == len(lines) - 2 * heads > 0


def test_ignored_layers_is_freeze_outputs(names):
    """The same layer is left alone, so the same shapes are left."""
    model, x, fxprune = (names["from-torch-pruning.md"][name] for name in ("model", "x", "fxprune"))
    theirs = copy.deepcopy(model)
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    ignored = [theirs.fc, theirs.layer1[0].conv1]
    torch_pruning.BasePruner(theirs, x, importance, pruning_ratio=0.5, ignored_layers=ignored).step()
    ours = fxprune.prune(model, 0.5, x, freeze_outputs=[model.fc, model.layer1[0].conv1])
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
