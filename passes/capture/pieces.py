"""How many pieces a tensor is cut into: where Python counts them, the size that says so is decided on.

`for step in x.unbind(1)` is a loop over as many steps as the example has, which becomes as many lines; `x.unbind(1)[0]` and
`x.unbind(1)[-1]` are right for any number of them. A real tuple does not tell one from the other, this one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from fxprune.passes.capture.proxy import Items, TensorProxy

# what cuts a tensor into pieces, and the place of the number it is cut by; where the number is a list, that many pieces it is
CUTTING = {"unbind": None, "split": 1, "unsafe_split": 1, "chunk": 1, "unsafe_chunk": 1}
NAMES = ("split_size_or_sections", "split_size", "chunks")


class Pieces(Items):
    """The pieces of a tensor.

    Attributes:
        counted: is told that Python has asked how many there are.
        from_end: one of them as a value of its own, counted from the end.
    """

    counted: Callable[[], None]
    from_end: Callable[[int], Any]

    @classmethod
    def among(cls, items: Items, counted: Callable[[], None], from_end: Callable[[int], Any]) -> Pieces:
        made = cls(tuple.__iter__(items))
        made.node, made.value, made.counted, made.from_end = items.node, items.value, counted, from_end
        return made

    def __iter__(self) -> Iterator[Any]:
        self.counted()
        return tuple.__iter__(self)

    def __len__(self) -> int:
        self.counted()
        return tuple.__len__(self)

    def __getitem__(self, index: Any) -> Any:
        number = tuple.__len__(self)
        if isinstance(index, slice):
            first, end = index.start or 0, index.stop
            if end is None or min(first, end) < 0 or end > number:
                self.counted()
        elif index < 0 and -index <= number:
            return self.from_end(index)
        return tuple.__getitem__(self, index)

    def __contains__(self, item: Any) -> bool:
        return item in tuple(self)

    def __add__(self, other: Any) -> Any:
        return tuple(self) + tuple(other)

    def __radd__(self, other: Any) -> Any:
        return other + tuple(self)

    def __mul__(self, times: Any) -> Any:
        return tuple(self) * times

    __rmul__ = __mul__


def number_of_pieces(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A number computed from the size that is cut; None where the call does not cut, or says how many pieces there are."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name not in CUTTING:
        return None
    at = CUTTING[name]
    tensor: Any = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    by = None if at is None else args[at] if len(args) > at else next((kwargs[n] for n in NAMES if n in kwargs), None)
    place = 1 if at is None else at + 1
    dim = args[place] if len(args) > place else kwargs.get("dim", 0)
    if type(tensor) is not TensorProxy:  # a tensor of the model's, whose sizes are not those of inputs
        return None
    if isinstance(by, tuple | list) or not isinstance(dim, int) or is_written(tensor.node, dim % tensor.value.dim()):
        return None
    size: Any = tensor.shape[dim]
    if at is None:
        return size
    if "chunk" in name:
        by = -(-size // by)
    return -(-size // by)


def is_written(node: fx.Node, dim: int) -> bool:
    """Whether a size was written down as a number where the tensor got its shape, as the 3 of a packed projection."""
    while node.args and isinstance(node.args[0], fx.Node):
        name, given = getattr(node.target, "__name__", node.target), list[Any](node.args[1:])
        given = list[Any](given[0]) if given and isinstance(given[0], tuple | list) else given
        if name in ("reshape", "view"):
            return dim < len(given) and type(given[dim]) is int and given[dim] != -1
        if name != "permute" or not all(type(d) is int for d in given):
            return False
        dim, node = given[dim] % len(given), node.args[0]
    return False
