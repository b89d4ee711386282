"""`attention="queries"`: query heads go, within the KV head that they share; each KV head keeps equally many."""

import copy

import pytest
import torch
import transformers as hf
from test_experts import SMALL, TOKENS
from torch import nn
from torch.nn import functional as F

import fxprune

WIDE = {**SMALL, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}


class Grouped(nn.Module):
    """Six query heads of width 4, three for each of two KV heads."""

    def __init__(self, how, shared=2):
        super().__init__()
        self.how, self.shared = how, shared
        self.q, self.k, self.v, self.o = (
            nn.Linear(10, 24),
            nn.Linear(10, 4 * shared),
            nn.Linear(10, 4 * shared),
            nn.Linear(24, 10),
        )

    def forward(self, x):
        heads = [layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        q, k, v = heads
        if self.how == "copies":
            k, v = k.repeat_interleave(6 // self.shared, 1), v.repeat_interleave(6 // self.shared, 1)
        if self.how == "product":
            k, v = (t[:, :, None].expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, -1, 4) for t in (k, v))
            return self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(-2))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "native")
        return self.o(y.transpose(1, 2).flatten(-2))


def llama(name):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**WIDE)
    return getattr(hf, f"{name}ForCausalLM")(config).eval().double()


def silent(model, output, heads, width):
    """The original, in which some heads hand nothing to an output projection."""
    made = copy.deepcopy(model)
    weight = made.get_submodule(output).weight.data.unflatten(1, (-1, width))
    weight[:, heads] = 0
    return made


@pytest.mark.parametrize("how", ["native", "copies", "product"])
def test_own_attention(how):
    torch.manual_seed(0)
    model, x = Grouped(how).double(), torch.randn(2, 5, 10).double()
    small = fxprune.prune(model, 0.4, x, attention="queries", only=["q", "o"])
    (cut,) = fxprune.plan_of(small).slices["q.weight"]
    kept = sorted({i // 4 for i in cut.keep.tolist()})
    assert len(kept) == 4 and sum(h < 3 for h in kept) == 2
    assert small.k.weight.shape == model.k.weight.shape
    gone = [h for h in range(6) if h not in kept]
    torch.testing.assert_close(small(x), silent(model, "o", gone, 4)(x))
    y = torch.randn(3, 7, 10).double()
    torch.testing.assert_close(small(y), silent(model, "o", gone, 4)(y))


def test_groups_lose_other_heads():
    """Which of its query heads a KV head loses is its own."""
    torch.manual_seed(0)
    model, x = Grouped("native"), torch.randn(2, 5, 10)
    for head in (0, 4):  # the least important of either group
        model.q.weight.data[4 * head : 4 * head + 4] *= 0.01
        model.q.bias.data[4 * head : 4 * head + 4] *= 0.01
        model.o.weight.data[:, 4 * head : 4 * head + 4] *= 0.01
    small = fxprune.prune(model, 0.4, x, attention="queries", only=["q", "o"])
    (cut,) = fxprune.plan_of(small).slices["q.weight"]
    assert sorted({i // 4 for i in cut.keep.tolist()}) == [1, 2, 3, 5]


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_transformers(name, tmp_path):
    model, call = llama(name), {"input_ids": TOKENS, "use_cache": False}
    small = fxprune.prune(model, 0.4, call, attention="queries", only="*self_attn*", same_class=True)
    reference = model
    for i in range(2):
        path = f"model.layers.{i}.self_attn"
        cut = next(c for c in fxprune.plan_of(small).slices[f"{path}.q_proj.weight"] if c.dims == (0,))
        gone = [h for h in range(6) if h not in {j // 8 for j in cut.keep.tolist()}]
        assert len(gone) == 2
        reference = silent(reference, f"{path}.o_proj", gone, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(**call).logits, reference(**call).logits)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (4, 2)
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again.generate(TOKENS, max_new_tokens=3), small.generate(TOKENS, max_new_tokens=3))
    with torch.no_grad():
        torch.testing.assert_close(again(**call).logits, small(**call).logits)


def test_nothing_is_shared():
    model, x = Grouped("own", shared=6), torch.randn(2, 5, 10)
    with pytest.raises(fxprune.PruneError, match="each has its own") as error:
        fxprune.prune(model, 0.5, x, attention="queries")
    assert "attention='heads'" in error.value.fix


def test_heads_that_share_nothing_stay():
    """Beside an attention with shared keys there may be another one; its heads would leave groups of none."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Grouped("native"), Grouped("own", shared=6)), torch.randn(2, 5, 10)
    small = fxprune.prune(model, 0.4, x, attention="queries")
    assert small[0].q.weight.shape[0] == 16 and small[1].q.weight.shape[0] == 24
    (reason,) = {f.frozen for f in fxprune.couple(model, x, attention="queries").families if f.name == "1.q"}
    assert "keys and values of its own" in reason


def test_plans(tmp_path):
    """A plan remembers what it was made with, and applies."""
    torch.manual_seed(0)
    model, x = Grouped("native"), torch.randn(2, 5, 10)
    small = fxprune.prune(model, 0.4, x, attention="queries", only=["q", "o"])
    plan = fxprune.Plan.from_json(fxprune.plan_of(small).to_json())
    assert plan.attention == "queries"
    torch.testing.assert_close(plan.apply(model, x)(x), small(x))
