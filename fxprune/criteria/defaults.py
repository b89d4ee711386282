"""The criterion where none is asked for: the one that knows most of what there is to look at."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxprune.criteria.calibration import check_batches, loss_in, prepare_source, read


def choose_criterion(model: nn.Module, data: Any, loss: Any) -> tuple[str, Any, str]:
    """A criterion by name, the data to read, and the reason.

    With data and a loss, which the output of the model may hold, the gradient of the loss tells what a unit is worth; with data
    alone, what an activation varies by; else the weights alone are known.

    Raises: PruneError for what cannot be batches, or that the model does not take.
    """
    if data is None:
        return "magnitude", None, "weights alone are there to look at"
    if loss is not None:
        return "token_taylor", data, "there are data and a loss"
    check_batches(data)
    whole, first = peek(data)
    with prepare_source(model, first, None, "", None) as source, torch.no_grad(), contextlib.suppress(StopIteration):
        if loss_in(source.run(next(source.batches()))) is not None:
            return "token_taylor", whole, "the outputs of the model hold a loss"
    return "flap", whole, "there are data and no loss"


def peek(data: Iterable[Any]) -> tuple[Iterable[Any], list[Any]]:
    """The same batches, and the first of them in a list, which is empty where there are none."""
    found: Iterator[Any] = read(data)
    first = list(itertools.islice(found, 1))
    return (itertools.chain(first, found) if isinstance(data, Iterator) else data), first
