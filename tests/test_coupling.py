"""What is tied and what is not, where the outputs of a pruned model would not tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs.registry import features, linear, net, tokens
from torch import nn

import fxprune
from fxprune.passes.coupling.components import Components, edges, smallest_connected
from fxprune.passes.coupling.solver import partial_rows
from fxprune.passes.ir import constraints
from fxprune.passes.ir.constraints import LabelArray, LabelSet, Tie
from fxprune.passes.ir.labels import Factor, factor, varying
from fxprune.passes.ops.call import RuleContext
from fxprune.passes.ops.unify import heads_alone


def family_of(coupling: fxprune.Coupling, name: str, dim: int = 0) -> object:
    return next(f for f in coupling.families if (name, dim) in f.members)


@pytest.mark.parametrize(
    ("rnn", "other"),
    [
        (nn.LSTM(10, 14, num_layers=2, batch_first=True), "rnn.weight_hh_l1"),
        (nn.GRU(10, 14, num_layers=2, batch_first=True), "rnn.weight_hh_l1"),
        (nn.LSTM(10, 14, bidirectional=True, batch_first=True), "rnn.weight_hh_l0_reverse"),
        (nn.RNN(10, 14, bidirectional=True, batch_first=True), "rnn.weight_hh_l0_reverse"),
    ],
)
def test_a_state_of_zeros_ties_no_layers(rnn: nn.Module, other: str) -> None:
    width = 28 if "reverse" in other else 14
    model = net(lambda self, x: self.head(self.rnn(x)[0]), rnn=rnn, head=linear(width, 5)).double()
    coupling = fxprune.couple(model, tokens())
    one, two = family_of(coupling, "rnn.weight_hh_l0"), family_of(coupling, other)
    assert one is not two and one.units == two.units == 14 and one.frozen is two.frozen is None


def test_a_state_that_is_written_to_ties_its_readers() -> None:
    """It is no constant any more: both cells start from what was put there, index by index."""

    def forward(self, x):
        h = torch.zeros(x.shape[0], 14, dtype=x.dtype)
        h[:, :10] = x
        return self.head(torch.cat([self.one(x, h), self.two(x, h)], 1))

    cells = {"one": nn.GRUCell(10, 14), "two": nn.GRUCell(10, 14)}
    coupling = fxprune.couple(net(forward, **cells, head=linear(28, 5)).double(), features())
    assert family_of(coupling, "one.weight_hh", 1) is family_of(coupling, "two.weight_hh", 1)


def test_what_keeps_a_dimension_is_named() -> None:
    """An input, as it is or scaled; a constant; or another tensor, whose own reason is elsewhere."""

    def forward(self, x):
        seen = torch.randperm(12, device=x.device)
        y = self.other(x / 2) * seen
        return self.head(self.first(x) + 1), self.tail(y), self.last(self.first(x).sort(1).values)

    layers = {"first": linear(10, 14), "other": linear(10, 12), "head": linear(14, 5), "last": linear(14, 5)}
    layers |= {"tail": linear(12, 5)}
    coupling = fxprune.couple(net(forward, **layers).double(), features())
    assert family_of(coupling, "first.weight", 1).frozen == "is tied to an input of the model (at %first in first)"
    assert family_of(coupling, "other.weight", 1).frozen == "is tied to an input of the model (at %other in other)"
    constant = "is combined with a constant that cannot be pruned along that dimension (at %mul)"
    assert family_of(coupling, "other.weight", 0).frozen == constant
    kept = "is combined with a tensor that cannot be pruned along that dimension (at %last in last)"
    assert family_of(coupling, "last.weight", 1).frozen == kept


def test_an_error_of_the_compiler_is_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch, own_ops: None) -> None:
    """In tests it is let out; users get a run with values."""
    from fxprune.passes.errors import EngineFault
    from fxprune.passes.ops import registry

    model = net(lambda self, x: self.head(self.a(x).relu()), a=linear(10, 14), head=linear(14, 5)).double()
    calls = []

    def fails_once(call: RuleContext) -> object:
        calls.append(call)
        return {}["missing"] if len(calls) == 1 else call.labels(call.first)

    registry.register("relu", registry.OpSpec(fails_once))
    with pytest.raises(EngineFault, match="KeyError: 'missing'"):
        fxprune.couple(model, features())
    calls.clear()
    monkeypatch.setenv("FXPRUNE_STRICT", "0")
    assert family_of(fxprune.couple(model, features()), "a.weight").frozen is None


def test_every_statistic_has_a_masked_form() -> None:
    """An op whose rule lets reduced or normalised channels go is compared with what it makes of those that are left."""
    from fxprune.passes.ops import reduction, registry

    statistics = (reduction.reduce, reduction.spread, reduction.extreme, reduction.place_of_extreme, reduction.normalise)
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    seen = set()
    for name, spec in registry.SPECS.items():
        packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
        if spec.labels in statistics and packet is not None:
            overloads = [getattr(packet, o) for o in packet.overloads()]
            if not all(o.has_kernel_for_dispatch_key(composite) for o in overloads):  # those are taken apart
                seen.add(name)
    missing = {name for name in seen if registry.named(name).masked is None}
    assert len(seen) > 20 and not missing, missing


@pytest.mark.parametrize("seed", range(40))
def test_components_are_those_of_a_slow_search(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 60))
    rows, cols = rng.integers(0, size, (2, int(rng.integers(0, 80))))
    if seed % 4 == 0 and size > 1:  # one long path in no order
        path = rng.permutation(size)
        rows, cols = path[:-1], path[1:]
    rows, cols = rows[rows != cols], cols[rows != cols]
    expected = list(range(size))
    for _ in range(size):
        for a, b in zip(rows, cols):
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert smallest_connected(np.arange(size), rows, cols).tolist() == expected
    half = len(rows) // 2
    earlier = smallest_connected(np.arange(size), rows[:half], cols[:half])
    assert smallest_connected(earlier, rows[half:], cols[half:]).tolist() == expected


@pytest.mark.parametrize("seed", range(60))
def test_ties_of_lines_are_those_of_their_labels(seed):
    rng = np.random.default_rng(seed)
    starts, lines, size = [], [], 1
    for _ in range(int(rng.integers(2, 12))):
        n = int(rng.integers(1, 4))
        starts.append((size, n))
        lines.append(np.arange(size, size + n))
        size += n
    lines += [np.arange(s, s + n) for s, n in starts[: len(starts) // 3]]  # the same once more, as another array
    if seed % 2:  # parts of lines, lines end to end, lines in no order, and label 0
        lines += [line[1:] for line in lines[:3] if len(line) > 1]
        lines += [np.arange(s, s + 4) for s, _ in starts[:2] if s + 4 <= size]
        lines += [rng.permutation(lines[0]), np.zeros(2, np.int64), np.array([0, 1])]
    pairs = []
    for _ in range(int(rng.integers(1, 20))):
        a = lines[int(rng.integers(len(lines)))]
        fitting = [line for line in lines if len(line) == len(a)]
        pairs.append(Tie(a, fitting[int(rng.integers(len(fitting)))], False, len(pairs)))
    edges = [(a, b, p.node) for p in pairs for a, b in zip(p.a.tolist(), p.b.tolist()) if a != b]
    joined = [(a, b) for a, b, _ in edges if a and b]
    expected = smallest_connected(np.arange(size), *np.array(joined, np.int64).reshape(-1, 2).T).tolist()
    units = Components(size)
    units.add(pairs)
    assert units.unit_of.tolist() == expected
    met = sorted((max(a, b), node) for a, b, node in edges if not (a and b))
    assert sorted((int(x), node) for labels, node in units.tied_to_zero for x in labels) == met
    half = len(pairs) // 2
    in_two = Components(size)
    in_two.add(pairs[:half])
    in_two.add(pairs[half:])
    assert in_two.unit_of.tolist() == expected


class HeadsTiedWhole(nn.Module):
    """The entries of each head of v go together; the weights of the attention, which no label tells apart, have every head."""

    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(10, 27, bias=False), nn.LayerNorm(3), nn.Linear(9, 2)

    def forward(self, x):
        b, n = x.shape[:2]
        q, k, v = (t.view(b, n, 3, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        weights = torch.einsum("bhnd,bhmd->bhnm", self.norm(q), self.norm(k)).softmax(-1)
        heads = torch.einsum("bhnm,bhmd->bhnd", weights, v).transpose(1, 2).reshape(b, n, 9)
        pieces = heads[..., 0::3] + heads[..., 1::3] + heads[..., 2::3]
        return self.out(heads + 0 * pieces.sum(-1, keepdim=True))


def test_rows_that_meet_every_row_of_another_tensor_stay():
    """Found by fuzzing: whole heads of v went, while the other factor of the product kept all of them."""
    torch.manual_seed(0)
    model, x = HeadsTiedWhole().double().eval(), torch.randn(2, 5, 10, dtype=torch.float64)
    family = next(f for f in fxprune.couple(model, x, attention="dims").families if ("out.weight", 1) in f.members)
    assert family.frozen and "cannot be pruned along that dimension" in family.frozen
    small = fxprune.prune(model, 0.4, example_inputs=x, attention="dims")
    assert small.verification.error < 1e-9 and small.get_submodule("norm").normalized_shape == (2,)


def test_a_factor_lets_go_of_the_array_it_was_cut_from():
    made = factor(torch.arange(8).expand(1000, 8).contiguous())
    assert made.major_to_minor == (1,) and made.labels.untyped_storage().nbytes() == 8 * made.labels.element_size()


def test_class_tokens_are_no_heads():
    """Rows of labels along tokens (1, tokens, channels): heads occur equally often, whether shared or not."""
    own, patch = torch.arange(1, 5), torch.arange(5, 9)
    assert heads_alone(Factor(torch.stack([own, patch, patch])[None], (1, 2)), {1}) is None
    for rows in (torch.stack([own, own, patch, patch])[None], torch.arange(1, 13).reshape(1, 3, 4)):
        f = Factor(rows, (1, 2))
        assert heads_alone(f, {1}) is f


@pytest.mark.parametrize("shared", [False, True])
def test_heads_beside_a_class_token(shared):
    """Rows along heads and tokens (2, 5, channels): a token by which heads differ speaks for all, here the first one only."""
    own = torch.arange(1, 9).reshape(2, 1, 4)
    patches = torch.arange(9, 13).expand(2, 4, 4) if shared else (own + 8).expand(2, 4, 4)
    found = heads_alone(Factor(torch.cat([own, patches], 1), (1, 0, 2)), {0, 1})
    assert found.major_to_minor == (0, 2) and torch.equal(found.labels, own)


def test_an_index_passes_what_it_does_not_touch():
    """A bias table (positions, heads) read at places of the tokens: its heads go, and each place keeps its own entry."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 8))
            self.register_buffer("places", (torch.arange(25) % 9).reshape(5, 5))
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.down(self.up(x)[:, :, None] + self.table[self.places])

    model, x = Biased().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert dict(pruned.named_parameters())["table"].shape == (9, 4)
    assert fxprune.verify(model, pruned, x).error < 1e-12


def test_matrices_of_classes_are_looked_at_once():
    """A detector picks class after class out of one matrix of scores; its rows repeat for every place of the image."""
    part = np.arange(20)
    part[7] = 6
    places = np.array([[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 7]])
    events = [LabelArray(places, node) for node in (3, 4, 5)] + [
        LabelArray(np.array([[8, 8], [9, 9]]), 6),
        LabelArray(places[:2], 7),
    ]
    found = partial_rows(part, events)
    assert [(e.node, e.array.tolist()) for e in found] == [(3, [[1, 2, 3], [4, 5, 6]]), (7, [[1, 2, 3], [4, 5, 6]])]


@pytest.mark.parametrize("seed", range(30))
def test_what_meets_all_of_another_array_is_tied_by_the_first(seed):
    """Masks by token tie all tokens of a window to one another: 49 x 49 pairs of 49 labels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [((3, 1, 5), (3, 4, 1)), ((2, 1, 4, 1), (1, 3, 1, 3)), ((3, 5), (3, 1)), ((2, 1, 3), (2, 6, 3))]
    a, b = (torch.randint(int(seed % 3 > 0), 60, shape, generator=generator) for shape in shapes[seed % 4])
    tie = Tie(a, b, True, 7)
    left, right = tie.sides()
    joined = (left != 0) & (right != 0) & (left != right)
    units = Components(60)
    units.add([tie])
    assert units.unit_of.tolist() == smallest_connected(np.arange(60), left[joined], right[joined]).tolist()
    zero = {max(x, y) for x, y in zip(left.tolist(), right.tolist()) if x != y and not (x and y)}
    assert {int(x) for labels, _ in units.tied_to_zero for x in labels} == zero
    if seed % 4 == 0 and seed % 3:
        assert len(edges(tie)[0]) == 3 * 5 + 3 * 4


@pytest.mark.parametrize("seed", range(20))
def test_a_set_of_labels_is_a_set(seed):
    rng = np.random.default_rng(seed)
    labels, known = LabelSet(), set()
    assert not labels and not labels.meets(np.arange(9)) and not labels.holds(np.arange(9)).any()
    labels.add(np.zeros(0, np.int64))
    assert not labels
    for _ in range(5):
        more = rng.integers(0, rng.integers(1, 100), rng.integers(1, 5))
        labels.add(more)
        known.update(more.tolist())
        asked = rng.integers(0, 300, (4, 7))
        assert labels.holds(asked).tolist() == [[x in known for x in row] for row in asked.tolist()]
        assert labels.meets(asked) == any(x in known for x in asked.flatten().tolist())


@pytest.mark.parametrize("seed", range(20))
def test_an_array_varies_where_any_of_its_entries_differ(seed):
    """Also where the first and the last entry are equal."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 2, [(1, 4)[i] for i in torch.randint(0, 2, (3,), generator=generator)], generator=generator)
    labels = small.expand(4, 4, 4).permute(2, 0, 1)
    expected = [d for d in range(3) if not torch.equal(labels, labels.narrow(d, 0, 1).expand_as(labels))]
    assert list(varying(labels)) == expected
    assert factor(labels).count == len(labels.unique())
    assert varying(torch.zeros(0, 3, dtype=torch.int64)) == ()


def test_rows_that_repeat_are_tied_once(monkeypatch):
    """Tokens tie the same channels over and over: what comes of it is the same if each is looked at."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.randint(0, 40, (4, 6), generator=generator)
    tokens = torch.randint(0, 4, (200,), generator=generator)
    others = torch.randint(40, 80, (3, 6), generator=generator)
    pairs = [
        Tie(channels[tokens], others[tokens % 3], False, 1),
        Tie(channels[tokens][None], others[:1], True, 2),
        Tie(channels[tokens], channels[tokens.flip(0)], False, 3),
    ]
    found = []
    for large in (0, 1 << 30):
        monkeypatch.setattr(constraints, "DEDUPLICATED_FROM", large)
        units = Components(80)
        units.add(pairs)
        part, stopped = units.unit_of, units.tied_to_zero
        found.append((part.tolist(), [(sorted(set(labels.tolist())), node) for labels, node in stopped]))
        assert (len(pairs[0].sides()[0]) < 6 * 200) == (large == 0)
    assert found[0] == found[1] and found[0][1]
