"""Multiply-accumulates of `fxprune.count` against `torch.utils.flop_counter`, before and after pruning.

    macs.py                            30 models of torchvision, timm and transformers
    macs.py --models resnet50 llama

The counter runs each model with the math kernel of attention, since a fused one hides its products. Rows are stored in
`macs.jsonl`, the table in `MACS.md`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from models import build
from sweep import Row, find, markdown_table, read_rows, write_rows
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers_configs import CONFIGS

import fxprune

HERE = Path(__file__).parent
TORCHVISION = (
    "alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d densenet121 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small"
    " shufflenet_v2_x1_0 squeezenet1_1 mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny vit_b_32 swin_t swin_v2_t"
)
TIMM = "test_maxvit test_vit test_efficientnet test_resnet"
TRANSFORMERS = "bert gpt2 llama mixtral mamba t5 whisper segformer"
COLUMNS = (
    ("MACs before", "before"),
    ("torch's counter", "counter_before"),
    ("MACs after", "after"),
    ("torch's counter", "counter_after"),
)
MODELS = [*TORCHVISION.split(), *TIMM.split(), *TRANSFORMERS.split()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    arguments = parser.parse_args(argv)
    rows = read_rows(HERE / "macs.jsonl")
    for name in arguments.models:
        row = {"model": name, **measure(name)}
        at = find(rows, {"model": name})
        if at is None:
            rows.append(row)
        else:
            rows[at] = row
        print(row)
        write_rows(HERE / "macs.jsonl", rows)
    (HERE / "MACS.md").write_text(report(rows))
    return int(any(not equal(row) for row in rows))


def measure(name: str) -> Row:
    """Multiply-accumulates by both counts, of the original and with half of every family removed."""
    model, inputs = CONFIGS[name]() if name in CONFIGS else build(name)
    pruned = fxprune.prune(model, 0.5, inputs, verify=False)
    found: Row = {}
    for when, module in (("before", model), ("after", pruned)):
        counted = fxprune.count(module, inputs)
        found |= {f"{when}": counted.macs, f"counter_{when}": by_counter(module, inputs), f"params_{when}": counted.parameters}
    return found


def by_counter(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates by torch's counter, which counts both operations of each."""
    torch.backends.mha.set_fastpath_enabled(False)  # one call that the counter knows nothing of
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return int(counter.get_total_flops()) // 2


def equal(row: Row) -> bool:
    return all(row[when] == row[f"counter_{when}"] for when in ("before", "after"))


def report(rows: list[Row]) -> str:
    same = sum(map(equal, rows))
    columns = [
        ("model", "l", lambda row: row["model"]),
        *((title, "r", lambda row, key=key: f"{row[key]:,}") for title, key in COLUMNS),
        ("equal", "l", lambda row: "yes" if equal(row) else "no"),
    ]
    head = f"""# Multiply-accumulates

`fxprune.count` against `torch.utils.flop_counter` with the math kernel of attention, of each model and of what a
ratio of 0.5 leaves of it, on a batch of two: equal for {same} of {len(rows)} models. Models of transformers are
small configurations.

"""
    return head + markdown_table(columns, rows)


if __name__ == "__main__":
    sys.exit(main())
