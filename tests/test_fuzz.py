"""Random programs from fresh seeds are pruned exactly; and the fuzzer sees a mistake, and shrinks it, when there is one.

A run draws its seed and prints it (`conftest.py`). `FUZZ_SEED=123 pytest tests/test_fuzz.py` runs the same programs again; ten
thousand at a time are run by `examples/benchmarks/fuzz.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from fuzz_steps import OPS, Step
from fuzzing import Outcome, Program, build, check, draw
from graphs.registry import normal, randomise
from shrinking import fails_like, shrink
from torch import nn

import fxprune
from fxprune.passes.ops import pointwise, registry

BLOCKS, GRAPHS = 4, 50  # blocks are told apart by number, so that the workers of a parallel run agree on them
CAUGHT = 1e-3


def failure(program: Program, outcome: Outcome) -> str:
    """The program shrunk, ready to be pasted as a test."""
    small = shrink(program, fails_like(outcome))
    found = check(small)
    return f"seed {program.seed} is {found.status}: {found.message} (error {found.error:.1e})\n\n{small.source()}"


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_programs_are_exact(block: int) -> None:
    seed = int(os.environ["FUZZ_SEED"]) + block * GRAPHS
    removed = []
    for number in range(GRAPHS):
        program = draw(seed + number)
        outcome = check(program)
        assert not outcome.failed, failure(program, outcome)
        removed.append(outcome.removed)
    # About two in three graphs lose that much; with fifty of them a third is out of reach of chance.
    reached = sum(share >= 0.15 for share in removed) / GRAPHS
    assert reached > 0.35, f"seeds {seed} to {seed + GRAPHS - 1}: only {reached:.0%} lost 15 % of their parameters: {removed}"


@pytest.mark.parametrize("seed", [4001754, 7700518, 9004673, 9004699, 9004769, 9005265, 9009514, 12007538])
def test_programs_that_failed_once_are_exact(seed: int) -> None:
    outcome = check(program := draw(seed))
    assert not outcome.failed, failure(program, outcome)


def test_every_step_is_drawn() -> None:
    """The vocabulary has no step that never fits."""
    missing = set(OPS)
    for seed in range(1000):
        missing -= {step.op for step in draw(seed).steps}
        if not missing:
            return
    raise AssertionError(f"never drawn: {sorted(missing)}")


def test_a_seed_is_a_program() -> None:
    one, two = draw(5), draw(5)
    assert one == two and one.source() == two.source()
    model, other = build(one, one.write()), build(two, two.write())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# -- the fuzzer can fail -----------------------------------------------------------------------------------------------

IMAGE = (("x0", "map", (2, 3, 4, 6)),)
CHAIN = Program(
    0,
    IMAGE,
    (
        Step("v1", "conv", ("x0",), {"out": 8, "kernel": 3, "groups": 1, "stride": 1, "bias": True}),
        Step("v2", "batch_norm", ("v1",), {"affine": True}),
        Step("v3", "split_and_join", ("v2",), {"sizes": [3, 5], "order": "same", "act": "relu"}),
        Step("v4", "flip", ("v3",), {"how": "added"}),
        Step("v5", "conv", ("v4",), {"out": 6, "kernel": 1, "groups": 1, "stride": 1, "bias": False}),
        Step("v6", "pointwise", ("v5",), {"how": "tanh"}),
        Step("v7", "head", ("v6",), {"how": "pooled", "out": 3}),
    ),
    ("v7",),
)


def swap_two_channels(pruned: nn.Module) -> None:
    """Two kept channels change places in one layer and nowhere else."""
    weight = next(value for name, value in pruned.named_parameters() if name == "conv1.weight")
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]


def forget_a_statistic(pruned: nn.Module) -> None:
    pruned.get_buffer("batchnorm2.running_mean").mul_(1.01)


@pytest.mark.parametrize("damage", [swap_two_channels, forget_a_statistic])
def test_a_damaged_result_is_wrong(damage: Callable[[nn.Module], None]) -> None:
    assert check(CHAIN).status == "exact"
    outcome = check(CHAIN, damage)
    assert outcome.status == "wrong" and outcome.error > CAUGHT, outcome


def test_a_result_that_does_not_run_has_crashed() -> None:
    def widen(pruned: nn.Module) -> None:
        pruned.get_submodule("conv5").weight = nn.Parameter(torch.ones(6, 8, 1, 1, dtype=torch.float64))

    assert check(CHAIN, widen).status == "crashed"


@pytest.fixture
def flip_forgotten(own_ops: None) -> None:
    """The rule of `flip` leaves every channel where it is."""
    registry.register("flip", registry.OpSpec(pointwise.same))


def test_a_broken_rule_is_caught_and_shrunk(flip_forgotten: None) -> None:
    outcome = check(CHAIN)
    assert outcome.status == "wrong" and outcome.error > CAUGHT, outcome
    small = shrink(CHAIN, fails_like(outcome))
    assert [step.op for step in small.steps if step.op != "head"] in (["conv", "flip"], ["conv", "flip", "conv"])
    assert "flip" in failure(CHAIN, outcome)


def test_random_programs_find_a_broken_rule(flip_forgotten: None) -> None:
    """Not only a program that was written to: one that is drawn, with a flip in it."""
    drawn = (draw(seed) for seed in range(10**6))
    having = (p for p in drawn if any(s.op == "flip" for s in p.steps))
    assert any(check(next(having)).status == "wrong" for _ in range(15))


# -- shrinking ---------------------------------------------------------------------------------------------------------


def test_shrinking_a_planted_failure() -> None:
    """A made-up fault, a pad that comes after a cat: nothing else is left of a long program but what makes it run."""

    def fails(program: Program) -> bool:
        program.write()
        ops = [step.op for step in program.steps]
        return "cat" in ops and "pad" in ops[ops.index("cat") :]

    having = (program for program in map(draw, range(10**6)) if len(program.steps) > 8 and fails(program))
    small = shrink(next(having), fails)
    assert fails(small)
    assert len(small.steps) <= 5, small.source()
    assert small.freeze == () and small.round_to == 1 and small.ratio == 0.5


def test_what_is_printed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The source of a program, pasted with the imports of a test, builds the same model and prunes it."""
    scope = {"torch": torch, "nn": nn, "F": nn.functional, "fxprune": fxprune, "normal": normal, "randomise": randomise}
    exec(CHAIN.source(), scope)
    assert capsys.readouterr().out.startswith("exact")
    model = build(CHAIN, CHAIN.write())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), scope["model"].parameters(), strict=True))
