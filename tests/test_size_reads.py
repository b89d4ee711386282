"""A size that a forward reads again is the same node, as long as it is the same size."""

import torch
from torch import nn

import fxprune


def pruned(net, x):
    small = fxprune.prune(net, 0.5, example_inputs=x)
    assert small.verification.ok and any(k for k in small.plan.slices)
    return small


def reads(small):
    """The nodes that read a shape or a size, or compute with numbers."""
    return [n for n in small.graph.nodes if n.target is getattr or n.target == "size" or str(n.target).startswith("<built-in")]


class Asks(nn.Module):
    """Reads the same sizes over and over, and computes the same number of them."""

    def __init__(self, times):
        super().__init__()
        torch.manual_seed(0)
        self.times, self.a, self.b = times, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.a(x)
        for _ in range(self.times):
            y = y.reshape(x.shape[0] * x.size(1), -1).relu().reshape(x.shape[0], x.size(1), -1)
        return self.b(y)


def test_what_is_asked_again_is_not_read_again():
    x = torch.randn(2, 3, 8)
    once, often = pruned(Asks(1).eval(), x), pruned(Asks(5).eval(), x)
    assert len(reads(once)) == len(reads(often))
    assert often(torch.randn(4, 5, 8)).shape == (4, 5, 8)


class Turns(nn.Module):
    """Turns a tensor in place between two looks at its shape; where it is square, both say the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        t = x[:, :, 0].clone()
        rows = t.shape[0]
        t.t_()
        columns = t.shape[0]
        return self.b(self.a(x).relu()) * rows + columns


def test_a_tensor_turned_in_place_is_asked_anew():
    net = Turns().eval()
    small = pruned(net, torch.randn(3, 3, 8))
    x = torch.randn(2, 5, 8)
    masked = fxprune.verify(net, small, x)
    assert masked.ok  # 2 rows and 5 columns, where the example had 3 of either


class Modal(nn.Module):
    """Reads the same size in evaluation, in training, and after both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.inner, self.b = nn.Linear(8, 16), Noisy(), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(self.inner(self.a(x)))


class Noisy(nn.Module):
    def forward(self, y):
        half = y.shape[0] // 2
        return y * half + y.shape[1] if self.training else y * half + 1


def test_branches_read_for_themselves():
    net = Modal().eval()
    x = torch.randn(4, 3, 8)
    small = pruned(net, x)
    assert len(fxprune.couple(net, x)._solution.captures) == 1  # where a branch leans on the other, there are two
    for mode in (False, True):
        net.train(mode), small.train(mode)
        for n in (4, 6, 9):
            x = torch.randn(n, 3, 8)
            hidden = net.a(x)
            kept = small.plan.slices["a.weight"][0].keep
            mask = torch.zeros(16).index_fill(0, kept, 1.0)
            expected = net.b((net.inner(hidden)) * mask)
            torch.testing.assert_close(small(x), expected)
