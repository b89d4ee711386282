"""A model with masks computes what the pruned one will, on every model: before, during and after training."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from oracle import relative_error
from refusals import untouched
from stepping import trained
from torch import nn

import fxprune
from fxprune.iterative.masked_forward import MaskedForward

DOUBLE = torch.float64


def first(out):
    """The first tensor of an output."""
    return out if isinstance(out, torch.Tensor) else next(v for v in out.values() if isinstance(v, torch.Tensor))


def call(model, x):
    return first(model(**x) if isinstance(x, dict) else model(x))


def images(*shape):
    return lambda n, g: torch.randn(n, *shape, dtype=DOUBLE, generator=g)


def words(n, generator):
    return {"input_ids": torch.randint(3, 60, (n, 7), generator=generator)}


def of_transformers(kind, **sizes):
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    kind = getattr(transformers, kind)
    return kind(kind.config_class(**config, **sizes))


def resnet():
    """Torchvision's, up to its first strided stage: the two others have the same two kinds of block, and most parameters."""
    model = of_torchvision("resnet18")
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 5)
    return model


def of_torchvision(name, **options):
    models = pytest.importorskip("torchvision").models
    return getattr(models, name)(num_classes=5, **options)


def swin():
    kind = pytest.importorskip("torchvision").models.SwinTransformer
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": [4, 4]}
    return kind(**sizes, stochastic_depth_prob=0.0, num_classes=5)


def convnext():
    convnext = pytest.importorskip("torchvision").models.convnext
    blocks = [convnext.CNBlockConfig(16, 24, 1), convnext.CNBlockConfig(24, None, 1)]
    return convnext.ConvNeXt(blocks, num_classes=5)


class Heads(nn.Module):
    """A softmax over channels, means over them, and a root mean square."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.norm, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.RMSNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        h = self.up(x) * self.gate(x).softmax(-1)
        return self.down(self.norm(h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True))


def group_norms():
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Conv2d(24, 24, 3), nn.GroupNorm(1, 24), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )


MODELS = {
    "bert": (lambda: of_transformers("BertForSequenceClassification", max_position_embeddings=16), words),
    "llama": (lambda: of_transformers("LlamaForCausalLM", num_key_value_heads=2, use_cache=False), words),
    "vit": (lambda: of_torchvision("VisionTransformer", **VIT), images(3, 16, 16)),
    "swin": (swin, images(3, 32, 32)),
    "convnext": (convnext, images(3, 32, 32)),
    "resnet": (resnet, images(3, 32, 32)),
    "group norms": (group_norms, images(3, 9, 9)),
    "heads": (Heads, images(6)),
}
VIT = {"image_size": 16, "patch_size": 8, "num_layers": 1, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 32, "dropout": 0.1}


def made(kind):
    make, draw = MODELS[kind]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    return trained(make().double().eval(), seed=1), lambda n: draw(n, generator)


def step(model, optimizer, x, seed):
    torch.manual_seed(seed)  # of dropout
    model.train()
    optimizer.zero_grad()
    call(model, x).tanh().square().mean().backward()
    optimizer.step()
    model.eval()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)


def agree(masked, small, x):
    with torch.no_grad():
        assert relative_error(call(small, x), call(masked, x)) < 1e-10


@pytest.mark.parametrize("mask", ["hold", "soft"])
def test_a_forward_that_makes_constants(mask):
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.outer(self.inner(x).relu() * torch.tensor([1.0, 2.0, 3.0] * 4))

    torch.manual_seed(0)
    x = torch.randn(4, 6)
    pruner = fxprune.Pruner(Scales().eval(), 0.5, x, mask=mask)
    torch.testing.assert_close(pruner.step()(x), pruner.shrink()(x))


@pytest.mark.parametrize("mask", ["hold", "soft"])
@pytest.mark.parametrize("kind", MODELS)
def test_training_with_masks_is_training_the_pruned_model(kind, mask):
    model, draw = made(kind)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=draw(2), mask=mask, steps=2, verify=False)
    with untouched(model):
        wide = pruner.step()
    assert type(wide) is type(model) and wide.state_dict().keys() == model.state_dict().keys()
    small = pruner.shrink()
    x = draw(3)
    agree(wide, small, x)
    makes = sgd(wide), sgd(small)
    for seed in range(3):
        batch = draw(4)
        for one, optimizer in zip((wide, small), makes, strict=True):
            step(one, optimizer, batch, seed)
    agree(wide, small, x)
    agree(wide, pruner.shrink(wide), x)
    wide = pruner.step(wide)
    small = pruner.shrink()
    agree(wide, small, x)
    for one, optimizer in ((wide, sgd(wide)), (small, sgd(small))):
        step(one, optimizer, draw(4) if one is None else x, 7)
    agree(wide, small, x)


@pytest.mark.parametrize("kind", MODELS)
def test_held_elements_stay_zero_and_soft_ones_grow(kind):
    model, draw = made(kind)
    for mask in ("hold", "soft"):
        pruner = fxprune.Pruner(model, 0.5, example_inputs=draw(2), mask=mask, verify=False)
        wide = pruner.step()
        before = {name: p.detach().clone() for name, p in wide.named_parameters()}
        decay = 0.1 if mask == "hold" else 0.0  # which would move what has no gradient
        optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-2, weight_decay=decay)
        for seed in range(2):
            step(wide, optimizer, draw(4), seed)
        masks = pruner.plan.masks(wide)
        moved = {name: (p.detach() != before[name]) for name, p in wide.named_parameters()}
        gone = [bool((m & ~masks[name]).any()) for name, m in moved.items() if not masks[name].all()]
        assert any(bool((m & masks[name]).any()) for name, m in moved.items())
        if mask == "hold":
            assert not any(gone)
            assert not any(p[~masks[name]].any() for name, p in wide.named_parameters())
        else:
            assert sum(gone) >= len(gone) / 2


def test_gradients_of_what_grows_are_those_of_the_original():
    """With nothing that counts channels, the two models are one function at first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(20, 4, dtype=DOUBLE)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=x, mask="soft")
    wide = pruner.step()
    plain = copy.deepcopy(model)
    plain.load_state_dict(wide.state_dict())
    for one in (wide, plain):
        one(x).square().mean().backward()
    for a, b in zip(wide.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)


def test_zeros_alone_leave_a_model_its_own_forward():
    """Where nothing counts channels, hooks on modules go on running."""
    model, draw = made("resnet")
    pruner = fxprune.Pruner(model, 0.5, example_inputs=draw(2), mask="hold")
    wide = pruner.step()
    seen = []
    wide.layer1.register_forward_hook(lambda *_: seen.append(1))
    wide(draw(2))
    assert seen and "forward" not in vars(wide)


@pytest.mark.parametrize("kind", ["bert", "heads", "group norms"])
def test_masks_alone_and_a_model_that_is_held(kind):
    model, draw = made(kind)
    small = fxprune.prune(model, 0.5, example_inputs=draw(2))
    x = draw(3)
    agree(fxprune.masks.masked(model, small.plan), small, x)
    original = copy.deepcopy(model)
    held = fxprune.masks.hold(model, small.plan)
    agree(model, small, x)
    optimizers = sgd(model), sgd(small)
    for one, optimizer in zip((model, small), optimizers, strict=True):
        step(one, optimizer, x, 0)
    agree(model, small, x)
    agree(model, small.plan.apply(model), x)
    held.remove()
    assert "forward" not in vars(model)
    model.load_state_dict(original.state_dict())
    agree(model, original, x)


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_a_file], ids=["copy", "file"])
def test_a_copy_has_a_forward_of_its_own(way):
    model, draw = made("group norms")
    x = draw(3)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    wide = fxprune.masks.masked(model, small.plan)
    wide(x)
    other = way(wide)
    agree(other, small, x)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    agree(wide, small, x)
    agree(other, small.plan.apply(other), x)


def test_outputs_are_of_the_original_class_and_batches_of_any_form():
    model, draw = made("bert")
    ids = draw(2)["input_ids"]
    wide = fxprune.Pruner(model, 0.5, example_inputs={"input_ids": ids}, mask="hold").step()
    assert type(wide(ids)) is type(model(ids))
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[:, 6:] = 0
    longer = torch.randint(3, 60, (4, 9))
    small = fxprune.prune(model, 0.5, example_inputs={"input_ids": longer, "attention_mask": mask})
    with torch.no_grad():
        found = wide(input_ids=longer, attention_mask=mask).logits
    assert relative_error(small(input_ids=longer, attention_mask=mask)["logits"], found) < 1e-10


def test_a_masked_model_is_pruned_as_the_original_with_zeros():
    model, draw = made("heads")
    x = draw(4)
    plan = fxprune.prune(model, 0.5, example_inputs=x).plan
    wide = fxprune.masks.masked(model, plan)
    assert isinstance(vars(wide)["forward"], MaskedForward)
    small = fxprune.masks.prune_zeros(wide, x)
    assert fxprune.plan_of(small) == plan and small.verification.error < 1e-8
    agree(wide, small, x)
    assert fxprune.prune(wide, 0.25, example_inputs=x).verification.error < 1e-8


def test_frozen_layers_and_modes_are_followed():
    model, draw = made("group norms")
    small = fxprune.prune(model, 0.5, example_inputs=draw(2))
    wide = fxprune.masks.masked(model, small.plan).train()
    norm = wide[4].eval()
    before = norm.running_mean.clone()
    wide(draw(4))
    assert torch.equal(norm.running_mean, before)
    norm.train()
    wide(draw(4))
    kept = small.plan.masks(model)["4.running_mean"]
    assert (norm.running_mean != before)[kept].all() and torch.equal(norm.running_mean[~kept], before[~kept])
    assert int(norm.num_batches_tracked) == int(model[4].num_batches_tracked) + 1


def test_without_gradients_and_with_data_of_their_own():
    model, draw = made("vit")
    x = draw(2)
    pruner = fxprune.Pruner(model, 0.5, example_inputs=x, mask="soft", steps=2, criterion="wanda", data=[x])
    wide = pruner.step()
    with torch.inference_mode():
        out = wide(x)
    assert relative_error(pruner.shrink()(x), out) < 1e-10
    assert F.cross_entropy(wide(x), torch.tensor([0, 1])).requires_grad
    agree(pruner.step(wide), pruner.shrink(), x)


def test_branches_that_went_add_nothing():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return x + self.down(self.up(self.norm(x)).relu())

    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer(), nn.Linear(8, 3)).double().eval(), torch.randn(4, 8, dtype=DOUBLE)
    small = fxprune.prune(model, 0.5, x, depth=True)
    assert small.meta["branches"]
    assert relative_error(fxprune.masks.masked(model, small.plan)(x), small(x)) < 1e-10


def test_holds_end_in_any_order():
    model, draw = made("group norms")
    small = fxprune.prune(model, 0.5, example_inputs=draw(2))
    x = draw(3)
    for order in ((0, 1), (1, 0)):
        holds = [fxprune.masks.hold(model, small.plan) for _ in range(2)]
        holds[order[0]].remove()
        agree(model, small, x)
        assert "forward" in vars(model)
        for number in (*order, *order):
            holds[number].remove()
        assert "forward" not in vars(model)


def test_torch_compile_does_not_follow_the_capture_of_a_masked_model():
    model, draw = made("group norms")
    x = draw(3)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    agree(torch.compile(fxprune.masks.masked(model, small.plan), backend=backend), small, x)
    assert len(graphs) < 5
