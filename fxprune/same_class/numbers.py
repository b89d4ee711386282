"""Find by experiment the numbers that a module's own forward needs at its new sizes.

Some are its attributes, others those of a configuration that it holds. Each may be scaled as a dimension of its tensors is;
what is right is seen by running it.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

from torch import nn

from fxprune.passes.ir.module_tree import named_tensors

Change = tuple[str, str, int]  # the attribute that holds the object, empty for the module; the number's name; its new value
MOST_TRIED = 64  # changes of one or two numbers


def fit_numbers(original: nn.Module, module: nn.Module, is_right: Callable[[], bool]) -> bool:
    """Change at most two numbers of a module such that it computes what it has to; otherwise it is left as it was.

    Arguments:
        original: its counterpart in the model that was pruned.
        module: the module, with cut tensors.
        is_right: whether it computes what it has to.
    """
    shapes = {name: t.shape for name, t in named_tensors(original)}
    pairs = [(shapes[name], t.shape) for name, t in named_tensors(module) if name in shapes]
    scales = Counter(Fraction(b, a) for x, y in pairs if len(x) == len(y) for a, b in zip(x, y, strict=True) if a != b)
    changes = [
        (holder, name, int(value * scale))
        for scale, _ in scales.most_common()
        for holder, name, value in numbers_of(module)
        if (value * scale).denominator == 1
    ]
    several = (pair for pair in itertools.combinations(changes, 2) if pair[0][:2] != pair[1][:2])
    for chosen in itertools.islice(itertools.chain(((change,) for change in changes), several), MOST_TRIED):
        before = {holder: vars(module)[holder] for holder, _, _ in chosen if holder}
        before |= {name: vars(module)[name] for holder, name, _ in chosen if not holder}
        for holder in {holder for holder, _, _ in chosen if holder}:
            vars(module)[holder] = copy.copy(before[holder])  # others may hold the same object
        for holder, name, value in chosen:
            vars(vars(module)[holder] if holder else module)[name] = value
        if is_right():
            return True
        vars(module).update(before)
    return False


def numbers_of(module: nn.Module) -> Iterator[Change]:
    """The whole numbers above 1 of a module, and of configurations that it holds."""
    for name, value in vars(module).items():
        if type(value) is int and value > 1 and not name.startswith("_"):
            yield "", name, value
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from ((name, key, n) for key, n in vars(value).items() if type(n) is int and n > 1 and key[0] != "_")
