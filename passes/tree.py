"""Module trees: the tensors they hold, and copies of them with tensors swapped."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def fetch(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def named_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module tree holds: parameters, buffers and plain attributes; tied ones once."""
    seen: set[int] = set()
    for prefix, module in root.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        for name, tensor in [*module._parameters.items(), *module._buffers.items(), *plain.items()]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield (f"{prefix}.{name}" if prefix else name), tensor


def copy_tree(root: nn.Module, swap: Mapping[int, Tensor]) -> Any:
    """A deep copy in which the tensors with the given identities are replaced; gradients are not copied.

    Hooks are part of what a module computes (weight normalisation is one): the copy calls the same ones.
    """
    memo: dict[int, Any] = dict(swap)
    for module in root.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
            if hooks:
                memo[id(hooks)] = OrderedDict(hooks)
    return copy.deepcopy(root, memo)


def private_copy(root: nn.Module) -> Any:
    """A copy to trace: its parameters are the original's, everything that a forward might change is its own."""
    swap: dict[int, Tensor] = {id(p): p for p in root.parameters()}
    for _, tensor in named_tensors(root):
        if not tensor.is_leaf:  # a parameter computed by a hook, left over from the last forward
            swap[id(tensor)] = tensor.detach().clone()
    return copy_tree(root, swap)
