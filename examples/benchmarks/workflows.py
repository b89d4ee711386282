"""Take a pruned model through what its users do next: save, generate, train, compile, export, quantize, shard.

    workflows.py                                   every workflow whose row is missing
    workflows.py --only '*pickle*' --redo          some of them again
    workflows.py --forms graph 'same class'        not those of other tools

Each workflow runs in a process of its own for each form of the model: the *original*, unpruned; fxprune's GraphModule (*graph*)
and its `same_class=True` where both make sense; Torch-Pruning's result and, for models of images, that of NVIDIA's modelopt
(FastNAS), told what `prunability.py` tells them. Half of everything is removed. A workflow *passes* if it runs and what comes
out computes what the model computed before it, to rounding; that the pruned model is exact is checked by fxprune's own
verification alone. A workflow whose original fails is marked so and not counted. A row says what the code of the day did:
`--redo` before figures are quoted.
"""

import argparse
import contextlib
import fnmatch
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import workflows_deployed
import workflows_saving
import workflows_text
import workflows_trained
import workflows_vision
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from workflow_cases import CLASS, FORMS, GRAPH, MODELOPT, ORIGINAL, TORCH_PRUNING, WORKFLOWS, Case, NewProcess, Workflow

PARTS = (workflows_saving, workflows_text, workflows_vision, workflows_trained, workflows_deployed)  # which register them
HERE = Path(__file__).parent
ROWS, TABLE = HERE / "workflows.jsonl", HERE / "WORKFLOWS.md"
HEADINGS = {GRAPH: "fxprune", CLASS: "fxprune, same class", TORCH_PRUNING: "Torch-Pruning", MODELOPT: "modelopt"}
MARKS = {"pass": "pass", "failed": "**fails**", "pruning failed": "**pruning fails**"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="*", metavar="GLOB", help="workflows by name and model, as 'pickle: BERT'")
    parser.add_argument("--skip", nargs="+", default=[], metavar="GLOB", help="not these, as 'torch.compile*'")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--failed", action="store_true", help="only those that fail; implies --redo")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one workflow")
    arguments = options(parser, measure, argv, memory=0.5, prepare=imports)
    if arguments is None:
        return
    passed = {(row["workflow"], row["model"], row["form"]) for row in read_rows(ROWS) if row["status"] == "pass"}
    jobs = [
        {"workflow": found.name, "model": found.model, "form": form}
        for found in listed()
        if fnmatch.fnmatch(f"{found.name}: {found.model}", arguments.only)
        and not any(fnmatch.fnmatch(f"{found.name}: {found.model}", glob) for glob in arguments.skip)
        for form in arguments.forms
        if form in found.forms and not (arguments.failed and (found.name, found.model, form) in passed)
    ]
    try:
        redo = arguments.redo or arguments.failed
        sweep(__file__, jobs, ROWS, limit=arguments.limit, redo=redo, workers=arguments.workers)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE)


def listed() -> list[Workflow]:
    """All workflows, in the order of `PARTS`."""
    order = [part.__name__ for part in PARTS]
    return sorted(WORKFLOWS.values(), key=lambda found: order.index(found.run.__module__))


def imports(workflow: str, model: str, form: str) -> None:
    """What the jobs need, before the process forks for one."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
    }
    os.environ |= {"YOLO_VERBOSE": "false", "PYTHONWARNINGS": "ignore"}
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    for name in ("transformers", *WORKFLOWS[workflow, model].needs):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def measure(workflow: str, model: str, form: str) -> Row:
    """The row of a workflow with a model in a form; an error is a row too."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # a process that has started a thread pool cannot fork
    row: Row = {"machine": machine()}
    found = WORKFLOWS[workflow, model]
    missing = [name for name in found.needs if importlib.util.find_spec(name) is None]
    if missing:
        return row | {"status": "not installed", "reason": ", ".join(missing)}
    with tempfile.TemporaryDirectory() as folder:
        status, process = "pruning failed", NewProcess()
        try:
            case = Case.of(model, form, Path(folder), process)
            status = "failed"
            os.chdir(folder)
            found.run(case)
        except Exception as error:
            return row | {"status": status, "reason": said(error)}
        finally:
            process.end()
            os.chdir(HERE)
    return row | {"status": "pass", "reason": ""}


def said(error: Exception) -> str:
    """One line of an error; that of a process which was spawned ends with its own."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if type(error).__name__ == "ProcessRaisedException" and lines:
        return one_line(RuntimeError(f"in a process: {lines[-1]}"))
    return one_line(error)


# -- the table --------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The report: counts by form, then every workflow, by group."""
    by_key = {(row["workflow"], row["model"], row["form"]): row for row in rows}
    lines = [
        {
            "found": found,
            "rows": {f: by_key[found.name, found.model, f] for f in FORMS if (found.name, found.model, f) in by_key},
        }
        for found in listed()
    ]
    lines = [line for line in lines if line["rows"]]
    counted = [line for line in lines if line["rows"].get(ORIGINAL, {}).get("status") == "pass"]
    names = Counter(row["machine"] for row in rows if "machine" in row)
    shown = [form for form in HEADINGS if any(form in line["rows"] for line in lines)]
    columns = [
        ("workflow", "l", lambda line: line["found"].name),
        ("model", "l", lambda line: line["found"].model),
        *((HEADINGS[form], "l", lambda line, form=form: cell(line["rows"], form)) for form in shown),
    ]
    parts = [
        "# Workflows\n\nWritten by `workflows.py` from `workflows.jsonl`; what the words mean is said at its top.\n\n"
        f"- {len({line['found'].name for line in lines})} workflows, with {len(lines)} pairs of workflow and model;"
        f" the original passes {len(counted)} of these\n"
        + "".join(f"- {HEADINGS[form]}: {share(counted, form)}\n" for form in shown)
        + "".join(f"- {n} rows on {name}\n" for name, n in names.most_common())
    ]
    for group in dict.fromkeys(line["found"].group for line in lines):
        parts.append(f"\n## {group}\n\n" + markdown_table(columns, [line for line in lines if line["found"].group == group]))
    return "".join(parts)


def share(lines: Sequence[Row], form: str) -> str:
    """How many of the workflows that make sense for a form pass, and how many fail since nothing was pruned."""
    mine = [line["rows"][form]["status"] for line in lines if form in line["rows"]]
    count = Counter(mine)
    failing = f", {count['pruning failed']} fail as pruning does" if count["pruning failed"] else ""
    return f"{count['pass']} of {len(mine)} pass{failing}"


def cell(rows: dict[str, Row], form: str) -> str:
    original, row = rows.get(ORIGINAL), rows.get(form)
    if original is not None and original["status"] != "pass":
        what = "not installed" if original["status"] == "not installed" else "the original fails"
        return f"{what}: {original['reason'][:120]}" if form == GRAPH or (GRAPH not in rows and form == CLASS) else ""
    if row is None:
        return ""
    return MARKS.get(row["status"], row["status"]) + (f": {row['reason'][:160]}" if row["reason"] else "")


if __name__ == "__main__":
    sys.exit(main())
