"""Training and testing of the networks of `accuracy.py`; trained ones are kept in `scratch/`, which git ignores."""

from pathlib import Path

import torch
from data import fashion
from networks import build
from torch import Tensor, nn
from torch.nn import functional as F

SCRATCH = Path(__file__).parent / "scratch"
TRAIN, TEST, BATCH = 12_000, 2_000, 128
EPOCHS = {"resnet20": 4, "vit": 6, "mobilenet": 6}
BASE_RATE, TUNE_RATE = 3e-3, 1e-3


def base(name: str, seed: int) -> nn.Module:
    """A network trained from scratch on the first images of the training set."""
    torch.manual_seed(seed)
    network = build(name)
    path = SCRATCH / f"{name}-{seed}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    images, labels = fashion("train", TRAIN)
    train(network, images, labels, steps=EPOCHS[name] * TRAIN // BATCH, rate=BASE_RATE, seed=seed)
    SCRATCH.mkdir(exist_ok=True)
    torch.save(network.state_dict(), path)
    return network


def train(network: nn.Module, images: Tensor, labels: Tensor, *, steps: int, rate: float, seed: int) -> None:
    """AdamW, with a rate that rises over the first tenth of the steps and falls to nothing; leaves evaluation mode on."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    network.train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        mine, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(network(images[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images that are classified rightly."""
    right = [(network(x).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500))]
    return float(sum(right)) / len(labels)
