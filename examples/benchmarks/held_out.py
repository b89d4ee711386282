"""Repair on a little data: the error of the output on other data, before and after.

    held_out.py                     every network and number of samples
    held_out.py --networks bert --redo

Rows go to `held_out.jsonl`, the table to `HELD_OUT.md`. Each network loses half of every family and is repaired by
`fxprune.repair(model, small, data)` on so many samples. The error is that of the output on samples that neither has seen: the
norm of the difference from the original's, over the norm of the original's. Networks of images are trained for some steps on
Fashion-MNIST (Debian's `dataset-fashion-mnist`), enlarged, so that their layers differ; those of tokens have random weights.
The outputs of those with inverted residuals hardly vary from image to image after so few steps, so that a bias repairs them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import fashion
from sweep import Row, machine, markdown_table, options, read_rows, sweep
from torch import Tensor, nn
from training import train

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "held_out.jsonl", HERE / "HELD_OUT.md"
SAMPLES = (8, 32, 128)
STEPS, UNSEEN, SIZE = 40, 128, 64
VISION = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "regnet_y_400mf",
    "densenet121",
    "efficientnet_b0",
)
NETWORKS = (*VISION, "bert", "llama")


def images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Of shape (count, 3, SIZE, SIZE), and their classes."""
    small, labels = fashion(split, count)
    return nn.functional.interpolate(small, SIZE, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), labels


def build(name: str) -> tuple[nn.Module, Callable[[str, int], Any]]:
    """In evaluation mode, with a function that makes its inputs."""
    torch.manual_seed(0)
    if name in VISION:
        from torchvision import models

        model = getattr(models, name)(weights=None, num_classes=10)
        train(model, *images("train", 1024), steps=STEPS, rate=1e-3, seed=0)
        return model.eval(), lambda split, count: images(split, count)[0]
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    sizes = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    kind, config = {"bert": (BertModel, BertConfig), "llama": (LlamaModel, LlamaConfig)}[name]
    tokens = {split: torch.randint(200, (256, 24)) for split in ("train", "t10k")}
    return kind(config(**sizes)).eval(), lambda split, count: tokens[split][:count]


def measure(network: str, samples: int) -> Row:
    model, inputs = build(network)
    small = fxprune.prune(model, 0.5, inputs("t10k", 2))
    unseen, data = inputs("t10k", UNSEEN), inputs("train", samples)
    start = time.perf_counter()
    better = fxprune.repair(model, small, list(data.split(8)))
    row: Row = {"machine": machine(), "seconds": time.perf_counter() - start, "status": "measured"}
    return row | {"before": error(model, small, unseen), "after": error(model, better, unseen)}


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """The norm of the difference of their outputs over the norm of the first one's."""
    wanted, found = (out if isinstance(out, Tensor) else out[0] for out in (model(inputs), other(inputs)))
    return float((found - wanted).norm() / wanted.norm())


def table(rows: list[Row]) -> str:
    columns = [
        ("network", "l", lambda row: row["network"]),
        ("samples", "r", lambda row: row["samples"]),
        ("error before", "r", lambda row: f"{row['before']:.3f}" if "before" in row else row.get("reason", "")),
        ("after", "r", lambda row: f"{row['after']:.3f}" if "after" in row else ""),
    ]
    done = [row for row in rows if "before" in row]
    worse = sum(row["after"] > row["before"] for row in done)
    machines = "".join(f"- {name}\n" for name in sorted({row["machine"] for row in done}))
    return (
        "# Repair, on data held out\n\nWritten by `held_out.py` from `held_out.jsonl`; what the error is is said at its top."
        f"\n\n{machines}- {len(done)} pairs of network and number of samples: worse than before in {worse}\n\n"
        f"{markdown_table(columns, rows)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = options(parser, measure, argv)
    if arguments is None:
        return
    jobs = [{"network": name, "samples": count} for name in arguments.networks for count in SAMPLES]
    try:
        sweep(__file__, jobs, ROWS, limit=1800, redo=arguments.redo, workers=arguments.workers)
    finally:
        rows = sorted(read_rows(ROWS), key=lambda row: (NETWORKS.index(row["network"]), row["samples"]))
        TABLE.write_text(table(rows))
    print(TABLE)


if __name__ == "__main__":
    sys.exit(main())
