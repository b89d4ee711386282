"""`repair(method="refit")`: least squares on the original's own activations, for the weights that lost inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune import PruneError
from fxprune.repairs import both_models, held_out, inputs, least_squares, refit

DOUBLE = torch.float64


def kept(pruned, name, dim):
    return next(c.keep for c in pruned.meta["plan"].slices[name] if c.dims == (dim,))


def ridge_solution(x, gone, ridge, constant):
    """The weight that makes up for what is gone by what is left, from the augmented system: its penalty is rows of its own."""
    if constant:
        means, lost = x.mean(0), gone.mean(0)
        x, gone = x - means, gone - lost
    size = (ridge * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, size * torch.eye(x.shape[1], dtype=x.dtype)])
    wanted = torch.cat([gone, torch.zeros(x.shape[1], gone.shape[1], dtype=x.dtype)])
    weight = torch.linalg.lstsq(rows, wanted).solution
    return weight.mT, (lost - weight.mT @ means if constant else None)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_fitted_to_what_it_lost(bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5, bias=bias)).double().eval()
    x = torch.randn(300, 6, dtype=DOUBLE)
    small = fxprune.prune(net, 0.5, x[:2])
    better = fxprune.repair(net, small, x.split(50), method="refit", ridge=0.02, held_out=0)
    h, rows = net[1](net[0](x)), kept(small, "0.weight", 0)
    others = torch.tensor([i for i in range(20) if i not in rows.tolist()])
    change, shift = ridge_solution(h[:, rows], h[:, others] @ net[2].weight[:, others].mT, 0.02, bias)
    found = better.get_submodule("2")
    assert torch.allclose(found.weight, net[2].weight[:, rows] + change, atol=1e-10)
    if bias:
        assert torch.allclose(found.bias, net[2].bias + shift, atol=1e-10)
    assert torch.equal(better.get_submodule("0").weight, small.get_submodule("0").weight)


def test_a_convolution_is_fitted_by_its_windows():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False)).double().eval()
    x = torch.randn(40, 3, 9, 9, dtype=DOUBLE)
    small = fxprune.prune(net, 0.5, x[:2])
    better = fxprune.repair(net, small, x.split(10), method="refit", ridge=0.01, held_out=0)
    h, rows = net[1](net[0](x)), kept(small, "0.weight", 0)
    others = torch.tensor([i for i in range(8) if i not in rows.tolist()])
    gone = F.conv2d(h[:, others], net[2].weight[:, others], stride=2, padding=1).movedim(1, -1).reshape(-1, 4)
    columns = F.unfold(h[:, rows], 3, stride=2, padding=1).mT.reshape(len(gone), -1)
    change, _ = ridge_solution(columns, gone, 0.01, False)
    expected = net[2].weight[:, rows] + change.reshape(4, len(rows), 3, 3)
    assert torch.allclose(better.get_submodule("2").weight, expected, atol=1e-9)


class Products(nn.Module):
    """`x @ w` with a weight of its own, read as it is, and a layer whose weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(6, 20), nn.Parameter(torch.randn(20, 12))
        self.twice, self.head = nn.Linear(12, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x):
        h = self.first(x).relu() @ self.w
        return self.head(self.twice(self.twice(h).relu()))


def test_products_are_fitted_whatever_holds_the_weight():
    torch.manual_seed(0)
    net, x = Products().double().eval(), torch.randn(300, 6, dtype=DOUBLE)
    small = fxprune.prune(net, 0.5, x[:2], freeze_outputs="twice")
    better = fxprune.repair(net, small, x.split(50), method="refit", ridge=0.02, held_out=0)
    rows = kept(small, "first.weight", 0)
    h, others = net.first(x).relu(), torch.tensor([i for i in range(20) if i not in rows.tolist()])
    change, _ = ridge_solution(h[:, rows], h[:, others] @ net.w[others], 0.02, False)
    assert torch.allclose(better.get_parameter("w"), net.w[rows] + change.mT, atol=1e-9)
    assert [s.layer for s in better.meta["repair"].done] == ["w"]


def test_a_weight_used_twice_is_left():
    torch.manual_seed(0)
    net, x = Products().double().eval(), torch.randn(300, 6, dtype=DOUBLE)
    small = fxprune.prune(net, 0.5, x[:2])
    better = fxprune.repair(net, small, x.split(50), method="refit", held_out=0)
    assert {s.layer: s.note for s in better.meta["repair"].skipped}["twice.weight"] == "it is used more than once"
    assert torch.equal(better.get_submodule("twice").weight, small.get_submodule("twice").weight)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize("same_class", [False, True])
def test_batches_come_in_any_form_that_the_original_takes(llama, same_class):
    example = {"input_ids": torch.arange(16).reshape(2, 8)}
    small = fxprune.prune(llama, 0.5, example, only="*mlp*", verify=False, same_class=same_class)
    generator = torch.Generator().manual_seed(0)
    data = []
    for size in (3, 5, 4, 4):
        ids = torch.randint(0, 64, (size, 12), generator=generator)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    better = fxprune.repair(llama, small, data, method="refit")
    found = better.meta["repair"]
    assert found.samples == (12, 4)
    assert {s.layer for s in found.steps} == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    before = [s.error for s in found.steps if s.error is not None]
    assert len(before) == 2
    assert found.error[1] <= found.error[0]


@pytest.mark.parametrize("same_class", [False, True])
def test_what_went_with_its_branch_is_not_fitted(llama, same_class):
    """A branch of attention and half of the widths are gone: what is left of one layer is fitted, what is not there is not."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (4, 12))
    one = fxprune.prune(llama, 0.5, {"input_ids": ids}, depth="only", only="*self_attn*", same_class=same_class)
    small = fxprune.prune(one, 0.5, {"input_ids": ids}, only="*mlp*", same_class=same_class)
    assert sum(name.endswith("o_proj.weight") for name in small.state_dict()) == 1
    better = fxprune.repair(llama, small, [{"input_ids": torch.randint(0, 64, (4, 12))} for _ in range(6)], method="refit")
    found = better.meta["repair"]
    assert {s.layer for s in found.steps} == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    assert found.error[1] <= found.error[0]


def test_what_is_left_behind_a_branch_that_went_is_not_fitted():
    """Of BERT's attention its last bias stays, which the stream still gets, and no weight that reads the heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    bert = BertModel(BertConfig(**sizes)).eval()
    data = [{"input_ids": torch.randint(0, 60, (4, 8))} for _ in range(4)]
    small = fxprune.prune(bert, 0.5, data[0], depth="only", only="*attention*")
    found = fxprune.repair(bert, small, data, method="refit").meta["repair"]
    assert found.error[1] <= found.error[0]


def test_other_inputs_are_no_worse_off():
    for seed in range(3):
        for samples in (3, 4, 16, 800):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).double().eval()
            x, data = torch.randn(200, 20, dtype=DOUBLE), torch.randn(samples, 20, dtype=DOUBLE)
            small = fxprune.prune(net, 0.5, x[:2], verify=False)
            better = fxprune.repair(net, small, [data], method="refit")
            off = [float((net(x) - other(x)).square().mean().detach().sqrt()) for other in (small, better)]
            assert off[1] <= 1.02 * off[0], (seed, samples)
            if samples == 800:
                assert off[1] < 0.97 * off[0]


def test_neither_model_is_touched_and_no_other_method_goes_with_it():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).eval(), torch.randn(64, 6)
    small = fxprune.prune(net, 0.5, x[:2])
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (net, small)]
    better = fxprune.repair(net, small.train(), [x], method="refit")
    assert better.training
    for state, model in zip(states, (net, small), strict=True):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    with pytest.raises(PruneError, match="goes with no other method"):
        fxprune.repair(net, small, [x], method=("refit", "fold"))
    with pytest.raises(PruneError, match="on a batch of data"):
        fxprune.repair(net, small, [torch.randn(8, 7)], method="refit")


def test_the_data_run_at_most_three_times_however_far_the_fit_may_go(llama, monkeypatch):
    """The original once to fit, and once for each look at what is held out; the pruned model once in each state."""
    data = [{"input_ids": torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]
    small = fxprune.prune(llama, 0.5, data[0], only="*mlp*", verify=False)
    runs = []

    def counting(run):
        def counted(owner, batch):
            runs.append(len(batch.kwargs["input_ids"]))
            return run(owner, batch)

        return counted

    monkeypatch.setattr(refit, "call", counting(refit.call))
    monkeypatch.setattr(both_models, "call", counting(both_models.call))
    monkeypatch.setattr(both_models.BothModels, "run", counting(both_models.BothModels.run))
    monkeypatch.setattr(held_out.Errors, "surely_less_than", lambda self, other: False)
    better = fxprune.repair(llama, small, data, method="refit")
    assert better.meta["repair"].share == 0
    assert sum(runs) <= 3 * 24
    for name, tensor in small.state_dict().items():
        assert torch.equal(better.state_dict()[name], tensor)
    runs.clear()
    monkeypatch.setattr(held_out.Errors, "surely_less_than", lambda self, other: True)
    assert fxprune.repair(llama, small, data, method="refit").meta["repair"].share == 1
    assert sum(runs) <= 1.75 * 24


def test_moments_are_those_of_all_pairs(monkeypatch):
    """Whatever the width of the blocks in which they are computed."""
    torch.manual_seed(0)
    x, r = torch.randn(2, 50, 7, dtype=DOUBLE), torch.randn(2, 50, 3, dtype=DOUBLE)
    for columns in (2, 3, 7, 8):
        monkeypatch.setattr(inputs, "COLUMNS", columns)
        found = least_squares.NormalEquations(False)
        for part in (slice(20), slice(20, 50)):
            found.add(inputs.Matrix(x[:, part]), r[:, part])
            torch.testing.assert_close(found.whole(), x[:, : part.stop].mT @ x[:, : part.stop])
        torch.testing.assert_close(found.cross, x.mT @ r)
