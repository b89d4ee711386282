"""What every public function does with its arguments: names that do not exist, names of other tools, numbers of other kinds."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import os
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor, nn

from fxprune.errors import without_own_lines
from fxprune.passes.errors import PruneError

P = ParamSpec("P")
T = TypeVar("T")
Kind = TypeVar("Kind", bound=type)

STEPS = "fxprune.Pruner(model, ratio, example_inputs, steps=5)"
FOUND = "nothing to pass: it is found in the model's program"
# keyword arguments of Torch-Pruning, torch.nn.utils.prune, NNI and ModelOpt, and what does the same here
ELSEWHERE = {
    **dict.fromkeys(["pruning_ratio", "ch_sparsity", "sparsity", "amount", "prune_ratio", "pruning_rate"], "ratio=0.5"),
    **dict.fromkeys(["pruning_ratio_dict", "ch_sparsity_dict", "layer_ratios"], "ratio={model.layer1: 0.5}"),
    **dict.fromkeys(["max_pruning_ratio", "max_ch_sparsity", "max_sparsity"], "floor=0.1, the share that stays"),
    **dict.fromkeys(
        ["ignored_layers", "ignored_modules", "exclude"],
        "freeze_outputs=[model.fc] where only the outputs of a layer must stay, freeze=[model.fc] where all of it must",
    ),
    "ignored_params": "freeze= with the modules that hold them",
    **dict.fromkeys(["global_pruning", "global_ranking"], "ranking='global'"),
    "isomorphic": "ranking='isomorphic'",
    "pruning_ratio_scopes": "scopes={'early': ['layer1', 'layer2']} with ratio={'early': 0.5}",
    **dict.fromkeys(["importance", "pruning_method", "score", "metric", "strategy"], "criterion='magnitude'"),
    **dict.fromkeys(["iterative_steps", "n_steps"], STEPS),
    "iterative_pruning_ratio_scheduler": "fxprune.Pruner(..., schedule='cubic')",
    "iterative_sparsity_scheduler": "fxprune.Pruner(..., schedule='cubic')",
    **dict.fromkeys(["unwrapped_parameters", "channel_groups", "in_channel_groups", "out_channel_groups"], FOUND),
    **dict.fromkeys(["num_heads", "root_instances", "root_module_types"], FOUND),
    "customized_pruners": "fxprune.register_op for ops that fxprune does not know",
    **dict.fromkeys(["prune_num_heads", "head_pruning_ratio", "head_pruning_ratio_dict"], "attention='heads', with ratio="),
    "prune_head_dims": "attention='dims'",
    **dict.fromkeys(["inputs", "input", "x", "dummy_input", "dummy_inputs", "example_input", "args"], "example_inputs="),
    **dict.fromkeys(["input_example", "sample_input", "sample_inputs", "kwargs"], "example_inputs="),
    **dict.fromkeys(["input_size", "input_shape"], "example_inputs=torch.randn(1, 3, 224, 224)"),
    "forward_fn": "example_inputs={'name': value}, as forward takes them",
    "output_transform": "nothing to pass: outputs may be nested",
    **dict.fromkeys(["flops", "target_flops", "max_flops", "ops", "speed_up", "speedup"], "macs=0.5, or macs='2G'"),
    **dict.fromkeys(["parameters", "num_params", "max_params"], "params=0.5, or params='5M'"),
    **dict.fromkeys(["dataloader", "data_loader", "loader", "calibration_data", "dataset"], "data=[(images, labels), ...]"),
    **dict.fromkeys(["train_loader", "val_loader"], "data=[(images, labels), ...]"),
    **dict.fromkeys(["layers", "modules", "module_types", "op_types", "op_names", "include"], "only=[model.layer1]"),
    **dict.fromkeys(["config_list", "sparsity_per_layer"], "ratio={model.layer1: 0.5}"),
    "copy": "inplace=True where there need be no copy",
    "device": "model.to(device), with example_inputs there",
    **dict.fromkeys(["loss_fn", "loss_func", "criterion_fn"], "loss=torch.nn.functional.cross_entropy"),
    **dict.fromkeys(["round", "channel_divisor", "divisor"], "round_to=8"),
    "constraints": "budget={'macs': 0.5}",
}


def checked_call(shared: Mapping[str, inspect.Parameter] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A public function whose calls that do not fit its signature raise PruneError; editors see what `**asked` stands for.

    Tracebacks of its PruneErrors show the caller's lines, and fxprune's own where `FXPRUNE_TRACEBACK=1` is set.

    Arguments:
        shared: the parameters that it takes as `**asked`.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        own = inspect.signature(function)
        fixed = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        named = {p.name for p in fixed}
        signature = own.replace(parameters=[*fixed, *(p for n, p in (shared or {}).items() if n not in named)])
        bound = next((n for n in own.parameters if n in ("self", "cls")), None)
        listed = [n for n in signature.parameters if n != bound]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            unknown = next((name for name in kwargs if name not in signature.parameters), None)
            if unknown is not None:
                title = titled(function, args if bound else ())
                raise PruneError(f"{title} has no argument {unknown!r}", fix=called_here(unknown, listed))
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                title = titled(function, args if bound else ())
                places = [p.name for p in fixed if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
                twice = [f"{n} is {shown(a)} by its place, and given by name, too" for n, a in zip(places, args) if n in kwargs]
                written = [n for n in places if n != bound]
                fix = f"{title}({', '.join([*written, *(['...'] if len(listed) > len(written) else [])])})"
                raise PruneError(f"{title}: {twice[0] if twice else error}", fix=fix) from None
            try:
                return function(*args, **kwargs)
            except PruneError as error:
                if os.environ.get("FXPRUNE_TRACEBACK") == "1":
                    raise
                raise without_own_lines(error)  # noqa: B904 - the same error

        vars(call)["__signature__"] = signature
        return call

    return decorate


def titled(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """What a function is called in a message; `args` are those of a method, the first of which says its class."""
    if not args:
        return function.__qualname__.removesuffix(".__init__")
    kind = args[0] if isinstance(args[0], type) else type(args[0])
    return kind.__name__ if function.__name__ == "__init__" else f"{kind.__name__}.{function.__name__}"


def checked_class(kind: Kind) -> Kind:
    """A class whose constructor and public methods, but for those that it inherits, are checked calls."""
    for name, member in list(vars(kind).items()):
        if name.startswith("_") and name not in ("__init__", "__getitem__"):
            continue
        if isinstance(member, classmethod):
            setattr(kind, name, classmethod(checked_call()(member.__func__)))
        elif isinstance(member, types.FunctionType) and "__signature__" not in vars(member):
            setattr(kind, name, checked_call()(member))
    return kind


def called_here(name: str, known: Iterable[str]) -> str:
    """What to write in place of an argument that does not exist."""
    known = list(known)
    if name in ELSEWHERE:
        here = ELSEWHERE[name]
        missing = "=" in here and here.partition("=")[0].isidentifier() and here.partition("=")[0] not in known
        return here if here.startswith("nothing") else f"here it is {here}{', of fxprune.prune' if missing else ''}"
    return f"{did_you_mean(name, known)}one of {', '.join(known)}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question about the nearest of some names, with what separates it from what follows; empty where none is near.

    >>> did_you_mean("magnitud", ["magnitude", "taylor"]), did_you_mean("luck", ["magnitude", "taylor"])
    ("did you mean 'magnitude'? ", '')
    """
    close = difflib.get_close_matches(name.lower(), list(known), n=1) if isinstance(name, str) else []
    return f"did you mean {close[0]!r}? " if close else ""


class Shown(reprlib.Repr):
    """How an argument is shown in a message: what is long is shortened, and tensors are told by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlong = 40

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor | np.ndarray) and x.ndim:
            return f"a {type(x).__name__} of shape {tuple(x.shape)}"
        if isinstance(x, nn.Module):
            return f"a {type(x).__name__}"
        try:
            return super().repr1(x, level)
        except ValueError:  # Python writes down no integer of thousands of digits
            return f"a {type(x).__name__} that is too long to show"


shown = Shown().repr


def number(value: Any) -> Any:
    """A number as Python's: those of NumPy, fractions, and tensors and arrays of no dimension too. All else is handed back.

    A boolean is none, whoever it is from.

    >>> number(np.float32(0.5)), number(np.int64(8)), number("8")
    (0.5, 8, '8')
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0 and not getattr(value, "is_meta", False):
        value = value.item()
    if type(value) in (bool, float) or not isinstance(value, numbers.Real):
        return value
    try:
        fraction = float(value)
    except OverflowError:
        return value
    return int(value) if isinstance(value, numbers.Integral) else fraction


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float of Python's, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def broadcasts(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a tensor of the first shape can be used as one of the second.

    >>> broadcasts((1, 4), (3, 4)), broadcasts((3, 4), (1, 4))
    (True, False)
    """
    return len(shape) <= len(whole) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(whole)))
