"""Experts as one tensor of three dimensions, multiplied run by run (`torch._grouped_mm`): their hidden units are pruned."""

import pytest
import torch
from torch import nn

import fxprune
from fxprune.inputs import ExampleInputs
from fxprune.passes.capture.programs import programs
from fxprune.passes.ir.module_tree import on_meta
from fxprune.reports.profile import macs_by_module

pytestmark = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no such kernel")


class Experts(nn.Module):
    """A mixture of experts with one choice for each token; `gated` halves a wider first product, as gated experts do."""

    def __init__(self, hidden=20, experts=3, transposed=False, gated=False):
        super().__init__()
        torch.manual_seed(0)
        wide = 2 * hidden if gated else hidden
        up, down = torch.randn(experts, 16, wide), torch.randn(experts, hidden, 16)
        if transposed:
            up, down = up.mT.contiguous(), down.mT.contiguous()
        self.up, self.down = nn.Parameter(up / 4), nn.Parameter(down / 4)
        self.gate, self.body, self.head = nn.Linear(16, experts), nn.Linear(8, 16), nn.Linear(16, 4)
        self.transposed, self.gated, self.experts = transposed, gated, experts

    def product(self, x, weight, ends):
        return torch._grouped_mm(x, weight.mT if self.transposed else weight, offs=ends)

    def forward(self, x):
        x = self.body(x)
        chosen, order = self.gate(x).argmax(-1).sort()
        ends = torch.histc(chosen.float(), bins=self.experts, min=0, max=self.experts - 1).cumsum(0).to(torch.int32)
        y = self.product(x[order], self.up, ends)
        if self.gated:
            a, b = y.chunk(2, -1)
            y = a.sigmoid() * b
        else:
            y = y.relu()
        y = self.product(y, self.down, ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self.head(y[back])


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_hidden_units_of_experts_are_pruned(ratio, gated, transposed):
    """Whatever is left of them: the kernel takes rows of whole multiples of 16 bytes, so some widths need filling up."""
    model, x = Experts(transposed=transposed, gated=gated).eval(), torch.randn(12, 8)
    pruned = fxprune.prune(model, ratio, example_inputs=x)
    assert pruned.verification.ok and pruned.meta["capture"] == "symbolic"
    hidden = pruned.down.shape[2 if transposed else 1]
    assert hidden == 20 - int(20 * ratio) and pruned.up.shape[1 if transposed else 2] == hidden * (2 if gated else 1)
    assert pruned.up.shape[0] == pruned.down.shape[0] == 3


@pytest.mark.parametrize("how", ["aot_eager", "export"])
@pytest.mark.parametrize("ratio", [{"body": 0.25}, 0.2])
def test_experts_are_compiled_and_exported_in_single_precision(ratio, how):
    """What torch's compilers know of the product is for bfloat16 alone. Also of experts that lose nothing."""
    model, x = Experts().eval(), torch.randn(12, 8)
    pruned = fxprune.prune(model, ratio, example_inputs=x)
    assert pruned.up.shape == ((3, 13, 16) if ratio == 0.2 else (3, 12, 20))
    want = pruned(x)
    if how == "export":
        found = torch.export.export(pruned, (x,)).module()
    else:
        found = torch.compile(pruned, backend=how, fullgraph=True)
    torch.testing.assert_close(found(x), want)
    if how == "aot_eager":
        parameters = [pruned.up, pruned.down, pruned.body.weight]
        expected = torch.autograd.grad(want.square().sum(), parameters)
        for a, b in zip(torch.autograd.grad(found(x).square().sum(), parameters), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_experts_are_captured_without_values():
    """A run with values of a model of many billions of parameters would take its memory, and its time."""
    [capture] = programs(Experts().eval(), (torch.randn(12, 8),), {}, on_meta)
    products = [op for op in capture.op_trace.ops if op.func is torch.ops.aten._grouped_mm.default]
    assert [capture.op_trace.values[op.outs.id].shape for op in products] == [(12, 20), (12, 16)]
    assert all(capture.op_trace.values[op.outs.id].dtype is torch.float32 for op in products)


def test_what_experts_read_is_pruned_with_their_neighbours():
    pruned = fxprune.prune(Experts().eval(), {"body": 0.5}, example_inputs=torch.randn(12, 8))
    assert pruned.verification.ok
    assert pruned.body.out_features == pruned.up.shape[1] == pruned.gate.in_features == 8
    assert pruned.up.shape[2] == pruned.down.shape[1] == 20 and pruned.head.in_features == 16


def test_experts_themselves_stay():
    coupling = fxprune.couple(Experts().eval(), torch.randn(12, 8))
    reasons = {f.frozen.partition(" (")[0] for f in coupling.frozen if any(name == "up" for name, _ in f.members)}
    assert reasons == {"is in a product whose runs are told apart by their ends"}


class Stacks(nn.Module):
    """As many stacks of rows as matrices: an ordinary batched product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(3, 8, 20)), nn.Parameter(torch.randn(3, 20, 8))

    def forward(self, x):
        return torch._grouped_mm(torch._grouped_mm(x, self.a).relu(), self.b)


def test_stacks_of_rows_are_a_batched_product():
    pruned = fxprune.prune(Stacks().eval(), 0.5, example_inputs=torch.randn(3, 5, 8))
    assert pruned.verification.ok and pruned.a.shape == (3, 8, 10)


class Columns(nn.Module):
    """Runs along the columns of the second operand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        weight = torch.ones(16, 12) / 16
        ends = torch.tensor([4, 8, 12], dtype=torch.int32)
        y = torch._grouped_mm(self.a(x).relu().view(3, 4, 16), weight, offs=ends)
        return self.b(x @ torch.ones(8, 16)) + y.mean()


def test_runs_along_another_dimension_keep_what_they_meet():
    coupling = fxprune.couple(Columns().eval(), torch.randn(12, 8))
    [mine] = [f for f in coupling.families if ("a.weight", 0) in f.members]
    assert mine.frozen.startswith("is in a product whose runs are told apart by their ends")


def score_by_hand(model, batches, criterion):
    """Of each hidden unit, from the rows that the second product reads and the gradients of the loss there."""
    total = torch.zeros(20)
    rows = []
    for x, target in batches:
        read = []
        first = model.product
        model.product = lambda y, weight, ends: first(keep(y, read) if weight is model.down else y, weight, ends)
        loss = nn.functional.cross_entropy(model(x), target)
        del model.product
        (y,) = read
        (g,) = torch.autograd.grad(loss, [y])
        total += (len(x) * g * y).square().sum(0).detach()
        rows.append(y.detach())
    y = torch.cat(rows)
    weight = model.down.detach().transpose(0, 1).flatten(1)
    if criterion == "wanda":
        return weight.abs().sum(1) * y.square().sum(0).sqrt()
    return total if criterion == "token_taylor" else weight.square().sum(1) * y.var(0)


def keep(y, read):
    read.append(y)
    return y


@pytest.mark.parametrize("criterion", ["token_taylor", "wanda", "flap"])
def test_hidden_units_are_scored_by_data(criterion):
    model = Experts().eval()
    batches = [(torch.randn(12, 8), torch.randint(0, 4, (12,))) for _ in range(3)]
    options = {"criterion": criterion, "data": batches, "loss": nn.functional.cross_entropy, "freeze": ["body", "head"]}
    pruned = fxprune.prune(model, 0.5, example_inputs=batches[0][0], **options)
    stay = score_by_hand(model, batches, criterion).topk(10).indices.sort().values
    assert torch.equal(pruned.down, model.down[:, stay]) and torch.equal(pruned.up, model.up[:, :, stay])


def test_products_of_experts_are_counted_and_left_by_reconstruct():
    """One multiply-accumulate for each row, entry of the row and entry of the result; each row meets one of the matrices."""
    model, x = Experts().eval(), torch.randn(12, 8)
    plain = 12 * (8 * 16 + 16 * 3 + 16 * 4)
    assert fxprune.count(model, x).macs == plain + 12 * 2 * 16 * 20
    assert macs_by_module(model, ExampleInputs.parse(x))[""] == plain + 12 * 2 * 16 * 20
    half = fxprune.prune(model, macs=0.5, example_inputs=x, freeze="body", round_to=4)  # a whole line of 16 bytes
    assert fxprune.count(half, x).macs <= 0.5 * fxprune.count(model, x).macs
    data = [torch.randn(12, 8) for _ in range(4)]
    again = fxprune.repair(model, half, data, method="reconstruct")
    assert torch.equal(again.down, half.down) and torch.equal(again.up, half.up)
