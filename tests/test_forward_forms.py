"""What forwards of other people's packages do, each in a small model: pruned by half, and exact."""

import functools

import torch
from torch import nn

import fxprune


def halved(model, *inputs):
    """A model pruned by half, which verification found exact; something is gone of it."""
    model.eval()
    pruned = fxprune.prune(model, 0.5, example_inputs=inputs)
    assert pruned.verification.ok
    assert sum(p.numel() for p in pruned.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    return pruned


# -- hooks -------------------------------------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Takes what a layer inside returns from a hook, which is a method of its own."""

    def __init__(self, when, bound=True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))
        self.head = nn.Linear(16, 5)
        self.hidden, self.hooked, self.bound = {}, False, bound
        if when == "before":
            self.register()

    def register(self):
        hook = self.hook if self.bound else functools.partial(Keeps.hook, self)
        self.net[1].register_forward_hook(hook)
        self.hooked = True

    def hook(self, module, args, output):
        self.hidden[args[0].device] = output.flatten(1)

    def forward(self, x):
        if not self.hooked:
            self.register()
        self.hidden.clear()
        out = self.net(x)
        return out, self.head(self.hidden[x.device])


def test_a_hook_that_keeps_what_a_layer_returns_is_a_step_of_the_program():
    for when, bound in (("before", True), ("before", False), ("in forward", True)):
        torch.manual_seed(0)
        model, x = Keeps(when, bound), torch.randn(4, 6)
        before = dict(model.net[1]._forward_hooks)
        pruned = halved(model, x)
        assert pruned.head.weight.shape == (5, 8), "what the hook keeps is pruned where it is used"
        assert pruned.meta["capture"] == "symbolic"
        assert model.net[1]._forward_hooks == before
        assert not pruned.get_submodule("net.1")._forward_hooks, "the program does it already"
        assert fxprune.verify(model, pruned, torch.randn(7, 6)).ok


def test_a_hook_that_looks_at_values_stays_part_of_its_layer():
    seen = []
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().mean().item()))
    pruned = halved(model, torch.randn(4, 6))
    seen.clear()
    pruned(torch.randn(2, 6))
    assert len(seen) == 1


def test_the_method_of_a_module_outside_of_the_model_stays_its_own():
    class Watch(nn.Module):
        def hook(self, module, args, output):
            return output * 2

    model, watch = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), Watch()
    model[1].register_forward_hook(watch.hook)
    pruned = halved(model, torch.randn(4, 6))
    assert not list(watch.children())
    assert "mul" in pruned.code
