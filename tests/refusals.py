"""A model with one of everything that a request must leave alone, and a check that it did."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune import PruneError

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Small; `net` gives it one of everything that must not change."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.body = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x, scale=1.0):
        x = self.drop(F.relu(self.norm(self.stem(x))))
        return self.head(self.body(x).mean((2, 3))) * scale


def net():
    """With a gradient, a frozen parameter, a hook and mixed modes."""
    model = Net()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.head.bias.requires_grad_(False)
    model.body.register_forward_hook(lambda module, args, output: None)
    model.norm.eval()
    return model


def state(model):
    """Everything of a model, and of torch, that a failed request must leave alone."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    names = ("zeros", "ones", "arange", "where", "tensor", "finfo", "pow")
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta},
        "tensors": {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "gradients": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in modules.items()},
        "hooks": {k: [len(getattr(m, h)) for h in hooks] for k, m in modules.items()},
        "attributes": {k: sorted(vars(m)) for k, m in modules.items()},
        "random": torch.get_rng_state(),
        "torch": [*(id(getattr(torch, name)) for name in names), id(F._verify_batch_size)],
        "settings": [torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()],
        "module class": sorted(vars(nn.Module)),
        "autograd": id(vars(torch.autograd.function._SingleLevelFunction).get("apply")),
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


@contextmanager
def untouched(*models):
    before = [state(m) for m in models]
    yield
    for was, model in zip(before, models):
        now = state(model)
        changed = [k for k in was if not same(was[k], now[k])]
        assert not changed, f"changed: {changed}"


def message(what, where=None, fix=None):
    return "\n".join([what, *([f"  at {where}"] if where else []), *([f"  fix: {fix}"] if fix else [])])


def refuses(call, *models, what, where=None, fix=None):
    """The call raises exactly this message, and leaves the models as they were."""
    with untouched(*models), pytest.raises(PruneError) as caught:
        call()
    assert str(caught.value) == message(what, where, fix)
    return caught.value
