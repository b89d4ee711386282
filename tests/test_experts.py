"""Whole experts go, with their rows of the router: exact against the original whose router never picks them."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fxprune

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "vocab_size": 30,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, **SMALL}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS = {
    "Mixtral": ({"num_local_experts": 6, **GROUPED}, "num_local_experts"),
    "Qwen3Moe": ({"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, **GROUPED}, "num_experts"),
    "GptOss": ({"num_local_experts": 6, "num_experts_per_tok": 2, **GROUPED}, "num_local_experts"),
    "DeepseekV3": (
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12}
        | {"first_k_dense_replace": 1, "num_key_value_heads": 4, **LATENT, **SMALL},
        "n_routed_experts",
    ),
}
TOKENS = torch.arange(14).reshape(2, 7) + 3


def made(name, kernel="eager"):
    """A small model, all of whose values matter, in the precision in which all routers compute, and one call of it."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**MODELS[name][0])
    config._experts_implementation = kernel
    model = getattr(hf, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for layer in model.model.layers:
            if hasattr(getattr(layer.mlp, "gate", None), "e_score_correction_bias"):
                layer.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    return model, {"input_ids": TOKENS, "use_cache": False}


def routers(model):
    return {n: m for n, m in model.named_modules() if n.endswith(("mlp.gate", "mlp.router")) and hasattr(m, "top_k")}


class NeverPicked(TorchFunctionMode):
    """The scores that a router computes are minus infinity for some experts."""

    def __init__(self, gone):
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.linear:
            out[..., self.gone] = -torch.inf
        return out


def without(model, small, call):
    """What the original computes if its routers never pick the experts that are gone, and how many are."""
    model, slices, count = copy.deepcopy(model), fxprune.plan_of(small).slices, 0
    for name, router in routers(model).items():
        kept = next(cut.keep for cut in slices[f"{name}.weight"] if cut.dims == (0,))
        gone = [i for i in range(len(router.weight)) if i not in kept.tolist()]
        count += len(gone)
        forward = router.forward

        def routed(*args, forward=forward, gone=gone, **kwargs):
            with NeverPicked(gone):
                return forward(*args, **kwargs)

        router.forward = routed
        if hasattr(router, "e_score_correction_bias"):  # what is compared is a sigmoid, which is 0 there, and this
            router.e_score_correction_bias[gone] = -torch.inf
    with torch.no_grad():
        return model(**call).logits, count


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_exact(name, same_class):
    model, call = made(name)
    small = fxprune.prune(model, 0.5, call, experts="only", same_class=same_class)
    with torch.no_grad():
        logits = small(**call).logits
        assert (logits - model(**call).logits).abs().max() > 1e-2  # the experts were used
    wanted, gone = without(model, small, call)
    assert gone == (4 if name == "DeepseekV3" else 6)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    if same_class:
        number = MODELS[name][1]
        assert getattr(small.config, number) == getattr(model.config, number) // 2


@pytest.mark.parametrize(("name", "kernel"), [("Mixtral", "grouped_mm"), ("GptOss", "grouped_mm"), ("Qwen3Moe", "batched_mm")])
def test_kernels(name, kernel):
    model, call = made(name, kernel)
    small = fxprune.prune(model, 0.5, call, experts="only")
    wanted, gone = without(model, small, call)
    assert gone >= 4
    with torch.no_grad():
        torch.testing.assert_close(small(**call).logits, wanted)


def test_groups_keep_equally_many():
    """DeepSeek-V3 chooses groups of experts first; which experts a group loses is its own."""
    model, call = made("DeepseekV3")
    small = fxprune.prune(model, example_inputs=call, remove={"model.layers.1.mlp.gate": [0, 1, 6, 7]})
    wanted, gone = without(model, small, call)
    assert gone == 4
    with torch.no_grad():
        torch.testing.assert_close(small(**call).logits, wanted)
    with pytest.raises(fxprune.PruneError, match="loses equally many"):
        fxprune.prune(model, example_inputs=call, remove={"model.layers.1.mlp.gate": [0, 1, 6]})


def test_as_many_stay_as_are_chosen():
    model, call = made("Mixtral")
    small = fxprune.prune(model, 0.9, call, experts="only")
    assert all(router.weight.shape == (2, 16) for router in routers(small).values())
    with pytest.raises(fxprune.PruneError, match="chosen at a time, and 1 would be left"):
        fxprune.prune(model, example_inputs=call, remove={"model.layers.0.mlp.gate": [0, 1, 2, 3, 5]})


def test_beside_other_families():
    """Experts, heads and widths go together; a budget is one over all."""
    model, call = made("Qwen3Moe")
    for asked in ({"ratio": 0.5}, {"params": 0.6}):
        small = fxprune.prune(model, example_inputs=call, experts=True, same_class=True, **asked)
        assert routers(small)["model.layers.0.mlp.gate"].weight.shape[0] < 6
        assert small.model.layers[0].mlp.experts.down_proj.shape[2] < 12
    count = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert 0.5 < count[0] / count[1] <= 0.6
    whole = fxprune.prune(model, 0.5, call)  # by default experts stay
    assert routers(whole)["model.layers.0.mlp.gate"].weight.shape[0] == 6


def test_saved_and_generating(tmp_path):
    model, call = made("Mixtral")
    small = fxprune.prune(model, 0.5, call, experts="only", same_class=True)
    small.save_pretrained(tmp_path)
    again = hf.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(**call).logits, small(**call).logits)
    assert torch.equal(again.generate(TOKENS, max_new_tokens=4), small.generate(TOKENS, max_new_tokens=4))
    plain = fxprune.prune(model, 0.5, call, experts="only")
    fxprune.save(plain, tmp_path / "plain.safetensors")
    loaded = fxprune.load(tmp_path / "plain.safetensors", model)
    plan = fxprune.Plan.from_json(fxprune.plan_of(plain).to_json())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**call).logits, plain(**call).logits)
        torch.testing.assert_close(plan.apply(model, call)(**call).logits, plain(**call).logits)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_reap(name):
    """The mean over an expert's tokens of gate times the norm of its output, computed expert by expert."""
    model, call = made(name)
    seen, expected = {}, {}
    for path, module in model.named_modules():
        if path.endswith("experts"):
            module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args}))
    batches = [call, {"input_ids": TOKENS.flip(0)[:1], "use_cache": False}]
    for batch in batches:
        seen.clear()
        with torch.no_grad():
            model(**batch)
        for path, args in seen.items():
            module = model.get_submodule(path)
            x = args[0]
            index, gate = (args[1], args[2])
            for token in range(len(x)):
                for slot in range(2):
                    e = int(index[token, slot])
                    with torch.no_grad():
                        if name == "Mixtral":
                            a, b = (x[token] @ module.gate_up_proj[e].mT).chunk(2)
                            out = (F.silu(a) * b) @ module.down_proj[e].mT
                        else:
                            both = x[token] @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
                            out = module._apply_gate(both) @ module.down_proj[e] + module.down_proj_bias[e]
                    expected.setdefault(path, {}).setdefault(e, []).append(float(gate[token, slot] * out.norm()))
    before = {n: p.clone() for n, p in model.named_parameters()}
    small = fxprune.prune(model, 0.5, call, experts="only", data=batches)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for path, found in expected.items():
        score = [sum(found[e]) / len(found[e]) if e in found else 0.0 for e in range(6)]
        cut = next(c for c in fxprune.plan_of(small).slices[f"{path}.down_proj"] if c.dims == (0,))
        assert cut.keep.tolist() == sorted(sorted(range(6), key=score.__getitem__)[3:])


class Stacked(nn.Module):
    """Six experts of a user's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.number = nn.Linear(8, 6), 6
        self.up, self.down = nn.Parameter(torch.randn(6, 8, 12)), nn.Parameter(torch.randn(6, 12, 8))

    def forward(self, x):
        scores = self.gate(x)
        return self.mix(x, scores.softmax(-1))


class Switch(Stacked):
    """The best expert, by `max`."""

    def mix(self, x, p):
        gate, best = p.max(-1)
        h = torch.einsum("bnd,bndh->bnh", x, self.up[best]).relu()
        return torch.einsum("bnh,bnhd->bnd", h, self.down[best]) * gate.unsqueeze(-1)


class ByArgmax(Stacked):
    def mix(self, x, p):
        best = p.argmax(-1)
        return ((x.unsqueeze(-2) @ self.up[best]).relu() @ self.down[best]).squeeze(-2) * p.gather(-1, best.unsqueeze(-1))


class Dense(Stacked):
    """All experts run, and gates are zero for those that are not chosen."""

    def mix(self, x, p):
        gate, best = p.topk(2, -1)
        gates = (F.one_hot(best, self.number) * gate.unsqueeze(-1)).sum(-2)
        h = torch.einsum("bnd,edh->bneh", x, self.up).relu()
        return torch.einsum("bneh,ehd,bne->bnd", h, self.down, gates)


class Scattered(Stacked):
    def mix(self, x, p):
        gate, best = p.topk(3, -1)
        gates = torch.zeros_like(p).scatter(-1, best, gate)
        h = torch.einsum("bnd,edh->bneh", x, self.up).relu()
        return torch.einsum("bneh,ehd,bne->bnd", h, self.down, gates)


class Named(Stacked):
    """What depends on one expert by its number: that one stays, and its number changes."""

    def mix(self, x, p):
        best = p.argmax(-1)
        return (x.unsqueeze(-2) @ self.up[best]).squeeze(-2) * (best == 2).unsqueeze(-1)


class Loop(nn.Module):
    """One node, whose code looks at the least and the greatest of what was chosen, as `one_hot` of torch 2.11 does."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x, best, gate):
        if best.min() < 0 or best.max() >= len(self.up):
            raise IndexError("there is no such expert")
        out, mask = torch.zeros_like(x), F.one_hot(best, len(self.up)).permute(2, 1, 0)
        for (expert,) in mask.sum((-1, -2)).greater(0).nonzero():
            slot, token = torch.where(mask[expert])
            out.index_add_(0, token, (x[token] @ self.up[expert]).relu() @ self.down[expert] * gate[token, slot, None])
        return out


class Looped(Stacked):
    def __init__(self):
        super().__init__()
        self.loop = Loop(self.up, self.down)

    def mix(self, x, p):
        gate, best = p.flatten(0, 1).topk(2, -1)
        return self.loop(x.flatten(0, 1), best, gate).view(x.shape)


@pytest.mark.parametrize("kind", [Switch, ByArgmax, Dense, Scattered, Named, Looped])
def test_own_layers(kind):
    model, x = kind(), torch.randn(2, 5, 8)
    small = fxprune.prune(model, 0.5, x, experts="only")
    (cut,) = fxprune.plan_of(small).slices["gate.weight"]
    gone = [i for i in range(6) if i not in cut.keep.tolist()]
    expected = 2 if kind is Named else 3  # half of five, since one stays
    assert len(gone) == expected and small.up.shape == (6 - expected, 8, 12)
    assert kind is not Named or 2 not in gone
    for y in (x, torch.randn(3, 4, 8)):
        with NeverPicked(gone):
            wanted = model(y)
        torch.testing.assert_close(small(y), wanted)


class Shifted(Stacked):
    def mix(self, x, p):
        return (x.unsqueeze(-2) @ self.up[(p.argmax(-1) + 1) % 6]).squeeze(-2)


class Told(Switch):
    def forward(self, x):
        return super().forward(x), self.gate(x).argmax(-1)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Shifted, "more is done with the choice than to index"),
        (Told, "an output of the model says how"),
    ],
)
def test_what_cannot_be_followed_stays(kind, why):
    x = torch.randn(2, 5, 8)
    with pytest.raises(fxprune.PruneError, match=why):
        fxprune.prune(kind(), 0.5, x, experts="only")


def test_sensitivity_of_experts():
    model, x = Switch(), torch.randn(2, 5, 8)
    found = fxprune.sensitivity(model, x, lambda m: m.gate.weight.shape[0], ratios=(0.5,), experts="only")
    assert [(c.units, c.removed, c.values) for c in found.curves] == [(6, (3,), (3.0,))]
    with pytest.raises(fxprune.PruneError, match="expert"):
        fxprune.sensitivity(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(1, 4), len, experts=True)


def test_experts_that_are_zero():
    model, x = Switch(), torch.randn(2, 5, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.shape[0] == 6, name
            parameter[[1, 4]] = 0
    small = fxprune.masks.prune_zeros(model, x, experts="only", verify=False)
    (cut,) = fxprune.plan_of(small).slices["gate.weight"]
    assert cut.keep.tolist() == [0, 2, 3, 5]


def test_bad_arguments():
    x = torch.randn(2, 4)
    with pytest.raises(fxprune.PruneError, match="the model has none") as error:
        fxprune.prune(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), 0.5, x, experts=True)
    assert error.value.fix == "experts=False"
    with pytest.raises(fxprune.PruneError, match="experts must be True, False or 'only', not 'all'"):
        fxprune.prune(nn.Linear(4, 2), 0.5, x, experts="all")


def test_role():
    coupling = fxprune.couple(Switch(), torch.randn(2, 5, 8), experts=True)
    (family,) = [f for f in coupling.families if f.name == "gate"]
    assert family.frozen is None and "expert" in str(coupling)


def test_an_extreme_whose_place_nobody_reads_is_a_reduction():
    """The plan couples as `prune` did, and units go by index whether or not something is chosen among others."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.side, self.out = nn.Linear(8, 10, bias=False), nn.Linear(5, 2), nn.Linear(10, 2)

        def forward(self, x):
            hidden = self.up(x)
            return self.out(hidden), self.side(hidden.unflatten(1, (5, 2)).max(2).values)

    torch.manual_seed(0)
    model, x = Pooled().double().eval(), torch.randn(3, 8, dtype=torch.float64)
    small = fxprune.prune(model, 0.4, x)
    again = fxprune.plan_of(small).apply(model)
    assert all(torch.equal(a, b) for a, b in zip(small(x), again(x), strict=True))
    pair = fxprune.prune(model, example_inputs=x, remove={"up": [2, 3]})
    assert pair.side.in_features == 4 and fxprune.plan_of(pair).apply(model).out.in_features == 8
