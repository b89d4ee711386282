"""`repair(method="block")`: each block trained to return what the original's does; and repair that goes block by block."""

import weakref

import pytest
import torch
import transformers
from refusals import untouched
from stepping import trained
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock

import fxprune
from fxprune import PruneError
from fxprune.repairs import refit
from fxprune.repairs.least_squares import NormalEquations

DOUBLE = torch.float64
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}


def llama(blocks=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=blocks, initializer_range=0.2)
    return transformers.LlamaForCausalLM(config).eval()


def words(count, size=4, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (size, length), generator=generator)} for _ in range(count)]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


def mlp(blocks=3):
    body = nn.Sequential(*(Block(8) for _ in range(blocks)))
    return nn.Sequential(nn.Linear(6, 8), body, nn.Linear(8, 3)).double().eval()


def outputs(model, path, batch):
    found = []
    hook = model.get_submodule(path).register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("same_class", [False, True])
def test_errors_are_those_of_the_blocks_on_what_is_held_out(same_class):
    model, data = llama(), words(16)
    pruned = fxprune.prune(model, 0.4, data[0] | {"use_cache": False}, verify=False, same_class=same_class)
    with untouched(model), untouched(pruned):
        better = fxprune.repair(model, pruned, data, method="block", steps=40)
    report = better.meta["repair"]
    assert [s.layer for s in report.steps] == [f"model.layers.{i}" for i in range(2)] and report.done
    stays = next(c.keep for c in fxprune.plan_of(pruned).slices["model.embed_tokens.weight"] if c.dims == (1,))
    held = data[3::4]
    for step in report.steps[:1]:  # the later ones follow those before them
        for small, reported in zip((pruned, better), step.error, strict=True):
            squares = []
            for batch in held:
                wanted = outputs(model, step.layer, batch)[..., stays]
                found = outputs(small, step.layer, batch if same_class else batch | {"use_cache": False})
                squares.append(float((found - wanted).square().sum() / wanted.square().sum()))
            assert reported == pytest.approx((sum(squares) / len(squares)) ** 0.5, rel=1e-4)
    last = data[0] if same_class else data[0] | {"use_cache": False}
    assert report.error[1] < report.error[0] and better(**last)["logits"].shape == (4, 12, 64)


def test_batches_of_other_forms():
    model, data = llama(3), words(16)
    pruned = fxprune.prune(model, 0.4, data[0], verify=False)
    for i, batch in enumerate(data):
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, : i % 3] = 0
    report = fxprune.repair(model, pruned, data, method="block", steps=20).meta["repair"]
    assert len(report.done) == 3 and report.error[1] < report.error[0]


def transformer():
    """As `vit`, with two layers."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 32}
    model = VisionTransformer(image_size=16, patch_size=8, num_classes=5, **sizes).double().eval()
    return trained(model, seed=1)


class Stages(nn.Module):
    """Two stages of two residual blocks, as a ResNet has them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        down = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2), nn.BatchNorm2d(16))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2, down), BasicBlock(16, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def resnet():
    torch.manual_seed(0)
    return trained(Stages().double().eval(), seed=1)


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


OTHERS = {
    "t5": (t5, lambda n: [b | {"decoder_input_ids": b["input_ids"]} for b in words(n)], 4),
    "vit": (transformer, lambda n: list(torch.randn(n, 4, 3, 16, 16, dtype=DOUBLE)), 2),
    "resnet": (resnet, lambda n: list(torch.randn(n, 4, 3, 8, 8, dtype=DOUBLE)), 4),
    "mlp": (mlp, lambda n: list(torch.randn(n, 64, 6, dtype=DOUBLE)), 3),
}


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
@pytest.mark.parametrize("kind", OTHERS)
def test_any_model_with_a_chain_of_blocks(kind, inputs):
    torch.manual_seed(0)
    make, batches, blocks = OTHERS[kind]
    model, data = make(), batches(8)
    given = data[0] | {"use_cache": False} if isinstance(data[0], dict) else data[0]
    pruned = fxprune.prune(model, 0.4, given, verify=False)
    better = fxprune.repair(model, pruned, data, method="block", steps=30, block_inputs=inputs)
    report = better.meta["repair"]
    assert len(report.steps) >= blocks and report.done
    assert all(s.error[1] < s.error[0] for s in report.done) and report.error[1] <= report.error[0]
    tuned = {name for name, p in better.named_parameters() if not torch.equal(p, pruned.get_parameter(name))}
    if report.share:
        assert tuned and all(any(name.startswith(f"{s.layer}.") for s in report.done) for name in tuned)


@pytest.mark.parametrize("samples", [3, 8, 48])
def test_other_inputs_are_never_worse_off(samples):
    """Five networks of two seeds each."""
    shapes = {mlp: (6,), lambda: mlp(2): (6,), resnet: (3, 8, 8), transformer: (3, 16, 16), lambda: mlp(5): (6,)}
    for make, shape in shapes.items():
        for seed in range(2):
            torch.manual_seed(seed)
            model, others = make().double().eval(), torch.randn(64, *shape, dtype=DOUBLE)
            pruned = fxprune.prune(model, 0.5, example_inputs=others[:2], verify=False)
            data = [torch.randn(samples, *shape, dtype=DOUBLE)]
            better = fxprune.repair(model, pruned, data, method="block", steps=8)
            with torch.no_grad():
                before, after = (float((model(others) - m(others)).square().mean().sqrt()) for m in (pruned, better))
            assert after <= 1.02 * before, (seed, samples)


def test_the_seed_decides_the_order():
    torch.manual_seed(0)
    model, data = mlp(), list(torch.randn(8, 64, 6, dtype=DOUBLE))
    pruned = fxprune.prune(model, 0.5, data[0])
    states = [
        fxprune.repair(model, pruned, data, method="block", steps=20, seed=seed).get_parameter("1.0.up.weight")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_a_loss_that_rises_undoes_it():
    torch.manual_seed(0)
    model, data = mlp(), [(x, torch.zeros(64)) for x in torch.randn(8, 64, 6, dtype=DOUBLE)]
    pruned = fxprune.prune(model, 0.5, data[0][0])

    def closeness(out, target):  # grows as the output comes closer to the original's
        with torch.no_grad():
            return -min((out - model(x)).square().sum() for x, _ in data)

    for loss, done in ((closeness, False), (lambda out, target: -closeness(out, target), True)):
        found = fxprune.repair(model, pruned, data, method="block", steps=20, loss=loss)
        assert bool(found.meta["repair"].share) == done
        same = all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), pruned.state_dict().values(), strict=True))
        assert same != done


class Again(nn.Module):
    """The first block twice, and a bias of the second one used outside."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(8), Block(8), Block(8)]), nn.Linear(8, 3)

    def forward(self, x):
        for i in (0, 1, 2, 0):
            x = self.blocks[i](x)
        return self.head(x)


def test_a_block_that_is_called_again_is_left():
    torch.manual_seed(0)
    model, data = Again().double().eval(), list(torch.randn(8, 64, 8, dtype=DOUBLE))
    pruned = fxprune.prune(model, 0.5, data[0], verify=False)
    found = fxprune.repair(model, pruned, data, method="block", steps=60)
    by_layer = {s.layer: s for s in found.meta["repair"].steps}
    assert "more than once" in by_layer["blocks.0"].note and by_layer["blocks.1"].done
    assert torch.equal(found.get_parameter("blocks.0.up.weight"), pruned.get_parameter("blocks.0.up.weight"))


def test_what_cannot_be_done():
    net, x = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).eval(), torch.randn(64, 6)
    small = fxprune.prune(net, 0.5, x[:2])
    refused = {
        "has no list of blocks": {"method": "block"},
        "steps must be a positive integer, not 0": {"method": "block", "steps": 0},
        "block_inputs must be": {"method": "block", "block_inputs": "both"},
        "loss is given to a method that does not look at it": {"loss": lambda out: out.sum()},
        "block goes with no other method": {"method": ["block", "fold"]},
    }
    for what, asked in refused.items():
        with pytest.raises(PruneError, match=what):
            fxprune.repair(net, small, [x], **asked)


def test_an_error_in_a_batch_leaves_no_thread():
    import threading

    model, data = llama(), [*words(4), {"input_ids": torch.full((2, 4), 999)}]
    pruned = fxprune.prune(model, 0.4, data[0] | {"use_cache": False}, verify=False, same_class=True)
    before = threading.active_count()
    for method in ("refit", "block"):
        with pytest.raises(PruneError, match="on a batch of data"):
            fxprune.repair(model, pruned, data, method=method)
    assert threading.active_count() == before


# -- refit -----------------------------------------------------------------------------------------------------------------


def test_refit_holds_the_matrices_of_one_block(monkeypatch):
    """And finds what it finds with those of all blocks at once, as it did before it went block by block."""
    model, data = llama().double(), words(16)
    pruned = fxprune.prune(model, 0.4, data[0] | {"use_cache": False}, verify=False, same_class=True)
    made, alive, fit, add = [], [], refit.fit, NormalEquations.add

    def noted(self, x, r):
        add(self, x, r)
        made.append(weakref.ref(self.gram))

    def watched(*given):
        alive.append(len({id(matrix()) for matrix in made if matrix() is not None}))
        return fit(*given)

    monkeypatch.setattr(NormalEquations, "add", noted)
    monkeypatch.setattr(refit, "fit", watched)
    found = fxprune.repair(model, pruned, data, method="refit", held_out=0)
    assert max(alive) <= 7, "products of a block; each has one matrix"
    alive.clear()
    monkeypatch.setattr(refit, "block_chains", lambda model: [])
    wanted = fxprune.repair(model, pruned, data, method="refit", held_out=0)
    assert max(alive) >= len(wanted.meta["repair"].done), "all at once, before the first is fitted"
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-9, atol=1e-9)
    assert len(found.meta["repair"].done) > 7, "more than one block has"


def test_refit_puts_back_what_is_used_again():
    torch.manual_seed(0)
    model, data = Again().double().eval(), list(torch.randn(8, 4, 8, dtype=DOUBLE))
    pruned = fxprune.prune(model, 0.5, data[0], verify=False)
    found = fxprune.repair(model, pruned, data, method="refit", held_out=0)
    notes = {s.layer: s.note for s in found.meta["repair"].skipped}
    assert notes["blocks.0.down.weight"] == "it is used more than once"
    assert torch.equal(found.get_parameter("blocks.0.down.weight"), pruned.get_parameter("blocks.0.down.weight"))
    assert "blocks.1.down.weight" in {s.layer for s in found.meta["repair"].done}


def test_caches_with_fewer_heads_are_no_outputs():
    model, data = llama(), words(8)
    pruned = fxprune.prune(model, 0.5, data[0], verify=False, same_class=True)
    assert fxprune.repair(model, pruned, data, method="refit").meta["repair"].samples == (24, 8)
