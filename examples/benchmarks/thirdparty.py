"""Prune models of third-party packages, each cold in a process of its own, and check the result by two references.

    thirdparty.py                                every model of `thirdparty_models.py` whose row is missing
    thirdparty.py --only 'monai:*' --redo        some of them again
    thirdparty.py --installed                    only those whose package is installed
    thirdparty.py --before HEAD                  again those whose row is of code before a commit

Nothing of a model has run in its process when `prune` is called: a child process checks before that the original runs, and
draws its weights. Half of everything is pruned. Two references are computed independently:

- *masked*: what `fxprune.verify` says, which carries channel labels through the original.
- *zeroed*: the original whose removed parameters and buffers are zero, computed here. It is no reference as it is where an op
  takes a statistic (a mean, a variance, a softmax, a maximum) over a dimension that has become shorter; then it runs once more
  with such statistics taken over what is not zero. Neither is it one where zeroed parameters give NaN.

A model is *exact* by both references, or by the masked one alone with the reason why the zeroed one does not apply; *refused*
if `prune` raises PruneError with a reason that can hold (that the original fails is none, as it has run); *unbuildable* if the
original does not build or run with the installed versions; else *failed*.
Outputs are compared in the model's own precision, and where they differ once more in double precision.
"""

import argparse
import fnmatch
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import call, randomise
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from thirdparty_models import PACKAGES, make, names
from thirdparty_references import agreement, agreement_over_kept, copied, seed, zero_removed
from torch import Tensor, nn

import fxprune
from fxprune.passes.ir.pytree import collect

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "thirdparty.jsonl", HERE / "THIRDPARTY.md"
RATIO = 0.5
UNINITIALISED = 1e4
# What PruneError says of a result, of an original that has run here, or of a model that is one node, is no reason to refuse it.
NO_REASONS = ("is not exact", "could not be verified", "own forward raises", "fxprune failed with", "%whole in whole")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="models by name, as package:model")
    parser.add_argument("--installed", action="store_true", help="only models of installed packages")
    parser.add_argument("--status", help="only models whose row has this status; implies --redo")
    parser.add_argument("--before", metavar="COMMIT", help="only models whose row is of code before this; implies --redo")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one model")
    arguments = options(parser, measure, argv, memory=0.4, prepare=imports)
    if arguments is None:
        return
    rows = {row["model"]: row for row in read_rows(ROWS)}
    chosen = [
        name
        for name in fnmatch.filter(names(), arguments.only)
        if (not arguments.installed or importlib.util.find_spec(PACKAGES[name.partition(":")[0]].root))
        and (arguments.status is None or rows.get(name, {}).get("status") == arguments.status)
        and (arguments.before is None or is_before(rows.get(name, {}), arguments.before))
    ]
    redo = arguments.redo or arguments.status is not None or arguments.before is not None
    try:
        sweep(
            __file__,
            [{"model": name} for name in chosen],
            ROWS,
            limit=arguments.limit,
            redo=redo,
            workers=arguments.workers,
        )
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE)


def imports(model: str) -> None:
    """The package, which is imported before the process forks for a model."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    warnings.simplefilter("ignore")
    importlib.import_module(PACKAGES[model.partition(":")[0]].root)


def measure(model: str) -> Row:
    """The row of one model; an error is a row too."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a process that has started a thread pool cannot fork
    row: Row = {"machine": machine()} | commit()
    try:
        seed()
        network, inputs = make(model)
        state = in_child(lambda: drawn(network, inputs))
    except Exception as error:
        return row | {"status": "unbuildable", "reason": one_line(error)}
    load(network, state)
    row["params"] = sum(p.numel() for p in network.parameters())
    start = time.perf_counter()
    try:
        pruned = fxprune.prune(network, RATIO, example_inputs=inputs)
    except fxprune.PruneError as error:
        holds = not any(claim in error.what for claim in NO_REASONS)
        return row | {"status": "refused" if holds else "failed", "reason": shortened(error)}
    except Exception as error:
        return row | {"status": "failed", "reason": shortened(error)}
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["left"] = round(sum(p.numel() for p in pruned.parameters()) / max(1, row["params"]), 3)
    row["capture"] = str(pruned.meta.get("capture", ""))[:100]
    return row | judged(network, pruned, inputs)


def commit() -> Row:
    """The commit of the code, where this is a checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


@functools.cache
def precedes(one: str, other: str) -> bool:
    """Whether a commit is an ancestor of another, and another one."""
    said = subprocess.run(
        ["git", "rev-list", "--count", f"{one}..{other}"], cwd=HERE, capture_output=True, text=True, check=False
    )
    known = subprocess.run(["git", "merge-base", "--is-ancestor", one, other], cwd=HERE, capture_output=True, check=False)
    return known.returncode == 0 and said.stdout.strip() != "0"


def is_before(row: Row, commit: str) -> bool:
    """Whether a row is there, and of code before a commit; one that does not say its code is."""
    return bool(row) and ("commit" not in row or precedes(row["commit"], commit))


def judged(network: nn.Module, pruned: nn.Module, inputs: Any) -> Row:
    """Status and reason of a pruned model; zeroes what was removed from the original."""
    found = pruned.verification or fxprune.verify(network, pruned, inputs)  # large models are not verified unless asked
    row: Row = {"masked": float(f"{found.error:.1e}")}
    if not found.ok:
        return row | {"status": "failed", "reason": f"inexact against the masked original: {found.error:.1e}"}
    if not any(not bool(mask.all()) for mask in fxprune.plan_of(pruned).masks(network).values()):
        return row | {"status": "failed", "reason": "nothing was removed"}
    zero_removed(network, fxprune.plan_of(pruned).masks(network))
    try:
        error, exact = agreement(network, pruned, inputs)
    except Exception as raised:
        return row | {"status": "failed", "reason": f"the pruned model or the zeroed original fails: {one_line(raised)}"}
    row["zeroed"] = float(f"{error:.1e}")
    if exact:
        return row | {"status": "exact", "references": "both", "reason": ""}
    over_kept, why = agreement_over_kept(network, pruned, inputs)
    if why:
        return row | {"status": "exact", "references": "statistics" if over_kept else "masked", "reason": why}
    return row | {"status": "failed", "reason": f"inexact against the zeroed original: {error:.1e}"}


def shortened(error: Exception) -> str:
    """What an error says, in a line without paths of this machine."""
    text = one_line(error)
    where = getattr(error, "where", None)
    text += f" (at {where})" if where else ""
    return text.replace(str(Path(torch.__file__).parents[1]), "").replace(str(Path.home()), "")[:300]


def in_child(compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a function returns, computed in a forked process, so that nothing it does is left in this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        child = os.fork()
        if child == 0:
            try:
                torch.save(compute(), path)
            except BaseException as error:
                torch.save(one_line(error), path)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        result = torch.load(path) if code == 0 and path.exists() else f"the original ends the process ({code})"
    if isinstance(result, str):
        raise RuntimeError(result)
    return result


def drawn(network: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Random weights and running statistics of a model, which runs here."""
    with torch.no_grad():
        for parameter in network.parameters():  # some are left uninitialised
            if not bool((parameter.abs() < UNINITIALISED).all()):
                parameter.normal_(std=0.02)
        if not collect(call(network, copied(inputs)), Tensor):
            raise RuntimeError("it returns no tensor")
        randomise(network, copied(inputs))
        out = collect(call(network, copied(inputs)), Tensor)
        if not all(bool(t.isfinite().all()) for t in out if t.is_floating_point()):
            raise RuntimeError("its outputs are not finite")
    return {name: t.detach().clone() for name, t in stateful(network)}


def stateful(network: nn.Module) -> list[tuple[str, Tensor]]:
    running = [(name, t) for name, t in network.named_buffers() if "running_" in name]
    return [*network.named_parameters(), *running]


def load(network: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in stateful(network):
            if name in state and state[name].shape == tensor.shape:
                tensor.copy_(state[name])


def table(rows: list[Row]) -> str:
    """The report: counts by package, then all that is not exact by both references."""
    order = {name: at for at, name in enumerate(PACKAGES)}
    rows = sorted(rows, key=lambda row: (order.get(row["model"].partition(":")[0], len(order)), row["model"]))
    per_package = [
        {"package": name, "rows": [row for row in rows if row["model"].partition(":")[0] == name]}
        for name in dict.fromkeys(row["model"].partition(":")[0] for row in rows)
    ]
    columns: list[tuple[str, str, Callable[[Row], object]]] = [
        ("package", "l", lambda line: line["package"]),
        ("models", "r", lambda line: len(line["rows"]) - count(line["rows"], "unbuildable")),
        ("exact by both", "r", lambda line: by(line["rows"], "both")),
        ("by both, statistics over what is not zero", "r", lambda line: by(line["rows"], "statistics")),
        ("by the masked one alone", "r", lambda line: by(line["rows"], "masked")),
        ("refused", "r", lambda line: count(line["rows"], "refused")),
        ("failed", "r", lambda line: count(line["rows"], "failed")),
        ("unbuildable", "r", lambda line: count(line["rows"], "unbuildable")),
    ]
    said = [
        ("model", "l", lambda row: row["model"]),
        ("status", "l", lambda row: row["status"]),
        ("why", "l", lambda row: row.get("reason", "")[:200]),
    ]
    reasons = Counter(row["reason"].partition(" over ")[0] for row in rows if row.get("references") == "masked")
    machines = Counter(row["machine"] for row in rows if "machine" in row)
    commits = Counter(row["commit"] for row in rows if "commit" in row)
    built = [row for row in rows if row["status"] != "unbuildable"]
    share = count(built, "exact") / max(1, len(built))
    listed = [row for row in rows if row["status"] != "exact"]
    listed.sort(key=lambda row: ["failed", "refused", "unbuildable"].index(row["status"]))
    return (
        "# Third-party packages\n\nWritten by `thirdparty.py` from `thirdparty.jsonl`; what the words mean is said at its top."
        f"\n\n- {len(built)} models of {len(per_package)} packages, each cold in a process of its own:"
        f" {count(built, 'exact')} exact ({share:.1%}), {count(built, 'refused')} refused, {count(built, 'failed')} failed\n"
        "- why the zeroed original is no reference, where it is none: "
        + (", ".join(f"{name} ({n})" for name, n in reasons.most_common()) or "-")
        + "\n"
        + "".join(f"- {n} rows on {name}\n" for name, n in machines.most_common())
        + "".join(f"- {n} rows of the code of {name}\n" for name, n in commits.most_common())
        + "\n"
        + markdown_table(columns, [*per_package, {"package": "all", "rows": rows}])
        + "\n## What is not exact, and what did not build\n\n"
        + markdown_table(said, listed)
    )


def by(rows: list[Row], references: str) -> int:
    return sum(row.get("references") == references for row in rows)


def count(rows: list[Row], status: str) -> int:
    return sum(row["status"] == status for row in rows)


if __name__ == "__main__":
    sys.exit(main())
