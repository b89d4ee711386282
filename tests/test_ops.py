"""Ops of one's own, registered in one line: followed, rewritten and verified like torch's."""

from __future__ import annotations

import pytest
import torch
from graphs.registry import conv, features, image, linear, net, parameter, pool, randomise
from oracle import plain_masked, relative_error, run
from torch import Tensor, nn

import fxprune
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.ops import call
from fxprune.passes.ops.registry import named
from fxprune.selection.costs import Costs

LIBRARY: list[object] = []


def op(name: str, function: object, fake: object) -> object:
    made = torch.library.custom_op(f"tested::{name}", mutates_args=())(function)
    made.register_fake(fake)
    LIBRARY.append(made)
    return made


def swap(x: Tensor, dim: int) -> Tensor:
    return x.unflatten(dim, (-1, 2)).flip(dim + 1).flatten(dim, dim + 1).clone()


def to_space(x: Tensor) -> Tensor:
    return nn.functional.pixel_shuffle(x, 2).contiguous()


def mirrored(x: Tensor) -> Tensor:
    return x.flip(-1).clone()


def sheared(x: Tensor) -> Tensor:
    return torch.stack([part.roll(i, -1) for i, part in enumerate(x.unbind(1))], 1)


def gate(x: Tensor, y: Tensor) -> Tensor:
    return x * y.sigmoid()


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight


def average(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    return x.mean(dim, keepdim)


def shaken(x: Tensor) -> Tensor:
    return x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


def convolved(x: Tensor, w: Tensor) -> Tensor:
    return nn.functional.conv2d(x, w)


def alike(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


SWAP = op("swap_pairs", swap, alike)
SPACE = op("to_space", to_space, lambda x: x.new_empty(x.shape[0], x.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3]))
MIRROR = op("mirrored", mirrored, alike)
SHEARED = op("sheared", sheared, alike)
GATE = op("gate", gate, alike)
PRODUCT = op("product", product, lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
CONVOLVE = op("convolve", convolved, nn.functional.conv2d)
AVERAGE = op("average", average, lambda x, dim, keepdim: x.mean(dim, keepdim))
SHAKEN = op("shaken", shaken, alike)


pytestmark = pytest.mark.usefixtures("own_ops")


def images(step: object, width: int = 12) -> tuple[nn.Module, Tensor]:
    def forward(self, x):
        return self.head(pool(self.b(step(self, self.a(x)).relu())))

    model = net(forward, a=conv(3, 12), b=conv(width, 20), head=linear(20, 5)).double().eval()
    randomise(model)
    return model, image()


def exact(model: nn.Module, inputs: Tensor, *, stats: bool = False) -> nn.Module:
    pruned = fxprune.prune(model, 0.5, example_inputs=inputs, verify=False)
    assert fxprune.verify(model, pruned, inputs).error < 1e-8
    if not stats:
        with torch.no_grad():
            assert relative_error(run(plain_masked(model, fxprune.plan_of(pruned)), inputs), run(pruned, inputs)) < 1e-8
    return pruned


@pytest.mark.parametrize(
    ("moved", "step", "width", "left"),
    [
        (SWAP, lambda self, x: SWAP(x, 1), 12, 6),  # other neighbours are left: a gather
        (MIRROR, lambda self, x: MIRROR(x), 12, 6),  # channels stay where they are: the call itself
        (SPACE, lambda self, x: SPACE(x.repeat(1, 2, 1, 1)), 6, 12),  # a whole pixel's channels go together
    ],
)
def test_a_movement_is_run_on_labels(moved: object, step: object, width: int, left: int) -> None:
    model, inputs = images(step, width)
    before = fxprune.couple(model, inputs)
    assert not any(("a.weight", 0) in f.members for f in before.prunable)  # gradients do not tell where channels go
    fxprune.register_op(moved, "movement")
    pruned = exact(model, inputs)
    assert pruned.a.weight.shape[0] <= left and pruned.b.weight.shape[1] < width


def test_a_movement_that_only_suits_the_whole() -> None:
    """Each channel is shifted by its number: what is gone is filled up, moved, and cut out again."""
    fxprune.register_op("tested::sheared", "movement")
    pruned = exact(*images(lambda self, x: SHEARED(x) * x))
    assert pruned.a.weight.shape[0] == 6 and "pad" in pruned.code


def test_pointwise_contraction_and_reduction_are_one_line_each() -> None:
    fxprune.register_op(GATE, "pointwise")
    fxprune.register_op(PRODUCT, like="aten::mm")
    fxprune.register_op(AVERAGE, like="aten::mean")

    def forward(self, x):
        x = self.a(x)
        x = GATE(x - AVERAGE(x, [1], True), x.tanh())
        return self.head(PRODUCT(x, self.weight).relu())

    parts = {"a": linear(10, 14), "weight": parameter(14, 20), "head": linear(20, 5)}
    model = net(forward, **parts).double().eval()
    randomise(model)
    pruned = exact(model, features(), stats=True)
    assert pruned.a.weight.shape[0] == 7 and pruned.weight.shape == (7, 10)


MULTIPLY = op("multiply", product, lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
MULTIPLY.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def multiplying(function: object) -> tuple[nn.Module, Tensor]:
    """A model with a product in it, whose weight is no layer's."""

    def forward(self, x):
        return self.head(function(self.a(x).relu(), self.weight).relu())

    torch.manual_seed(0)
    model = net(forward, a=linear(10, 14), weight=parameter(14, 20), head=linear(20, 5)).double().eval()
    randomise(model)
    return model, torch.randn(64, 10, dtype=torch.float64)


@pytest.mark.parametrize("criterion", ["wanda", "flap", "fisher", "taylor"])
def test_criteria_see_a_product_of_ones_own(criterion: str) -> None:
    """Units are chosen as they are where the product is that of torch."""
    fxprune.register_op(MULTIPLY, like="aten::mm")
    kept = []
    for function in (torch.mm, MULTIPLY):
        model, x = multiplying(function)
        given = {"criterion": criterion, "data": [x], "loss": lambda out: out.square().sum()}
        given = given if criterion in ("fisher", "taylor") else {k: given[k] for k in ("criterion", "data")}
        pruned = fxprune.prune(model, 0.5, example_inputs=x, **given)
        kept.append(dict(pruned.named_parameters()))
    assert kept[0].keys() == kept[1].keys()
    for name, value in kept[0].items():
        torch.testing.assert_close(value, kept[1][name], rtol=0, atol=0)


def test_a_product_of_ones_own_is_counted_and_repaired() -> None:
    fxprune.register_op(MULTIPLY, like="aten::mm")
    repaired, counted = [], []
    for function in (torch.mm, MULTIPLY):
        model, x = multiplying(function)
        pruned = fxprune.prune(model, macs=0.5, example_inputs=x)
        solution = analyse(model, (x,), {}, CouplingOptions())
        counted.append(Costs(solution, dict(model.named_parameters())).original("macs"))
        repaired.append(fxprune.repair(model, pruned, [x], method="reconstruct"))
        assert repaired[-1].meta["repair"].error[1] < repaired[-1].meta["repair"].error[0]
    assert counted == [64 * (10 * 14 + 14 * 20 + 20 * 5)] * 2
    torch.testing.assert_close(repaired[0].weight, repaired[1].weight)
    assert not torch.equal(repaired[1].weight, pruned.weight)


def test_like_another_op_under_its_names_of_arguments() -> None:
    """The specification of another op asks for arguments by its own names: here `input` is `x` and `weight` is `w`."""
    fxprune.register_op(CONVOLVE, like="aten::conv2d")
    model = (
        net(
            lambda self, x: self.head(pool(CONVOLVE(self.a(x), self.w))),
            a=conv(3, 12),
            w=parameter(20, 12, 3, 3),
            head=linear(20, 5),
        )
        .double()
        .eval()
    )
    randomise(model)
    pruned = exact(model, image())
    assert pruned.w.shape == (10, 6, 3, 3)


def test_frozen_with_a_reason() -> None:
    why = "is scaled by its place"
    fxprune.register_op(SHAKEN, "frozen", why=why)
    coupling = fxprune.couple(*images(lambda self, x: SHAKEN(x)))
    frozen = next(f for f in coupling.frozen if ("a.weight", 0) in f.members)
    assert frozen.frozen == f"{why} (at %shaken_default)"


def test_a_rule_of_ones_own() -> None:
    @fxprune.register_op("tested::mirrored")
    def rule(call: call.RuleContext) -> object:
        return call.labels(call.first)

    assert exact(*images(lambda self, x: MIRROR(x))).a.weight.shape[0] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tested::gate", "pointwisely"), "an op's kind is not 'pointwisely'\n  at tested::gate\n  fix: "),
        ((7, "pointwise"), "7 is neither an op nor the name of one\n  fix: "),
    ],
)
def test_what_is_not_known(arguments: tuple[object, str], message: str) -> None:
    with pytest.raises(fxprune.PruneError) as error:
        fxprune.register_op(*arguments)
    assert str(error.value).startswith(message)


def test_like_an_op_without_a_rule() -> None:
    with pytest.raises(fxprune.PruneError, match="there is no rule for 'aten::nothing'"):
        fxprune.register_op("tested::gate", like="aten::nothing")


@pytest.mark.parametrize("named", [GATE, torch.ops.tested.gate, torch.ops.tested.gate.default, "tested::gate"])
def test_an_op_may_be_like_one_that_torch_calls_pointwise(named: object) -> None:
    fxprune.register_op(named, like="aten::mul")
    pruned = exact(*images(lambda self, x: GATE(x, x.tanh())))
    assert pruned.a.weight.shape[0] == 6


def test_any_field_of_a_specification_may_be_given() -> None:
    fxprune.register_op("tested::gate.default", "pointwise", macs=lambda call: 7, always=True)
    found = named("tested::gate")
    assert found.macs is not None and found.always
    with pytest.raises(fxprune.PruneError, match=r"register_op has no argument 'mac'\n  fix: did you mean 'macs'"):
        fxprune.register_op("tested::gate", "pointwise", mac=7)
    with pytest.raises(fxprune.PruneError, match="is neither an op nor the name of one"):
        fxprune.register_op("tested:: gate", "pointwise")
