"""The smallest program that still fails, found by taking steps out and simplifying what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fuzz_steps import Step
from fuzzing import Outcome, Program, Unfit, check


def shrink(program: Program, fails: Callable[[Program], bool], budget: int = 400) -> Program:
    """The smallest program found by taking steps out and simplifying what is left, that still ``fails``."""
    tried = 0
    smaller = True
    while smaller:
        smaller = False
        for candidate in simpler(program):
            tried += 1
            if tried > budget:
                return program
            try:
                smaller = fails(candidate)
            except Unfit:
                continue
            if smaller:
                program = candidate
                break
    return program


def fails_like(outcome: Outcome) -> Callable[[Program], bool]:
    """Whether a program fails in the same way."""
    return lambda program: check(program).cause == outcome.cause


def simpler(program: Program) -> Iterator[Program]:
    """Programs a little simpler than this one, the greatest simplifications first."""
    bare = needed(program)
    if bare != program:  # what no output comes from is part of the program all the same, and may be why it fails
        yield bare
    for name in program.outputs if len(program.outputs) > 1 else ():
        yield replace(program, outputs=tuple(other for other in program.outputs if other != name))
    for i, step in reversed(list(enumerate(program.steps))):
        rest = program.steps[:i] + program.steps[i + 1 :]
        if step.name not in program.outputs:
            for instead in dict.fromkeys(step.inputs):
                yield replace(program, steps=tuple(renamed(s, step.name, instead) for s in rest))
    for change in ({"freeze": ()}, {"round_to": 1}, {"attention": "heads"}, {"ratio": 0.5}):
        if any(getattr(program, k) != v for k, v in change.items()):
            yield replace(program, **change)  # type: ignore[arg-type]
    for i, step in enumerate(program.steps):
        for args in simpler_arguments(step):
            changed = (*program.steps[:i], replace(step, args=args), *program.steps[i + 1 :])
            yield replace(program, steps=changed)


def renamed(step: Step, old: str, new: str) -> Step:
    return replace(step, inputs=tuple(new if name == old else name for name in step.inputs))


def needed(program: Program) -> Program:
    """Without the steps and inputs that no output comes from."""
    wanted, kept = set(program.outputs), []
    for step in reversed(program.steps):
        if step.name in wanted:
            wanted.update(step.inputs)
            kept.append(step)
    inputs = tuple(given for given in program.inputs if given[0] in wanted)
    return replace(program, steps=tuple(reversed(kept)), inputs=inputs)


# What tells least about an argument of this name.
PLAINEST = {
    "bias": False,
    "norm": False,
    "groups": 1,
    "stride": 1,
    "kernel": 1,
    "layers": 1,
    "both": False,
    "times": 1,
    "shared": 1,
}


def simpler_arguments(step: Step) -> Iterator[dict[str, Any]]:
    for name, value in step.args.items():
        options: list[Any] = []
        if name in PLAINEST and value != PLAINEST[name]:
            options.append(PLAINEST[name])
        elif isinstance(value, bool):
            options += [False] if value else []
        elif isinstance(value, int) and value > 2:
            options += [2, value // 2, value - 1]
        elif isinstance(value, list) and len(value) > 1:
            options += [value[:-1], value[1:]] if step.op != "split_and_join" else []
        elif step.op == "head" and value != "plain" and isinstance(value, str):
            options.append("plain")
        for option in options:
            yield {**step.args, name: option}
