"""Prune a small CNN, fine-tune it, save it without pickle, and load it back.

What is saved is the weights that are left and the plan, in one safetensors file. To load, build the original model from its own
code; it may be on the meta device.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fxprune


class SmallNet(nn.Module):
    """Three convolutions, one of them in a residual branch, and a classifier."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.classify = nn.Linear(64 * 4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stem(images)
        features = torch.relu(features + self.branch(features))
        features = F.adaptive_avg_pool2d(self.down(features), 2)
        return self.classify(features.flatten(1))


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one bright quadrant; its index is the class."""
    images = torch.randn(count, 3, 16, 16, generator=generator)
    targets = torch.randint(4, (count,), generator=generator)
    for image, target in zip(images, targets.tolist()):
        row, column = divmod(target, 2)
        image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1.0
    return images, targets


def train(model: nn.Module, steps: int, generator: torch.Generator) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        images, targets = draw(64, generator)
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, generator: torch.Generator) -> float:
    images, targets = draw(512, generator)
    return (model.eval()(images).argmax(1) == targets).float().mean().item()


def main() -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images, _ = draw(2, generator)

    model = SmallNet()
    train(model, 40, generator)
    print(f"trained              {accuracy(model, generator):.1%}")

    pruned = fxprune.prune(model, 0.5, example_inputs=images)
    print(f"pruned               {accuracy(pruned, generator):.1%}")
    train(pruned, 20, generator)  # an ordinary module: any training loop does
    tuned = accuracy(pruned, generator)
    print(f"pruned, fine-tuned   {tuned:.1%}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pruned.safetensors")
        fxprune.save(pruned, path)
        with torch.device("meta"):
            empty = SmallNet()
        loaded = fxprune.load(path, empty)
        same = torch.equal(loaded(images), pruned(images))
        print(f"loaded back          {'the same outputs' if same else 'DIFFERENT OUTPUTS'}")
        assert same
    return tuned


if __name__ == "__main__":
    main()
