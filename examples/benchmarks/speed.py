"""Time `fxprune.prune` against Torch-Pruning, model by model, taking turns in one process.

    speed.py                              torchvision's classifiers, and all that both prune in PRUNABILITY.md
    speed.py --models resnet50 vit_b_32 transformers:bert --budget 60

Rows go to `speed.jsonl`, the table to `SPEED.md`. Both sides prune half the channels by L2 magnitude, start
to end: tracing, coupling, scoring and the surgery. Torch-Pruning is given the hints its documentation asks
for (the layers to leave alone, the heads of each attention); fxprune is given none. Copies of the model are
made outside of the timed part, and both sides prune a tiny network first, so that neither pays for imports.

Classifiers see one image. Models of transformers and DiT have the size that their configuration has by default, which is
that of a checkpoint; all others are built as for PRUNABILITY.md. Of all but classifiers Torch-Pruning is told which layers
to leave alone as fxprune found them, outside of the timed part.
"""

import argparse
import copy
import gc
import importlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch_pruning
from models import build, call, full_name, torchvision_names
from suites import make
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from torch import fx, nn

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "speed.jsonl", HERE / "SPEED.md"
RATIO = 0.5
ROUNDS = 7  # at most; fewer where the budget is spent sooner
LEAST = 3  # but so many where a single round does not spend the budget
SIDES = {"default": "fxprune", "unverified": "without verification"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", help="instead of all that both prune")
    parser.add_argument("--budget", type=float, default=20, help="seconds to spend on repeats of one model")
    parser.add_argument("--other-limit", type=float, default=300, help="seconds Torch-Pruning may take for one")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for one model, all told")
    arguments = options(parser, measure, argv, alone=True)
    if arguments is None:
        return
    settings = {"budget": arguments.budget, "other_limit": arguments.other_limit}
    jobs = [{"model": name if is_of_a_suite(name) else full_name(name)} for name in arguments.models or prunable_by_both()]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo, settings=settings)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE.relative_to(Path.cwd()) if TABLE.is_relative_to(Path.cwd()) else TABLE)


def is_of_a_suite(name: str) -> bool:
    """Whether a name is one of PRUNABILITY.md that `models.build` does not know."""
    library, _, short = name.partition(":")
    classifier = library == "timm" or (library == "torchvision" and name in torchvision_names())
    return bool(short) and not classifier


def prunable_by_both() -> list[str]:
    """torchvision's classifiers, and the models of PRUNABILITY.md that Torch-Pruning makes smaller and that still run."""
    plain = [name for name in torchvision_names() if "quantized" not in name]
    rows = read_rows(HERE / "prunability.jsonl")
    both = [r["model"] for r in rows if r["tool"] == "torch-pruning" and r["status"] in ("exact", "inexact", "runs")]
    return list(dict.fromkeys(plain + both))


def built(model: str) -> tuple[nn.Module, Any]:
    """A model and the arguments of one call, at the size at which it is timed."""
    if not is_of_a_suite(model):
        network, images = build(model)
        return network, images[:1]
    library, _, short = model.partition(":")
    return full_size(library, short) if library in ("transformers", "diffusers") else make(model)


def full_size(library: str, short: str) -> tuple[nn.Module, Any]:
    """A model by the defaults of its configuration; a few have a builder of their own."""
    configs = importlib.import_module(f"{library}_configs")
    torch.manual_seed(0)
    return configs.BY_DEFAULT.get(short, configs.CONFIGS[short])()


def layers_that_stay(network: nn.Module, inputs: Any) -> list[str]:
    """The layers whose outputs stay, by name."""
    families = fxprune.couple(network, inputs).families
    return sorted({member.rpartition(".")[0] for f in families if f.frozen for member, dim in f.members if dim == 0})


def measure(model: str, budget: float, other_limit: float) -> Row:
    network, inputs = built(model)
    stay = layers_that_stay(network, inputs) if is_of_a_suite(model) else None
    sides: dict[str, Callable[[nn.Module], object]] = {
        "forward": lambda copied: forward(copied, inputs),
        "default": lambda copied: prune_here(copied, inputs, verify="auto"),
        "unverified": lambda copied: prune_here(copied, inputs, verify=False),
        "other": lambda copied: prune_with_torch_pruning(copied, inputs, stay),
        "plain": plain_steps,
    }
    warm_up()
    forward(network, inputs)
    turns = take_turns(network, sides, budget, {"other": other_limit})
    row: Row = {"params": count_parameters(network), "machine": machine(), "threads": torch.get_num_threads()}
    for side in ("default", "other"):
        if side in turns.results:
            row[f"{side}_left"] = count_parameters(turns.results[side]) / row["params"]
    if "other" in turns.results:
        row["other_breaks"] = breaks(turns.results["other"], inputs)
    row |= {f"{side}_s": seconds for side, seconds in turns.times.items()}
    row |= {f"{side}_fails": reason for side, reason in turns.failures.items()}
    row["status"] = "failed" if "default" in turns.failures else "timed"
    return row


@dataclass
class Turns:
    """Seconds of each run of each side, why a side was given up, and what its last run returned."""

    times: dict[str, list[float]]
    failures: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


def take_turns(
    network: nn.Module,
    sides: dict[str, Callable[[nn.Module], object]],
    budget: float,
    limits: dict[str, float],
) -> Turns:
    """A/B/A/B until another round would go over the budget: at least `LEAST` (or one that does), at most `ROUNDS`."""
    turns = Turns({side: [] for side in sides})
    began = time.perf_counter()
    for done in range(1, ROUNDS + 1):
        for side, work in sides.items():
            if side in turns.failures:
                continue
            turns.results.pop(side, None)
            copied = None
            gc.collect()  # before the next copy is made, since the largest models are gigabytes, and on nobody's time
            copied = copy.deepcopy(network)
            try:
                with time_limit(limits.get(side)):
                    start = time.perf_counter()
                    turns.results[side] = work(copied)
                    turns.times[side].append(time.perf_counter() - start)
            except (Exception, OutOfTime) as error:
                turns.failures[side] = one_line(error)
        spent = time.perf_counter() - began
        if spent + spent / done > budget and (done >= LEAST or spent / done > budget):
            break
    return turns


OUT_OF_TIME = "no result within"


class OutOfTime(BaseException):
    """Not an Exception: the code it interrupts may catch those."""


@contextmanager
def time_limit(seconds: float | None):
    """Interrupt the block after so many seconds; no limit where None."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime(f"{OUT_OF_TIME} {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def forward(network: nn.Module, inputs: Any) -> object:
    return call(network, inputs)


def prune_here(network: nn.Module, inputs: Any, verify: Any) -> nn.Module:
    return fxprune.prune(network, RATIO, example_inputs=inputs, verify=verify)


@torch.no_grad()
def plain_steps(network: nn.Module) -> object:
    """What every pruner of captured programs does, in its plainest form: a program, magnitudes, half of each weight.

    No coupling, no choice, no rewriting, one mode of two. What it returns is not a pruned model.
    """
    program = fx.symbolic_trace(network)
    made: list[object] = [program]
    for tensor in network.parameters():
        energy = tensor.square()
        made += [energy.sum([d for d in range(energy.dim()) if d != along]) for along in range(min(2, energy.dim()))]
        cut = tensor.data
        for along in range(min(2, tensor.dim())):
            cut = cut.index_select(along, torch.arange(0, cut.shape[along], 2))
        made.append(cut)
    return made


def prune_with_torch_pruning(network: nn.Module, inputs: Any, stay: Sequence[str] | None = None) -> nn.Module:
    """`network` itself, half of it removed, told what Torch-Pruning's documentation asks for.

    Arguments: `stay`, the names of the layers whose outputs stay; None for the classifiers.
    """
    ignored = classifiers(network)
    if stay is not None:
        ignored = [module for name, module in network.named_modules() if name in stay and hasattr(module, "weight")]
    pruner = torch_pruning.pruner.BasePruner(
        network,
        inputs,
        forward_fn=call,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=ignored,
        num_heads=heads(network),
    )
    pruner.step()
    if hasattr(network, "hidden_dim") and hasattr(network, "conv_proj"):
        # torchvision's VisionTransformer reads its width from an attribute; Torch-Pruning's own tests set it
        network.hidden_dim = network.conv_proj.out_channels
    return network


def classifiers(network: nn.Module, classes: int = 1000) -> list[nn.Module]:
    """The layers whose outputs are the model's: every one with as many outputs as there are classes."""
    return [
        module
        for module in network.modules()
        if getattr(module, "out_features", None) == classes or getattr(module, "out_channels", None) == classes
    ]


def heads(network: nn.Module) -> dict[nn.Module, int]:
    """Packed projection to its number of heads.

    An `nn.MultiheadAttention` is left to Torch-Pruning, which knows it: told its heads, it leaves 68% of the
    parameters of a ViT-B/32 instead of 26%.
    """
    return {
        module.qkv: module.num_heads for module in network.modules() if hasattr(module, "qkv") and hasattr(module, "num_heads")
    }


def breaks(pruned: nn.Module, inputs: Any) -> str:
    """Why Torch-Pruning's result does not run, or "" where it does."""
    try:
        forward(pruned, inputs)
    except Exception as error:
        return one_line(error)
    return ""


def warm_up() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 1000))
    images = torch.randn(1, 3, 8, 8)
    prune_here(network, images, verify=True)
    prune_with_torch_pruning(copy.deepcopy(network), images)


def table(rows: list[Row]) -> str:
    rows = sorted(rows, key=lambda row: row["model"])
    columns = [
        ("model", "l", lambda row: row["model"].removeprefix("torchvision:")),
        ("parameters, M", "r", lambda row: f"{row['params'] / 1e6:.1f}" if "params" in row else ""),
        ("forward, s", "r", lambda row: cell(row, "forward")),
        ("Torch-Pruning, s", "r", lambda row: cell(row, "other")),
        ("fxprune, s", "r", lambda row: cell(row, "default")),
        ("times faster", "r", lambda row: f"{ratio(row, 'other', 'default'):.1f}" if compared(row, "default") else ""),
        ("forwards", "r", lambda row: cell_ratio(row, "default")),
        ("unverified, s", "r", lambda row: cell(row, "unverified")),
        ("times faster", "r", lambda row: f"{ratio(row, 'other', 'unverified'):.1f}" if compared(row, "unverified") else ""),
        ("forwards", "r", lambda row: cell_ratio(row, "unverified")),
        ("left, Torch-Pruning", "r", lambda row: cell_left(row, "other")),
        ("left, fxprune", "r", lambda row: cell_left(row, "default")),
        ("rounds", "r", lambda row: len(row.get("default_s", []))),
        ("remarks", "l", remarks),
    ]
    return (
        "# Speed, side by side with Torch-Pruning\n\n"
        f"Written by `speed.py` from `speed.jsonl`. Seconds for one call, start to end, at ratio {RATIO}:"
        " medians over the rounds. Classifiers see one image, what others see is said in the script. *fxprune* is the call"
        " as it is, which verifies models of up to 100 million parameters; *unverified* has `verify=False`. *forwards*: the"
        " time over that of a forward. *fails*: raised an error, or ran out of time or memory; such a model is not counted.\n\n"
        f"{summary(rows)}\n{markdown_table(columns, rows)}"
    )


def summary(rows: list[Row]) -> str:
    machines = sorted({f"{row['machine']}, threads of torch: {row['threads']}" for row in rows if "threads" in row})
    other = version("torch-pruning")  # its own __version__ still says 1.6.0
    lines = [f"Torch-Pruning {other}; {name}" for name in machines]
    for side, name in SIDES.items():
        chosen = [row for row in rows if compared(row, side)]
        groups = {
            f"models of {len(rows)} that Torch-Pruning finishes": chosen,
            "of them whose result by Torch-Pruning runs": [row for row in chosen if not row["other_breaks"]],
            "with a forward of 50 ms or more": [row for row in chosen if statistics.median(row["forward_s"]) >= 0.05],
            "with a million parameters or more": [row for row in chosen if row["params"] >= 1e6],
        }
        lines += [f"{name}, {len(some)} {what}: {faster(some, side)}" for what, some in groups.items() if some]
        over = [ratio(row, side, "forward") for row in rows if row.get(f"{side}_s")]
        if over:
            lines.append(f"{name}: median {statistics.median(over):.1f} forwards, worst {max(over):.1f}")
    late = [row for row in rows if row.get("default_s") and OUT_OF_TIME in row.get("other_fails", "")]
    if late:
        least = [ratio(row, "other", "default") for row in rows if compared(row, "default")] + [at_least(row) for row in late]
        lines.append(
            f"with the {len(late)} that Torch-Pruning did not finish in the time it was given, counted at that time:"
            f" {len(least)} models; times faster: median {statistics.median(least):.1f}"
        )
    plain = [row for row in rows if compared(row, "unverified") and row.get("plain_s")]
    if plain:
        middle = {side: statistics.median(ratio(row, "other", side) for row in plain) for side in ("plain", "unverified")}
        lines.append(
            f"the {len(plain)} of them that `torch.fx.symbolic_trace` traces: FX's own trace, the squares of all weights added"
            " up along two dimensions, and half of each weight copied, without coupling, choice or rewriting, are"
            f" {middle['plain']:.1f} times faster in the median, fxprune without verification {middle['unverified']:.1f}"
        )
    return "".join(f"- {line}\n" for line in lines)


def faster(rows: list[Row], side: str) -> str:
    """How much faster than Torch-Pruning, in the median and at worst, and on how many models it is slower."""
    found = {row["model"]: ratio(row, "other", side) for row in rows}
    worst = min(found, key=found.__getitem__)
    slower = sum(times < 1 for times in found.values())
    middle = statistics.median(found.values())
    return f"median {middle:.1f} times faster, worst {found[worst]:.1f} ({worst}); slower on {slower}"


def at_least(row: Row) -> float:
    """How many times faster where Torch-Pruning was stopped."""
    seconds = float(row["other_fails"].split("within ")[1].split()[0])
    return seconds / statistics.median(row["default_s"])


def compared(row: Row, side: str) -> bool:
    return bool(row.get(f"{side}_s") and row.get("other_s")) and not {f"{side}_fails", "other_fails"} & row.keys()


def ratio(row: Row, above: str, below: str) -> float:
    return statistics.median(row[f"{above}_s"]) / statistics.median(row[f"{below}_s"])


def cell(row: Row, side: str) -> str:
    if f"{side}_fails" in row:
        return "fails"
    return f"{statistics.median(row[f'{side}_s']):.2f}" if row.get(f"{side}_s") else ""


def cell_ratio(row: Row, side: str) -> str:
    return f"{ratio(row, side, 'forward'):.1f}" if row.get(f"{side}_s") else ""


def cell_left(row: Row, side: str) -> str:
    return f"{row[f'{side}_left']:.0%}" if f"{side}_left" in row else ""


def remarks(row: Row) -> str:
    parts = [row["reason"]] if "reason" in row else []
    for side, name in (("default", "fxprune"), ("unverified", "unverified"), ("other", "Torch-Pruning")):
        if f"{side}_fails" in row:
            parts.append(f"{name} fails: {row[f'{side}_fails']}")
    if row.get("other_breaks"):
        parts.append(f"Torch-Pruning's result does not run: {row['other_breaks']}")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
