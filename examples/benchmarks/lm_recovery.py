"""A short LoRA for `lm.py`: products of low rank beside the linear layers learn what the original says, and are merged."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

RANK, RATE, WINDOWS = 16, 2e-3, 2


class LoRA(nn.Module):
    """A linear layer with a product beside it that is trained in its place; it starts as zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        outputs, inputs = layer.weight.shape  # those of a layer that was cut by hand are not what it says
        self.down, self.up = nn.Linear(inputs, RANK, bias=False), nn.Linear(RANK, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.layer.weight += self.up.weight @ self.down.weight
        return self.layer


def replace(model: nn.Module, kind: type[nn.Module], make: Any) -> None:
    """Put something in place of all modules of a kind but the head, which is the table of embeddings, too."""
    for path, module in list(model.named_modules()):
        if isinstance(module, kind) and not path.endswith("lm_head"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module))


def distilled(model: Any, small: Any, windows: Tensor, steps: int) -> Any:
    """A copy of a pruned model after some steps of distillation from the original on a text, without labels.

    Arguments:
        windows: of tokens, shape (windows, tokens); each step sees `WINDOWS` of them, each of them as often as any other.
    """
    torch.manual_seed(0)
    student = copy.deepcopy(small)
    student.requires_grad_(False)
    replace(student, nn.Linear, LoRA)
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    order = [i for _ in range(steps * WINDOWS // len(windows) + 1) for i in torch.randperm(len(windows)).tolist()]
    for step in tqdm(range(steps), desc="LoRA"):
        ids = windows[order[step * WINDOWS : (step + 1) * WINDOWS]]
        with torch.no_grad():
            wanted = model(input_ids=ids).logits.log_softmax(-1)
        found = student(input_ids=ids, labels=ids).logits.log_softmax(-1)
        loss = F.kl_div(found, wanted, log_target=True, reduction="sum") / ids.numel()
        for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            p.grad = g
        optimizer.step()
        schedule.step()
    replace(student, LoRA, LoRA.merged)
    return student
