"""A size that a forward reads again is the same node, as long as it is the same size."""

import copy
import importlib.util
import math

import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import fxprune
from fxprune.passes.errors import GuardError


def pruned(net, x):
    small = fxprune.prune(net, 0.5, example_inputs=x)
    assert small.verification.ok and any(k for k in small.plan.slices)
    return small


def reads(small):
    """The nodes that read a shape or a size, or compute with numbers."""
    return [n for n in small.graph.nodes if n.target is getattr or n.target == "size" or str(n.target).startswith("<built-in")]


class Asks(nn.Module):
    """Reads the same sizes over and over, and computes the same number of them."""

    def __init__(self, times):
        super().__init__()
        torch.manual_seed(0)
        self.times, self.a, self.b = times, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.a(x)
        for _ in range(self.times):
            y = y.reshape(x.shape[0] * x.size(1), -1).relu().reshape(x.shape[0], x.size(1), -1)
        return self.b(y)


def test_what_is_asked_again_is_not_read_again():
    x = torch.randn(2, 3, 8)
    once, often = pruned(Asks(1).eval(), x), pruned(Asks(5).eval(), x)
    assert len(reads(once)) == len(reads(often))
    assert often(torch.randn(4, 5, 8)).shape == (4, 5, 8)


class Turns(nn.Module):
    """Turns a tensor in place between two looks at its shape; where it is square, both say the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        t = x[:, :, 0].clone()
        rows = t.shape[0]
        t.t_()
        columns = t.shape[0]
        return self.b(self.a(x).relu()) * rows + columns


def test_a_tensor_turned_in_place_is_asked_anew():
    net = Turns().eval()
    small = pruned(net, torch.randn(3, 3, 8))
    x = torch.randn(2, 5, 8)
    masked = fxprune.verify(net, small, x)
    assert masked.ok  # 2 rows and 5 columns, where the example had 3 of either


class Modal(nn.Module):
    """Reads the same size in evaluation, in training, and after both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.inner, self.b = nn.Linear(8, 16), Noisy(), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(self.inner(self.a(x)))


class Noisy(nn.Module):
    def forward(self, y):
        half = y.shape[0] // 2
        return y * half + y.shape[1] if self.training else y * half + 1


def test_branches_read_for_themselves():
    net = Modal().eval()
    x = torch.randn(4, 3, 8)
    small = pruned(net, x)
    assert len(fxprune.couple(net, x)._solution.captures) == 1  # where a branch leans on the other, there are two
    for mode in (False, True):
        net.train(mode), small.train(mode)
        for n in (4, 6, 9):
            x = torch.randn(n, 3, 8)
            hidden = net.a(x)
            kept = small.plan.slices["a.weight"][0].keep
            mask = torch.zeros(16).index_fill(0, kept, 1.0)
            expected = net.b((net.inner(hidden)) * mask)
            torch.testing.assert_close(small(x), expected)


# -- sizes that Python converts to plain numbers ------------------------------------------------------------------------


class Padded(nn.Module):
    """Pads images to the next multiple of 4, in the arithmetic of plain numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x):
        y = self.a(x).relu()
        height, width = (int(math.ceil(float(n) / 4) * 4) for n in y.shape[-2:])
        whole = y.new_zeros(y.shape[0], y.shape[1], height, width)
        whole[..., : y.shape[-2], : y.shape[-1]].copy_(y)
        return self.b(whole) / round(x.shape[-1] * 0.3) + round(x.shape[-1] / 7, 1)


class Batched(nn.Module):
    """Images of several sizes in one batch, as torchvision's detectors put them there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prepare = GeneralizedRCNNTransform(24, 60, [0.5] * 3, [0.2] * 3, size_divisible=8)
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, images):
        return self.b(self.a(self.prepare(images)[0].tensors).relu())


@pytest.mark.parametrize(
    ("net", "example", "others"),
    [
        (Padded, lambda: torch.randn(2, 3, 14, 9), [lambda: torch.randn(1, 3, 21, 30), lambda: torch.randn(3, 3, 16, 8)]),
        (
            Batched,
            lambda: ([torch.rand(3, 32, 40), torch.rand(3, 24, 36)],),
            [
                lambda: ([torch.rand(3, 30, 34), torch.rand(3, 28, 42)],),
                lambda: ([torch.rand(3, 20, 36), torch.rand(3, 18, 40)],),
            ],
        ),
    ],
)
def test_what_is_computed_from_converted_sizes_is_computed_anew(net, example, others):
    model = net().eval()
    small = fxprune.prune(model, 0.5, example_inputs=example())
    own = fxprune.prune(model, 0.5, example_inputs=example(), same_class=True)  # whose forward is the class's
    assert small.a.weight.shape[0] == 6 and small.meta["capture"] == "symbolic" and small.verification.ok
    assert "int" not in globals() and "float" not in globals()
    for make in others:
        x = make()
        given = (x,) if isinstance(x, torch.Tensor) else x
        with torch.no_grad():
            assert torch.allclose(small(*given), own(*given), atol=1e-6)


CONVERTS = """
import json
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 4, 1)

    def forward(self, x):
        n = int(x.shape[-1])
        {use}
        return self.b(self.a(x).relu()) * n
"""


@pytest.mark.parametrize(
    ("use", "any_length"),
    [
        ("assert isinstance(n, int) and issubclass(type(3), (int, float))", True),
        ("assert type(3) is int", False),  # which another class in its place would not answer
        ("kind = int; assert kind(3) == 3", False),
        ("assert json.loads(json.dumps(n)) == x.shape[-1]", False),  # for which only a plain number will do
    ],
)
def test_numbers_stay_plain_where_a_file_needs_them(use, any_length, tmp_path):
    path = tmp_path / "converts.py"
    path.write_text(CONVERTS.format(use=use))
    spec = importlib.util.spec_from_file_location("converts", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    model = made.Net().eval()
    small = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 3, 10))
    assert small.verification.ok and small.a.weight.shape[0] == 6 and not vars(made).keys() & {"int", "float"}
    longer = torch.randn(2, 3, 13)
    if any_length:
        own = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 3, 10), same_class=True)
        assert torch.allclose(small(longer), own(longer), atol=1e-6)
    else:
        with pytest.raises(GuardError, match="is 10, and here it is 13"):
            small(longer)


def looked_at(net, x):
    """The table, in a module that looks at values and so is one node."""
    return net.table if bool(x.sum() < 1e9) else net.table * 2


TABLES = {
    "slice": lambda net, x, n: net.table[:n],
    "later": lambda net, x, n: net.table[2 : n + 2],
    "last": lambda net, x, n: net.table[-n:],
    "of many": lambda net, x, n: net.tables[1, :n],
    "dots": lambda net, x, n: net.tables[0][..., :n, :],
    "narrow": lambda net, x, n: torch.narrow(net.table, 0, 0, n),
    "split": lambda net, x, n: net.table.split([n, 32 - n])[0],
    "buffer": lambda net, x, n: net.waves[: x.size(1)],
    "relative": lambda net, x, n: net.table[16 - n : 15 + n].mean(0),
    "opaque, by index": lambda net, x, n: looked_at(net, x)[torch.arange(n)],
    "opaque, by a table": lambda net, x, n: looked_at(net, x)[net.places[:n]],
    "opaque, from one on": lambda net, x, n: looked_at(net, x)[1 : n + 1],
    "opaque, by selection": lambda net, x, n: looked_at(net, x).index_select(0, torch.ones(n, dtype=torch.long).cumsum(0)),
    "vectorised": lambda net, x, n: torch.vmap(lambda i: net.table[i])(torch.arange(n)),
    "opaque": lambda net, x, n: net.table[: x.shape[1]] * (2 if bool(net.table.sum() > 0) else 3),
}


class Placed(nn.Module):
    """Adds the first rows of a table, as many as there are tokens."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.table, self.tables = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(3, 32, 16))
        self.register_buffer("waves", torch.randn(32, 16))
        self.register_buffer("places", torch.arange(32))
        self.first, self.inner, self.last = nn.Linear(4, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.inner(self.first(x) + TABLES[self.how](self, x, x.shape[1])).relu())


@pytest.mark.parametrize("how", TABLES)
def test_rows_of_a_table_that_longer_inputs_read_stay(how):
    net = Placed(how)
    small = pruned(net, torch.randn(2, 6, 4))
    assert small.inner.weight.shape[0] == 6
    masked = fxprune.masks.masked(net, small.plan)
    for length in (3, 6, 9, 14):
        x = torch.randn(3, length, 4)
        assert torch.allclose(small(x), masked(x), atol=1e-5), length


class Packed(nn.Module):
    """Attention by itself: the width of its input says where the packed projection is cut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        batch, tokens, width = x.shape
        packed = self.qkv(x)
        q, k, v = packed[..., :width], packed[..., width : 2 * width], packed[..., 2 * width :]
        q, k, v = (t.view(batch, tokens, 4, width // 4).transpose(1, 2) for t in (q, k, v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_parts_that_are_all_read_may_go_though_an_input_says_how_wide_they_are():
    net, x = Packed(), torch.randn(2, 5, 16)
    small = pruned(net, x)
    assert small.out.weight.shape == (16, 8) and small.qkv.weight.shape == (24, 16)
    assert torch.allclose(small(x[:, :3]), fxprune.masks.masked(net, small.plan)(x[:, :3]), atol=1e-5)


NUMBERS = {
    "divmod": lambda n: sum(divmod(n, 4)) + sum(divmod(100, n)),
    "trunc": lambda n: math.trunc(n / 2),
    "abs": lambda n: abs(3 - n),
    "round": lambda n: round(n / 3) + round(n / 3, 1),
    "copy": lambda n: copy.copy(n) + copy.deepcopy(n),
}


@pytest.mark.parametrize("how", NUMBERS)
def test_what_python_computes_of_a_size_is_computed_anew(how):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.b(self.a(x).relu()) * NUMBERS[how](x.shape[1])

    net, other = Counts().eval(), torch.randn(3, 9, 8)
    small = pruned(net, torch.randn(2, 5, 8))
    torch.testing.assert_close(small(other), fxprune.masks.masked(net, small.plan)(other))


def test_pieces_are_counted_where_their_truth_is_asked():
    class Cuts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            parts = self.a(x).unbind(1)
            return self.b(parts[0]) if parts else x

    small = pruned(Cuts().eval(), torch.randn(2, 5, 8))
    with pytest.raises(GuardError):
        small(torch.randn(2, 4, 8))


class Strides(nn.Module):
    """Scales maps by numbers in a tensor that is neither a parameter nor a buffer, one a map."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.factor = nn.Linear(8, 16), nn.Linear(16, 8), factor
        self.strides = torch.tensor([8.0, 16.0])

    def forward(self, x):
        x = self.b(self.a(x).relu())
        return torch.cat([y * self.factor(stride) for y, stride in zip((x, x + 1), self.strides, strict=True)], -1)


FACTORS = [lambda stride: float(stride) + 1, lambda stride: stride, lambda stride: torch.full((1,), float(stride))]


@pytest.mark.parametrize("factor", FACTORS)
def test_fractions_in_a_tensor_of_the_model_are_read_in_each_call(factor):
    model, x = Strides(factor).eval(), torch.randn(2, 3, 8)
    small = pruned(model, x)
    assert small.meta["capture"] == "symbolic" and small.a.weight.shape == (8, 8)
    small.strides = torch.tensor([2.0, 1.0])
    assert torch.allclose(small(x)[..., :8] / factor(2.0) + 1, small(x)[..., 8:] / factor(1.0), atol=1e-6)


def test_what_is_decided_by_a_fraction_is_not_captured():
    model, x = Strides(lambda stride: 3 if float(stride) > 10 else 2).eval(), torch.randn(2, 3, 8)
    assert "float()" in pruned(model, x).meta["capture"]
