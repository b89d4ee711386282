"""What Python answers itself about sizes and tensors: `int(size)`, `float(size)`, `len(tensor)`, `type(tensor)`;
and what torch answers about the modes that look on.

Python insists that `int` and `float` return plain numbers. While a program is captured, classes of the same names stand in
their place in files that convert sizes. Which files do is known once they have: the capture starts again then. For `len` and
`type` there is something in every file of the model's.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import math
import re
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.capture.opaque import is_fraction
from fxprune.passes.capture.patches import not_a_models
from fxprune.passes.capture.proxy import NAMED, PROXIES, Items, TensorProxy

PLAIN: dict[str, Any] = {"int": int, "float": float}
ASKING = ("isinstance", "issubclass")


class Conversions:
    """What a capture knows of conversions.

    Attributes:
        files: the variables of each file whose conversions are nodes.
        expected: whether a conversion in another file starts the capture again.
        compare_dtypes: whether a file asks whether a dtype `is` another, which a proxy for it would not be.
    """

    compare_dtypes = False

    def __init__(self, files: tuple[dict[str, Any], ...] = (), *, expected: bool = True) -> None:
        self.files, self.expected = files, expected

    def after(self, error: BaseException) -> Conversions:
        """What is known once a conversion has raised `ConvertsSize`; none is expected once one cannot be a node."""
        names = converting_file(error)
        if names is None or any(names is known for known in self.files) or not can_stand_in(names):
            return Conversions(self.files, expected=False)
        return Conversions((*self.files, names))


@functools.lru_cache(maxsize=4096)
def compares_dtypes(path: str) -> bool:
    try:
        return re.search(r"dtype\s+is\s+(not\s+)?torch\.", Path(path).read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False


def converting_file(error: BaseException) -> dict[str, Any] | None:
    """The variables of the innermost file of the model's that an error came through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if not not_a_models(trace.tb_frame.f_globals):
            found = trace.tb_frame.f_globals
        trace = trace.tb_next
    return found


def can_stand_in(names: dict[str, Any]) -> bool:
    """Whether the functions of a file use `int` and `float` for conversions and questions by `isinstance` alone.

    What is asked otherwise (`type(x) is int`, `dtype=float`), another class would not answer.
    """
    path = names.get("__file__")
    return isinstance(path, str) and not names.keys() & PLAIN.keys() and only_converts(path)


@functools.lru_cache(maxsize=512)
def only_converts(path: str) -> bool:
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return False
    fine: set[ast.AST] = set()
    used: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            fine.add(node.func)
            if node.func.id in ASKING:
                fine.update(inner for argument in node.args[1:] for inner in ast.walk(argument))
        said = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        fine.update(inner for hint in said if isinstance(hint, ast.AST) for inner in ast.walk(hint))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            body = node.body if isinstance(node.body, list) else [node.body]
            used.update(inner for part in body for inner in ast.walk(part))
    return all(node in fine for node in used if isinstance(node, ast.Name) and node.id in PLAIN)


class Converting(type):
    """The class of what stands for `int` or `float`; `plain` is that, and `tracer` captures in `thread`, or None afterwards."""

    plain: Any
    tracer: Any
    thread: int

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        tracer = cls.tracer if threading.get_ident() == cls.thread else None
        if tracer is None or not tracer.recorder.tracing or len(args) != 1 or kwargs or type(args[0]) not in PROXIES:
            return cls.plain(*args, **kwargs)
        given, plain = args[0], cls.plain
        if isinstance(given.value, Tensor) and given.value.numel() == 1:
            if plain is float and is_fraction(given.value):
                return tracer.read_numbers(given, "item")
            given = tracer.read_numbers(given, "item") if tracer.is_made_of_sizes(given.node) else given
        if type(given.value) not in (int, float, bool):
            return plain(given)
        tracer.check_size(given, plain.__name__)
        return tracer.create_proxy("call_function", plain, (given,), {})

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.plain)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.plain)


@contextlib.contextmanager
def seen_conversions(tracer: Any) -> Iterator[None]:
    """While a tracer runs, the conversions in the files that it knows are nodes; the lock of `Patches` must be held."""
    made = {name: Converting(name, (plain,), {"plain": plain, "tracer": tracer}) for name, plain in PLAIN.items()}
    for kind in made.values():
        kind.thread = threading.get_ident()
    try:
        for names in tracer.conversions.files:
            names.update(made)
        yield
    finally:
        for names in tracer.conversions.files:
            for name in made:
                del names[name]
        for kind in made.values():
            kind.tracer = None


# -- what stands for torch's own classes and questions -------------------------------------------------------------------

empty, tensor = torch.empty, torch.tensor  # the originals: a capture replaces factories of torch
LEGACY = {name: kind for name, kind in vars(torch).items() if type(kind) is type(torch.FloatTensor)}


def legacy(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """What a call of a tensor's class comes to, as the parts of a node: its arguments are sizes, or data, or a tensor."""
    dtype = torch.get_default_dtype() if kind is torch.Tensor else kind.dtype
    data = args[0] if len(args) == 1 else None
    if isinstance(data, torch.Tensor):
        return "call_method", "detach", args, {}
    shape = isinstance(data, torch.Size) or isinstance(getattr(data, "value", None), torch.Size)  # of another tensor
    if isinstance(data, list | tuple) and not shape:
        return "call_function", tensor, args, kwargs | {"dtype": dtype}
    return "call_function", empty, (data if shape else tuple(args),), kwargs | {"dtype": dtype}


class TensorClass(type(torch.Tensor)):  # type: ignore[misc]
    """The class of what stands for `torch.Tensor` in files of the model's while it is traced, to see what it is called with."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return STANDS_FOR_TORCH.construct(torch.Tensor, args, kwargs)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, torch.Tensor)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is torch.Tensor

    def __hash__(cls) -> int:
        return hash(torch.Tensor)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, torch.Tensor)


class LegacyType(str):
    """Stands for a class such as `torch.LongTensor`; C++ takes such a class by its name, too."""

    kind: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return STANDS_FOR_TORCH.construct(self.kind, args, kwargs)

    def __instancecheck__(self, value: object) -> bool:
        """A tensor is of such a class by its dtype and device, of which a capture without values has another."""
        if type(value) in PROXIES:
            return isinstance(value, torch.Tensor) and value.dtype == self.kind.dtype and str(value.device) == "cpu"
        return isinstance(value, self.kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(LEGACY[self.rpartition(".")[2]], name)


class StandIn(types.ModuleType):
    """Stands for a module of torch's in files of the model's while it is traced: some of what it has are others."""

    def __init__(self, real: Any) -> None:
        super().__init__(real.__name__)
        vars(self)["real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["real"], name, value)


class TorchModule(StandIn):
    """Stands for `torch`, of which the classes of tensors are others.

    Attributes:
        construct: creates a tensor of such a class from the arguments of a call.
    """

    construct: Callable[[Any, Any, Any], Any]

    def __init__(self) -> None:
        super().__init__(torch)
        held = vars(self)
        held["construct"] = constructed
        held["Tensor"] = TensorClass("Tensor", (torch.Tensor,), {"__module__": "torch"})
        for name, kind in LEGACY.items():
            held[name] = made = LegacyType(f"torch.{name}")
            made.kind = kind
        held["overrides"], held["_C"], held["utils"] = map(StandIn, (torch.overrides, torch._C, torch.utils))
        vars(held["utils"])["_python_dispatch"] = StandIn(torch.utils._python_dispatch)


def constructed(kind: Any, args: Any, kwargs: Any) -> Any:
    return kind(*args, **kwargs)


STANDS_FOR_TORCH = TorchModule()
STAND_INS: dict[int, Any] = {id(torch): STANDS_FOR_TORCH, id(torch.Tensor): STANDS_FOR_TORCH.Tensor}
STAND_INS |= {id(kind): vars(STANDS_FOR_TORCH)[name] for name, kind in LEGACY.items()}
NAMED[torch.Tensor] = STANDS_FOR_TORCH.Tensor
ASKED = [STANDS_FOR_TORCH.overrides, STANDS_FOR_TORCH._C, STANDS_FOR_TORCH.utils._python_dispatch]
STAND_INS |= {id(vars(module)["real"]): module for module in [*ASKED, STANDS_FOR_TORCH.utils]}


def is_overridden(*given: Any) -> bool:
    """Whether any of these is of a class that has functions of torch of its own."""
    kinds = {type(v.value if type(v) in PROXIES else v) for v in given} - {Tensor, nn.Parameter}
    own = [getattr(kind, "__torch_function__", None) for kind in kinds]
    return any(function not in (None, torch._C._disabled_torch_function_impl) for function in own)


# What is asked of the modes that look on, which a model outside of a capture does not see, by the name of the function.
ABOUT_MODES: dict[str, Callable[..., Any]] = {
    "has_torch_function": lambda given: is_overridden(*given),
    "has_torch_function_unary": is_overridden,
    "has_torch_function_variadic": is_overridden,
    "_get_current_function_mode": lambda: None,
    "_get_current_function_mode_stack": list,
    "_len_torch_function_stack": lambda: 0,
    "_len_torch_dispatch_stack": lambda *kind: 0,
    "is_in_torch_dispatch_mode": lambda *how, **named: False,
    "_get_current_dispatch_mode": lambda: None,
    "_get_current_dispatch_mode_stack": list,
}
ABOUT_MODES |= {f"_{name}": answer for name, answer in ABOUT_MODES.items() if name.startswith("has_")}


def see_numpy(patches: Any) -> None:
    """`numpy.prod`, `numpy.ceil` and `numpy.floor` take sizes, of which they would make plain numbers."""
    for name in ("ceil", "floor"):
        rounding = patches.seeing_proxies(rounds := getattr(np, name))
        patches.stand_ins[id(rounds)] = rounding
        patches.patch(np, name, rounding)
    plain = np.prod

    @functools.wraps(plain)
    def product(given: Any, *args: Any, **kwargs: Any) -> Any:
        sizes = type(given) in (tuple, list, Items) and any(type(v) in PROXIES for v in given)
        return math.prod(given) if sizes and not args and not kwargs and patches.tracing() else plain(given, *args, **kwargs)

    patches.stand_ins[id(plain)] = product
    patches.patch(np, "prod", product)
    patches.replaced.append((plain, product))


def see_mode_questions(patches: Any) -> None:
    """Files of the model's are told that no mode looks on; torch's own, which ask for the same, are told what is."""

    def answering(function: Any, answer: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return answer(*args, **kwargs) if patches.tracing() else function(*args, **kwargs)

        patches.stand_ins[id(function)] = wrapper
        patches.replaced.append((function, wrapper))
        return wrapper

    for module in ASKED:
        for name, answer in ABOUT_MODES.items():
            if (function := getattr(vars(module)["real"], name, None)) is not None:
                vars(module)[name] = answering(function, answer)
                patches.undo.append(functools.partial(vars(module).pop, name))


# -- what is asked in every file -----------------------------------------------------------------------------------------


class Kind(type):
    """The class of what stands for `type` in files of the model's: a proxy is of the class of what it stands for."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return type(*args, **kwargs)
        kind = type(args[0])
        if kind in PROXIES or kind is Items:
            kind = type(args[0].value)
        return STAND_INS.get(id(kind), kind)  # as the file names it

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)


def see_questions(patches: Any) -> None:
    """`len(tensor)` is a size, of which Python would make a plain number; a proxy's class is that of its value, and no proxy
    of a tensor is called."""

    def length(x: Any) -> Any:
        return x.shape[0] if type(x) is TensorProxy and x.value.dim() and patches.tracing() else len(x)

    def is_callable(x: Any) -> bool:
        return type(x) is not TensorProxy and callable(x)

    patches.shadows |= {"len": length, "type": Kind("type", (type,), {}), "callable": is_callable}
