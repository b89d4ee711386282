"""Random programs, and whether each is pruned exactly.

    from fuzzing import check, draw
    program = draw(seed=7)
    print(program.source())         # a module ready to be pasted into a test
    print(check(program))           # exact, refused, wrong or crashed; share of parameters removed

A program is a list of steps in plain data (`fuzz_steps`), so a failing one can be shrunk (`shrinking`).
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fuzz_steps import OPS, PARTS, SCOPE, Step, Value, Writer
from graphs.registry import normal, randomise
from oracle import leaves, parameter_count, plain_masked, relative_error, run
from torch import Tensor, nn

import fxprune

TOLERANCE = 1e-9  # relative, in double precision
NOTHING = ("nothing in the model can be pruned", "round_to=")
SHAPES = {
    "vector": [(7,), (10,)],
    "tokens": [(5, 10), (6, 8), (4, 9)],
    "line": [(3, 8), (4, 6)],
    "map": [(3, 4, 6), (3, 6, 6), (4, 4, 4)],
    "volume": [(2, 2, 4, 4)],
}
FIRST = {"vector": 2, "tokens": 7, "line": 1, "map": 8, "volume": 0.5}
PARAMETRIC = ("conv", "linear", "conv_transposed", "attention", "recurrent", "gated_linear", "parameter_product")


class Unfit(Exception):
    """A program that is no fair test: it does not run, or its outputs are of no ordinary size."""


@dataclass(frozen=True)
class Program:
    """A model and how it is to be pruned.

    Attributes:
        inputs: name, kind and shape of each.
        steps: in order; those named in ``outputs`` are returned.
        freeze: steps whose modules stay as they are.
    """

    seed: int
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    ratio: float = 0.5
    attention: str = "heads"
    round_to: int = 1
    freeze: tuple[str, ...] = ()

    @property
    def draws_numbers(self) -> bool:
        """Whether it is random in training."""
        return any(step.args.get("how") == "drop" for step in self.steps)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(normal(*shape, seed=2 + i) for i, (_, _, shape) in enumerate(self.inputs))

    def write(self) -> Writer:
        """The program's lines; raises Unfit where a step does not run."""
        writer = started(self)
        try:
            for step in self.steps:
                writer.add(step)
        except Exception as error:
            raise Unfit(f"{type(error).__name__}: {error}") from error
        return writer

    def options(self, writer: Writer) -> dict[str, Any]:
        """What ``prune`` is called with."""
        return {"attention": self.attention, "round_to": self.round_to, "freeze": frozen(self, writer)}

    def source(self) -> str:
        """A module, its inputs and the call of ``prune``, ready to be pasted."""
        writer = self.write()
        options = "".join(f", {k}={v!r}" for k, v in self.options(writer).items() if v not in ("heads", 1, []))
        inputs = "".join(f"normal({', '.join(map(str, s))}, seed={2 + i}), " for i, (_, _, s) in enumerate(self.inputs))
        steps = "".join(f"#   {step}\n" for step in self.steps)
        made = module_source(self, writer)
        own = [name for name in PARTS if f"{name}(" in made]
        imports = f"from fuzz_steps.parts import {', '.join(own)}\n\n\n" if own else ""
        return (
            f"# seed {self.seed}:\n{steps}{imports}{made}\n\n"
            f"model, inputs = Net().double().eval(), ({inputs.rstrip()})\nrandomise(model)\n"
            f"pruned = fxprune.prune(model, {self.ratio}, example_inputs=inputs{options}, verify=False)\n"
            "print(fxprune.verify(model, pruned, inputs))\n"
        )


@dataclass(frozen=True)
class Outcome:
    """What happened: status is exact, refused, wrong or crashed; removed is a share of the parameters."""

    status: str
    removed: float = 0.0
    error: float = 0.0
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "crashed")

    @property
    def cause(self) -> tuple[str, str]:
        """What two programs have in common that fail alike; numbers and names of values do not count."""
        return self.status, re.sub(r"[\d.e+-]*\d[\w.]*", "#", self.message.split("\n")[0])[:80]


# -- build and check ---------------------------------------------------------------------------------------------------


def started(program: Program) -> Writer:
    writer = Writer()
    for (name, kind, _), tensor in zip(program.inputs, program.tensors()):
        writer.put(name, kind, tensor)
    return writer


def frozen(program: Program, writer: Writer) -> list[str]:
    """The modules that the frozen steps made."""
    return [
        name
        for name, _ in writer.module.named_children()
        if any(re.fullmatch(rf"[a-z]+{step.lstrip('v')}[b-m]?", name) for step in program.freeze)
    ]


def module_source(program: Program, writer: Writer) -> str:
    names = ", ".join(name for name, _, _ in program.inputs)
    lines = [
        "class Net(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in writer.made),
        "",
        f"    def forward(self, {names}):",
        *(f"        {line}" for line in writer.lines),
        f"        return {', '.join(program.outputs)}",
    ]
    return "\n".join(lines)


def build(program: Program, writer: Writer) -> nn.Module:
    """The model in double precision, every weight and running statistic random; raises Unfit."""
    scope = dict(SCOPE)
    exec(module_source(program, writer), scope | {"__name__": "fuzzed"}, scope)
    model: nn.Module = scope["Net"]
    model.forward.__globals__.update(scope)
    made: nn.Module = scope["Net"]().double().eval()
    randomise(made, seed=1 + program.seed % 1000)
    with torch.no_grad():
        output = [value for _, value in leaves(run(made, tuple(t.clone() for t in program.tensors())))]
    if not all(bool(v.isfinite().all()) and 1e-5 < float(v.abs().max()) < 1e5 for v in output):
        raise Unfit("outputs are of no ordinary size")
    return made


def check(program: Program, damage: Callable[[nn.Module], None] | None = None) -> Outcome:
    """Prune the program's model and hold it against both references; raises Unfit.

    Arguments:
        damage: done to the pruned model before it is looked at, to see that the check can fail.
    """
    writer = program.write()
    model, inputs = build(program, writer), program.tensors()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        pruned = fxprune.prune(model, program.ratio, example_inputs=inputs, verify=False, **program.options(writer))
    except fxprune.PruneError as error:
        if str(error).startswith(NOTHING):
            return Outcome("refused", message=str(error))
        return Outcome("crashed", message=f"prune: {error}")
    except Exception as error:
        return Outcome("crashed", message=f"prune: {type(error).__name__}: {error}")
    removed = 1 - parameter_count(pruned) / parameter_count(model)
    if damage is not None:
        damage(pruned)
    try:
        found = compared(model, pruned, inputs, plain=writer.zeroing, draws_numbers=program.draws_numbers)
    except Exception as error:
        return Outcome("crashed", removed, message=f"after: {type(error).__name__}: {error}")
    for against, error in found.items():
        if not error <= TOLERANCE:
            return Outcome("wrong", removed, error, f"against {against}")
    if any(not torch.equal(before[name], value) for name, value in model.state_dict().items()):
        return Outcome("wrong", removed, message="the original has changed")
    return Outcome("exact", removed, max(found.values()))


@torch.no_grad()
def compared(
    model: nn.Module, pruned: Any, inputs: tuple[Tensor, ...], *, plain: bool, draws_numbers: bool
) -> dict[str, float]:
    """The relative error against each reference: the one without the engine, if it applies, and the engine's own."""
    output = run(copy.deepcopy(pruned), inputs)  # a run may leave other buffers
    found = {}
    if plain:
        reference = plain_masked(model, fxprune.plan_of(pruned))
        found["the zeroed original"] = relative_error(run(copy.deepcopy(reference), inputs), output)
        if not draws_numbers:
            with contextlib.suppress(ValueError):  # a norm needs more than one value a channel to train
                wanted = run(reference.train(), inputs)
                found["the zeroed original in training"] = relative_error(wanted, run(copy.deepcopy(pruned).train(), inputs))
    verification = fxprune.verify(model, pruned, inputs)
    # where a statistic sees removed channels, zeros are no reference, however close they come
    masked = not plain and verification.masked <= TOLERANCE
    return found | {"fxprune.verify": verification.masked if masked else verification.error}


# -- draw --------------------------------------------------------------------------------------------------------------


def draw(seed: int) -> Program:
    """The program of a seed: three to fourteen steps, one to three outputs, random options."""
    for attempt in range(100):
        rng = random.Random(f"{seed} {attempt}")
        program = attempted(rng, seed)
        try:
            build(program, program.write())
            return program
        except Unfit:
            continue
    raise AssertionError(f"seed {seed} gives no program that runs")


def attempted(rng: random.Random, seed: int) -> Program:
    batch = rng.choice((1, 2, 2, 3))
    kinds = rng.choices(list(FIRST), list(FIRST.values()), k=rng.choice((1, 1, 1, 2)))
    inputs = tuple((f"x{i}", kind, (batch, *rng.choice(SHAPES[kind]))) for i, kind in enumerate(kinds))
    program = Program(seed, inputs, (), ())
    writer, steps = started(program), []
    for name, value in list(writer.values.items()):  # inputs themselves stay whole, so each goes through a layer first
        steps.append(grown(rng, writer, [value], [n for n in PARAMETRIC if value.kind in OPS[n].kinds], groups=1))
    length = rng.randint(1, 4) if rng.random() < 0.3 else rng.randint(3, 13)
    while len(steps) < length + len(inputs):
        pool = list(writer.values.values())[len(inputs) :]
        near = [pool[-1]] * 2 + pool[-3:] + [rng.choice(pool)]
        steps.append(grown(rng, writer, near, list(OPS)))
    read = {name for step in steps for name in step.inputs}
    ends = [step.name for step in steps if step.name not in read][-3:]
    heads = [grown(rng, writer, [writer.values[name]], ["head"]) for name in ends]
    owners = [step.name for step in steps if rng.random() < 0.2] if rng.random() < 0.15 else []
    return replace(
        program,
        steps=(*steps, *heads),
        outputs=tuple(step.name for step in heads),
        ratio=round(rng.uniform(0.1, 0.8), 2),
        attention=rng.choice(("heads", "heads", "dims")),
        round_to=rng.choice((1, 1, 1, 1, 1, 1, 2, 4)),
        freeze=tuple(owners),
    )


def grown(rng: random.Random, writer: Writer, near: list[Value], ops: list[str], **fixed: Any) -> Step:
    """One more step that runs, on one of the values ``near``; drawn again until it does. ``fixed`` arguments are given."""
    while True:
        x = rng.choice(near)
        fitting = [OPS[name] for name in ops if x.kind in OPS[name].kinds]
        chosen = rng.choices(fitting, [max(o.weight, 1e-6) for o in fitting])[0]
        inputs = [x.name]
        if chosen.other is not None:
            known = [v for v in writer.values.values() if not v.name.startswith("x") and chosen.other(x, v)]
            distinct = [v for v in known if v is not x]
            if not known:
                continue
            inputs.append(rng.choice(distinct or known).name)
        try:
            args = {name: fixed.get(name, pick(rng, x)) for name, pick in chosen.picks.items()}
            step = Step(f"v{len(writer.values)}", chosen.name, tuple(inputs), args)
        except (IndexError, ValueError):  # a value of one channel has no two pieces
            continue
        made, lines, layers, zeroing = len(writer.made), len(writer.lines), dict(writer.layers), writer.zeroing
        try:
            writer.add(step)
            return step
        except Exception:
            for text in writer.made[made:]:
                target = text.removeprefix("self.").partition(" ")[0]
                if "." not in target:
                    delattr(writer.module, target)
            del writer.made[made:], writer.lines[lines:]
            writer.layers, writer.zeroing = layers, zeroing
