"""The two references of verification: when the zeroed original applies, which of them decides, and what is said of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.passes.ir.slices import TensorSlice, mask_of
from fxprune.passes.verification import zero_flow
from fxprune.passes.verification.masked_model import MaskedOriginal
from fxprune.passes.verification.zero_flow import why_zeroed_does_not_apply
from fxprune.passes.verification.zeroed_model import ZeroedOriginal


def net(forward, **layers) -> nn.Module:
    torch.manual_seed(0)
    model = type("Net", (nn.Module,), {"forward": forward})()
    for name, make in layers.items():
        setattr(model, name, make())
    return model.eval()


def linear(*sizes):
    return lambda: nn.Linear(*sizes)


def without(model: nn.Module, *names: str) -> ZeroedOriginal:
    """The model without the first three of eight channels: rows of weights and biases, and columns where `name:1` is said."""
    keep, slices = torch.arange(3, 8), {}
    for name in names:
        tensor, _, dim = name.partition(":")
        slices.setdefault(tensor, []).append(TensorSlice((int(dim or 0),), keep, (5,)))
    return ZeroedOriginal(model, slices)


FIRST, LAST = ["a.weight", "a.bias"], ["b.weight:1"]
APPLIES = {
    "relu": (lambda self, x: self.b(self.a(x).relu()), linear(8, 4), FIRST + LAST),
    "sigmoid meets weights of zero": (lambda self, x: self.b(self.a(x).sigmoid()), linear(8, 4), FIRST + LAST),
    "gate": (lambda self, x: self.b(self.a(x) * self.a(x).sigmoid()), linear(8, 4), FIRST + LAST),
    "gram": (lambda self, x: self.b((self.a(x) @ self.a(x).mT) @ self.a(x)), linear(8, 4), FIRST + LAST),
    "written in place": (lambda self, x: self.b(write(torch.zeros(5, 2, 8), self.a(x).relu_())), linear(8, 4), FIRST + LAST),
    "sum over channels": (lambda self, x: self.b(self.a(x).sum(-1, keepdim=True)), linear(1, 4), FIRST),
    "norm over channels": (lambda self, x: self.b(self.a(x).norm(dim=-1, keepdim=True)), linear(1, 4), FIRST),
    "softmax over tokens": (lambda self, x: self.b(self.a(x).softmax(0)), linear(8, 4), FIRST + LAST),
    "columns alone": (lambda self, x: self.b(self.a(x)), linear(8, 4), LAST),
}
MIXES = {
    "a mean over what was overwritten": (
        lambda self, x: self.b(overwrite(self.a(x)).square().mean(-1, keepdim=True)),
        linear(1, 4),
        FIRST,
        "mean",
    ),
    "mean over channels": (lambda self, x: self.b(self.a(x).mean(-1, keepdim=True)), linear(1, 4), FIRST, "mean"),
    "layer norm": (lambda self, x: self.b(F.layer_norm(self.a(x), (8,))), linear(8, 4), FIRST + LAST, "native_layer_norm"),
    "softmax over channels": (lambda self, x: self.b(self.a(x).softmax(-1)), linear(8, 4), FIRST + LAST, "_softmax"),
    "maximum over channels": (lambda self, x: self.b(self.a(x).amax(-1, keepdim=True)), linear(1, 4), FIRST, "amax"),
    "norm of a negative order": (lambda self, x: self.b(self.a(x).norm(-2, -1, True)), linear(1, 4), FIRST, "norm"),
    "the least of channels": (lambda self, x: self.b(self.a(x).norm(-torch.inf, -1, True)), linear(1, 4), FIRST, "norm"),
    "a constant that is summed": (lambda self, x: self.b(self.a(x).cos().sum(-1, keepdim=True)), linear(1, 4), FIRST, "sum"),
    "a constant that meets weights": (lambda self, x: self.b(self.a(x).sigmoid()), linear(8, 4), FIRST, "addmm"),
    "a product, then a norm": (
        lambda self, x: self.b(F.layer_norm(self.a(x) * self.a(x).tanh(), (8,))),
        linear(8, 4),
        FIRST + LAST,
        "native_layer_norm",
    ),
    "a sum with what is kept": (lambda self, x: self.b(self.a(x) + x[..., :1]), linear(8, 4), FIRST, "aten::add "),
    "order of channels": (lambda self, x: self.b(self.a(x).sort(-1).values), linear(8, 4), FIRST + LAST, "sort"),
    "a value that Python reads": (lambda self, x: self.b(self.a(x)) * float(self.a(x)[0, 0, 1]), linear(8, 4), FIRST, "scalar"),
}


def overwrite(x: Tensor) -> Tensor:
    x[..., :5] = 0
    return x


def write(out: Tensor, value: Tensor) -> Tensor:
    out[:, :, :4].copy_(value[:, :, :4])
    out[:, :, 4:] += value[:, :, 4:]
    return out


@pytest.mark.parametrize("name", APPLIES)
def test_zero_stays_out_of_the_way(name):
    forward, last, removed = APPLIES[name]
    model = net(forward, a=linear(6, 8), b=last)
    assert why_zeroed_does_not_apply(without(model, *removed), (torch.randn(5, 2, 6),), {}) == ""


@pytest.mark.parametrize("name", MIXES)
def test_what_counts_removed_entries_is_found(name):
    forward, last, removed, op = MIXES[name]
    model = net(forward, a=linear(6, 8), b=last)
    assert op in why_zeroed_does_not_apply(without(model, *removed), (torch.randn(5, 2, 6),), {})


def test_a_reason_that_the_model_catches_is_kept():
    def forward(self, x):
        try:
            return self.b(self.a(x).mean(-1, keepdim=True))
        except Exception:
            return x

    assert "mean" in why_zeroed_does_not_apply(
        without(net(forward, a=linear(6, 8), b=linear(1, 4)), *FIRST), (torch.randn(5, 2, 6),), {}
    )


def test_whole_groups_leave_a_group_norm_alone():
    """Groups of two: of the three channels that go, one leaves its group's other channel behind."""
    model = net(lambda self, x: self.b(self.n(self.a(x))), a=linear(6, 8), n=lambda: nn.GroupNorm(4, 8), b=linear(8, 4))
    names, x = [*FIRST, "n.weight", "n.bias", *LAST], (torch.randn(5, 6),)
    assert "group_norm" in why_zeroed_does_not_apply(without(model, *names), x, {})
    keep = torch.arange(2, 8)
    slices = {n.partition(":")[0]: [TensorSlice((int(n.endswith(":1")),), keep, (6,))] for n in names}
    assert why_zeroed_does_not_apply(ZeroedOriginal(model, slices), x, {}) == ""


def test_where_slices_of_nested_dimensions_remove():
    gone = ~mask_of([TensorSlice((1, 0), torch.tensor([1, 3, 5]), (3, 1))], (2, 3, 2))
    assert torch.equal(gone, torch.tensor([[[True] * 2] * 3, [[False] * 2] * 3]))


def pruned_relu():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(2, 6)
    return model, fxprune.prune(model, 0.5, example_inputs=x, verify=False), x


def test_both_references_agree():
    found = fxprune.verify(*pruned_relu())
    assert found.ok and found.masked <= 1e-6 and found.zeroed <= 1e-6
    assert found.no_zeroed == found.disagreement == ""


def test_where_the_masked_original_is_wrong_the_zeroed_one_decides(monkeypatch):
    model, pruned, x = pruned_relu()
    masked = MaskedOriginal.__call__
    monkeypatch.setattr(MaskedOriginal, "__call__", lambda *a, **k: 1.1 * masked(*a, **k))
    found = fxprune.verify(model, pruned, x)
    assert found.ok and found.masked > 0.05
    assert "the masked original differs by" in str(found) and str(found).startswith("exact")


def test_what_only_the_masked_original_calls_exact_is_not(monkeypatch):
    model, pruned, x = pruned_relu()
    with torch.no_grad():
        pruned.get_parameter("2.weight").mul_(1.1)
    monkeypatch.setattr(MaskedOriginal, "__call__", lambda self, a, k, whole: copy.deepcopy(pruned).to(a[0].dtype)(*a, **k))
    found = fxprune.verify(model, pruned, x)
    assert not found.ok and found.masked == 0 and found.error == found.zeroed > 0.01
    assert str(found).startswith("NOT exact") and "against the zeroed original" in str(found)


def test_where_zeros_are_counted_the_masked_original_decides(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval(), torch.randn(2, 6)
    pruned = fxprune.prune(model, 0.5, example_inputs=x, verify=False)
    found = fxprune.verify(model, pruned, x)
    assert found.ok and found.zeroed > 0.01 and "native_layer_norm" in found.no_zeroed
    assert "the zeroed original does not apply" in str(found)
    masked = MaskedOriginal.__call__
    monkeypatch.setattr(MaskedOriginal, "__call__", lambda *a, **k: 1.1 * masked(*a, **k))
    assert not fxprune.verify(model, pruned, x).ok


class Discriminator(nn.Module):
    """Tells channels how much they differ over the batch, in the mean; in a batch of one none does, removed or kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = linear(6, 16)(), linear(17, 4)()

    def forward(self, x):
        x = self.a(x).relu()
        deviation = (x.var(0, unbiased=False, keepdim=True) + 1e-8).sqrt().mean(-1, keepdim=True)
        return self.b(torch.cat([x, deviation.expand(len(x), -1)], -1))


def test_what_counts_removed_entries_is_found_where_one_sample_does_not_show_it():
    model, x = Discriminator().eval(), torch.randn(4, 6)
    found = fxprune.verify(model, fxprune.prune(model, 0.5, example_inputs=x), x)
    assert found.ok and found.zeroed > 0.01 and "aten::mean" in found.no_zeroed


def test_an_inexact_result_is_refused_by_both():
    model, pruned, x = pruned_relu()
    with torch.no_grad():
        pruned.get_parameter("2.weight").mul_(1.1)
    found = fxprune.verify(model, pruned, x)
    assert not found.ok and found.disagreement == "" and "the masked and the zeroed original" in str(found)


class OneBatch(nn.Module):
    """Takes batches of two alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = nn.Linear(6, 8), nn.Linear(8, 4), nn.Parameter(torch.ones(2, 1))

    def forward(self, x):
        return self.b(self.a(x).relu() * self.table)


def test_a_size_that_the_original_does_not_take_is_excused_by_its_error():
    found = fxprune.prune(OneBatch(), 0.5, example_inputs=torch.randn(2, 6), verify=True).verification
    assert found.ok and found.compared == ("the example inputs",)
    (excuse,) = found.excused
    assert excuse.startswith("another batch is not taken by the original: RuntimeError: The size of tensor a (3) must match")
    assert excuse in str(found)


def test_a_size_that_the_reference_alone_does_not_take_is_not_excused(monkeypatch):
    """It was: every error at another size counted as the original's own, and the result as exact."""
    model, _, x = pruned_relu()
    masked = MaskedOriginal.__call__

    def fails_on_three(self, args, kwargs, *rest, **options):
        if len(args[0]) == 3:
            raise RuntimeError("a defect of the reference")
        return masked(self, args, kwargs, *rest, **options)

    def refuses_all(self, args, kwargs):
        raise RuntimeError("no zeroed original")

    monkeypatch.setattr(MaskedOriginal, "__call__", fails_on_three)
    monkeypatch.setattr(ZeroedOriginal, "__call__", refuses_all)  # which would do alone, where it agrees
    with pytest.raises(fxprune.PruneError, match="could not be verified: RuntimeError: a defect of the reference"):
        fxprune.prune(model, 0.5, example_inputs=x, verify=True)


def test_the_tolerance_follows_the_arithmetic():
    """In bfloat16 by autocast, though every parameter is in float32; what is computed in float32 is judged as that."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(self.a(x).relu())
        return y.float()

    x = torch.randn(4, 6)
    model = net(forward, a=linear(6, 8), b=linear(8, 4))
    assert fxprune.verify(model, fxprune.prune(model, 0.5, x), x).tolerance == 5e-2
    assert fxprune.verify(*pruned_relu()).tolerance == 1e-3


def test_the_tolerance_is_that_of_the_narrowest_sum():
    """What is computed in float32 counts where it depends on sums over kept channels, and not in a table of positions."""

    def forward(self, x):
        y = self.a(x).relu()
        table = torch.arange(6, dtype=torch.float32).cos().double()
        return F.linear(y.float(), self.b.weight.float()).double() if self.narrow else self.b(y) * table[:4]

    x = torch.randn(4, 6).double()
    for narrow, tolerance in ((True, 1e-3), (False, 1e-8)):
        model = net(forward, a=linear(6, 8), b=linear(8, 4)).double()
        model.narrow = narrow
        found = fxprune.verify(model, fxprune.prune(model, 0.5, example_inputs=x), x)
        assert found.tolerance == tolerance and found.error < 1e-6


class Flexible(nn.Module):
    """Attention by an operator that takes a function: its ops are seen by way of the kernel that it comes to."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(flex_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_operators_that_take_functions_are_no_obstacle():
    import torch.nn.attention.flex_attention

    pruned = fxprune.prune(Flexible().eval(), 0.5, example_inputs=torch.randn(2, 16, 8), verify=True)
    assert pruned.verification.ok and pruned.verification.zeroed is not None
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in Flexible().parameters())


@pytest.mark.parametrize(
    "func, args",
    [
        (torch.ops.aten.embedding.default, lambda t, i: (t, i)),
        (torch.ops.aten.index_select.default, lambda t, i: (t, 0, i[0])),
        (torch.ops.aten.gather.default, lambda t, i: (t, 0, i)),
    ],
)
def test_notes_move_as_entries_do(monkeypatch, func, args):
    """What is found by moving the notes is what is found by drawing values, for operators that only move entries."""
    table, indices = torch.randn(7, 5), torch.randint(7, (3, 5))
    mask = torch.rand(7, 5) < 0.4
    given = args(table.masked_fill(mask, 0), indices)
    operands = [v for v in given if isinstance(v, torch.Tensor)]
    probe = zero_flow.Probe(func, given, {}, operands, [mask, None], ())
    [moved] = probe.removed_results()
    monkeypatch.setattr(zero_flow, "MOVING", frozenset())
    [drawn] = probe.removed_results()
    assert moved.any() and not moved.all() and torch.equal(moved, drawn)


@pytest.mark.parametrize("absorb", [torch.cumprod, torch.prod])
def test_a_product_of_removed_and_kept_entries_of_a_tensor_is_no_zero(absorb):
    """The zeroed model has zeros where the masked one multiplies what is kept."""

    class Multiplies(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            y = 4 * self.a(x).tanh()
            return self.b(
                absorb(y, 1).reshape(len(x), -1) * torch.ones(12) if absorb is torch.cumprod else y * absorb(y, 1)[:, None]
            )

    torch.manual_seed(0)
    model, x = Multiplies().eval(), torch.randn(4, 6)
    pruned = fxprune.prune(model, 0.3, example_inputs=x, verify=True)
    found = fxprune.verify(model, pruned, x)
    assert pruned.verification.ok and found.ok and "multiplies removed with kept entries" in str(found)
