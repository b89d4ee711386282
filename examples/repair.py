"""Prune a small CNN, repair it from unlabelled images without training, and see which layers are sensitive.

Repair needs the original, the pruned model and a few hundred inputs. It returns a copy; `meta["repair"]` says what it did.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fxprune


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves in noise; the direction they run in is the class."""
    targets = torch.randint(4, (count,), generator=generator)
    angle = targets * torch.pi / 4
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = 6.3 * torch.rand(count, generator=generator)
    along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    images = (1.2 * along + phase[:, None, None]).sin().unsqueeze(1)
    return images + torch.randn(images.shape, generator=generator), targets


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for before, width, stride in ((1, 24, 1), (24, 24, 2), (24, 32, 2)):
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def train(model: nn.Module, generator: torch.Generator) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        images, targets = draw(64, generator)
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def main() -> dict[str, float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = network()
    train(model, generator)
    images, targets = draw(500, generator)

    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            return (module(images).argmax(1) == targets).float().mean().item()

    pruned = fxprune.prune(model, macs=0.25, example_inputs=images[:1])
    calibration = [draw(64, generator)[0] for _ in range(4)]  # no labels
    repaired = fxprune.repair(model, pruned, calibration)
    found = {"trained": accuracy(model), "pruned": accuracy(pruned), "repaired": accuracy(repaired)}
    for name, share in found.items():
        print(f"{name:<10} {share:.1%}")
    print(repaired.meta["repair"])

    curves = fxprune.sensitivity(model, images[:1], accuracy, ratios=(0.25, 0.5, 0.75))
    print(curves)
    with tempfile.TemporaryDirectory() as folder:
        curves.plot(Path(folder, "sensitivity.svg"))
    return found


if __name__ == "__main__":
    main()
