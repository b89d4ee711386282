"""Criteria that look at gradients and activations, against slow, obvious references and the closed forms of their papers."""

import pytest
import torch
import torch.nn.functional as F
from scored import NEED_DATA, ONE, SPANS, agree, batch, built, gradients, scores, summed
from torch import nn

import fxprune
from fxprune import criteria


@pytest.fixture
def small():
    return built()


def test_taylor_counts_every_parameter(small):
    x, y = batch()
    g = gradients(small, x, y)
    wanted = summed(small, lambda n: (g[n] * small.get_parameter(n)) ** 2)
    found = scores(small, x, "taylor", [(x, y)], F.cross_entropy)
    agree(found, wanted)
    rest = {"one": [place for place in ONE if "norm" not in place[0]]}
    without = summed(small, lambda n: (g[n] * small.get_parameter(n)) ** 2, rest)
    assert (found["one"] > without["one"] * (1 + 1e-6)).all(), "batch normalisation counts"


def test_joint_taylor_is_the_square_of_a_layers_sum(small):
    x, y = batch()
    g = gradients(small, x, y)
    wanted = {
        family: torch.stack(
            [
                sum((g[n] * small.get_parameter(n)).select(d, i).sum() ** 2 for n, d in places)
                for i in range(small.get_parameter(places[0][0]).shape[0])
            ]
        )
        for family, places in SPANS.items()
    }
    agree(scores(small, x, criteria.Taylor(joint=True), [(x, y)], F.cross_entropy), wanted)


def test_joint_taylor_is_the_change_of_a_loss_that_is_linear():
    """Closed form: where the loss is linear in a unit's weights, their removal changes it by the sum of g w, exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    loss = lambda out: out.sum(1).mean()  # noqa: E731
    change = []
    for i in range(5):
        cut = [p.detach().clone() for p in model.parameters()]
        cut[1][:, i] = 0  # the unit's weights of one layer; those of the other take it by as much
        with torch.no_grad():
            change.append((loss(model(x)) - loss(F.relu(x @ cut[0].T) @ cut[1].T)) ** 2)
    found = scores(model, x, criteria.Taylor(joint=True), [x], loss)["0"]
    torch.testing.assert_close(found, 2 * torch.stack(change), rtol=1e-9, atol=1e-12)


def test_hessian_of_a_regression_is_its_closed_form():
    """With the loss (w h - y)^2 / 2 a weight's squared gradient is (w h - y)^2 h^2: no automatic differentiation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 1, bias=False)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    W, w = model[0].weight.detach(), model[1].weight.detach()[0]
    h = x @ W.T
    r = (h @ w)[:, None] - y
    outer = w**2 * (r**2 * h**2).mean(0) / 2
    inner = (W**2 * ((r * w) ** 2).T.unsqueeze(2).mul((x**2).unsqueeze(0)).mean(1) / 2).sum(1)
    found = scores(model, x, "hessian", [(x, y)], lambda out, y: ((out - y) ** 2).mean() / 2)
    agree(found, {"0": outer + inner})


def test_flap_of_a_channel_that_is_constant_is_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].weight[2] = 0
    found = scores(model, torch.randn(8, 3).double(), "flap", [torch.randn(8, 3).double()])["0"]
    assert found[2] < 1e-20 and (found[[0, 1, 3, 4]] > 1e-3).all()


def test_snip_is_connection_sensitivity(small):
    x, y = batch()
    g = gradients(small, x, y)
    wanted = summed(small, lambda n: (g[n] * small.get_parameter(n)).abs())
    agree(scores(small, x, "snip", [(x, y)], F.cross_entropy), wanted)


def test_hessian_is_over_single_samples(small):
    x, y = batch()
    each = [gradients(small, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    wanted = summed(small, lambda n: small.get_parameter(n) ** 2 * sum(g[n] ** 2 for g in each) / len(x) / 2)
    agree(scores(small, x, "hessian", [(x, y)], F.cross_entropy), wanted)


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient():
    """Against the whole Hessian, element by element."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    names, tensors = zip(*model.named_parameters())
    shapes = [t.shape for t in tensors]

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        values = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes)}
        return F.cross_entropy(torch.func.functional_call(model, values, x), y)

    flat = torch.cat([t.detach().reshape(-1) for t in tensors]).requires_grad_()
    (g,) = torch.autograd.grad(loss(flat), flat)
    product = flat.detach() * (torch.autograd.functional.hessian(loss, flat) @ g)
    by_name = {n: p.reshape(s) for n, p, s in zip(names, product.split([s.numel() for s in shapes]), shapes)}
    wanted = summed(model, by_name.get, {"0": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]})
    agree(scores(model, x, "grasp", [(x, y)], F.cross_entropy), wanted)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    agree(scores(model, x, "grasp", halves, F.cross_entropy), wanted)


def test_fisher_is_the_squared_gradient_of_a_mask(small):
    """A mask on each channel, where it is read: the paper's own definition."""
    x, y = batch()
    total = {"one": torch.zeros(8), "two": torch.zeros(6)}
    for i in range(len(x)):
        masks = [torch.ones(8, dtype=x.dtype, requires_grad=True), torch.ones(6, dtype=x.dtype, requires_grad=True)]
        h = F.gelu(small.norm(small.one(x[i : i + 1]))) * masks[0].reshape(1, 8, 1, 1)
        h = F.gelu(small.two(h)).mean((2, 3)) * masks[1]
        found = torch.autograd.grad(F.cross_entropy(small.head(h), y[i : i + 1]), masks)
        for family, g in zip(total, found):
            total[family] = total[family] + g**2 / len(x)
    agree(scores(small, x, "fisher", [(x, y)], F.cross_entropy), total)


def test_fisher_adds_coupled_layers_before_it_squares():
    """Two layers read the same channel: one mask."""
    torch.manual_seed(0)

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x, mask=None):
            h = self.stem(x).tanh()
            h = h if mask is None else h * mask
            return self.a(h) * self.b(h)

    model, x, y = Fork().double(), torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    total = torch.zeros(5)
    for i in range(4):
        mask = torch.ones(5, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1], mask), y[i : i + 1]), mask)
        total = total + g**2 / 4
    agree(scores(model, x, "fisher", [(x, y)], F.cross_entropy), {"stem": total})


def test_obdc_is_the_kronecker_form(small):
    """S_ii (w_i A w_i) / 2, with A built from patches and S from gradients at the convolutions' results."""
    x, y = batch()
    before = [x, F.gelu(small.norm(small.one(x)))]
    made = {}
    h = made["one"] = small.one(x)
    h = made["two"] = small.two(F.gelu(small.norm(h)))
    loss = F.cross_entropy(small.head(F.gelu(h).mean((2, 3))), y) * len(x)  # the sum: each sample's own gradient
    found = dict(zip(made, torch.autograd.grad(loss, list(made.values()))))
    wanted = {}
    for conv, source, padding in (("one", before[0], 1), ("two", before[1], 0)):
        weight, g = small.get_parameter(f"{conv}.weight").flatten(1), found[conv].flatten(2)
        patches = F.unfold(source, 3, padding=padding)  # (samples, in * 9, positions)
        A = torch.einsum("nit,njt->ij", patches, patches) / len(x)
        S = torch.einsum("nit,njt->ij", g, g) / len(x) / g.shape[-1]
        wanted[f"{conv}"] = torch.stack([S[i, i] * (w @ A @ w) / 2 for i, w in enumerate(weight)])
    agree(scores(small, x, "obdc", [(x, y)], F.cross_entropy), wanted)


def test_obdc_where_the_result_is_written_over():
    """An activation in place changes the product's result before its gradient is there."""
    torch.manual_seed(0)

    def build(inplace):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 2)).double()

    data = [(torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,)))]
    a, b = (scores(build(i), data[0][0], "obdc", data, F.cross_entropy)["0"] for i in (False, True))
    torch.testing.assert_close(a, b)
    assert (a > 0).any()


def inputs_read(model, x):
    """The activations that each consumer reads, one row for each sample and position of a channel."""
    hidden = F.gelu(model.norm(model.one(x)))
    pooled = F.gelu(model.two(hidden)).mean((2, 3))
    return {"two.weight": hidden.movedim(1, 0).flatten(1), "head.weight": pooled.T}


def test_wanda_is_the_weight_times_the_norm_of_what_it_reads(small):
    x, _ = batch()
    rows = inputs_read(small, x)
    wanted = {
        family: torch.stack(
            [(small.get_parameter(n).select(1, j).abs() * rows[n][j].norm()).sum() for j in range(len(rows[n]))]
        )
        for family, n in (("one", "two.weight"), ("two", "head.weight"))
    }
    agree(scores(small, x, "wanda", [x]), wanted)
    agree(scores(small, x, "wanda", [x[:2], x[2:]]), wanted)


def test_flap_is_the_fluctuation_times_the_squared_weights(small):
    x, _ = batch()
    rows = inputs_read(small, x)
    wanted = {
        family: torch.stack(
            [small.get_parameter(n).select(1, j).square().sum() * rows[n][j].var() for j in range(len(rows[n]))]
        )
        for family, n in (("one", "two.weight"), ("two", "head.weight"))
    }
    agree(scores(small, x, "flap", [x]), wanted)
    agree(scores(small, x, "flap", [x[:2], x[2:]]), wanted)


def test_activations_of_groups_meet_their_own_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    hidden = F.gelu(model[0](x)).movedim(1, 0).flatten(1)
    wanted = torch.stack(
        [(model[2].weight[3 * (j // 4) : 3 * (j // 4) + 3, j % 4].abs() * hidden[j].norm()).sum() for j in range(8)]
    )
    agree(scores(model, x, "wanda", [x]), {"0": wanted})


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_two_batches_equal_one_of_both(small, criterion):
    """Of unequal sizes, too: every sample counts the same."""
    x, y = batch(8)
    whole, parts = [(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]
    a, b = (scores(small, x, criterion, data, F.cross_entropy) for data in (whole, parts))
    agree(a, b)


READERS = {
    "prune": lambda model, x, data: fxprune.prune(model, 0.5, x, data=data, same_class=True),
    "basis": lambda model, x, data: fxprune.prune(model, 0.5, x, data=data, basis="principal"),
    "feasible": lambda model, x, data: fxprune.feasible(model, x, data=data),
    "sensitivity": lambda model, x, data: fxprune.sensitivity(model, x, lambda m: 1.0, data=data),
    "sweep": lambda model, x, data: fxprune.sweep(model, x, lambda m: 1.0, budgets={"macs": 0.5}, data=data),
    "calibrate": lambda model, x, data: fxprune.calibrate(model, data, "flap", x),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_data_that_cannot_be_read_say_so(read):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    with pytest.raises(fxprune.PruneError, match="reading data raises ZeroDivisionError"):
        read(model, x, (1 / 0 for _ in range(2)))


def test_batches_without_values_are_refused():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    with pytest.raises(fxprune.PruneError, match="a batch of data holds a tensor on the meta device"):
        fxprune.prune(model, 0.5, x, data=[x.to("meta")])


def test_models_and_data_made_in_inference_mode_have_gradients():
    with torch.inference_mode():
        fixed, y = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    model.load_state_dict(fixed.state_dict())
    asked = {"criterion": "token_taylor", "loss": lambda out: out.square().mean()}
    wanted = fxprune.prune(model, 0.5, x, data=[y.clone()], **asked).plan
    assert fxprune.prune(fixed, 0.5, x, data=[y], **asked).plan == wanted
