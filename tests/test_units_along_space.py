"""Labels that vary along channels and along a dimension which stays whole: there they are one unit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.passes.errors import GuardError


def flat(y):
    return y.reshape(1, -1, *y.shape[2:])


def kernels(net, y):
    return net.make(y.mean((2, 3))).view(-1, 1, 3, 3)


def complex_pairs(y):
    return torch.view_as_complex(y.movedim(1, -1).contiguous().unflatten(-1, (-1, 2)))


FORMS = {  # what is between two layers, the width that the second one reads, and a layer that makes kernels
    "of each image and channel": (
        lambda net, y: F.conv2d(flat(y), kernels(net, y), padding=1, groups=y.shape[0] * y.shape[1]).view(y.shape),
        8,
        lambda: nn.Linear(8, 72),
    ),
    "of each channel": (
        lambda net, y: F.conv2d(y, kernels(net, torch.ones(1, 1, 1, 1)), padding=1, groups=8),
        8,
        lambda: nn.Linear(1, 72),
    ),
    "of all channels": (
        lambda net, y: F.conv2d(y, net.make(torch.ones(1)).view(8, 8, 3, 3), padding=1),
        8,
        lambda: nn.Linear(1, 576),
    ),
    "complex pairs": (
        lambda net, y: torch.view_as_real(complex_pairs(y) * 1j).flatten(-2).movedim(-1, 1),
        8,
        nn.Identity,
    ),
    "magnitudes": (lambda net, y: complex_pairs(y).abs().movedim(-1, 1), 4, nn.Identity),
}


class Net(nn.Module):
    def __init__(self, between, width, make):
        super().__init__()
        torch.manual_seed(0)
        self.between, self.a, self.b, self.make = between, nn.Conv2d(3, 8, 1), nn.Conv2d(width, 2, 1), make()
        self.eval()

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_zeroed_original(form):
    model, x = Net(*FORMS[form]), torch.randn(2, 3, 6, 6)
    small = fxprune.prune(model, 0.5, x)
    assert small.a.out_channels == 4
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
    other = torch.randn(3, 3, 5, 7)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)


def test_strides_of_the_example_are_not_those_of_other_sizes():
    """They are facts of the run: the program was wrong, without a word, at another width."""
    small = fxprune.prune(
        Net(lambda net, y: y.as_strided(y.shape, y.stride()).relu(), 8, nn.Identity), 0.5, torch.randn(2, 3, 6, 6)
    )
    assert small.a.out_channels == 4
    assert small(torch.randn(5, 3, 6, 6)).shape == (5, 2, 6, 6)
    with pytest.raises(GuardError, match="captured where"):
        small(torch.randn(2, 3, 6, 8))


class Placed(nn.Module):
    """Positions that a parameter stands behind, a bias that makes them more than zero, and a window over them."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(2, 3) + 0.5)
        self.a, self.b, self.c = nn.Conv2d(7, 7, 1), nn.Conv2d(7, 4, 3, padding=1), nn.Conv2d(4, 7, 1, bias=False)
        self.head = nn.Linear(42, 2)

    def forward(self, x, kept=1.0):
        y = x[:, :, None, None].expand(-1, -1, 2, 3) * self.scale
        y = (y - self.a(y)) * kept
        return self.head(((y + self.c(F.gelu(self.b(y)))) * kept).flatten(1))


def test_positions_are_masked_before_a_window_whose_weight_is_cut():
    """The weight is zero for other channels than the one that the window of a removed position would be read for."""
    torch.manual_seed(0)
    model, x = Placed().double().eval(), torch.randn(2, 7, dtype=torch.double)
    small = fxprune.prune(model, 0.5, example_inputs=x)
    masks = fxprune.plan_of(small).masks(model)
    assert small.b.out_channels < 4 and not bool(masks["scale"].all())
    found = fxprune.verify(model, small, x)
    assert found.ok and found.masked < 1e-12
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
        torch.testing.assert_close(small(x), model(x, masks["scale"]))


MAPS = {  # what a linear layer makes, as a map of 12 channels and 4 x 4 positions, and what mixes the positions
    "interpolated": lambda y, x: F.interpolate(as_map(y), scale_factor=2, mode="bilinear"),
    "pooled": lambda y, x: F.max_pool2d(as_map(y), 3, 1, 1),
    "sorted": lambda y, x: as_map(y).flatten(2).sort(-1)[0].view(-1, 12, 4, 4),
    "by Fourier": lambda y, x: torch.fft.irfft2(torch.fft.rfft2(as_map(y))),
    "reflected": lambda y, x: F.pad(as_map(y), (1, 1, 1, 1), mode="reflect"),
    "padded": lambda y, x: F.pad(as_map(y), (1, 0, 1, 2)),
    "sampled": lambda y, x: F.grid_sample(as_map(y), torch.zeros(len(y), 3, 3, 2), align_corners=False),
    "unpooled": lambda y, x: F.max_unpool2d(*F.max_pool2d(as_map(y), 2, return_indices=True), 2),
    "triangle": lambda y, x: as_map(y).tril(),
    "cropped": lambda y, x: as_map(y)[:, :, 1:, :3],
    "every second position": lambda y, x: as_map(y)[..., ::2],
    "weights of a layer": lambda y, x: torch.bmm(y.view(-1, 12, 16), x[:, :, None])[..., None],
}


def as_map(y):
    return y.view(-1, 12, 4, 4)


@pytest.mark.parametrize("form", MAPS)
def test_a_row_whose_positions_are_mixed_goes_whole(form):
    torch.manual_seed(0)
    model, x = nn.Module(), torch.randn(2, 16)
    model.a, model.b = nn.Linear(16, 192), nn.Conv2d(12, 2, 3, padding=1)
    model.forward = lambda x: model.b(MAPS[form](model.a(x), x))
    small = fxprune.prune(model.eval(), 0.5, example_inputs=x)
    assert small.b.in_channels == 6 and small.a.out_features < 192
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks.get(name, torch.ones(())))
    other = torch.randn(3, 16)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)


class RotatesAPart(nn.Module):
    """Latent attention in small: a rotary part stands behind a latent one in a single projection."""

    def __init__(self):
        super().__init__()
        self.both, self.out, self.turned = nn.Linear(5, 16), nn.Linear(12, 3), nn.Linear(4, 3)

    def forward(self, x):
        latent, part = self.both(x).split([12, 4], -1)
        pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2))) * 1j
        return self.out(latent.relu()) + self.turned(torch.view_as_real(pairs).flatten(-2))


def test_pairs_behind_an_odd_number_of_channels():
    torch.manual_seed(0)
    model, x = RotatesAPart().eval(), torch.randn(2, 6, 5)
    small = fxprune.prune(model, 0.25, x, freeze="turned")
    assert small.both.out_features == 13
    masks = fxprune.plan_of(small).masks(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.mul_(masks[name])
    torch.testing.assert_close(small(x), model(x))
