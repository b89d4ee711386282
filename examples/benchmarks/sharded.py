"""Memory of each process while a model that is sharded over several is pruned.

    python examples/benchmarks/sharded.py                 a table for 1, 2 and 4 processes, in SHARDED.md
    python examples/benchmarks/sharded.py --width 2048    a larger model

A decoder of `--blocks` blocks is made shard by shard (no process has it whole), sharded with FSDP2 over gloo, and pruned by
half in place. What a process has beyond what torch and this package take is read from the system, at the highest: `VmHWM` is
reset before. Memory that is freed goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`), so that it is not counted. The
digest is of the plan and of what is left of all parameters; it is the same for any number of processes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sweep import machine
from torch import nn
from torch.distributed.fsdp import fully_shard

import fxprune

MB = 1e6
TABLE = Path(__file__).parent / "SHARDED.md"
COLUMNS = (
    "processes",
    "shards of each, MB",
    "largest parameter, MB",
    "at most, of each, MB",
    "left of the shards, MB",
    "CPU, s",
    "plan and values",
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head_dim = 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


class Decoder(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 1000)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def memory(field: str) -> float:
    """Of this process, in bytes: `VmRSS` now, `VmHWM` the most since it was reset."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[field].split()[0]) * 1024


def sharded(width: int, blocks: int) -> nn.Module:
    """A model whose shards are filled with numbers that depend on where an element is, not on the number of processes."""
    with torch.device("meta"):
        model = Decoder(width, blocks)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        local = parameter.to_local()
        start = sum(len(t) for t in torch.empty(len(parameter), device="meta").chunk(dist.get_world_size())[: dist.get_rank()])
        for row, values in enumerate(local.detach(), start):
            generator = torch.Generator().manual_seed(number * 1_000_003 + row)
            values.copy_(torch.randn(values.shape, generator=generator) / width**0.5)
    return model.eval()


def work(rank: int, world: int, port: int, width: int, blocks: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    tokens = torch.arange(8).view(1, 8)
    warm = sharded(64, 1)
    fxprune.prune(warm, 0.5, tokens, inplace=True)  # what is imported and made once
    before = memory("VmRSS")
    model = sharded(width, blocks)
    shards = sum(p.to_local().nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    small = fxprune.prune(model, 0.5, tokens, inplace=True)
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start
    most = memory("VmHWM") - before
    left = sum(p.to_local().nbytes for p in small.parameters())
    digest = hashlib.sha256(fxprune.plan_of(small).to_json().encode())
    for parameter in small.parameters():
        digest.update(parameter.full_tensor().detach().numpy().tobytes())
    found: list[tuple[float, ...]] = [()] * world
    dist.all_gather_object(found, (shards, largest, most, left, seconds))
    if rank == 0:
        shards, largest, _, left, seconds = (max(column) for column in zip(*found, strict=True))
        sizes = [f"{size / MB:.0f}" for size in (shards, largest, left)]
        sizes.insert(2, ", ".join(f"{size / MB:.0f}" for _, _, size, *_ in found))
        write([str(world), *sizes, f"{seconds:.1f}", digest.hexdigest()[:12]])
    dist.destroy_process_group()


def write(cells: Sequence[str]) -> None:
    """Add a row to the table."""
    with TABLE.open("a") as file:
        file.write(f"| {' | '.join(cells)} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    asked = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    about = (
        f"{asked.blocks} blocks of width {asked.width}, pruned by half in place; what the columns mean is said in `sharded.py`"
    )
    TABLE.write_text(f"# Sharded models\n\nMade by `sharded.py`: {about}. {machine()}.\n\n")
    write(COLUMNS)
    write(["---:"] * len(COLUMNS))
    for world in asked.processes:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(work, (world, port, asked.width, asked.blocks), nprocs=world)
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
