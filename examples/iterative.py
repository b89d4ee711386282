"""Prune a small CNN in steps, and let one training run go on through all of them.

The optimizer, its schedule and a moving average of the weights are carried over each step; between the steps, a regulariser
brings the units that go next near zero. In the end the plan of all steps makes the same architecture from the original one.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxprune
from fxprune.iterative.regularizers import Growing


def small_net(classes: int = 4) -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(block(3, 32, 1), block(32, 32, 2), block(32, 64, 2), pool, nn.Linear(4 * 64, classes))


def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one bright quadrant; its index is the class."""
    images = torch.randn(count, 3, 16, 16, generator=generator)
    targets = torch.randint(4, (count,), generator=generator)
    for image, target in zip(images, targets.tolist()):
        row, column = divmod(target, 2)
        image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 0.25
    return images, targets


@torch.no_grad()
def accuracy(model: nn.Module, generator: torch.Generator) -> float:
    images, targets = draw(512, generator)
    mode = model.training
    found = (model.eval()(images).argmax(1) == targets).float().mean().item()
    model.train(mode)
    return found


def main() -> tuple[float, fxprune.Pruner]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images, _ = draw(2, generator)

    model = original = small_net()
    pruner = fxprune.Pruner(
        original,
        example_inputs=images,
        macs=0.3,  # a budget: this share of the multiply-accumulates may stay
        ranking="global",
        schedule="cubic",
        steps=3,
        regularizer=Growing(strength=0.02, every=2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    for iteration in range(120):
        if iteration in (30, 55, 80):
            before = accuracy(model, generator)
            model = pruner.step()  # the next smaller model, from what was trained so far
            pruner.remap_optimizer(optimizer)
            pruner.remap_average(average)
            print(f"iteration {iteration:>3}: {before:.1%} before, {accuracy(model, generator):.1%} after the step")
        inputs, targets = draw(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(inputs), targets).backward()
        pruner.regularize(model)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)

    reached = accuracy(average, generator)
    print(f"at the end     {reached:.1%} with averaged weights")
    print(pruner.history)

    again = pruner.plan.apply(small_net())  # the plan is one of the original, whatever the number of steps
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), model.eval()(images))
    return reached, pruner


if __name__ == "__main__":
    main()
