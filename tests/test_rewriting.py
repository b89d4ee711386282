"""Rewriting a captured program: where new nodes stand, what is checked of the result, and that a program is used once."""

import copy

import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune.passes.coupling.couple import analyse
from fxprune.passes.coupling.solution import CouplingOptions
from fxprune.passes.errors import NotARectangle
from fxprune.passes.rewrite.graph_editor import GraphEditor
from fxprune.passes.rewrite.rewrite import check_programs, rewrite_program


def graph_of(*names: str) -> tuple[fx.Graph, list[fx.Node]]:
    """A chain of calls of these methods on one input."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for name in names:
        nodes.append(graph.call_method(name, (nodes[-1],)))
    return graph, [*nodes, graph.output(nodes[-1])]


def targets(graph: fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes]


def test_new_nodes_stand_before_a_node_until_it_is_emitted_and_after_it_from_then_on():
    graph, nodes = graph_of("relu", "exp")
    editor = GraphEditor(graph, {})
    editor.visit(nodes[1])
    before = graph.call_method("neg", (nodes[0],))
    relu = editor.emit(nodes[1], (before,), {})
    editor.replace(nodes[1], graph.call_method("abs", (relu,)))
    editor.leave(nodes[1])
    editor.visit(nodes[2])
    graph.call_method("sin", (nodes[0],))
    editor.leave(nodes[2])
    assert targets(graph) == ["x", "neg", "relu", "abs", "sin", "exp", "output"]
    assert nodes[1].args == (nodes[0],)  # nothing changes before all is applied
    editor.apply(nodes, set())
    graph.lint()
    assert nodes[1].args == (before,) and nodes[2].args[0].target == "abs"


def test_nodes_that_others_stand_for_are_erased():
    graph, nodes = graph_of("relu", "exp")
    editor = GraphEditor(graph, {})
    editor.visit(nodes[1])
    editor.replace(nodes[1], graph.call_method("abs", (nodes[0],)))
    editor.leave(nodes[1])
    editor.apply(nodes, set())
    graph.lint()
    assert targets(graph) == ["x", "abs", "exp", "output"]


def test_new_nodes_belong_to_the_branch_of_the_node_they_are_made_for():
    graph, nodes = graph_of("relu", "exp")
    editor = GraphEditor(graph, {nodes[1]: True})
    editor.visit(nodes[1])
    made = graph.call_method("neg", (nodes[0],))
    editor.leave(nodes[1])
    editor.visit(nodes[2])
    common = graph.call_method("abs", (nodes[0],))
    editor.leave(nodes[2])
    assert editor.branches == {nodes[1]: True, made: True} and common not in editor.branches


class Chunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).view(x.shape[0], 8))


@pytest.fixture
def solution():
    torch.manual_seed(0)
    model, x = Chunks().eval(), torch.randn(3, 4)
    return model, x, analyse(model, (x,), {}, CouplingOptions(heads=True))


def kept_half(solution):
    """All labels but those of half of the channels of the first layer."""
    kept = torch.ones(len(solution.unit_of), dtype=torch.bool)
    channels = solution.leaves["a.bias"][0].flat[:4]
    kept[torch.isin(solution.unit_of, solution.unit_of[channels])] = False
    return kept


def test_a_captured_program_is_rewritten_once(solution):
    """A second rewrite raises, and the first result stays what it was: once its 4 channels silently became 8."""
    model, x, solved = solution
    first = rewrite_program(model, solved, kept_half(solved))
    before = first(x)
    assert first.a.weight.shape == (4, 4)
    with pytest.raises(RuntimeError, match="rewritten already"):
        rewrite_program(model, solved, torch.ones(len(solved.unit_of), dtype=torch.bool))
    assert first.a.weight.shape == (4, 4)
    assert torch.equal(first(x), before)


def test_a_choice_that_leaves_nothing_of_a_tensor_consumes_no_program(solution):
    model, x, solved = solution
    with pytest.raises(NotARectangle):
        rewrite_program(model, solved, torch.zeros(len(solved.unit_of), dtype=torch.bool))
    assert rewrite_program(model, solved, kept_half(solved))(x).shape == (3, 2)


def test_what_a_program_refers_to_must_exist(solution):
    model, _, solved = solution
    pruned = rewrite_program(model, solved, kept_half(solved))
    check_programs(pruned)
    del pruned._modules["b"]
    with pytest.raises(RuntimeError, match="nonexistent attribute b"):
        check_programs(pruned)


def test_a_program_must_be_well_formed(solution):
    model, _, solved = solution
    pruned = rewrite_program(model, solved, kept_half(solved))
    nodes = list(pruned.graph.nodes)
    nodes[1].append(nodes[0])  # an input after its use
    with pytest.raises(RuntimeError):
        check_programs(pruned)


class LowRank(nn.Module):
    """A weight that is a product, so that none of the layer's own tensors has its shape."""

    def forward(self, left):
        return left @ left.mT[:, : left.shape[0]] @ left

    def right_inverse(self, weight):
        return weight


HOOKS = {
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm, parametrized": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "a product": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", LowRank()),
}


@pytest.mark.parametrize("wrap", HOOKS.values(), ids=HOOKS)
def test_layers_whose_weight_is_computed_say_their_widths(wrap):
    model = nn.Sequential(wrap(nn.Linear(6, 8)), nn.ReLU(), wrap(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)).eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 6), verify=True)
    layers = [m for m in pruned.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 3
    for layer in layers:
        assert (layer.out_features, layer.in_features) == tuple(layer.weight.shape)
    assert layers[-1].in_features == 4


def each_group(moved):
    return lambda x: moved(x.unflatten(1, (3, 3))).flatten(1, 2)


MOVES = {
    "roll": (each_group(lambda x: x.roll(1, 2)), [0, 1, 5, 8]),
    "flip": (each_group(lambda x: x.flip(2)), [0, 2, 3, 5, 6, 8]),
    "swap": (each_group(lambda x: x[:, :, [1, 0, 2]]), [0, 3, 6]),
    "shuffle": (lambda x: nn.functional.channel_shuffle(x, 3), [1, 2, 3, 5, 6, 7]),
}


@pytest.mark.parametrize("written", ["what is moved", "the result"])
@pytest.mark.parametrize("move", MOVES)
def test_what_moves_channels_still_copies_where_those_that_are_left_stay_in_place(move, written):
    """One of the two is written to, and the other one is read afterwards."""
    moved, gone = MOVES[move]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 9, 1, bias=False), nn.Conv2d(9, 2, 1)

        def forward(self, x):
            x = self.a(x)
            y = moved(x)
            first, then = (x, y) if written == "what is moved" else (y, x)
            first.mul_(3)
            return self.b(then)

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(2, 3, 4, 4).double()
    pruned = fxprune.prune(model, remove={"a": gone}, example_inputs=x, verify=False)
    whole = torch.arange(9).view(1, 9, 1, 1).double()
    kept = [int(i) for i in moved(whole).flatten() if int(i) not in gone]
    assert kept == sorted(kept) and pruned.a.weight.shape[0] == len(kept)  # none of them changes places
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.a.weight[gone] = 0
    torch.testing.assert_close(pruned(x), masked(x))


def test_a_shuffle_reads_its_source_before_that_is_written_to():
    """The chain that becomes one gather ends before the write, though a copy of its result follows."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.a(x)
            y = x.unflatten(1, (3, 2)).transpose(1, 2).flatten(1, 2)
            more = x.add_(0.3) > 0.2
            y = y.clone()
            y[more] = 0.3
            return self.b(y)

    torch.manual_seed(0)
    pruned = fxprune.prune(Net().double(), 0.5, example_inputs=torch.randn(2, 4, 4, 4).double())
    assert pruned.verification.ok and pruned.a.weight.shape[0] < 6


class LooksAndReturns(nn.Module):
    """It is one node, in which copies are made of what it returns as it is."""

    def forward(self, x):
        if x.abs().max() > 1e30:
            raise ValueError("too large")
        return x


def test_what_a_module_returns_as_it_was_given_stays_the_same_tensor():
    """It is written to later, and the result of the module is read after that."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.looks, self.b = nn.Linear(5, 6), LooksAndReturns(), nn.Linear(6, 2)

        def forward(self, x):
            x = self.a(x)
            y = self.looks(x)
            x[:, :2] = 1 - x[:, :2]
            return self.b(y)

    model = Net().double()
    pruned = fxprune.prune(model, remove={"a": [4, 5]}, example_inputs=torch.randn(3, 5).double(), verify=False)
    x = torch.randn(3, 5).double()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.b.weight[:, 4:] = 0
    torch.testing.assert_close(pruned(x), masked(x))


class WrittenLater(nn.Module):
    """A reshape of a slice copies; where the slice takes all that is left, it would be a view of what is written to later."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(9, 2, 1)

    def forward(self, x):
        other = self.conv(x)
        y = other.flip(1)
        kept = y.unflatten(1, (3, 4))[:, :, 1:].flatten(1, 2)
        y.mul_(other)
        return self.last(kept)


def test_a_copy_stays_one_where_a_slice_takes_all_that_is_left():
    model, x = WrittenLater().eval(), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        model.conv.weight.view(3, 4, -1)[:, [0, 3]] *= 1e-3  # the first and the last of each group go
    pruned = fxprune.prune(model, 0.5, x)
    assert pruned.verification.ok and pruned.conv.out_channels == pruned.last.in_channels == 6
