"""The calls of modules in a flat program, as a tree, each with the lines that ran in it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fxprune.passes.ir.program import TracedCall
from fxprune.passes.rewrite.programs import FlatProgram, Line


@dataclass(eq=False)
class Call:
    """A call of a module in a flat program, with its own lines and the calls in it, in order."""

    call: TracedCall
    body: list[Line | Call] = field(default_factory=list)
    first: int = -1  # of the positions of all its lines
    last: int = -1
    touched: bool = False  # whether the rewrite changed a line of its own
    emptied: bool = False  # whether all its lines are gone: it returns what it is given, and nobody calls it

    def calls(self) -> Iterator[Call]:
        return (item for item in self.body if isinstance(item, Call))

    def all_calls(self) -> Iterator[Call]:
        """Those in its calls, too."""
        for call in self.calls():
            yield call
            yield from call.all_calls()

    def all_lines(self) -> Iterator[Line]:
        for item in self.body:
            yield from item.all_lines() if isinstance(item, Call) else (item,)


def call_tree(flat: FlatProgram, calls: Iterable[TracedCall]) -> Call:
    """The calls as a tree, with the lines of each. Lines that read tensors of the model are in none."""
    top = Call(TracedCall("", (), {}, None, -1, max(flat.numbers.values(), default=0) + 1))
    ordered = sorted(calls, key=lambda c: (c.begin, -c.end))
    pending, stack = iter(ordered), [top]
    upcoming = next(pending, None)
    touched = sorted(flat.touched)
    for i, line in enumerate(flat.program.lines):
        number = flat.numbers[line.name]
        while upcoming is not None and upcoming.begin <= number:
            while upcoming.begin >= stack[-1].call.end:
                stack.pop().last = i - 1
            if number < upcoming.end:
                stack.append(Call(upcoming, first=i))
                stack[-2].body.append(stack[-1])
            elif bisect_left(touched, upcoming.begin) < bisect_left(touched, upcoming.end):
                stack[-1].body.append(Call(upcoming, emptied=True))
            upcoming = next(pending, None)
        while number >= stack[-1].call.end:
            stack.pop().last = i - 1
        if line.op != "get_attr":
            stack[-1].body.append(line)
    for call in stack:
        call.last = len(flat.program.lines) - 1
    mark_touched(top, touched)
    return top


def mark_touched(parent: Call, numbers: list[int]) -> None:
    """Mark the innermost calls that touched nodes, by their numbers in order, belong to."""
    left = 0
    for call in parent.calls():
        first, end = bisect_left(numbers, call.call.begin), bisect_left(numbers, call.call.end)
        parent.touched |= left < first
        mark_touched(call, numbers[first:end])
        left = end
    parent.touched |= left < len(numbers)


def touched_paths(top: Call) -> set[str]:
    """The modules of which a call, or a call in one, was rewritten; of a module that is called several times, any of them."""
    calls = list(top.all_calls())
    found = {call.call.path for call in calls if call.touched}
    size = -1
    while size < len(found):
        size = len(found)
        found |= {call.call.path for call in calls if any(inner.call.path in found for inner in call.calls())}
    return found


def call_name(call: Call) -> str:
    return f"{call.call.path} {call.call.begin}"
