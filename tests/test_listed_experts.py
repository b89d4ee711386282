"""Experts that are modules in a list go whole: exact against the original whose router never picks them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune


class Experts(nn.Module):
    """Six experts of a user's own, of which a router chooses two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.number, self.gate = 6, nn.Linear(8, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(6))

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        return self.mix(x, p, *p.topk(2, -1))


class Where(Experts):
    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            out[token] += w[token, slot, None] * expert(x[token])
        return out


class Nonzero(Experts):
    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i in range(self.number):
            place = (index == i).nonzero()
            token, slot = place[:, 0], place[:, 1]
            out = out.index_add(0, token, self.experts[i](x[token]) * w[token, slot].unsqueeze(-1))
        return out


class ByMask(Experts):
    """The best expert alone, by a mask that is written through."""

    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = index[:, 0] == i
            out[mask] = expert(x[mask]) * w[mask, :1]
        return out


class Chosen(Experts):
    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = torch.where(index[:, :1] == i, expert(x), out)
        return out


class Dense(Experts):
    """All experts run, and add nothing where they are not chosen."""

    def mix(self, x, p, w, index):
        out = x.clone()
        for i, expert in enumerate(self.experts):
            out += (w * (index == i)).sum(-1, keepdim=True) * expert(x)
        return out


class OneHot(Experts):
    def mix(self, x, p, w, index):
        mask, out = F.one_hot(index, self.number).permute(2, 1, 0), torch.zeros_like(x)
        for i in range(self.number):
            slot, token = torch.where(mask[i])
            chosen = x[None, token].reshape(-1, x.shape[-1])
            out.index_add_(0, token, (self.experts[i](chosen) * w[token, slot, None]).to(x.dtype))
        return out


class Gates(Experts):
    def mix(self, x, p, w, index):
        gates, out = torch.zeros_like(p).scatter(-1, index, w), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i : i + 1] * expert(x)
        return out


class Counted(Experts):
    def mix(self, x, p, w, index):
        gates = (F.one_hot(index, self.number) * w[..., None]).sum(-2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i, None] * expert(x)
        return out


KINDS = [Where, Nonzero, ByMask, Chosen, Dense, OneHot, Gates, Counted]
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def gone_from(small, name="gate"):
    (cut,) = fxprune.plan_of(small).slices[f"{name}.weight"]
    return [i for i in range(6) if i not in cut.keep.tolist()]


def never_picking(model, gone):
    """The original with scores of minus infinity for what is gone."""
    model = copy.deepcopy(model)

    def lowered(module, args, out):
        out = out.clone()
        out[..., gone] = -torch.inf
        return out

    model.gate.register_forward_hook(lowered)
    return model


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind, same_class):
    model = kind()
    small = fxprune.prune(model, 0.5, X, experts="only", same_class=same_class)
    gone = gone_from(small)
    assert len(gone) == 3 and small.gate.weight.shape == (3, 8)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(small) == count(model) - 3 * (9 + count(model.experts[0]))
    wanted = never_picking(model, gone)
    for x in (X, X[:3], torch.cat([X, X.flip(0)])):
        torch.testing.assert_close(small(x), wanted(x))
    assert (wanted(X) - model(X)).abs().max() > 1e-2  # the experts were used
    if same_class:
        assert type(small) is kind and small.number == 3


def test_what_is_left_learns_alike():
    """Gradients are those of the original, too."""
    model = Where()
    small = fxprune.prune(model, 0.5, X, experts="only").train()
    wanted = never_picking(model, gone_from(small)).train()
    for m in (small, wanted):
        m(X).square().sum().backward()
    compared = 0
    for name, p in small.named_parameters():
        if name.startswith("experts"):
            torch.testing.assert_close(p.grad, wanted.get_parameter(name).grad)
            compared += 1
    assert compared == 12


def test_saved(tmp_path):
    model = Where()
    small = fxprune.prune(model, 0.5, X, experts="only")
    fxprune.save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(fxprune.load(tmp_path / "small.safetensors", Where())(X), small(X))
    plan = fxprune.Plan.from_json(fxprune.plan_of(small).to_json())
    for same_class in (False, True):
        torch.testing.assert_close(plan.apply(model, X, same_class=same_class)(X), small(X))


def test_named_and_budget():
    model = Gates()
    small = fxprune.prune(model, example_inputs=X, remove={"gate": [1, 4]})
    assert gone_from(small) == [1, 4]
    torch.testing.assert_close(small(X), never_picking(model, [1, 4])(X))
    with pytest.raises(fxprune.PruneError, match="chosen at a time, and 1 would be left"):
        fxprune.prune(model, example_inputs=X, remove={"gate": [0, 1, 2, 4, 5]})
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    small = fxprune.prune(model, example_inputs=X, params=0.7, experts="only")
    assert len(gone_from(small)) == 2 and count(small) <= 0.7 * count(model)
    torch.testing.assert_close(small(X), never_picking(model, gone_from(small))(X))


@pytest.mark.parametrize("kind", [Where, Gates, OneHot])
def test_reap(kind):
    """The mean over an expert's tokens of gate times the norm of its output, computed token by token."""
    model, batches, expected = kind(), [X, X.flip(1)], {i: [] for i in range(6)}
    with torch.no_grad():
        for x in batches:
            w, index = model.gate(x).softmax(-1).topk(2, -1)
            for token in range(len(x)):
                for slot in range(2):
                    e = int(index[token, slot])
                    expected[e].append(float(w[token, slot] * model.experts[e](x[token]).norm()))
    score = [sum(found) / len(found) if found else 0.0 for found in expected.values()]
    before = {name: p.clone() for name, p in model.named_parameters()}
    small = fxprune.prune(model, 0.5, X, experts="only", data=batches)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert gone_from(small) == sorted(sorted(range(6), key=score.__getitem__)[:3])
    assert gone_from(small) != gone_from(fxprune.prune(model, 0.5, X, experts="only", criterion="magnitude"))


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(8), kind()

    def forward(self, x):
        return x + self.moe(self.norm(x))


@pytest.mark.parametrize("same_class", [False, True])
def test_beside_widths(same_class):
    """In a model, with the widths of the experts that stay, and with the residual branch of another layer."""
    model = nn.Sequential(nn.Linear(8, 8), Block(Where), Block(OneHot), nn.Linear(8, 3))
    small = fxprune.prune(model, 0.5, X, experts=True, same_class=same_class)
    assert small[1].moe.gate.weight.shape[0] == 3 and len(small[2].moe.experts) == 3
    assert all(expert[0].weight.shape[0] == 6 for layer in (small[1], small[2]) for expert in layer.moe.experts)
    assert small.meta["verification"].ok
    deep = fxprune.prune(model, 0.5, X, experts="only", depth=True)
    assert deep.meta["verification"].ok
    left = [len(layer.moe.experts) if hasattr(layer, "moe") else 0 for layer in (deep[1], deep[2])]
    assert sorted(left) == [0, 3]


class Aside(Experts):
    """What expert 2 computes is also returned, and a shared layer belongs to all."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8)

    def mix(self, x, p, w, index):
        out, seen = torch.zeros_like(x), None
        for i, expert in enumerate(self.experts):
            y = self.last(expert(x))
            seen = y if i == 2 else seen
            out = out + (w * (index == i)).sum(-1, keepdim=True) * y
        return out, seen


def test_what_others_read_stays():
    model = Aside()
    small = fxprune.prune(model, example_inputs=X, remove={"gate": [0, 2, 5]})
    names = {name.split(".")[1] for name, _ in small.named_parameters() if name.startswith("experts")}
    assert names == {"1", "2", "3", "4"} and hasattr(small, "last")
    for found, wanted in zip(small(X), never_picking(model, [0, 2, 5])(X), strict=True):
        torch.testing.assert_close(found, wanted)


class Inverted(Experts):
    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + (index != i).all(-1, keepdim=True) * expert(x)
        return out


class Shifted(Experts):
    """An expert that is not chosen still adds something."""

    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + ((w * (index == i)).sum(-1, keepdim=True) + 0.1) * expert(x)
        return out


class WrittenOver(Experts):
    def mix(self, x, p, w, index):
        gates, out = torch.zeros_like(p).scatter(-1, index, w), torch.zeros_like(x)
        gates += 0.1
        for i, expert in enumerate(self.experts):
            out = out + gates[..., i : i + 1] * expert(x)
        return out


class Read(Experts):
    """Python asks which experts are chosen."""

    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = index == i
            if mask.any():
                token, slot = torch.where(mask)
                out[token] += w[token, slot, None] * expert(x[token])
        return out


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Inverted, "more is done with the choice than to index"),
        (Shifted, "more is done with the choice than to index"),
        (WrittenOver, "sliced to a single channel"),
        (Read, "more is done with the choice than to index"),
    ],
)
def test_what_cannot_be_followed_stays(kind, why):
    with pytest.raises(fxprune.PruneError, match=why):
        fxprune.prune(kind(), 0.5, X, experts="only")


@pytest.mark.parametrize("first", ["only", True, False])
def test_what_was_pruned_before_is_of_its_class(first):
    """The result of pruning a GraphModule is one, asked for by `same_class` or not, and exact."""
    model, x = Where().double().eval(), torch.randn(10, 8, dtype=torch.float64)
    once = fxprune.prune(model, 0.4, x, experts=first)
    twice = fxprune.prune(once, 0.3, x, experts="only", same_class=True)
    assert isinstance(twice, torch.fx.GraphModule)
    assert twice.verification.ok
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    again = fxprune.prune(once, 0.3, x, experts="only")
    assert torch.equal(twice(x), again(x))
    for mode in (True, False):
        assert twice.train(mode).gate.training is mode


class OnlyThoseHit(Experts):
    """Python asks which experts are chosen, and runs no others."""

    def mix(self, x, p, w, index):
        out = torch.zeros_like(x)
        for i in index.unique().tolist():
            token, slot = torch.where(index == i)
            out[token] += w[token, slot, None] * self.experts[i](x[token])
        return out


class Sorted(Experts):
    """Tokens sorted by their experts go through these in parts, whose sizes Python reads."""

    def mix(self, x, p, w, index):
        order, parts, first = index.flatten().argsort(), [], 0
        for i, number in enumerate(index.flatten().bincount(minlength=self.number).tolist()):
            if number:
                parts.append(self.experts[i](x[order[first : first + number] // 2]))
                first += number
        out = torch.cat(parts)
        return (torch.empty_like(out).index_copy(0, order, out).unflatten(0, index.shape) * w.unsqueeze(-1)).sum(1)


class Languages(Experts):
    """Modules of a mapping of which the first number of the input chooses one; a third is not like them, and stays."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Bilinear(8, 8, 8)})

    def mix(self, x, p, w, index):
        return self.experts["a" if x[0, 0].item() > 0 else "b"](x)


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("kind", [OnlyThoseHit, Sorted, Read, Languages])
def test_modules_of_a_list_that_did_not_run_are_cut_with_those_that_did(kind, same_class):
    """The example inputs choose a few of the experts; other inputs choose all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 5)).double().eval()
    few, many = torch.randn(2, 8, dtype=torch.float64), torch.randn(300, 8, dtype=torch.float64)
    ran = set()
    for name, expert in model[1].experts.named_children():
        expert.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(few)
    assert len(ran) < len(model[1].experts)
    small = fxprune.prune(model, 0.4, few, same_class=same_class)
    assert small.get_submodule("0").out_features < 8
    for x in (many, -many):
        assert fxprune.verify(model, small, x).ok
