"""Memory and time of pruning Llamas of 1.24 and 8 billion parameters in bfloat16.

    large.py                            every case
    large.py --cases checkpoint --redo  the 8 billion again, from folder to folder (16 GB of disk, twice)

Rows go to `large.jsonl`, the table to `LARGE.md`. Weights are random, as are tokens: no figure here depends on what they are.
Every case runs in a process of its own; what it holds at most is the system's figure (`ru_maxrss`, which is what
`/usr/bin/time -v` says, with torch and transformers in it).

- `memory`: the 1.24 billion in memory, pruned by half by magnitude, as a copy, in place, and in place in its own class.
- `checkpoint`: the 8 billion from a folder of shards to another, half of each FFN, by magnitude and by what the criteria of
  activations see of 128 tokens.
- `calibration`: seconds of `fxprune.calibrate` on the 1.24 billion in single precision and 512 tokens, over those of a plain
  forward of the same tokens, in turns.

The example has 16 tokens: a result of the model's own class, and its configuration, are tried by running both models on it.
The folder of 8 billion is written once, a shard at a time, below `build`.
"""

import argparse
import json
import math
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sweep import Row, machine, markdown_table, options, read_rows, sweep
from torch import nn

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE, BUILT = HERE / "large.jsonl", HERE / "LARGE.md", HERE.parent.parent / "build" / "large"
SIZES: dict[str, dict[str, Any]] = {
    "1.24 B": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8 B": {  # Llama 3 8B (arXiv:2407.21783, table 3)
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
LENGTH, SHARD, ROUNDS = 64, 2 << 30, 3  # tokens of a batch, bytes of a file, turns of calibration and forward
TOKENS = {"checkpoint": 128, "calibration": 512}
EXAMPLE = 16
CASES = {
    "memory": [("1.24 B", how) for how in ("copy", "inplace", "inplace, same class")],
    "calibration": [("1.24 B", how) for how in ("wanda", "flap")],
    "checkpoint": [("8 B", how) for how in ("magnitude", "wanda", "flap")],
}


def config_of(size: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(use_cache=False, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"], **SIZES[size])


def empty(size: str) -> nn.Module:
    """The model on the meta device."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config_of(size)).to(torch.bfloat16).eval()


def model_of(size: str) -> nn.Module:
    """The model with random weights, in memory once."""
    from transformers import LlamaForCausalLM

    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config_of(size)).eval()
    finally:
        torch.set_default_dtype(usual)


def folder_of(size: str) -> Path:
    """A folder of transformers' with the model in shards, written where it is not there, one shard in memory at a time."""
    folder, scratch = BUILT / size.replace(" ", "-"), BUILT / "scratch"
    if folder.exists():
        return folder
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    forms = dict(empty(size).named_parameters())
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, form in forms.items():
        if sum(t.nbytes for t in shards[-1].values()) + form.nbytes > SHARD and shards[-1]:
            shards.append({})
        shards[-1][name] = form
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, form in shard.items():
            tensors[name] = torch.empty(form.shape, dtype=form.dtype).normal_(0, 0.02, generator=generator)
            if "norm" in name:
                tensors[name].fill_(1)
            weight_map[name] = file
        save_file(tensors, scratch / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in forms.values())}, "weight_map": weight_map}
    (scratch / "model.safetensors.index.json").write_text(json.dumps(index))
    config_of(size).save_pretrained(scratch)
    scratch.rename(folder)
    return folder


def batches(tokens: int, length: int = LENGTH) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    vocabulary = min(sizes["vocab_size"] for sizes in SIZES.values())
    for _ in range(tokens // length):
        yield {"input_ids": torch.randint(vocabulary, (1, length), generator=generator)}


def peak() -> float:
    """The most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def prepare(case: str, size: str, how: str) -> None:
    if case == "checkpoint":
        folder_of(size)


def measure(case: str, size: str, how: str) -> Row:
    form = empty(size)
    row: Row = {"machine": machine(), "params": sum(p.numel() for p in form.parameters())}
    row["weights_gib"] = sum(p.nbytes for p in form.parameters()) / 2**30
    if case == "memory":
        return row | in_memory(size, how)
    if case == "calibration":
        return row | calibration(size, how)
    return row | checkpoint(size, how)


def in_memory(size: str, how: str) -> Row:
    model, inputs = model_of(size), next(batches(EXAMPLE, EXAMPLE))
    before, start = peak(), time.perf_counter()
    asked = {} if how == "copy" else {"inplace": True, "same_class": how != "inplace"}
    small = fxprune.prune(model, 0.5, inputs, criterion="magnitude", verify=False, **asked)
    seconds = time.perf_counter() - start
    left = sum(p.numel() for p in small.parameters())
    return {"before_gib": before, "peak_gib": peak(), "seconds": seconds, "params_after": left, "status": "timed"}


def calibration(size: str, how: str) -> Row:
    model, data = model_of(size).float(), list(batches(TOKENS["calibration"]))
    before, ours, plain = peak(), [], []

    @torch.no_grad()
    def forward() -> None:
        for batch in data:
            model(**batch)

    for turn in range(ROUNDS + 1):
        for run, seconds in ((forward, plain), (lambda: fxprune.calibrate(model, data, how, data[0]), ours)):
            start = time.perf_counter()
            run()
            if turn:  # after one to warm up
                seconds.append(time.perf_counter() - start)
    forwards = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    found = {"before_gib": before, "peak_gib": peak(), "seconds": statistics.median(ours), "tokens": TOKENS["calibration"]}
    found["weights_gib"] = sum(p.nbytes for p in model.parameters()) / 2**30
    return found | {"forwards": forwards, "status": "timed"}


def checkpoint(size: str, how: str) -> Row:
    source, target = folder_of(size), BUILT / "pruned"
    shutil.rmtree(target, ignore_errors=True)
    data = None if how == "magnitude" else list(batches(TOKENS["checkpoint"]))
    before, start = peak(), time.perf_counter()
    asked = {"criterion": how, "data": data, "only": "*mlp*"}
    fxprune.prune_checkpoint(source, target, 0.5, next(batches(EXAMPLE, EXAMPLE)), **asked)
    seconds = time.perf_counter() - start
    left = 0
    for path in target.glob("*.safetensors"):
        with safe_open(str(path), "pt") as file:
            left += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    shutil.rmtree(target)
    found = {"before_gib": before, "peak_gib": peak(), "seconds": seconds, "params_after": left, "status": "timed"}
    return found if data is None else found | {"tokens": TOKENS["checkpoint"]}


def table(rows: list[Row]) -> str:
    def number(key: str, form: str = ".2f", scale: float = 1.0) -> Any:
        return lambda row: format(row[key] * scale, form) if key in row else ""

    columns = [
        ("case", "l", lambda row: row["case"]),
        ("model", "l", lambda row: row["size"]),
        ("how", "l", lambda row: row["how"]),
        ("weights, GiB", "r", number("weights_gib")),
        ("tokens", "r", lambda row: row.get("tokens", "")),
        ("memory before, GiB", "r", number("before_gib")),
        ("at most, GiB", "r", number("peak_gib")),
        ("s", "r", number("seconds", ".0f")),
        ("forwards", "r", number("forwards", ".1f")),
        ("parameters left, M", "r", number("params_after", ",.0f", 1e-6)),
        ("", "l", lambda row: row.get("reason", "")),
    ]
    machines = "".join(f"- {name}\n" for name in sorted({row["machine"] for row in rows if "machine" in row}))
    return (
        "# Large models\n\nWritten by `large.py` from `large.jsonl`; what the cases are is said at its top. *before* is what"
        " the process holds with torch, transformers and what the case is given; *at most* what it held at the highest;"
        " *forwards* the seconds over those of a plain forward of the same tokens, the median of three turns. Seconds are"
        " those of a machine shared with other work.\n\n"
        f"{machines}\n{markdown_table(columns, rows)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--limit", type=float, default=7200, help="seconds for one row")
    arguments = options(parser, measure, argv, memory=0.9, alone=True, prepare=prepare)  # shards are mapped, all of them
    if arguments is None:
        return
    jobs = [{"case": case, "size": size, "how": how} for case in arguments.cases for size, how in CASES[case]]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo)
    finally:
        place = [(case, size, how) for case, rows in CASES.items() for size, how in rows]
        rows = sorted(read_rows(ROWS), key=lambda row: place.index((row["case"], row["size"], row["how"])))
        TABLE.write_text(table(rows))
    print(TABLE)


if __name__ == "__main__":
    sys.exit(main())
