"""The folders are the architecture: imports between them go one way, in no circle, and nothing in them grows too large.

Imports in functions and those for type checkers alone count like any others.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parent.parent
STAGES = ["errors", "ir", "ops", "capture", "coupling", "rewrite", "verification"]  # each imports those before it
LARGEST = {"file": 350, "class": 300, "function": 80}  # lines; a function's docstring is not counted
MOST_FILES = 20  # in one folder
SLOW_TO_IMPORT = ("scipy", "networkx", "jinja2", "torch.utils.flop_counter", "torch._dynamo", "transformers", "torchvision")
INTERPRETER = [("sys", "_getframe"), ("dis", None), (None, "__code__")]  # which another release of CPython may change


@cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package by name; `passes/` is installed as `fxprune.passes`."""
    found = {}
    for top, package in (("fxprune", "fxprune"), ("passes", "fxprune.passes")):
        for path in sorted((ROOT / top).rglob("*.py")):
            inside = path.relative_to(ROOT / top)
            if top == "fxprune" and inside.parts[0] == "passes":
                continue  # a link to the other folder, in a checkout that is worked on
            parts = [package, *inside.with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path, ast.parse(path.read_text())
    return found


def imported(name: str, path: Path, tree: ast.Module) -> set[str]:
    """The modules of the package that a module imports anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(above + ([node.module] if node.module else []))
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in sources() else base for alias in node.names)
    return {other for other in found if other in sources() and other != name}


@cache
def imports() -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(sources())
    graph.add_edges_from((name, other) for name, (path, tree) in sources().items() for other in imported(name, path, tree))
    return graph


def test_imports_are_found() -> None:
    """The tests below would hold of a graph without edges."""
    assert imports().has_edge("fxprune.passes.ir.slices", "fxprune.passes.errors")
    assert imports().number_of_edges() > len(sources())


def test_what_takes_long_to_import_is_imported_where_it_is_used() -> None:
    """`import fxprune` is paid by every process, and few of them need these; imports for type checkers alone cost nothing."""
    eager = []
    for name, (_, tree) in sources().items():
        for node in tree.body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            eager += [(name, said) for said in found if said.startswith(SLOW_TO_IMPORT)]
    assert not eager


def test_no_imports_go_in_a_circle() -> None:
    circles = [sorted(circle) for circle in nx.strongly_connected_components(imports()) if len(circle) > 1]
    assert not circles


def test_stages_import_those_before_them() -> None:
    def stage(name: str) -> int:
        return STAGES.index(name.split(".")[2]) if name.startswith("fxprune.passes.") else -1

    backwards = [(a, b) for a, b in imports().edges if stage(a) >= 0 and stage(b) > stage(a)]
    assert not backwards
    assert {name.split(".")[2] for name in sources() if name.startswith("fxprune.passes.")} == set(STAGES)


def test_passes_import_nothing_of_fxprune() -> None:
    inside = [(a, b) for a, b in imports().edges if a.startswith("fxprune.passes")]
    assert not [(a, b) for a, b in inside if not b.startswith("fxprune.passes")]


def test_folders_import_one_way() -> None:
    """No two folders of fxprune/ import from one another; its files at the top are folders of their own here."""
    folders = nx.DiGraph()
    for a, b in imports().edges:
        one, other = (".".join(name.split(".")[:2]) for name in (a, b))
        if one != other and "fxprune" not in (one, other):
            folders.add_edge(one, other)
    assert not [sorted(circle) for circle in nx.strongly_connected_components(folders) if len(circle) > 1]


def sizes(path: Path, tree: ast.Module) -> list[tuple[str, str, int]]:
    """The kind, the name and the lines of everything in a file that has a limit."""
    found = [("file", "", len(path.read_text().splitlines()))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found.append(("class", node.name, node.end_lineno - node.lineno + 1))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            of_doc = doc.end_lineno - doc.lineno + 1 if doc is not None else 0
            found.append(("function", node.name, node.end_lineno - node.lineno + 1 - of_doc))
    return found


def test_nothing_is_too_large() -> None:
    over = [
        f"{path.relative_to(ROOT)}: {kind} {name} has {lines} lines"
        for path, tree in sources().values()
        for kind, name, lines in sizes(path, tree)
        if lines > LARGEST[kind]
    ]
    assert not over
    folders = {path.parent for path, _ in sources().values()}
    assert not [str(f.relative_to(ROOT)) for f in folders if len(list(f.glob("*.py"))) > MOST_FILES]


@pytest.mark.parametrize(("module", "attribute"), INTERPRETER)
def test_nothing_looks_into_the_interpreter(module: str | None, attribute: str | None) -> None:
    found = []
    for path, tree in sources().values():
        for node in ast.walk(tree):
            named = isinstance(node, ast.Attribute) and node.attr == attribute
            taken = (
                isinstance(node, ast.Import | ast.ImportFrom)
                and module == "dis"
                and "dis"
                in (
                    getattr(node, "module", None),
                    *(alias.name for alias in node.names),
                )
            )
            if named or taken:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


def test_every_package_is_installed():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = [path.parent.relative_to(ROOT) for top in ("fxprune", "passes") for path in (ROOT / top).rglob("__init__.py")]
    names = [".".join(folder.parts) for folder in folders if "passes" not in folder.parts[1:]]
    assert declared == {f"fxprune.{name}" if name.startswith("passes") else name for name in names}


def test_what_is_installed_says_that_it_is_typed():
    """By the marker of PEP 561, which setuptools takes along where pyproject.toml says so."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["fxprune"] and (ROOT / "fxprune" / "py.typed").exists()
