"""What a forward does beside its tensors: results it remembers, numbers of NumPy, tables of nothing, a batch of one."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.passes.capture import programs as capture_programs
from fxprune.passes.coupling import couple
from fxprune.selection.costs import Costs
from fxprune.selection.options import Options


def remembered(function):
    """A decorator of one's own around a cache."""
    cached = functools.lru_cache(function)

    @functools.wraps(function)
    def wrapper(*args):
        return cached(*args)

    return wrapper


@functools.lru_cache
def plainly(n):
    return torch.arange(n) * 1.0


@remembered
def wrapped(n):
    return torch.arange(n) * 1.0


class Remembers(nn.Module):
    """Adds positions that were computed for the first input of a length, and asks for its mode, so that it is traced twice."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b = how, nn.Linear(8, 16), nn.Linear(16, 8)

    @functools.lru_cache
    def method(self, n):
        return torch.arange(n) * 1.0

    @staticmethod
    @functools.lru_cache
    def static(n):
        return torch.arange(n) * 1.0

    @staticmethod
    @remembered
    def both(n):
        return torch.arange(n) * 1.0

    def forward(self, x):
        table = {"plainly": plainly, "wrapped": wrapped}.get(self.how) or getattr(self, self.how)
        x = x + table(x.shape[1])[:, None]
        if self.training:
            x = x.tanh()
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("how", ["plainly", "wrapped", "method", "static", "both"])
def test_what_a_function_remembers_holds_no_proxies(how):
    """Neither the original nor the second trace meets what was computed in the first one, and other lengths are computed."""
    model, x = Remembers(how).eval(), torch.randn(2, 3, 8)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic"
    assert type(model(x)) is torch.Tensor and pruned(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    cached = {"plainly": plainly, "wrapped": wrapped}.get(how) or getattr(Remembers, how)
    cached = cached if hasattr(cached, "cache_info") else cached.__closure__[0].cell_contents
    before = cached.cache_info().hits
    model(x)
    assert cached.cache_info().hits == before + 1, "it remembers again"
    mask = fxprune.masks.masked(model, fxprune.plan_of(pruned)).train()
    assert torch.allclose(pruned.train()(x), mask(x), atol=1e-6)


class Numbers(nn.Module):
    """Scales by numbers of NumPy, from either side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), np.sqrt(16)

    def forward(self, x):
        return self.b(np.float32(0.5) * self.a(x).relu() / self.scale * np.float64(3))


def test_numbers_of_numpy_are_written_down_as_numbers():
    pruned = fxprune.prune(Numbers().eval(), 0.5, example_inputs=torch.randn(2, 8))
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic" and "np." not in pruned.code


class Packs(nn.Module):
    """Packs sequences of several lengths for a recurrent layer, and checks a size with NumPy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.rnn, self.b = nn.Linear(8, 16), nn.GRU(16, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x, lengths):
        if (np.array(x.shape[2:]) % 8 != 0).any():
            raise ValueError("its width is no multiple of 8")
        packed = nn.utils.rnn.pack_padded_sequence(self.a(x), lengths, batch_first=True)
        return self.b(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_sequences_are_packed_and_numpy_is_given_sizes():
    inputs = torch.randn(2, 5, 8), torch.tensor([5, 3])
    pruned = fxprune.prune(Packs().eval(), 0.5, example_inputs=inputs)
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic"
    assert pruned.rnn.hidden_size == 6


class Weighs(nn.Module):
    """Makes a tensor of as many entries as one of its parameters has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        width = self.a.weight.size(0)
        return self.b(self.a(x).relu() + torch.ones(3, 2).new_ones((1, width)) / width)


def test_the_size_of_a_parameter_is_a_number():
    pruned = fxprune.prune(Weighs().eval(), 0.5, example_inputs=torch.randn(2, 8))
    assert pruned.verification.ok and pruned.a.out_features == 8


def mask_of(lengths):
    """True where a sequence of this length has an entry."""
    return torch.arange(int(lengths.max())) < lengths[:, None]


class Masks(nn.Module):
    """Reads values in a function, called from its own forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, lengths):
        return self.b(self.a(x).relu() * mask_of(lengths)[..., None])


def test_a_function_that_reads_values_is_one_node():
    """And the model around it is captured op by op; the function computes what it does for other lengths."""
    model, x = Masks().eval(), torch.randn(2, 5, 8)
    pruned = fxprune.prune(model, 0.5, example_inputs=(x, torch.tensor([5, 3])))
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic"
    assert pruned.a.out_features == 8 and [n.name for n in pruned.graph.nodes if n.target is mask_of] == ["mask_of"]
    assert pruned(x[:, :4], torch.tensor([2, 4])).shape == (2, 4, 4)
    assert type(mask_of(torch.tensor([2]))) is torch.Tensor


class Registers(nn.Module):
    """Room for tokens of which there are none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.none, self.a, self.b = nn.Parameter(torch.zeros(1, 0, 8)), nn.Linear(8, 16), nn.Linear(16, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        x = torch.cat([self.none.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
        x = self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.b(self.a(x).relu())


def test_a_parameter_without_entries():
    pruned = fxprune.prune(Registers().eval(), 0.5, example_inputs=torch.randn(2, 3, 8))
    assert pruned.verification.ok and pruned.qkv.out_features == 12 and pruned.a.out_features == 8


class Rows(nn.Module):
    """Attention over rows that are batch times heads, whose batch comes from them again (as in BLOOM)."""

    def __init__(self, heads=4):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.q, self.k, self.v, self.out = heads, *(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2).flatten(0, 1) for f in (self.q, self.k, self.v))
        x = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        x = x.view(x.shape[0] // self.heads, self.heads, n, -1).transpose(1, 2)
        return self.out(x.reshape(x.shape[0], n, -1))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_batch_that_is_computed_from_batch_times_heads_stays_free(batch):
    """With one example the rows are the heads, and the batch a constant to all appearance."""
    model = Rows().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.randn(batch, 5, 32))
    assert pruned.q.out_features == 16
    mask = fxprune.masks.masked(model, fxprune.plan_of(pruned))
    for other in (1, 2, 5):
        x = torch.randn(other, 7, 32)
        assert torch.allclose(pruned(x), mask(x), atol=1e-6)


class Moves(nn.Module):
    """Brings its inputs, and what it makes, to where its own parameters are, as models of transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x):
        x = x.to(self.device, torch.float32) + torch.ones(8, device=self.device)
        return self.b(self.a(x).relu() + torch.zeros(1, 16).to(device=self.device))


def test_the_device_of_the_models_own_tensors_is_the_real_one():
    """The capture runs without values, on another device than the model is on."""
    pruned = fxprune.prune(Moves().eval(), 0.5, example_inputs=torch.randn(2, 8))
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic" and "meta" not in pruned.code


class Maps(nn.Module):
    """Scores every pair of places with `torch.vmap`, twice over, as masks of transformers are made."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        later = torch.vmap(torch.vmap(torch.ge, (None, 0)), (0, None))(places, places)
        return self.b(self.a(later.to(x.dtype) @ x).relu())


def test_a_function_mapped_over_a_dimension():
    """It would read a proxy's memory, where nothing is: so it is a node, and the sizes of the input stay free."""
    pruned = fxprune.prune(Maps().eval(), 0.5, example_inputs=torch.randn(2, 3, 8))
    assert pruned.verification.ok and pruned.a.out_features == 8
    assert pruned(torch.randn(3, 7, 8)).shape == (3, 7, 8)


class Handed(torch.autograd.Function):
    """Runs modules in a function of its own, as reversible networks do."""

    @staticmethod
    def forward(ctx, x, layers):
        for layer in layers:
            x = x + layer(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))  # noqa: E731
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, x):
        return Handed.apply(x, self.layers)


def test_modules_that_are_handed_to_a_function():
    """What calls them is one node, and they are pruned in it."""
    model, x = nn.Sequential(nn.Linear(4, 8), Reversible(), nn.Linear(8, 4)).eval(), torch.randn(2, 4)
    assert {f.units for f in fxprune.couple(model, x).prunable} == {8, 16}
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.get_submodule("1").layers[0][0].out_features == 8


class Extends(nn.Module):
    """Replaces a buffer by what it makes of it, and notes results in containers, before it reads a value."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("table", torch.randn(5, 8))
        self.notes, self.named, self.empty = ["first"], {"first": 1}, {}

    def forward(self, x):
        self.table = self.table * 1.0
        self.notes.append(x)
        self.named["first"] = self.empty["x"] = x
        x = x + self.table[: x.shape[1]]
        if (x == 0).all():
            return x
        return self.b(self.a(x).relu())


def test_what_is_put_into_buffers_and_containers_is_taken_back():
    """The module that reads a value runs again as one node: on its own buffer, and not on a proxy left over."""
    model = nn.Sequential(nn.Linear(8, 8), Extends(), nn.Linear(8, 8)).eval()
    before = model[1].table.clone()
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.randn(2, 3, 8))
    assert pruned.verification.ok and pruned.get_submodule("1").a.out_features == 8
    mine = model[1]
    assert torch.equal(mine.table, before) and (mine.notes, mine.named, mine.empty) == (["first"], {"first": 1}, {})


class Overlaps(nn.Module):
    """Adds up overlapping windows of a single channel, as an inverse Fourier transform of short windows does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 6)
        self.register_buffer("start", torch.tensor(2))

    def forward(self, x):
        windows = self.b(self.a(x).relu()).mT
        signal = nn.functional.fold(windows, (1, 6 + 2 * (x.shape[1] - 1)), (1, 6), stride=(1, 2))[:, 0, 0, 2:-2]
        return signal / 2


def test_windows_of_one_channel_that_are_added_up():
    model, x = Overlaps().eval(), torch.randn(2, 5, 8)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and (pruned.a.out_features, pruned.b.out_features) == (8, 6)
    [window] = [f for f in fxprune.couple(model, x).frozen if ("b.weight", 0) in f.members]
    assert window.frozen.startswith("is a window, the entries of which are summed")


class Bounded(nn.Module):
    """Slices channels by numbers that it holds as tensors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(12, 8)
        self.register_buffer("ends", torch.tensor([2, 14]))

    def forward(self, x):
        return self.b(self.a(x).relu()[:, self.ends[0] : self.ends[1]])


def test_bounds_that_are_tensors():
    pruned = fxprune.prune(Bounded().eval(), 0.5, example_inputs=torch.randn(2, 8))
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic" and pruned.b.in_features < 12


class Draws(nn.Module):
    """Noise in evaluation, too, before and after a norm over what is pruned (which makes the reference run twice)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.a(x * torch.rand(len(x), 1))
        return self.b(self.norm(x) * torch.rand(len(x), 1)) + torch.randn(len(x), 8)


def test_a_model_that_draws_random_numbers_in_evaluation():
    """Original and pruned model draw the same ones while they are compared, and nobody's generator has moved."""
    model, state = Draws().eval(), torch.get_rng_state()
    pruned = fxprune.prune(model, 0.5, example_inputs=torch.zeros(3, 8) + 1)
    assert pruned.verification.ok and torch.equal(state, torch.get_rng_state())


class Ranks(nn.Module):
    """Returns places in the order of their scores, which differ by less than single precision holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.score = nn.Linear(8, 1000), nn.Linear(1000, 500), nn.Linear(500, 1)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        order = self.score(x).squeeze(-1).topk(x.shape[1]).indices
        return x, order / x.shape[1]


def test_what_rounding_ranks_otherwise_is_compared_in_double_precision():
    x = torch.randn(1, 8) * (1 + 3e-7 * torch.arange(200.0)).view(1, 200, 1)
    model = Ranks().eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    assert pruned.verification.ok and pruned.verification.compared[-1] == "in double precision"
    assert all(p.dtype is torch.float32 for m in (model, pruned) for p in m.parameters())
    assert fxprune.prune(model.double(), 0.5, example_inputs=x.double()).verification.compared[-1] != "in double precision"


def test_a_pruned_model_that_is_wrong_is_wrong_in_double_precision_too():
    model, x = Ranks().eval(), torch.randn(1, 5, 8)
    pruned = fxprune.prune(model, 0.5, example_inputs=x)
    with torch.no_grad():
        pruned.b.bias += 0.1
    found = fxprune.verify(model, pruned, x)
    assert not found.ok and "in double precision" not in found.compared


class Repeats(nn.Module):
    """Says beforehand how long the result of a repetition is, as a layer without synchronisation does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(32, 8)

    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x.repeat_interleave(2, dim=1, output_size=2 * x.shape[1]))


def test_a_repetition_of_a_known_length():
    pruned = fxprune.prune(Repeats().eval(), 0.5, example_inputs=torch.randn(2, 8))
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic" and pruned.b.in_features < 32


def made_here(net, x):
    """Constants of the forward's own, on the device of its input, meet what is computed from weights."""
    steps = torch.arange(8, device=x.device).float()
    return net.b(net.a(x + (steps[:, None] * net.scale[:8]).sum(0)).relu() * torch.ones(16, device=x.device))


def asks(net, x):
    assert x.device.type == "cpu" and not x.is_cuda and x.is_cpu and not x.is_meta and x.get_device() == -1
    assert x.device == net.scale.device
    return net.b(net.a(x).relu())


def brings(net, x):
    """To be brought to where one is makes no copy: what is written there is written here."""
    x = net.a(x)
    y = x.to(x.device)
    y *= net.scale.to(device=y.device)
    return net.b(x.relu())


def looks_up(net, x):
    places = torch.arange(x.shape[1], device=x.device).flip(0)
    return net.b(net.a(x[:, places]).relu() + net.a(x).index_select(1, torch.arange(15, -1, -1, device=x.device)))


def writes(net, x):
    """Into a tensor of its own, whose contents then are no longer known."""
    table = torch.zeros(16, device=x.device)
    table += net.scale
    return net.b(net.a(x).relu() * table)


def writes_places(net, x):
    """Indices that weights decide: there is no run without values of that."""
    places = torch.zeros(16, dtype=torch.long, device=x.device)
    places += net.scale.argsort()
    return net.b(net.a(x).relu()[:, places])


class Placed(nn.Module):
    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.rand(16))
        self.between = between

    def forward(self, x):
        return self.between(self, x)


@pytest.mark.parametrize("between", [made_here, asks, brings, looks_up, writes, writes_places])
def test_a_run_without_values_is_where_the_model_is(between, monkeypatch):
    """A device that is asked for is the model's, and what is found is what a run with values finds."""
    runs, plain = [], couple.programs
    model, x = Placed(between).eval(), torch.randn(2, 8)

    def programs(model, args, kwargs, stand_in):
        runs.append(stand_in is None)
        if len(runs) == 1 and first_is_given_up:
            raise RuntimeError
        return plain(model, args, kwargs, stand_in)

    monkeypatch.setattr(couple, "programs", programs)
    monkeypatch.setenv("FXPRUNE_STRICT", "0")
    first_is_given_up = False
    found = fxprune.couple(model, x)
    assert runs == ([False, True] if between is writes_places else [False])
    runs.clear()
    first_is_given_up = True
    assert fxprune.couple(model, x).to_dict() == found.to_dict() and runs == [False, True]
    first_is_given_up = False
    if between is not writes_places:  # which keeps all channels
        pruned = fxprune.prune(model, 0.5, example_inputs=x, verify=True)
        assert pruned.a.weight.shape == (8, 8) and "meta" not in pruned.code


def turned_in_place(x):
    places = torch.arange(16)
    places *= -1
    places += 15
    return x[:, places] + x


def put_through_a_view(x):
    places = torch.arange(16)
    places.view(2, 8)[:] = torch.arange(15, -1, -1).view(2, 8)
    return x.index_select(1, places) + x


def looked_up_before(x):
    """The two look up different things."""
    places = torch.arange(16)
    y = x[:, places]
    places.copy_(places.flip(0).clone())
    return x[:, places] + y


def looked_up_before_by_nodes(x):
    """A value has one set of contents."""
    places = torch.arange(16, device=x.device)
    y = x[:, places]
    places.copy_(places.flip(0).clone())
    return x[:, places] + y


def put_by_the_input(x):
    places = torch.arange(16)
    places[:2] = (x[0, :2] > 100).long()
    return x[:, places] + x


WRITTEN = {
    turned_in_place: True,
    put_through_a_view: True,
    looked_up_before: True,
    looked_up_before_by_nodes: False,
    put_by_the_input: False,
}


@pytest.mark.parametrize("between", WRITTEN)
def test_indices_that_are_written_to(between):
    """What is looked up is what stands there at the time; where that cannot be said the channels stay."""
    model, x = Placed(lambda net, x: net.b(between(net.a(x).relu()) * net.scale)).eval(), torch.randn(2, 8)
    family = next(f for f in fxprune.couple(model, x).families if ("a.weight", 0) in f.members)
    assert (family.frozen is None) == WRITTEN[between]
    if WRITTEN[between]:
        assert family.units == 8  # a channel and its mirror image
        pruned = fxprune.prune(model, 0.5, example_inputs=x, verify=True)
        assert pruned.a.weight.shape == (8, 8)


def counted(x):
    """A tensor of the forward's own starts anew with every call."""
    seen = torch.zeros(1, 8)
    seen += x[:1].detach()
    seen[:, :2] *= 2
    return x + seen


def counted_twice(x):
    """The first of two is written to by the program; then Python writes to the tensor, and it is another."""
    seen = torch.zeros(1, 8)
    y = seen.index_add_(0, torch.zeros(1, dtype=torch.long), x[:1]).clone()
    seen.fill_(1)
    return x + y + seen


@pytest.mark.parametrize("counted", [counted, counted_twice])
def test_a_constant_that_is_written_to_starts_anew(counted):
    model, x = Placed(lambda net, x: net.b(net.a(counted(x)).relu())).eval(), torch.randn(2, 8)
    pruned = fxprune.prune(model, 0.5, example_inputs=x, verify=True)
    assert pruned.a.weight.shape == (8, 8)
    with torch.no_grad():
        assert torch.equal(pruned(x), pruned(x))


class Attends(nn.Module):
    """Four heads of eight; `keys` of them have keys and values of their own."""

    def __init__(self, keys=4, flat=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(8, 32), nn.Linear(8, 8 * keys), nn.Linear(8, 8 * keys), nn.Linear(32, 8)
        self.flat, self.options = flat, options

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.flat:
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, **self.options)
        if self.flat:
            out = out.view(x.shape[0], -1, *out.shape[1:])
        return self.o(out.transpose(1, 2).flatten(2))


MASK = torch.ones(6, 6).tril()
ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": MASK.bool()},
    "mask": {"attn_mask": MASK.log().clamp(min=-9.0), "scale": 0.3},
    "dropout": {"dropout_p": 0.5},
    "grouped": {"keys": 2, "enable_gqa": True},
    "one key": {"keys": 1},
    "flat": {"flat": True},
}


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_couples_without_values_as_with_them(kind, attention, monkeypatch):
    """One call in the op trace of one run, what the kernel of the time comes to in the other."""
    model, x = Attends(**ATTENTION[kind]).eval(), torch.randn(2, 6, 8)
    found = fxprune.couple(model, x, attention=attention).to_dict()
    plain, ways = couple.programs, []

    def with_values(*args):
        if args[-1] is not None:
            raise RuntimeError
        ways.append(plain(*args))
        return ways[-1]

    with monkeypatch.context() as patch:
        patch.setenv("FXPRUNE_STRICT", "0")
        patch.setattr(couple, "programs", with_values)
        assert fxprune.couple(model, x, attention=attention).to_dict() == found and len(ways) == 1
        solution = couple.analyse(model, (x,), {}, Options.parse(model, attention=attention).coupling)
    assert Costs(solution, dict(model.named_parameters())).original("macs") == fxprune.count(model, x).macs
    if kind != "dropout":
        pruned = fxprune.prune(model, 0.5, example_inputs=x, attention=attention, verify=True)
        assert pruned.o.in_features == 16


class Clamps(nn.Module):
    """Reads a value of its input while it trains."""

    def __init__(self, of_indices):
        super().__init__()
        self.one, self.two, self.of_indices = nn.Linear(6, 8), nn.Linear(8, 6), of_indices

    def forward(self, x, at):
        x = self.two(self.one(x).relu())
        if self.training and (at if self.of_indices else x).max() > 5:
            x = x.clamp(max=5)
        return x


class ClampsInside(nn.Module):
    def __init__(self, of_indices):
        super().__init__()
        self.inner, self.head = Clamps(of_indices), nn.Linear(6, 3)

    def forward(self, x, at):
        return self.head(self.inner(x, at))


@pytest.mark.parametrize("of_indices", [False, True])
def test_training_that_reads_values_is_run_with_values_at_once(of_indices, monkeypatch):
    """A run without values is made of what such a run can be made of, here one that reads indices, which it has."""
    runs = []
    captured = capture_programs.captured
    monkeypatch.setattr(
        capture_programs, "captured", lambda root, *a, **k: runs.append(runs_on(root)) or captured(root, *a, **k)
    )
    model, x, at = ClampsInside(of_indices), torch.randn(4, 6), torch.tensor([1, 9])
    small = fxprune.prune(model, ratio=0.5, example_inputs=(x, at))
    assert runs == [("meta", False), ("meta" if of_indices else "cpu", True)]
    assert small.get_submodule("inner.one").weight.shape == (4, 6)
    twin = copy.deepcopy(small).train()
    assert len([n for n in twin.graph.nodes if n.op == "call_module"]) == 2  # the module that reads, and the head
    large = torch.full((4, 6), 1e3)
    inner = twin.get_submodule("inner")
    assert inner(large, at).max() <= 5 and inner.two.weight.shape == (3, 4)  # half of six, half of eight


def runs_on(root):
    return next(root.parameters()).device.type, root.training


def test_a_tensor_that_an_input_is_written_into_depends_on_it():
    """Through a view of it, as well as by itself: what a criterion sees of a layer are its inputs."""

    class Assembled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            both = torch.zeros(x.shape[0], 8)
            before = both.view(-1, 2, 4)
            both[:, :4] = x
            before[:, 1] = x
            return self.b(self.a(both).relu()) + before.sum()

    model = Assembled().eval()
    trace = capture_programs.programs(model, (torch.randn(5, 4),), {}, None)[0].op_trace
    read = {op.func._schema.name: [trace.values[ref.id].from_input for ref in op.inputs] for op in trace.ops}
    assert read["aten::sum"] == [True] and read["aten::addmm"] == [False, True, False]
