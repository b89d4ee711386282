"""The mode as a value: what a forward gets when it reads `self.training` only to hand it on.

`F.dropout(x, 0.2, training=self.training)` decides nothing by the mode in Python. Such a call becomes two, one for each mode,
and a `switch` between them; the rest of the forward is captured once. Where Python asks the flag for its truth, the module that
it came from has asked for its mode, and is captured in both (see `modes.py`).
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fxprune.passes.capture.proxy import ValueProxy

if TYPE_CHECKING:
    from fxprune.passes.capture.tracer import ValueTracer


@dataclass(slots=True, eq=False)
class ModeReading:
    """What one call of a module wanted to know of its mode: `asked` for it, or got a `flag` to hand on."""

    asked: bool = False
    flag: bool = False


class TrainingFlag:
    """The mode of a module, not looked at yet. To Python it is a bool."""

    __slots__ = ("module", "reading", "tracer")

    def __init__(self, tracer: ValueTracer, module: nn.Module) -> None:
        self.tracer, self.module, self.reading = tracer, module, tracer.readings[-1]
        self.reading.flag = True

    @property
    def __class__(self) -> type:
        return bool

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("a flag's class is bool")

    def __bool__(self) -> bool:
        """Python wants to know: the call that read the flag is captured once more; if it is over, the model is."""
        self.reading.asked = True
        if not any(r is self.reading for r in self.tracer.readings):
            self.tracer.reads_training = True
        return bool(vars(self.module)["training"])

    def __int__(self) -> int:
        return int(bool(self))

    def __index__(self) -> int:
        return int(bool(self))

    def __float__(self) -> float:
        return float(bool(self))

    def __hash__(self) -> int:
        return hash(bool(self))

    def __repr__(self) -> str:
        return repr(bool(self))

    def __invert__(self) -> int:
        return ~int(self)


def _binary(name: str, *, swapped: bool = False) -> Any:
    function = getattr(operator, name)

    def method(self: TrainingFlag, other: Any) -> Any:
        if type(other) is ValueProxy:
            return NotImplemented  # a node, which takes a flag
        mine, other = bool(self), bool(other) if type(other) is TrainingFlag else other
        return function(other, mine) if swapped else function(mine, other)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor"):
    setattr(TrainingFlag, f"__{_name.strip('_')}__", _binary(_name))
    setattr(TrainingFlag, f"__r{_name.strip('_')}__", _binary(_name, swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(TrainingFlag, f"__{_name}__", _binary(_name))


def read_training(tracer: ValueTracer, module: nn.Module) -> Any:
    """What `module.training` is while a program is captured."""
    training = bool(vars(module)["training"])
    if tracer.running is not None:
        return training
    alone = tracer.branches is None or tracer.reads_training or training
    no_branch = alone or tracer.trained is None or not tracer.trained.get(module, True) or tracer.stack[-1] in tracer.flagless
    caller = sys._getframe(2)
    if no_branch or not handed_on(caller.f_code, caller.f_lasti):
        tracer.readings[-1].asked = True
        return training
    return TrainingFlag(tracer, module)


@functools.lru_cache(maxsize=4096)
def handed_on(code: types.CodeType, at: int) -> bool:
    """Whether what the instruction at an offset reads is an argument, or on its way to be one, for all that can be told.

    `self.training is True` would never ask a flag, nor would a variable tell what becomes of it.
    """
    following = [i.opname for i in dis.get_instructions(code) if i.offset > at and i.opname != "CACHE"][:2]
    loads = bool(following) and following[0].startswith("LOAD_")
    calls = bool(following) and following[0].startswith(("KW_NAMES", "PRECALL", "CALL"))
    return calls or (loads and following[-1] not in ("IS_OP", "COMPARE_OP", "CONTAINS_OP"))


def plainly(x: Any) -> Any:
    """An argument as it is in the mode that its module is in."""
    return bool(x) if type(x) is TrainingFlag else x


def settled(mode: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in one mode."""
    return tuple(mode if type(a) is TrainingFlag else a for a in args), {
        k: mode if type(v) is TrainingFlag else v for k, v in kwargs.items()
    }
