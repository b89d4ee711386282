"""Time against depth, and planning a model far larger than this machine.

    scale.py                    every case
    scale.py --cases mlp --redo

Rows go to `scale.jsonl`, the table to `SCALE.md` and the plot to `SCALE.svg`. Every size runs in a process of its own: the
least of three calls, verification off. A Llama is on the meta device and pruned by `random`, which reads no weights: what is
timed is capture, coupling, choice and the shapes of the result. But for `llama_1b`, which has weights and is pruned by
magnitude: what it holds above what it held before is the pruned copy and what scoring needed.
"""

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sweep import Row, machine, markdown_table, options, read_rows, sweep
from torch import Tensor, nn

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE, PLOT = HERE / "scale.jsonl", HERE / "SCALE.md", HERE / "SCALE.svg"
RUNS = 3


class Residual(nn.Module):
    """Blocks of two linear layers around one stream."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        pair = lambda: nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))  # noqa: E731
        self.blocks = nn.ModuleList([pair() for _ in range(depth)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def mlp(depth: int) -> tuple[nn.Module, Any, str]:
    return Residual(depth).eval(), torch.randn(2, 64), "magnitude"


def densenet(depth: int) -> tuple[nn.Module, Any, str]:
    """Table 1 of Huang et al. (arXiv:1608.06993)."""
    from torchvision.models import DenseNet

    blocks = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32), 264: (6, 12, 64, 48)}[depth]
    return DenseNet(32, blocks, 64).eval(), torch.randn(1, 3, 224, 224), "magnitude"


def llama(depth: int, **sizes: int) -> tuple[nn.Module, Any, str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, use_cache=False, **(sizes or small)))
    return model.to(torch.bfloat16).eval(), {"input_ids": torch.arange(16).view(1, 16)}, "random"


def llama_70b(depth: int) -> tuple[nn.Module, Any, str]:
    """Llama 3 70B (arXiv:2407.21783, table 3)."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    return llama(depth, **sizes, vocab_size=128256)


def llama_1b(depth: int) -> tuple[nn.Module, Any, str]:
    """Llama 3.2 1B, weights drawn at random in the precision that it is published in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(num_hidden_layers=depth, vocab_size=128256, tie_word_embeddings=True, use_cache=False, **sizes)
        return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(16).view(1, 16)}, "magnitude"
    finally:
        torch.set_default_dtype(usual)


CASES = {
    "mlp": (mlp, (125, 250, 500, 1000)),
    "densenet": (densenet, (121, 169, 201, 264)),
    "llama": (llama, (25, 50, 100, 200)),
    "llama_1b": (llama_1b, (16,)),
    "llama_70b": (llama_70b, (80,)),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limit", type=float, default=600, help="seconds for one size of one case")
    arguments = options(parser, measure, argv, alone=True)
    if arguments is None:
        return
    jobs = [{"case": case, "depth": depth} for case in arguments.cases for depth in CASES[case][1]]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo)
    finally:
        rows = sorted(read_rows(ROWS), key=lambda row: (list(CASES).index(row["case"]), row["depth"]))
        TABLE.write_text(table(rows))
        plot(rows)
    print(TABLE)


def measure(case: str, depth: int) -> Row:
    model, inputs, criterion = CASES[case][0](depth)
    row: Row = {"params": sum(p.numel() for p in model.parameters()), "machine": machine()}
    row["weights_gib"] = weights(model)
    before = peak()
    seconds: list[float] = []
    for _ in range(RUNS):
        start = time.perf_counter()
        pruned = fxprune.prune(model, 0.5, example_inputs=inputs, criterion=criterion, verify=False)
        seconds.append(time.perf_counter() - start)
        row.setdefault("peak_gib", peak())  # of one call: what it frees is not all given back to the system
    row |= {"nodes": len(pruned.graph.nodes), "params_after": sum(p.numel() for p in pruned.parameters())}
    row["weights_after_gib"] = weights(pruned)
    return row | {"seconds": min(seconds), "before_gib": before, "status": "timed"}


def weights(model: nn.Module) -> float:
    """GiB of parameters that are not on the meta device."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta) / 2**30


def peak() -> float:
    """The most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def straight(rows: list[Row]) -> tuple[float, float]:
    """Seconds per 1,000 nodes of the graph by least squares, and the coefficient of determination of that line."""
    x, y = (np.array([row[what] for row in rows], float) for what in ("nodes", "seconds"))
    slope, start = np.polyfit(x, y, 1)
    return float(slope) * 1000, float(1 - ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def table(rows: list[Row]) -> str:
    columns = [
        ("case", "l", lambda row: row["case"]),
        ("depth", "r", lambda row: row["depth"]),
        ("parameters, M", "r", lambda row: f"{row['params'] / 1e6:,.1f}" if "params" in row else ""),
        ("nodes", "r", lambda row: row.get("nodes", "")),
        ("prune, s", "r", lambda row: f"{row['seconds']:.2f}" if "seconds" in row else row.get("reason", "")),
        ("ms a node", "r", lambda row: f"{1000 * row['seconds'] / row['nodes']:.2f}" if "seconds" in row else ""),
        ("left", "r", lambda row: f"{row['params_after'] / row['params']:.0%}" if "seconds" in row else ""),
        ("weights, GiB", "r", lambda row: f"{row['weights_gib']:.2f}" if "weights_gib" in row else ""),
        ("left of them", "r", lambda row: f"{row['weights_after_gib']:.2f}" if "weights_gib" in row else ""),
        ("memory before, GiB", "r", lambda row: f"{row['before_gib']:.2f}" if "seconds" in row else ""),
        ("at most, GiB", "r", lambda row: f"{row['peak_gib']:.2f}" if "seconds" in row else ""),
    ]
    lines = [f"- {name}\n" for name in sorted({row["machine"] for row in rows if "machine" in row})]
    for case in CASES:
        mine = [row for row in rows if row["case"] == case and "seconds" in row]
        if len(mine) > 2:
            slope, fit = straight(mine)
            lines.append(f"- {case}: {slope:.2f} s per 1,000 nodes, a straight line with R² = {fit:.4f}\n")
    return (
        "# Scale\n\nWritten by `scale.py` from `scale.jsonl`: the time of `prune` against the length of the program, and"
        " planning models on the meta device. Memory is what the process holds, with torch loaded, before and in one call.\n\n"
        f"![time against nodes](SCALE.svg)\n\n{''.join(lines)}\n{markdown_table(columns, rows)}"
    )


def plot(rows: list[Row]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for case in CASES:
        mine = [row for row in rows if row["case"] == case and "seconds" in row]
        if len(mine) > 2:
            axes.plot([row["nodes"] for row in mine], [row["seconds"] for row in mine], "o-", label=case)
    axes.set(xlabel="nodes of the graph", ylabel="prune, s", xlim=0, ylim=0)
    axes.legend()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
