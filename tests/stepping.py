"""Small models for iterative pruning, and what becomes of their values."""

import torch
import torch.nn.functional as F
from graphs.registry import randomise
from torch import nn
from torchvision.models import VisionTransformer


class Residual(nn.Module):
    """A stem, a residual block, a strided layer and a head: three families, two of them normalised."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.outer, self.outer_norm = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 20, 3, stride=2, padding=1)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x))))))
        return self.head(F.gelu(self.down(x)).mean((2, 3)))


def residual():
    torch.manual_seed(0)
    return trained(Residual().double().eval(), seed=1)


def vit():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_heads": 4, "hidden_dim": 24, "mlp_dim": 32}
    return trained(VisionTransformer(image_size=16, patch_size=8, num_classes=5, **sizes).double().eval(), seed=1)


MODELS = {"residual": residual, "vit": vit}
IMAGES = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 3])


def trained(model, seed):
    """As if it had been trained: all values are others."""
    randomise(model, seed)
    return model


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def put_back(original, small, plan):
    """The original architecture with a pruned model's values where they were cut from, NaN elsewhere."""
    masks = plan.masks(original)
    state, values = original.state_dict(), small.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value = torch.full_like(value, torch.nan)
            value[masks[name]] = values[name].flatten()
        state[name] = value
    original.load_state_dict(state)
    return original
