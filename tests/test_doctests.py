"""Every docstring example of the package runs, module by module.

`pytest --doctest-modules` would import `passes/` under a second name, and its tables would exist twice.
"""

import doctest
import importlib
import pkgutil

import pytest

import fxprune
import fxprune.passes

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def module_names() -> list[str]:
    names = {"fxprune", "fxprune.passes"}
    for package in (fxprune, fxprune.passes):
        names |= {found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")}
    return sorted(name for name in names if not name.endswith("__main__"))


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples failed (printed above)"
