"""Tell what a number counts by the layers that its class makes with it.

`self.head = nn.Linear(self.num_features, classes)` in a method says that `num_features` is what the layer calls `in_features`,
which the layer's own attribute says of the pruned model, too. An expression that a method assigns to the attribute, such as
`widths[-1]`, stands for it there.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxprune.passes.ir.module_tree import walk
from fxprune.same_class.sizes import is_whole

Use = tuple[str, str, Any]  # a member, the kind of layer that it is or holds, and the place or name of an argument


def sizes_of_layers(module: nn.Module, counterpart: nn.Module, name: str) -> set[int]:
    """What the layers of a module that its class makes with a number say that the number is now.

    Arguments:
        module: of the original, which has the number as an attribute.
        counterpart: the same module of the pruned model.
    """
    found = set()
    kind: Any = type(module)
    for member, layer_kind, key in uses_of(kind).get(name, ()):
        held, now = getattr(module, member, None), getattr(counterpart, member, None)
        if not isinstance(held, nn.Module) or not isinstance(now, nn.Module):
            continue
        layers = {path: layer for layer, path in walk(now).items()}
        for layer, path in walk(held).items():
            if type(layer).__name__ == layer_kind and type(layer).__module__.startswith("torch.nn.") and path in layers:
                argument: Any = dict(enumerate(inspect.signature(type(layer)).parameters)).get(key, key)
                size: Any = getattr(layers[path], str(argument), None)
                if is_whole(size) and getattr(layer, str(argument), None) == getattr(module, name):
                    found.add(int(size))
    return found


@functools.lru_cache(maxsize=1024)
def uses_of(kind: type) -> dict[str, list[Use]]:
    """What the methods of a class make with each attribute."""
    found: dict[str, list[Use]] = {}
    for function in [f for base in kind.__mro__ for f in vars(base).values() if isinstance(f, types.FunctionType)]:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        assigned = [*assignments(tree)]
        same: dict[str, set[str]] = {}  # attributes, by the expressions that stand for them
        for attributes, value in assigned:
            texts = [] if isinstance(value, ast.Constant) else [ast.unparse(value)]
            for text in (*texts, *(f"self.{name}" for name in attributes)):
                same.setdefault(text, set()).update(attributes)
        for members, value in assigned:
            for call in [node for node in ast.walk(value) if isinstance(node, ast.Call)]:
                layer_kind = ast.unparse(call.func).rpartition(".")[2]
                placed = itertools.takewhile(lambda argument: not isinstance(argument, ast.Starred), call.args)
                given: list[tuple[Any, ast.expr]] = [*enumerate(placed), *((word.arg, word.value) for word in call.keywords)]
                for key, argument in given:
                    text = ast.unparse(argument)
                    for name in same.get(text, {text.removeprefix("self.")} if text.startswith("self.") else ()):
                        found.setdefault(name, []).extend((member, layer_kind, key) for member in members)
    return found


def assignments(tree: ast.AST) -> Iterator[tuple[list[str], ast.expr]]:
    """What a method assigns to attributes of `self`: their names, and the expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [ast.unparse(target).partition(".") for target in targets]
            attributes = [name for start, _, name in names if start == "self" and name.isidentifier()]
            if attributes:
                yield attributes, node.value
