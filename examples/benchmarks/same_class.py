"""Prune with `same_class=True` and use the result as one of its class: its methods, copies, and what comes back from disk.

    same_class.py                                       every torchvision classifier, a model of each timm family,
                                                        transformers (those of prunability.py and of kinds.py)
    same_class.py --models 'timm:*vit*' kinds:bloom     those whose names match
    same_class.py --largest 20                          up to so many million parameters

Each model is pruned twice, to half of everything (`ratio`) and to 70 % of its parameters by one ranking over all layers
(`params`), each in a process of its own. Rows go to `same_class.jsonl`, the table to `SAME_CLASS.md`. *ok*: the result is of
the original's class, computes what the GraphModule of the same request does (up to 1e-4 in single precision), its own methods
do what the original's do, and copies, pickled and loaded in a process that has seen nothing else, are equal to the bit. What
counts is what the original can do. *stale*: all that is wrong follows from numbers that `meta["stale"]` names, since tensors of
one size have several now, and nothing says which of them a number counts. *no graph*: there is no GraphModule of that request
either. *inexact*: something is wrong, and verification, which is asked then alone, refuses the GraphModule, too.
A row says what the code of the day did: remove it, and it is measured again.
"""

import argparse
import copy
import fnmatch
import importlib
import multiprocessing
import pickle
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kinds
import prunability
import torch
from models import call, randomise, torchvision_names
from suites import make, timm_suite, transformers_suite
from sweep import Row, machine, markdown_table, one_line, options, read_rows, sweep
from torch import Tensor, nn

import fxprune
from fxprune.passes.ir.pytree import collect
from fxprune.passes.rewrite.pruned_module import RewrittenForward

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "same_class.jsonl", HERE / "SAME_CLASS.md"
REQUESTS: dict[str, dict[str, Any]] = {"ratio": {"ratio": 0.5}, "params": {"params": 0.7, "ranking": "global"}}
TOLERANCE = 1e-4
CLASSES = 7


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["*"], help="patterns of suite:name")
    parser.add_argument("--requests", nargs="+", choices=list(REQUESTS), default=list(REQUESTS))
    parser.add_argument("--largest", type=float, default=100, help="million parameters")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model and request")
    arguments = options(parser, measure, argv, memory=0.8, prepare=imports)
    if arguments is None:
        return
    names = [name for name in every_name() if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.models)]
    jobs = [{"model": name, "request": request} for name in names for request in arguments.requests]
    settings = {"largest": arguments.largest}
    try:
        sweep(__file__, jobs, ROWS, limit=arguments.limit, settings=settings, redo=arguments.redo, workers=arguments.workers)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE)


def every_name() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    classifiers = [name for name in torchvision_names() if "quantized" not in name]
    return [*classifiers, *timm_suite(), *transformers_suite(), *(f"kinds:{kind}" for kind in sorted(MODEL_MAPPING_NAMES))]


def imports(model: str, request: str, largest: float) -> None:
    """What the job and the process that loads its model import; nothing runs before they are forked."""
    importlib.import_module("fxprune.same_class.restore")
    library, _, short = model.partition(":")
    if library == "kinds":
        kinds.imports(short)
    else:
        prunability.imports(model, "fxprune", "")


def measure(model: str, request: str, largest: float) -> Row:
    """The row of one model; an error is a row too."""
    warnings.simplefilter("ignore")
    mine, other = multiprocessing.Pipe()
    reader = multiprocessing.get_context("fork").Process(target=compare_loaded, args=(other,), daemon=True)
    reader.start()  # before it could know of any model
    try:
        row = row_of(model, request, largest, (mine, reader))
        return row | {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    except MemoryError:
        gib = resource.getrlimit(resource.RLIMIT_DATA)[0] / 2**30
        return {"machine": machine(), "status": "left out", "reason": f"takes more than {gib:.0f} GiB"}
    finally:
        reader.kill()


def row_of(model: str, request: str, largest: float, reader: Any) -> Row:
    row: Row = {"machine": machine()}
    torch.manual_seed(0)
    try:
        network, inputs = built(model)
    except Exception as error:
        surface(error)
        return row | {"status": "unbuilt", "reason": one_line(error)}
    row["params"] = sum(p.numel() for p in network.parameters())
    if row["params"] > largest * 1e6:
        return row | {"status": "left out", "reason": f"more than {largest:.0f} million parameters"}
    asked = {"example_inputs": inputs, "verify": False, **REQUESTS[request]}
    try:
        graph, row["seconds"] = timed(lambda: fxprune.prune(network, **asked))
        wanted, shapes = tensors(evaluated(graph, inputs)), {p.shape for p in graph.parameters()}
        del graph
    except Exception as error:
        surface(error)
        return row | {"status": "no graph", "reason": one_line(error)}
    try:
        small, row["seconds_same_class"] = timed(lambda: fxprune.prune(network, **asked, same_class=True))
        row |= {"params_after": sum(p.numel() for p in small.parameters()), "stale": list(small.meta["stale"])}
        row["programs"] = [path for path, m in small.named_modules() if isinstance(vars(m).get("forward"), RewrittenForward)]
        problems = dict(found_wrong(network, small, shapes, inputs, wanted, reader))
    except Exception as error:
        surface(error)
        problems = {"prune": one_line(error)}
    named = {path.rpartition(".")[2] for path in row.get("stale", [])}
    told = all(named & NUMBERS.get(name, set()) for name in problems)
    if not told:
        try:
            fxprune.prune(network, **asked | {"verify": True})
        except Exception as error:
            surface(error)
            return row | {"status": "inexact", "reason": one_line(error), "problems": problems}
    return row | {"status": ("stale" if told else "wrong") if problems else "ok", "problems": problems}


def built(model: str) -> tuple[nn.Module, Any]:
    library, _, short = model.partition(":")
    if library == "kinds":
        return kinds.built(short)
    network, inputs = make(model)
    with torch.no_grad():
        randomise(network, inputs)
    return network, inputs


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return run(), round(time.perf_counter() - start, 2)


def found_wrong(
    model: nn.Module, small: Any, shapes: set[Any], inputs: Any, wanted: list[Tensor], reader: Any
) -> Iterator[tuple[str, str]]:
    """What does not hold, and how."""
    if type(small) is not type(model):
        yield "class", type(small).__name__
    if {p.shape for p in small.parameters()} != shapes:
        yield "parameters", "other shapes than those of the GraphModule"
    mine, again = tensors(evaluated(small, inputs)), tensors(evaluated(small, inputs))
    error = difference(mine, wanted)
    if not error <= TOLERANCE:
        yield "output", f"differs by {error:.1e}"
    repeats = all(map(torch.equal, mine, again))
    same: Callable[[list[Tensor]], str] = lambda got: apart(got, mine, 0.0 if repeats else TOLERANCE)  # noqa: E731
    for name, duplicate in (("deepcopy", copy.deepcopy), ("pickle", lambda m: pickle.loads(pickle.dumps(m)))):
        problem = tried(lambda duplicate=duplicate: same(tensors(evaluated(duplicate(small), inputs))))
        if problem and tried(lambda duplicate=duplicate: duplicate(model) and "") == "":
            yield name, problem
    problem = tried(lambda: reloaded(small, inputs, mine, *reader))
    if problem and tried(lambda: pickle.dumps(model) and "") == "":
        yield "reload", problem
    for name, method in METHODS.items():
        if tried(lambda method=method: method(of_its_own(model), inputs)) == "":
            problem = tried(lambda method=method: method(of_its_own(small), inputs))
            if problem:
                yield name, problem
        for p in (*model.parameters(), *small.parameters()):
            p.grad = None


def of_its_own(model: nn.Module) -> nn.Module:
    """A copy that shares its parameters, which no method changes, with the model."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def evaluated(model: nn.Module, inputs: Any) -> Any:
    """What a model returns; one that draws numbers draws the same ones each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return call(model, inputs)


def tried(check: Callable[[], str | None]) -> str | None:
    """What a check says: empty if all is well, None if there is nothing to check; its error, where it raises."""
    try:
        torch.manual_seed(0)
        return check()
    except Exception as error:
        surface(error)
        return one_line(error) or "raises"


def surface(error: Exception) -> None:
    """Raise MemoryError again, in torch's words too: it says nothing of the model."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        raise MemoryError from error


# -- copies -------------------------------------------------------------------------------------------------------------


def reloaded(small: nn.Module, inputs: Any, wanted: list[Tensor], mine: Connection, reader: Any) -> str:
    """Have it loaded by the process that `measure` has started."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save((small, inputs, wanted), path)
        mine.send(str(path))
        while not mine.poll(1):
            if not reader.is_alive():
                return "the process ended"
        return str(mine.recv())


def compare_loaded(other: Connection) -> None:
    try:
        model, inputs, wanted = torch.load(other.recv(), weights_only=False)
        other.send(apart(tensors(evaluated(model, inputs)), wanted, 0.0))
    except Exception as error:
        other.send(one_line(error) or "raises")


def tensors(out: Any) -> list[Tensor]:
    return [t.detach().clone() for t in collect(out, Tensor)]


def apart(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> str:
    error = difference(got, wanted)
    return "" if error <= tolerance else f"differs by {error:.1e}"


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error; 0 only if equal to the bit."""
    if len(got) != len(wanted):
        return float("inf")
    return max((0.0 if torch.equal(a, b) else prunability.difference(a, b) or 1e-30 for a, b in zip(wanted, got)), default=0.0)


# -- own methods: empty where it does what it should, None where there is nothing of the kind --------------------------------


def head_of_features(model: Any, inputs: Any) -> str | None:
    if not hasattr(model, "forward_features") or not isinstance(inputs, Tensor):
        return None
    features = model.forward_features(inputs)
    if not hasattr(model, "forward_head"):
        return ""
    return apart(tensors(model.forward_head(features)), tensors(model(inputs)), TOLERANCE)


def number_of_features(model: Any, inputs: Any) -> str | None:
    if not hasattr(model, "forward_features") or not hasattr(model, "num_features"):
        return None
    shape = collect(model.forward_features(inputs), Tensor)[0].shape
    return "" if model.num_features in (shape[1], shape[-1]) else f"says {model.num_features}, has {tuple(shape)}"


def intermediates(model: Any, inputs: Any) -> str | None:
    if not hasattr(model, "forward_intermediates"):
        return None
    found = model.forward_intermediates(inputs, intermediates_only=True)
    said = [info["num_chs"] for info in model.feature_info]
    widths = [t.shape[1] for t in found]
    return "" if said == widths else f"feature_info says {said}, there are {widths}"


def new_head(model: Any, inputs: Any) -> str | None:
    if not hasattr(model, "reset_classifier"):
        return None
    model.reset_classifier(CLASSES)
    out = collect(model(inputs), Tensor)[0]
    return "" if out.shape[-1] == CLASSES else f"returns {tuple(out.shape)}"


def features_only(model: Any, inputs: Any) -> str | None:
    if not hasattr(model, "feature_info") or not hasattr(model.feature_info, "__iter__"):
        return None
    from timm.models import FeatureListNet

    net = FeatureListNet(model, out_indices=range(len(model.feature_info)))
    widths = [t.shape[1] for t in net(inputs)]
    return "" if net.feature_info.channels() == widths else f"says {net.feature_info.channels()}, there are {widths}"


def generates(model: Any, inputs: Any) -> str | None:
    if not hasattr(model, "can_generate") or not model.can_generate():
        return None
    given = {k: v for k, v in inputs.items() if k not in ("use_cache", "decoder_input_ids")}
    wanted = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        cached, plain = (model.generate(**given, **wanted, use_cache=use) for use in (True, False))
    return "" if torch.equal(cached, plain) else "the cache changes what is generated"


def loses(model: Any, inputs: Any) -> str | None:
    """The loss that it computes from labels, and its gradients."""
    if not hasattr(model, "config") or not isinstance(inputs, dict):
        return None
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    count = len(next(iter(inputs.values())))
    for labels in (ids, torch.zeros(count).long(), torch.zeros_like(ids) if ids is not None else None):
        try:
            loss = model(**{k: v for k, v in inputs.items() if k != "decoder_input_ids"}, labels=labels).loss
            loss.backward()
        except Exception:
            continue
        return "" if bool(torch.isfinite(loss)) else "not finite"
    raise TypeError("takes no labels")


def states(model: Any, inputs: Any) -> str | None:
    """Outputs that the example call did not ask for."""
    if not hasattr(model, "config") or not isinstance(inputs, dict):
        return None
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, return_dict=True)
    return "" if "hidden_states" in out or "encoder_hidden_states" in out else "no hidden states"


def trains(model: Any, inputs: Any) -> str | None:
    model.train()
    out = [t for t in collect(call(model, inputs), Tensor) if t.requires_grad]
    sum(t.float().square().mean() for t in out).backward()
    return "" if all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None) else "not finite"


METHODS: dict[str, Callable[[Any, Any], str | None]] = {
    "forward_features": head_of_features,
    "num_features": number_of_features,
    "forward_intermediates": intermediates,
    "features_only": features_only,
    "reset_classifier": new_head,
    "generate": generates,
    "loss": loses,
    "hidden states": states,
    "training step": trains,
}


# the numbers that these go by
NUMBERS = {
    "num_features": {"num_features"},
    "forward_intermediates": {"feature_info"},
    "features_only": {"feature_info"},
    "reset_classifier": {"num_features"},
}


# -- the table ----------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    parts = ["# Same class\n\nWritten by `same_class.py` from `same_class.jsonl`; what the words mean is said at its top.\n\n"]
    parts += [f"- {count} rows on {name}\n" for name, count in prunability.machines(rows)]
    for request, suite in sorted({(row["request"], row["model"].partition(":")[0]) for row in rows}):
        chosen = [r for r in rows if r["request"] == request and r["model"].startswith(suite + ":")]
        counts = Counter(row["status"] for row in chosen)
        problems = Counter(name for row in chosen for name in row.get("problems", {}))
        parts.append(f"- {suite}, {request}: " + ", ".join(f"{n} {status}" for status, n in counts.most_common()))
        parts.append(f" ({', '.join(f'{n} {name}' for name, n in problems.most_common())})\n" if problems else "\n")
    parts += [f"- left out: {row['model']}, {row['request']}, {row['reason']}\n" for row in rows if row["status"] == "left out"]
    shown = [row for row in rows if row["status"] not in ("unbuilt", "left out")]
    return "".join(parts) + "\n" + markdown_table(COLUMNS, sorted(shown, key=lambda row: (row["model"], row["request"])))


def some(names: list[str]) -> str:
    return ", ".join(name or "the model" for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


COLUMNS = [
    ("model", "l", lambda row: row["model"]),
    ("request", "l", lambda row: row["request"]),
    ("status", "l", lambda row: row["status"]),
    ("parameters, M", "r", lambda row: f"{row['params'] / 1e6:.1f}" if "params" in row else ""),
    ("s, GraphModule", "r", lambda row: row.get("seconds", "")),
    ("s, same class", "r", lambda row: row.get("seconds_same_class", "")),
    ("programs as forwards", "l", lambda row: some(row.get("programs", []))),
    ("stale", "l", lambda row: some(row.get("stale", []))),
    (
        "what does not hold",
        "l",
        lambda row: row.get("reason") or "; ".join(f"{k}: {v}" for k, v in row.get("problems", {}).items())[:400],
    ),
]


if __name__ == "__main__":
    sys.exit(main())
