"""Accuracy on Fashion-MNIST after pruning, after repair without training, and after a short fine-tuning.

    accuracy.py                                     everything: about four hours on one core
    accuracy.py --networks vit --seeds 0 --criteria magnitude:local
    accuracy.py --redo --repaired-only              what fxprune does, without fine-tuning: Torch-Pruning's columns stay

Rows go to `accuracy.jsonl`, the table to `ACCURACY.md`. Needs `apt-get install dataset-fashion-mnist`. A ResNet-20 and a
small ViT are trained from scratch for each seed (and kept in `scratch/`), then brought to 2, 3, 4 and 8 times fewer
multiply-accumulates. Torch-Pruning, where it has the criterion, gets the same ranking and scoring data, the floor that
fxprune has, the layer to leave alone and the heads of each attention; its ratio is searched until its multiply-accumulates
are within the budget.
Fine-tuning is the same on both sides, and is done without repair, too, so that the two can be told apart. Repair sees a few
images of the training set, without their labels; since Torch-Pruning has none, its batch normalisation is re-estimated on
the same images by hand.
"""

import argparse
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from data import fashion
from networks import build
from rival import IMPORTANCES, Rival, macs_of, with_fresh_norms
from sweep import Row, find, machine, markdown_table, one_line, options, read_rows, sweep
from torch import Tensor, nn
from torch.nn import functional as F
from training import BATCH, EPOCHS, TEST, TRAIN, TUNE_RATE, accuracy, base, train

import fxprune
from fxprune.criteria import CRITERIA

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "accuracy.jsonl", HERE / "ACCURACY.md"
NETWORKS = ("resnet20", "vit")
FEWER = (2, 3, 4, 8)
SCORING, CALIBRATION, STEPS = 512, 256, 60
SINCE = 436  # the last decision that changed what repair comes to: a budget of a row says of which it is
CALL = "prune(macs, data, repair=True)"  # in place of a criterion; of a ranking it has the number of images
CALLS = tuple(f"{CALL}:{images} images" for images in (SCORING, 2_048))
OF_EXPERTS = ("reap",)  # criteria that score nothing in these networks
SCORED = [name for name in CRITERIA if name not in OF_EXPERTS]
CHOICES = (*(f"{name}:{ranking}" for name in SCORED for ranking in ("local", "global", "isomorphic")), *CALLS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--criteria", nargs="+", default=list(CHOICES), help="criterion:ranking")
    parser.add_argument(
        "--fewer", nargs="+", type=int, default=list(FEWER), help="budgets; a row keeps what it knows of others"
    )
    parser.add_argument(
        "--repaired-only", action="store_true", help="do not fine-tune, and keep what is known of Torch-Pruning"
    )
    parser.add_argument("--limit", type=float, default=3600, help="seconds for one job")
    torch.set_num_threads(1)
    arguments = options(parser, measure, argv)
    if arguments is None:
        return
    jobs = [
        {"network": network, "seed": seed, **dict(zip(("criterion", "ranking"), choice.split(":")))}
        for seed in arguments.seeds
        for choice in arguments.criteria
        for network in arguments.networks
        if has_batch_norm(network) or not choice.startswith("bn_scale")
    ]
    try:
        how = {"limit": arguments.limit, "redo": arguments.redo, "workers": arguments.workers}
        sweep(__file__, jobs, ROWS, settings={"tunes": not arguments.repaired_only, "fewer": arguments.fewer}, **how)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE.relative_to(Path.cwd()) if TABLE.is_relative_to(Path.cwd()) else TABLE)


def has_batch_norm(network: str) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in build(network).modules())


def measure(network: str, seed: int, criterion: str, ranking: str, tunes: bool, fewer: list[int]) -> Row:
    """Accuracies at the budgets that are asked for, and the share of multiply-accumulates that is left."""
    torch.set_num_threads(1)
    model = base(network, seed)
    images, labels = fashion("train", TRAIN)
    calibration, test = images[:CALIBRATION], fashion("t10k", TEST)
    whole = macs_of(model, images[:1])
    asks = tunes and criterion in IMPORTANCES
    rival = rival_of(model, images[:SCORING], labels[:SCORING], criterion, ranking) if asks else None
    job = {"network": network, "seed": seed, "criterion": criterion, "ranking": ranking}
    at = find(rows := read_rows(ROWS), job)
    known = {} if tunes else known_of_rival(rows, job, whole)

    def tuned(made: nn.Module) -> float:
        train(made, images, labels, steps=STEPS, rate=TUNE_RATE, seed=seed)
        return accuracy(made, *test)

    before = {} if at is None else rows[at].get("budgets", {})
    budgets = {str(n): before[str(n)] for n in FEWER if n not in fewer and str(n) in before}
    for times in fewer if criterion == CALL else ():
        seen = images[: int(ranking.split(maxsplit=1)[0])].split(64)
        repaired = fxprune.prune(model, macs=1 / times, example_inputs=images[:1], data=seen, repair=True)
        way = next((said for said in repaired.meta["chosen"] if said.startswith("way=")), "")
        budgets[str(times)] = {"left": macs_of(repaired, images[:1]) / whole, "repaired": accuracy(repaired, *test), "way": way}
        budgets[str(times)]["since"] = SINCE
    for times in fewer if criterion != CALL else ():
        pruned = prune_here(model, images, labels, criterion, ranking, 1 / times)
        repaired = fxprune.repair(model, pruned, calibration.split(64))
        found: Row = {"left": macs_of(pruned, images[:1]) / whole, "since": SINCE}
        found |= {"pruned": accuracy(pruned, *test), "repaired": accuracy(repaired, *test)}
        found |= {"tuned": tuned(repaired), "tuned_alone": tuned(pruned)} if tunes else known.get(str(times), {})
        if rival is not None:
            try:
                other = rival.within_budget(whole / times)
                found |= {"other_left": macs_of(other, images[:1]) / whole, "other_pruned": accuracy(other, *test)}
                found |= {"other_norms": accuracy(with_fresh_norms(other, calibration), *test), "other_tuned": tuned(other)}
            except Exception as error:
                found["other_fails"] = one_line(error)
        budgets[str(times)] = found
    budgets = dict(sorted(budgets.items(), key=lambda item: int(item[0])))
    return {"status": "measured", "base": accuracy(model, *test), "macs": whole, "budgets": budgets, "machine": machine()}


def known_of_rival(rows: list[Row], job: Row, macs: int) -> dict[str, Row]:
    """What the row of a job says of Torch-Pruning, by budget: nothing of it depends on fxprune."""
    at = find(rows, job)
    if at is None or rows[at].get("macs") != macs:
        return {}
    return {n: {k: v for k, v in found.items() if k.startswith("other")} for n, found in rows[at]["budgets"].items()}


def prune_here(
    model: nn.Module, images: Tensor, labels: Tensor, criterion: str, ranking: str, share: float
) -> torch.fx.GraphModule:
    return fxprune.prune(
        model,
        macs=share,
        example_inputs=images[:1],
        criterion=criterion,
        ranking=ranking,
        data=list(zip(images[:SCORING].split(BATCH), labels[:SCORING].split(BATCH))),
        loss=F.cross_entropy,
        attention="dims",
    )


def rival_of(model: nn.Module, images: Tensor, labels: Tensor, criterion: str, ranking: str) -> Rival:
    return Rival(
        model,
        criterion,
        ranking,
        images,
        labels,
        F.cross_entropy,
        ignored=lambda made: [made.head],
        heads=lambda made: {m.qkv: m.num_heads for m in made.modules() if hasattr(m, "qkv")},
    )


# -- the table ------------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    measured = [row for row in rows if row.get("status") == "measured"]

    def chosen(network: str, choice: str) -> list[Row]:
        return [r for r in measured if (r["network"], r["criterion"], r["ranking"]) == (network, *choice.split(":"))]

    lines = [
        {"network": network, "choice": choice, "fewer": fewer, "rows": mine}
        for network in dict.fromkeys(row["network"] for row in measured)
        for fewer in FEWER
        for choice in CHOICES
        if (mine := [row for row in chosen(network, choice) if str(fewer) in row["budgets"]])
    ]
    columns = [
        ("network", "l", lambda line: line["network"]),
        ("MACs, times fewer", "r", lambda line: line["fewer"]),
        ("criterion, ranking", "l", lambda line: line["choice"].replace(":", ", ")),
        ("seeds", "r", lambda line: len(line["rows"])),
        ("unpruned", "r", lambda line: percent([r["base"] for r in line["rows"]])),
        *((heading, "r", lambda line, stage=stage: percent(values(line, stage))) for heading, stage in HEADINGS),
    ]
    failed = [row for row in rows if row.get("status") != "measured"]
    return (
        "# Accuracy on Fashion-MNIST, side by side with Torch-Pruning\n\n"
        "Written by `accuracy.py` from `accuracy.jsonl`. Per cent of"
        f" {TEST:,} test images that are classified rightly: means over the seeds, with the standard deviation. Trained from"
        f" scratch on {TRAIN:,} images ({', '.join(f'{n} for {EPOCHS[n]} epochs' for n in NETWORKS)}); scored on {SCORING};"
        f" *repaired* on {CALIBRATION} of them without labels, by `fxprune.repair` with its defaults; *tuned* is that,"
        f" and Torch-Pruning's result, after {STEPS} steps of {BATCH} images with AdamW. *norms*: Torch-Pruning's result"
        f" with its batch normalisation re-estimated by hand on the same {CALIBRATION} images.\n\n"
        f"{CALL} sees images alone, chooses by itself and does not fine-tune. Repair changed by decisions 432 and"
        f" {SINCE}: of the code since are {of_this_code(lines)}. Of the code before both are all other lines.\n\n"
        f"{summary(lines, failed)}\n{markdown_table(columns, lines)}"
    )


HEADINGS = (
    ("pruned", "pruned"),
    ("repaired", "repaired"),
    ("tuned", "tuned"),
    ("tuned, not repaired", "tuned_alone"),
    ("Torch-Pruning: pruned", "other_pruned"),
    ("norms", "other_norms"),
    ("tuned", "other_tuned"),
)


def of_this_code(lines: list[Row]) -> str:
    """The lines all of whose seeds were measured since the last decision that changed repair."""
    found: dict[str, list[int]] = {}
    for line in lines:
        if all(row["budgets"][str(line["fewer"])].get("since") == SINCE for row in line["rows"]):
            found.setdefault(f"{line['network']}, {line['choice'].replace(':', ', ')}", []).append(line["fewer"])
    return "; ".join(f"{name} at {', '.join(map(str, fewer))} times" for name, fewer in found.items()) or "none"


def values(line: Row, stage: str) -> list[float]:
    return [found[stage] for row in line["rows"] if stage in (found := row["budgets"][str(line["fewer"])])]


def percent(shares: list[float]) -> str:
    if not shares:
        return ""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}"


def summary(lines: list[Row], failed: list[Row]) -> str:
    machines = sorted({row["machine"] for line in lines for row in line["rows"]})
    made = [f"Torch-Pruning {version('torch-pruning')}; {name}" for name in machines]
    for what, mine, other in (
        ("after pruning and repair, against its result as it is", "repaired", "other_pruned"),
        ("after pruning and repair, against its result with norms re-estimated", "repaired", "other_norms"),
        ("after repair and fine-tuning, against its result after fine-tuning", "tuned", "other_tuned"),
        ("after fine-tuning without repair, against the same", "tuned_alone", "other_tuned"),
        ("after pruning alone", "pruned", "other_pruned"),
    ):
        gaps = [(gap(line, mine, other), line) for line in lines if values(line, mine) and values(line, other)]
        if not gaps:
            continue
        behind = [f"{place(line)} ({100 * g:+.1f})" for g, line in gaps if g < 0]
        middle = 100 * statistics.median(g for g, _ in gaps)
        made.append(
            f"{what}: fxprune is ahead in {len(gaps) - len(behind)} of {len(gaps)} lines, by {middle:+.1f} points in the median"
            + (f"; behind in {', '.join(behind)}" if behind else "")
        )
    tuned = [line for line in lines if values(line, "tuned")]
    worse = [f"{place(line)} ({100 * g:+.1f})" for line in tuned if (g := gap(line, "tuned", "repaired")) < 0]
    if worse:
        count = f"{len(worse)} of {len(tuned)} lines"
        made.append(f"fine-tuning this short makes a repaired model worse in {count}: {', '.join(worse)}")
    rows = [row for line in lines if line["fewer"] == FEWER[0] for row in line["rows"]]
    old = [row for row in rows if str(FEWER[-1]) not in row["budgets"]]
    if old:
        made.append(
            f"{len(old)} of {len(rows)} rows have no {FEWER[-1]} times: they are of the code before decisions 171 to 184, which"
            " chose otherwise by `global` and `isomorphic` rankings of gradients"
        )
    if short := against_local(lines):
        behind = [f"{place(line)} ({100 * g:+.1f})" for g, line in short if g < -0.01]
        made.append(
            f"`global` against `local` after repair: behind by more than a point in {len(behind)} of {len(short)} lines"
            + (f": {', '.join(behind)}" if behind else "")
        )
    if lines:
        spans = [[v * line["fewer"] for line in lines for v in values(line, stage)] for stage in ("left", "other_left")]
        mine, other = (f"{min(span):.1%} to {max(span):.1%}" for span in spans)
        made.append(f"multiply-accumulates left, as a share of the budget: fxprune {mine}, Torch-Pruning {other}")
    for choice in dict.fromkeys(line["choice"] for line in lines):
        found = [row["budgets"][str(line["fewer"])] for line in lines if line["choice"] == choice for row in line["rows"]]
        reasons = [each["other_fails"] for each in found if "other_fails" in each]
        if reasons:
            made.append(
                f"Torch-Pruning fails in {len(reasons)} of {len(found)} runs with {choice.replace(':', ', ')}: {reasons[0]}"
            )
    made += [f"failed: {row['network']} {row['seed']} {row['criterion']} {row['ranking']}: {row['reason']}" for row in failed]
    return "".join(f"- {line}\n" for line in made)


def against_local(lines: list[Row]) -> list[tuple[float, Row]]:
    """By how much each line with a global ranking is above its local one after repair, over the seeds that both have."""
    value = {
        (line["network"], line["fewer"], line["choice"], row["seed"]): row["budgets"][str(line["fewer"])]["repaired"]
        for line in lines
        for row in line["rows"]
    }
    found: dict[int, list[float]] = {}
    for at, line in enumerate(lines):
        name, _, ranking = line["choice"].partition(":")
        for row in line["rows"] if ranking == "global" else ():
            mine, other = ((line["network"], line["fewer"], f"{name}:{r}", row["seed"]) for r in ("global", "local"))
            if other in value:
                found.setdefault(at, []).append(value[mine] - value[other])
    return [(statistics.mean(gaps), lines[at]) for at, gaps in found.items()]


def gap(line: Row, mine: str, other: str) -> float:
    return statistics.mean(values(line, mine)) - statistics.mean(values(line, other))


def place(line: Row) -> str:
    return f"{line['network']} at {line['fewer']}, {line['choice'].replace(':', ' ')}"


if __name__ == "__main__":
    sys.exit(main())
