"""Time a pruned model against a natively built one: the class itself, told the smaller widths, with the same weights.

    native.py                                  every model, eager, with one sample and with eight
    native.py --modes compiled                 the same under torch.compile
    native.py --modes calls                    no times: whether they make the same calls, which no noise disturbs
    native.py --modes code                     nor here: whether the compiler writes the same code for them
    native.py --models resnet50 --redo         some of them again
    native.py --modes compiled --models mobilenet_v2 --compiling 1200 --limit 6000    where a compiler takes minutes

Rows go to `native.jsonl`, the table to `NATIVE.md`; what is there already is not run again. Half of everything is removed.
Three forms run in turns in one process: the native model, fxprune's GraphModule and its `same_class=True`. A round is one
forward of each, in an order that moves on, so that whatever disturbs the machine disturbs all. A figure is the median over
rounds, divided by that of the native model; *within 3 %* is what is asked for. *native again* is another copy of the native
model, timed as the others are: how far it is from 1 says how quiet the machine was.

Calls are those of the dispatcher, eager, and the lines that `torch.compile` gets to compile, without those that have no effect.
Code is all that `torch.compile` writes, without comments, which name the lines that it comes from.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sweep import Row, machine, markdown_table, options, read_rows, sweep
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxprune

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "native.jsonl", HERE / "NATIVE.md"
WITHIN = 1.03
SECONDS, ROUNDS = 40.0, 400  # of measuring one job, at most
UNTIMED = ("calls", "code")
AGAIN, GRAPH, CLASS = "native again", "GraphModule", "same class"


def resnet50() -> tuple[nn.Module, nn.Module]:
    from torchvision.models.resnet import Bottleneck, ResNet

    made: Any = ResNet(Bottleneck, [3, 4, 6, 3])
    made.inplanes = 32
    made.conv1, made.bn1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32)
    for i, (blocks, stride) in enumerate([(3, 1), (4, 2), (6, 2), (3, 2)], 1):
        setattr(made, f"layer{i}", made._make_layer(Bottleneck, 16 << i, blocks, stride))
    made.fc = nn.Linear(1024, 1000)
    return ResNet(Bottleneck, [3, 4, 6, 3]), made


def mobilenet_v2() -> tuple[nn.Module, nn.Module]:
    from torchvision.models.mobilenetv2 import MobileNetV2
    from torchvision.ops.misc import Conv2dNormActivation

    made = MobileNetV2(width_mult=0.5, round_nearest=1)
    made.features[18] = Conv2dNormActivation(160, 640, kernel_size=1, activation_layer=nn.ReLU6)
    made.classifier[1] = nn.Linear(640, 1000)
    return MobileNetV2(), made


def vit_b_32() -> tuple[nn.Module, nn.Module]:
    from torchvision.models import VisionTransformer

    both = [
        VisionTransformer(image_size=224, patch_size=32, num_layers=12, num_heads=n, hidden_dim=64 * n, mlp_dim=256 * n)
        for n in (12, 6)
    ]
    for made in both:
        nn.init.normal_(made.heads.head.weight, std=0.02)  # it starts with zeros
    return both[0], both[1]


def convnext_tiny() -> tuple[nn.Module, nn.Module]:
    from torchvision.models import ConvNeXt
    from torchvision.models.convnext import CNBlockConfig

    def of(n: int) -> nn.Module:
        widths = [n, 2 * n, 4 * n, 8 * n, None]
        return ConvNeXt([CNBlockConfig(a, b, c) for a, b, c in zip(widths[:4], widths[1:], (3, 3, 9, 3))], 0.1)  # type: ignore[arg-type]

    return of(96), of(48)


def llama() -> tuple[nn.Module, nn.Module]:
    """One layer as wide as those of TinyLlama-1.1B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def of(n: int) -> nn.Module:
        sizes = {"hidden_size": 512 * n, "intermediate_size": 1408 * n, "num_attention_heads": 8 * n, "num_key_value_heads": n}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, head_dim=64, use_cache=False, **sizes))

    return of(4), of(2)


MODELS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    made.__name__: made for made in (resnet50, mobilenet_v2, vit_b_32, convnext_tiny, llama)
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled", *UNTIMED], default=["eager"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--limit", type=float, default=900, help="seconds for one job")
    parser.add_argument("--compiling", type=float, default=120, help="seconds that compiling the native model may take")
    arguments = options(parser, measure, argv, alone=True)
    if arguments is None:
        return
    every = itertools.product(arguments.models, arguments.modes, arguments.batches)
    jobs = [{"model": model, "mode": mode, "batch": batch} for model, mode, batch in every if mode not in UNTIMED or batch == 1]
    try:
        settings = {"compiling": arguments.compiling}
        sweep(__file__, jobs, ROWS, limit=arguments.limit, settings=settings, redo=arguments.redo)
    finally:
        TABLE.write_text(table(read_rows(ROWS)))
    print(TABLE.relative_to(Path.cwd()) if TABLE.is_relative_to(Path.cwd()) else TABLE)


def forms(model: str, batch: int) -> tuple[dict[str, nn.Module], Any]:
    """The three forms and a copy of the native one, with the same weights, and inputs; raises where they do not agree."""
    torch.manual_seed(0)
    original, native = (made.eval() for made in MODELS[model]())
    text = model == "llama"
    shape = (batch, 64) if text else (batch, 3, 224, 224)
    inputs: Tensor = torch.randint(1000, shape) if text else torch.randn(shape)
    given: Any = {"input_ids": inputs} if text else inputs
    found = {}
    for name, same in ((GRAPH, False), (CLASS, True)):
        found[name] = fxprune.prune(original, 0.5, given, same_class=same, verify=False)
    native.load_state_dict(found[CLASS].state_dict())
    again = MODELS[model]()[1].eval()
    again.load_state_dict(native.state_dict())
    return {"native": native, AGAIN: again, **found}, given


@torch.no_grad()
def measure(model: str, mode: str, batch: int, compiling: float) -> Row:
    """The median seconds of a forward of each form; none where compiling the native model takes more than so many seconds."""
    made, given = forms(model, batch)
    if mode == "calls":
        return {"status": "ok", "machine": machine(), "calls": same_calls(made, given)}
    if mode == "code":
        return {"status": "ok", "machine": machine(), "code": same_code(made, given)}
    calls: dict[str, Callable[[], Any]] = {}
    outputs = {}
    for name, module in made.items():
        form: Any = torch.compile(module, dynamic=False) if mode == "compiled" else module
        calls[name] = (lambda form=form: form(**given)) if isinstance(given, dict) else (lambda form=form: form(given))
        start = time.perf_counter()
        outputs[name] = first(calls[name]())
        if mode == "compiled" and name == "native" and time.perf_counter() - start > compiling:
            return {"status": "slow", "reason": f"compiling it takes more than {compiling:.0f} s", "machine": machine()}
        error = float((outputs[name] - outputs["native"]).norm() / outputs["native"].norm())
        if not error < 1e-4:
            return {"status": "failed", "reason": f"{name} computes something else: {error:.1e}", "machine": machine()}
    seconds = in_turns(calls)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {"status": "ok", "machine": machine(), "rounds": len(seconds["native"]), "seconds": medians}


class Calls(TorchDispatchMode):
    """Writes down the dispatcher calls, with the shapes of the tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found.append((str(func), [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]))
        return out


def eager_calls(module: nn.Module, given: Any) -> list[Any]:
    with Calls() as calls:
        module(**given) if isinstance(given, dict) else module(given)
    return calls.found


def compiled_calls(module: nn.Module, given: Any) -> list[Any]:
    """The ops of the graphs that `torch.compile` makes, in order; an op whose result nobody reads has no part in them."""
    found: list[Any] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        read = [node for node in graph.graph.nodes if node.users and node.op not in ("placeholder", "output")]
        found.extend((str(node.target).split(" at 0x")[0], shape_of(node.meta["example_value"])) for node in read)
        return graph.forward

    torch._dynamo.reset()
    form = torch.compile(module, dynamic=False, backend=backend)
    form(**given) if isinstance(given, dict) else form(given)
    return found


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def same_calls(made: dict[str, nn.Module], given: Any) -> dict[str, dict[str, bool]]:
    """For each form whether it makes the same calls as the native model does, eager and compiled."""
    found = {form: (eager_calls(made[form], given), compiled_calls(made[form], given)) for form in ("native", GRAPH, CLASS)}
    eager, compiled = found.pop("native")
    return {form: {"eager": mine[0] == eager, "compiled": mine[1] == compiled} for form, mine in found.items()}


def same_code(made: dict[str, nn.Module], given: Any) -> dict[str, bool]:
    """For each form whether `torch.compile` writes the same code for it as for the native model."""
    found = {form: compiled_code(made[form], given) for form in ("native", GRAPH, CLASS)}
    native = found.pop("native")
    return {form: code == native for form, code in found.items()}


def compiled_code(module: nn.Module, given: Any) -> list[str]:
    """The lines of code that `torch.compile` writes for a module, without comments."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    form = torch.compile(module, dynamic=False)
    with config.patch(force_disable_caches=True):
        codes = run_and_get_code(lambda: form(**given) if isinstance(given, dict) else form(given))[1]
    return [line for code in codes for line in code.splitlines() if not line.lstrip().startswith(("#", "//"))]


def in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """The seconds of each call, round by round; the order moves on by one each round."""
    names = list(calls)
    for _ in range(3):
        for name in names:
            calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + SECONDS
    for number in range(ROUNDS):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return seconds


def first(output: Any) -> Tensor:
    """The first tensor of an output."""
    if isinstance(output, Tensor):
        return output
    return first(next(iter(output.values() if hasattr(output, "values") else output)))


def ratio(row: Row, form: str) -> float | None:
    return row["seconds"][form] / row["seconds"]["native"] if row["status"] == "ok" else None


def shown(row: Row, form: str) -> str:
    found = ratio(row, form)
    return "" if found is None else f"{found:.3f}" if found <= WITHIN else f"**{found:.3f}**"


def table(rows: list[Row]) -> str:
    """All rows, and how many are within 3 %."""
    columns = [
        ("model", "l", lambda row: row["model"]),
        ("mode", "l", lambda row: row["mode"]),
        ("batch", "r", lambda row: row["batch"]),
        ("native, ms", "r", lambda row: f"{1000 * row['seconds']['native']:.2f}" if row["status"] == "ok" else row["reason"]),
        *[(form, "r", lambda row, form=form: shown(row, form)) for form in (AGAIN, GRAPH, CLASS)],
        ("rounds", "r", lambda row: row.get("rounds", "")),
    ]
    counted = {row["model"]: row["calls"] for row in rows if row["mode"] == "calls" and row["status"] == "ok"}
    coded = {row["model"]: row["code"] for row in rows if row["mode"] == "code" and row["status"] == "ok"}
    rows = [row for row in rows if row["mode"] not in UNTIMED]
    told = [found for row in rows for form in (GRAPH, CLASS) if (found := ratio(row, form)) is not None]
    near = sum(found <= WITHIN for found in told)
    said = f"{near} of {len(told)} figures of pruned models are within 3 % of the natively built model."
    machines = ", ".join(dict.fromkeys(row["machine"] for row in rows if "machine" in row))
    about = "Made by `native.py`: the time of a forward over that of a natively built model with the same widths and weights."
    same = [
        f"{form}, {way}: " + ", ".join(model for model, calls in counted.items() if calls[form][way])
        for form in (GRAPH, CLASS)
        for way in ("eager", "compiled")
    ]
    calls = "".join(f"- {line}\n" for line in same)
    also = f"The same calls as those of the native model, one for one, of {len(counted)} models:\n\n{calls}"
    if coded:
        written = (f"{form}: " + ", ".join(model for model, same in coded.items() if same[form]) for form in (GRAPH, CLASS))
        also += f"\nThe same compiled code, of {len(coded)} models:\n\n" + "".join(f"- {line}\n" for line in written)
    return f"# Pruned against natively built\n\n{about}\n{said} {machines}.\n\n{also}\n{markdown_table(columns, rows)}"


if __name__ == "__main__":
    main()
