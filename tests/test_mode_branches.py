"""Evaluation and training in one capture: what follows a branch, and branches that do nothing but look something up."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fuzz_steps.parts import Chosen, Either, scripted_swish
from torch import Tensor, nn

import fxprune
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.ir.quiet import plain_random_state


class Louder(nn.Module):
    """Another value in training than in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 100 if self.training else x * 2


class Reads(nn.Module):
    """Takes one way or the other, by a value: the one for loud inputs knows its size by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet, self.loud = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 50:
            return self.quiet(x)
        return self.loud(x).reshape(-1, int("12"))


def test_what_follows_a_branch_sees_what_evaluation_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), Louder(), Reads(), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(5, 4)
    given: list[Tensor] = []
    handle = model[2].register_forward_pre_hook(lambda m, a: given.append(a[0].clone()))
    model(x)
    handle.remove()
    solution = analyse(model, (x,), {}, CouplingOptions(heads=True))
    assert solution.captures[0].opaque.keys() == {"2"}
    ((seen,), _), *others = solution.captures[0].given.values()
    assert not others
    assert torch.equal(seen, given[0])
    pruned = fxprune.prune(model, ratio=0.5, example_inputs=x)
    assert pruned.plan.kept_shape("2.quiet.weight") == (6, 6)  # else it would have been tried on what it does not take


class Uses(nn.Module):
    """Scales channels by what is chosen, or looks them up by it, where it is whole numbers or becomes such."""

    def __init__(self, chosen: Chosen, index: bool) -> None:
        super().__init__()
        self.chosen, self.index = chosen, index
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(torch.relu(x[:, self.chosen().long()] if self.index else x * self.chosen()))


SCALES = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([-1.0, 5.0, 0.5, 2.0])
ORDERS = torch.tensor([1, 0, 2, 3]), torch.tensor([0, 1, 3, 2])


FRACTIONS = ORDERS[0].float(), ORDERS[1].float()
CASES = {"scales": (SCALES, False, 1), "orders": (ORDERS, True, 2), "orders as fractions": (FRACTIONS, True, 2)}


@pytest.mark.parametrize(("tensors", "index", "captures"), CASES.values(), ids=CASES)
def test_a_branch_may_hold_nothing_but_a_tensor(tensors: tuple[Tensor, Tensor], index: bool, captures: int) -> None:
    """Where what it holds are indices, what is coupled in training is not what is coupled in evaluation."""
    torch.manual_seed(0)
    model, x = Uses(Chosen(*tensors), index).eval(), torch.randn(6, 3)
    assert len(fxprune.couple(model, x)._solution.captures) == captures
    pruned = fxprune.prune(model, ratio=0.5, example_inputs=x)
    keep = pruned.plan.slices["one.weight"][0].keep
    assert len(keep) == 2
    mask = torch.zeros(4).index_fill(0, keep, 1.0)
    for training, tensor in zip((False, True), tensors, strict=True):
        pruned.train(training)
        hidden = model.one(x) * mask
        wanted = model.two(torch.relu(hidden[:, tensor.long()] if index else hidden * tensor))
        torch.testing.assert_close(pruned(x), wanted)


class ReadsMode(nn.Module):
    """Stays one node, since it looks at values, and computes by another layer in training."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width = str(width) if width else ""
        self.evaluated, self.trained, self.out = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trained(x) if self.training else self.evaluated(x)
        if x.abs().max() > 1e6:
            return self.out(hidden) * 2
        return self.out(hidden.reshape(-1, int(self.width)) if self.training and self.width else hidden)


class Learns(ReadsMode):
    """Has nothing to compute with in training unless it is told what is right."""

    def forward(self, x: Tensor, right: Tensor | None = None) -> Tensor:
        if self.training and right is None:
            raise ValueError("nothing to learn from")
        return super().forward(x)


class Whole(nn.Module):
    """A model that stays one node, since it calls compiled code."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.last = part, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(scripted_swish(self.part(x)))


def as_masked(model: nn.Module, pruned: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the result and the original with its removed channels at zero compute in training; a swish of zero is zero."""
    masked = copy.deepcopy(model)
    for name, slices in pruned.plan.slices.items():
        for cut in slices:
            assert len(cut.dims) == 1
            gone = torch.ones(model.get_parameter(name).shape[cut.dims[0]], dtype=torch.bool)
            gone[cut.keep] = False
            masked.get_parameter(name).data.index_fill_(cut.dims[0], gone.nonzero().flatten(), 0.0)
    return pruned.train()(x), masked.train()(x)


@pytest.mark.parametrize(
    "model", [nn.Sequential(ReadsMode(), nn.ReLU(), nn.Linear(12, 3)), Whole(Either(nn.Linear(4, 12), nn.Linear(4, 12)))]
)
def test_what_a_part_that_is_one_node_does_in_training_is_coupled(model: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    pruned = fxprune.prune(model.eval(), ratio=0.5, example_inputs=x)
    part = "0" if isinstance(model, nn.Sequential) else "part"
    assert (
        pruned.get_parameter(f"{part}.evaluated.weight").shape == pruned.get_parameter(f"{part}.trained.weight").shape == (6, 4)
    )
    torch.testing.assert_close(*as_masked(model, pruned, x))
    assert fxprune.verify(model.eval(), pruned.eval(), x).ok


def test_what_fails_in_training_once_it_is_cut_is_frozen() -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(ReadsMode(width=12), nn.ReLU(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).eval(),
        torch.randn(5, 4),
    )
    pruned = fxprune.prune(model, ratio=0.5, example_inputs=x)
    assert pruned.get_parameter("0.trained.weight").shape == (12, 4) and pruned.get_parameter("2.weight").shape[0] < 24
    assert "in training" in pruned.meta["frozen_modules"]["0"]
    torch.testing.assert_close(*as_masked(model, pruned, x))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy])
def test_a_part_of_which_nobody_knows_what_it_does_in_training_evaluates(
    inside: bool, copied: Callable[[nn.Module], nn.Module]
) -> None:
    torch.manual_seed(0)
    model, x = (nn.Sequential(Learns(), nn.ReLU(), nn.Linear(12, 3)) if inside else Whole(Learns())).train(), torch.randn(5, 4)
    pruned = copied(fxprune.prune(model, ratio=0.5, example_inputs=x))
    assert "training mode is as evaluation" in pruned.meta["capture"]
    wanted = pruned.eval()(x)
    torch.testing.assert_close(pruned.train()(x), wanted)
    assert pruned.training


class Queued(nn.Module):
    """Keeps the results of training in a queue, at a place that is a buffer, too."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.up, self.down, self.last, self.looks = nn.Linear(4, 16), nn.Linear(16, 8), nn.Linear(8, 3), looks
        self.register_buffer("queue", torch.randn(8, 12))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x).relu())
        seen = y @ self.queue if self.looks else torch.zeros(())
        if self.training:
            at, count = int(self.place), y.shape[0]
            self.queue[:, at : at + count] = y.detach().T
            self.place[0] = (at + count) % self.queue.shape[1]
        return self.last(y) + seen.mean()


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_what_training_writes_where_a_buffer_says_is_written_there(looks: bool, inside: bool) -> None:
    torch.manual_seed(0)
    model, x = Queued(looks).double().eval(), torch.randn(4, 4, dtype=torch.float64)
    outer = nn.Sequential(model) if inside else model
    pruned = fxprune.prune(outer, ratio=0.5, example_inputs=x)
    found = pruned.get_submodule("0") if inside else pruned
    assert found.up.weight.shape[0] == 8
    masks = {name.removeprefix("0."): mask for name, mask in fxprune.plan_of(pruned).masks(outer).items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data.mul_(masks.get(name, torch.ones((), dtype=torch.int64)))
    kept = model.queue.any(1)
    for mode in (True, True, False, True, True):  # the fourth batch is written to the beginning again
        data = torch.randn(4, 4, dtype=torch.float64)
        torch.testing.assert_close(pruned.train(mode)(data), model.train(mode)(data))
        torch.testing.assert_close(found.queue, model.queue[kept] if len(found.queue) < 8 else model.queue)
        assert torch.equal(found.place, model.place)


class LayerDrop(nn.Module):
    """Leaves layers out in training, by a number that is drawn: how transformers and speech models do it."""

    def __init__(self, share: float, drops: Callable[[float], object]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))
        self.share, self.drops = share, drops

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self.drops(self.share):
                continue
            x = x + layer(x)
        return x


DROPS: dict[str, Callable[[float], object]] = {
    "less": lambda share: torch.rand([]) < share,
    "not at least": lambda share: not torch.rand(1) >= share,
    "number": lambda share: torch.rand(1).item() < share,
    "entry": lambda share: torch.rand(3)[1:].view(2)[0] < share,
    "like": lambda share: torch.rand_like(torch.empty(1))[0].lt(share + 0.0),
    "written": lambda share: torch.rand(1).add_(1) <= share,
}


@pytest.mark.parametrize(
    ("drop", "share", "known"),
    [(drop, share, drop != "written") for drop in DROPS for share in (0.0, 1.0)]
    + [(drop, 0.5, False) for drop in DROPS if drop != "written"],
)
def test_a_decision_by_a_number_that_is_drawn(drop: str, share: float, known: bool) -> None:
    """It is a node of its own, drawn anew in each call, unless all numbers that could be drawn decide the same."""
    model, x = nn.Sequential(LayerDrop(share, DROPS[drop]), nn.Linear(4, 3)).train(), torch.randn(3, 4)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert any(node.target == "0" for node in pruned.train().flat().graph.nodes) != known
    masks = fxprune.plan_of(pruned).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
    for training, seed in [(False, 0), *((True, seed) for seed in range(8))]:
        torch.manual_seed(seed)
        wanted, after = model.train(training)(x), torch.rand(1)
        torch.manual_seed(seed)
        assert torch.allclose(pruned.train(training)(x), wanted, atol=1e-6)
        assert torch.equal(torch.rand(1), after)  # as many numbers were drawn


def test_a_decision_of_the_model_itself_by_a_number_that_is_drawn_is_said_to_be_that_of_evaluation() -> None:
    pruned = fxprune.prune(LayerDrop(0.5, DROPS["less"]).train(), 0.5, example_inputs=torch.randn(3, 4))
    assert pruned.meta["capture"] == "symbolic; training mode is as evaluation: reads bool() of %lt, which is drawn"


class Noise(nn.Module):
    """Scales channels by a number that is drawn; in training by one for each sample, too."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.last, self.draw = nn.Linear(4, 8), nn.Linear(8, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu() * self.draw()
        if self.training:
            y = y * torch.from_numpy(np.random.rand(len(x), 1)).float()
        return self.last(y)


@pytest.mark.parametrize("draw", [lambda: 1.0, random.random, lambda: np.random.rand() * 2, lambda: random.gauss(0, 1)])
@pytest.mark.parametrize("inside", [False, True])
def test_numbers_of_other_generators_are_drawn_in_each_call(draw: Callable[[], float], inside: bool) -> None:
    noise, x = Noise(draw), torch.randn(3, 4)
    model = nn.Sequential(noise, nn.Linear(3, 2)).train() if inside else noise
    before = plain_random_state()
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert plain_random_state() == before and fxprune.plan_of(pruned).keep["0.first.weight" if inside else "first.weight"]
    masks = fxprune.plan_of(pruned).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
    trains = "as evaluation" not in pruned.meta["capture"]
    assert trains == (inside or draw() != 1.0)  # one node, or with what is said of it
    for training, seed in ((mode, seed) for mode in ([False, True] if trains else [False]) for seed in range(4)):
        random.seed(seed)
        np.random.seed(seed)
        wanted, after = model.train(training)(x), plain_random_state()
        random.seed(seed)
        np.random.seed(seed)
        assert torch.allclose(pruned.train(training)(x), wanted, atol=1e-6) and plain_random_state() == after


class Maybe(nn.Module):
    """Goes through a layer or around it."""

    def __init__(self, around: Callable[[nn.Module], object]) -> None:
        super().__init__()
        self.layer, self.around, self.calls = nn.Linear(8, 8), around, 0
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and self.around(self) else self.layer(x)


def counted(module: Any) -> object:
    module.step += 1
    return module.step < 3


def counted_in_python(module: Any) -> object:
    module.calls += 1
    return random.random() > 2 or module.calls < 100  # the draw makes it one node


AROUND: dict[str, Callable[[Any], object]] = {
    "torch": lambda module: torch.rand([]) < 0.1,
    "torch, a whole number": lambda module: int(torch.randint(0, 2, (1,))),
    "Python": lambda module: random.random() < 0.1,
    "Python, seldom": lambda module: random.uniform(0, 1) > 0.99999,
    "NumPy": lambda module: np.random.uniform() < 0.1,
    "a buffer": counted,
    "a number": counted_in_python,
}


@pytest.mark.parametrize("around", AROUND)
def test_what_a_draw_or_a_counter_decides_otherwise_in_another_call_is_coupled(around: str) -> None:
    """With the layer's inputs and outputs apart, the way around it would hand channels to readers of others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Maybe(AROUND[around]), nn.Linear(8, 3)).train()
    with torch.random.fork_rng():
        torch.manual_seed(11)
        pruned = fxprune.prune(model, 0.5, example_inputs=torch.randn(3, 4))
    keep = fxprune.plan_of(pruned).keep
    [first], [rows, columns], [last] = keep["0.weight"], keep["2.layer.weight"], keep["3.weight"]
    assert first.keep.tolist() == columns.keep.tolist() == rows.keep.tolist() == last.keep.tolist()
    assert len(first.keep) == 4


elsewhere: list[Tensor] = []


class Leaves(nn.Module):
    """Leaves for the model around it, on itself or elsewhere, something else in training than in evaluation."""

    def __init__(self, how: str, size: int, shared: dict[str, Any]) -> None:
        super().__init__()
        self.how, self.lin, self.shared = how, nn.Linear(size, 16), shared
        self.loss: Tensor | None = None
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y, loss = self.lin(x), self.lin.weight.square().sum()
        if self.how == "another":
            self.loss = loss if self.training else y.new_zeros(())
        elif self.how == "none":
            self.loss = loss if self.training else None
        elif self.how == "nothing":
            if self.training:
                self.loss = loss
        elif self.how == "list":
            self.losses = [loss * (2 if self.training else 1)]
        elif self.how == "append":
            self.losses.append(loss * (2 if self.training else 1))
        elif self.how == "elsewhere":
            elsewhere.append(loss * (2 if self.training else 1))
        elif self.how == "shared":
            self.shared["all"] += [loss * (2 if self.training else 1)]
        elif self.how == "hook":
            y = y * (2 if self.training else 1)
        else:
            y = F.dropout(y, 0.0, self.training)
            (self.losses if self.how == "dropout" else elsewhere).append(loss)
        return y.relu()


class Collects(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.shared: dict[str, Any] = {}
        self.a, self.b, self.head = Leaves(how, 6, self.shared), Leaves(how, 16, self.shared), nn.Linear(16, 3)
        if how == "hook":
            self.b.register_forward_hook(lambda module, args, out: elsewhere.append(out.sum()))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.shared["all"] = []
        elsewhere.clear()
        for part in (self.a, self.b):
            part.losses = []
        out = [self.head(self.b(self.a(x)))]
        for part in (self.a, self.b):
            out += part.losses if part.loss is None else [part.loss]
        return [*out, *elsewhere, *self.shared["all"]]


@pytest.mark.parametrize(
    "how", ["another", "none", "nothing", "list", "append", "dropout", "elsewhere", "dropout elsewhere", "shared", "hook"]
)
def test_what_a_part_leaves_for_others_is_that_of_the_mode(how: str) -> None:
    torch.manual_seed(0)
    model, x = Collects(how).eval(), torch.randn(4, 6)
    pruned = fxprune.prune(model, 0.5, x)
    with torch.no_grad():
        for name, mask in fxprune.plan_of(pruned).masks(model).items():
            model.get_parameter(name).mul_(mask)
    for training in (False, True):
        wanted, found = model.train(training)(x), pruned.train(training)(x)
        torch.testing.assert_close(found, wanted)
