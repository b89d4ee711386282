"""The report: sizes before and after, what shrank, and what is to blame where little did."""

from itertools import pairwise

import pytest
import torch
from clocks import counting_clock
from refusals import IMAGES, net, untouched
from torch import nn

import fxprune
from fxprune import PruneError

WORDS = torch.arange(14).remainder(11).view(2, 7)


class Reader(nn.Module):
    """Nearly all of it is a table and a last layer for 1000 words, neither of which can lose a word."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 16)
        self.inner = nn.Linear(16, 8)
        self.head = nn.Linear(8, 1000)

    def forward(self, words):
        return self.head(self.inner(self.table(words)).relu())


def pruned(model, inputs, ratio=0.5, **options):
    torch.manual_seed(0)
    return fxprune.prune(model, ratio, example_inputs=inputs, **options)


def test_counts():
    model = net()
    small = pruned(model, IMAGES)
    with untouched(model):
        found = fxprune.report(model, small, IMAGES)
    assert found.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))
    pixels = IMAGES[:, :1].numel()
    before = pixels * 9 * (3 * 8 + 8 * 6) + 2 * 6 * 4
    after = pixels * 9 * (3 * 4 + 4 * 3) + 2 * 3 * 4
    assert found.macs == (before, after)
    assert {c.family.name: (c.family.units, c.kept) for c in found.shrunk} == {
        "stem": (8, 4),
        "body": (6, 3),
    }
    assert [c.family.name for c in found.whole] == ["stem:1", "head"]
    left = {c.family.name: c.left for c in found.changes}
    assert left["body"] == 3 * 4 * 9 + 3 + 4 * 3
    assert left["stem"] == 4 * 3 * 9 + 4 + 2 * 4 + 3 * 4 * 9
    assert left["head"] == 4 * 3 + 4


def test_macs_count_attention_that_one_call_computes():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
            h = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(h.transpose(1, 2).flatten(2))

    model, x = Attention().eval(), torch.randn(2, 5, 16)
    found = fxprune.report(model, pruned(model, x, verify=False), x)
    assert found.macs[0] == 2 * 5 * (16 * 48 + 16 * 3) + 2 * 2 * 5 * 5 * 16
    assert found.macs[1] == 2 * 5 * (16 * 24 + 8 * 3) + 2 * 2 * 5 * 5 * 8


def test_macs_count_attention_whatever_kernel_computes_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    found = fxprune.report(layer, pruned(layer, x, verify=False), x)
    linear = 16 * 48 + 16 * 16 + 2 * 16 * 32
    assert found.macs[0] == 2 * 5 * linear + 2 * 2 * 5 * 5 * 16
    assert found.macs[1] < 0.6 * found.macs[0]


def test_text():
    model = net()
    lines = str(fxprune.report(model, pruned(model, IMAGES), IMAGES)).splitlines()
    assert lines[0].startswith("Net: 706 parameters, 247 left (35%)")
    assert lines[1] == "83.0 k multiply-accumulates, 27.7 k left (33%)"
    assert lines[2] == "2 of 4 families shrank, to 50% of their units in the median"
    text = "\n".join(lines)
    assert "captured: symbolic" in text and "exact: largest relative error" in text
    assert "head" in text.partition("stayed whole")[2]
    assert "is an output of the model" in text


def test_without_inputs_or_verification():
    model = net()
    found = fxprune.report(model, pruned(model, IMAGES, verify=False))
    assert found.macs is None and found.verification is None
    text = str(found)
    assert "multiply" not in text
    assert "not compared with the original: prune(..., verify=True) or fxprune.verify does it" in text


def test_who_is_to_blame_when_much_is_left():
    torch.manual_seed(0)
    model = Reader().eval()
    found = fxprune.report(model, pruned(model, WORDS))
    assert found.share > 0.45
    assert [c.family.name for c in found.held()] == ["table", "head"]
    text = str(found)
    assert "that leaves more than usual, because of these:" in text
    assert "  5.00 k left with head, which is an output of the model" in text


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_nobody_is_to_blame_when_the_share_is_what_the_ratio_says(ratio):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]).eval()
    found = fxprune.report(model, pruned(model, torch.randn(2, 64), ratio))
    assert found.usual == 1 - ratio
    assert not found.held() and "usual" not in str(found)


def test_reasons_for_what_was_not_frozen():
    model = net()
    reasons = {
        c.family.name: c.reason for c in fxprune.report(model, pruned(model, IMAGES, {"stem": 0.25}, freeze="head")).changes
    }
    assert reasons["stem"] == "keeps 6 of 8 units"
    assert reasons["body"] == "is frozen by request, which holds body:0 too"
    with pytest.warns(fxprune.PruneWarning, match="params=1.0 removes nothing"):
        whole = fxprune.report(model, pruned(model, IMAGES, None, params=1.0))
    assert "lost no unit" in {c.family.name: c.reason for c in whole.changes}["stem"]
    assert "0 of 4 families shrank" in str(whole)


def test_the_two_must_belong_together():
    model, other = net(), nn.Linear(3, 4)
    with pytest.raises(PruneError, match="the plan is for another model"):
        fxprune.report(other, pruned(model, IMAGES))


def chain(*widths):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)]).eval()


UNEVEN = [
    "have a count of channels that is no multiple of 8, for which",
    "  kernels are written: the model may be no faster, or slower; round_to=8 keeps to multiples",
]


def test_counts_that_hardware_dislikes_are_pointed_out():
    model, x = chain(8, 64, 64, 8), torch.randn(2, 8)
    text = str(fxprune.report(model, pruned(model, x, 0.45)))
    assert "\n".join([f"2 families {UNEVEN[0]}", UNEVEN[1]]) in text
    for options in ({"ratio": 0.5}, {"ratio": 0.45, "round_to": 8}):
        assert "multiple of 8" not in str(fxprune.report(model, pruned(model, x, **options)))


def test_counts_that_were_uneven_before_are_not_blamed_on_pruning():
    model, x = chain(8, 62, 62, 8), torch.randn(2, 8)
    assert "multiple of 8" not in str(fxprune.report(model, pruned(model, x, 0.45)))


def test_uneven_counts_of_little_weight_are_not_worth_a_line():
    model, x = chain(8, 16, 512, 512, 8), torch.randn(2, 8)
    found = fxprune.report(model, pruned(model, x, {"0": 0.45, "[12]": 0.5}))
    assert {c.family.name: c.kept for c in found.shrunk}["0"] == 9
    assert "multiple of 8" not in str(found)


def test_a_latency_that_was_measured_is_reported(monkeypatch):
    monkeypatch.setattr("fxprune.selection.latency.measure_seconds", counting_clock)
    model, x = chain(8, 64, 64, 8), torch.randn(2, 8)
    small = fxprune.prune(model, example_inputs=x, latency=0.5)
    assert f"latency: {small.meta['latency']}" in str(fxprune.report(model, small)).splitlines()
