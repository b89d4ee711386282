"""Prune a torchvision ResNet-50 to half its channels, and show what came of it.

Any other model of torchvision, too: `python examples/demo.py --model densenet121 --ratio 0.3`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import fxprune


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Multiply-accumulates of one forward; the counter counts both operations of each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return int(counter.get_total_flops()) // 2


def time_in_turns(*calls: Callable[[], object], repeats: int = 7) -> list[float]:
    """Median seconds of each call. They take turns, so that a busy machine slows both."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for taken, call in zip(seconds, calls):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]  # the first round warms up


@torch.no_grad()
def compare(model: torch.nn.Module, pruned: torch.nn.Module, images: torch.Tensor) -> Table:
    """The table of sizes and times, before and after."""
    table = Table(title="before and after", title_justify="left")
    for column, justify in (("", "left"), ("original", "right"), ("pruned", "right"), ("left", "right")):
        table.add_column(column, justify=justify)

    before, after = count_parameters(model), count_parameters(pruned)
    table.add_row("parameters", f"{before / 1e6:.2f} M", f"{after / 1e6:.2f} M", f"{after / before:.0%}")
    before, after = count_macs(model, images), count_macs(pruned, images)
    table.add_row("MACs", f"{before / 1e9:.2f} G", f"{after / 1e9:.2f} G", f"{after / before:.0%}")
    slow, fast = time_in_turns(lambda: model(images), lambda: pruned(images))
    table.add_row("forward", f"{slow * 1e3:.0f} ms", f"{fast * 1e3:.0f} ms", f"{fast / slow:.0%}")
    return table


def main(argv: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description="Prune a torchvision model and print the report.")
    parser.add_argument("--model", default="resnet50", help="a torchvision classification model")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the channels to remove")
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    model = torchvision.models.get_model(arguments.model, weights=None).eval()
    images = torch.randn(1, 3, arguments.image_size, arguments.image_size)

    start = time.perf_counter()
    pruned = fxprune.prune(model, arguments.ratio, example_inputs=images, verify=True)
    seconds = time.perf_counter() - start

    console = Console()
    console.print(f"{arguments.model}, ratio {arguments.ratio}: pruned and verified in {seconds:.1f} s\n")
    console.print(fxprune.report(model, pruned))
    console.print(compare(model, pruned, images))
    console.print(str(pruned.verification))
    return pruned


if __name__ == "__main__":
    main()
