"""Example inputs: what is accepted, a plain description of them, and others like them."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.passes.capture.programs import runs
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters, named_tensors
from fxprune.passes.ir.pytree import collect, map_tensors
from fxprune.plan_format import DTYPES, elements

EXAMPLE = "the example inputs"


@dataclass(frozen=True, slots=True)
class ExampleInputs:
    """What a model is called with: positional and keyword arguments."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Any, model: nn.Module | None = None) -> ExampleInputs:
        """A tensor is one argument, a tuple several, a mapping keywords; a list several if the model's forward takes so many.

        Raises: PruneError where there are none, or NumPy's arrays in place of tensors.
        """
        if given is None:
            raise PruneError(
                "example inputs are missing", fix="example_inputs=torch.randn(1, 3, 224, 224), or what forward takes"
            )
        if isinstance(given, list) and model is not None and takes_each(model, given):
            given = tuple(given)
        if isinstance(given, Mapping) and all(isinstance(k, str) for k in given):
            found = cls((), dict(given))
        else:
            found = cls(given if isinstance(given, tuple) else (given,), {})
        if collect((found.args, found.kwargs), np.ndarray):
            raise PruneError("the example inputs hold an array of NumPy's, not a tensor", fix="torch.from_numpy(array)")
        return found

    def call(self, model: Callable[..., Any]) -> Any:
        """What a model returns for them."""
        return model(*self.args, **self.kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
        """The same structure with every tensor changed."""
        return ExampleInputs(*map_tensors((self.args, self.kwargs), change))

    @property
    def tensors(self) -> list[Tensor]:
        return collect((self.args, self.kwargs), Tensor)

    def beside(self, model: nn.Module) -> ExampleInputs:
        """The same on the device of a model."""
        return self.map(functools.partial(Tensor.to, device=device_of(model)))

    def with_flags_of(self, other: ExampleInputs) -> ExampleInputs:
        """The same with the keywords of others that hold no tensor, as far as it has none of that name."""
        flags = {name: value for name, value in other.kwargs.items() if not collect(value, Tensor)}
        return ExampleInputs(self.args, {**flags, **self.kwargs})

    @property
    def batch(self) -> int | None:
        """The size of the first dimension of the first tensor that has any; None where there is none, or one is sparse."""
        if any(t.layout is not torch.strided for t in self.tensors):
            return None  # its rows are the nodes of a graph, say, and not samples
        return next((t.shape[0] for t in self.tensors if t.dim()), None)

    def first_sample(self) -> ExampleInputs:
        """The first sample of the batch alone."""
        return self.map(lambda t: t[:1] if t.dim() and t.shape[0] == self.batch else t)

    def one_more(self) -> ExampleInputs:
        """One sample more in the batch: the first one, rolled along its last dimension."""
        grown = lambda t: torch.cat([t, t[:1].roll(1, -1)])  # noqa: E731
        return self.map(lambda t: grown(t) if t.dim() and t.shape[0] == self.batch else t)

    def between_twice_the_first(self) -> ExampleInputs:
        """The first sample, the second one of the batch, and the first one again."""
        framed = lambda t: torch.cat([t[:2], t[:1]])  # noqa: E731
        return self.map(lambda t: framed(t) if t.dim() and t.shape[0] == self.batch else t)

    def other_sizes(self) -> Iterator[tuple[str, ExampleInputs]]:
        """The same inputs at a second batch size and at a second image size, with a name for each."""
        if self.batch is None:
            return
        yield "batch", self.one_more()
        if self.image_size is not None:
            yield "image size", self.with_images(larger)

    def other_size(self) -> tuple[list[str], ExampleInputs] | None:
        """The same inputs at another batch size, and a smaller image size if they are images: the names of what is other."""
        if self.batch is None:
            return None
        if self.image_size is None or any(smaller_size(n) >= n for n in self.image_size):
            return (["batch"], self.one_more()) if self.image_size is None else None
        return ["batch", "image size"], self.one_more().with_images(smaller)

    def fewer(self) -> Iterator[tuple[list[str], ExampleInputs]]:
        """Two samples, or one more than there is; other images come first, small ones before. With what is other."""
        if self.batch is None:
            return
        one_more = self.one_more()
        batches = [(["another batch"], self.map(lambda t: t[:2] if t.dim() and t.shape[0] == self.batch else t))]
        batches = [*(batches if self.batch > 2 else []), ([EXAMPLE, "another batch"], one_more)]
        if self.image_size is not None:
            few, tried = batches[0][1], {self.image_size}
            for change in (smallest, smaller, larger):
                images = few.with_images(change)
                size = images.image_size or self.image_size
                if size not in tried and math.prod(size) <= SLIGHTLY * math.prod(self.image_size):
                    tried.add(size)
                    yield ["another batch", "another image size"], images
        yield from batches

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the first tensor that may be images; None where there is none."""
        images = (t for t in self.tensors if t.dim() in (4, 5) and t.is_floating_point() and min(t.shape[-2:]) >= 8)
        return next(((t.shape[-2], t.shape[-1]) for t in images), None)

    def with_images(self, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
        """The same with all tensors of the size of the images changed."""
        size = self.image_size
        return self.map(lambda t: change(t) if t.dim() >= 4 and t.is_floating_point() and t.shape[-2:] == size else t)

    def describe(self) -> Any:
        """JSON-ready description: structure, shapes, dtypes and the range of integers."""
        alone = self.args[0] if len(self.args) == 1 and not self.kwargs else None
        if alone is not None and not isinstance(alone, tuple | dict):
            return describe(alone)
        return describe(self.kwargs or self.args)

    def check(self, model: nn.Module, *, weights: bool = True) -> ExampleInputs:
        """The inputs themselves; raises PruneError where they cannot be what the model takes: names, devices, dtypes.

        A model without `weights`, on the meta device, will do where they do not matter, and so will inputs on any device.
        """
        check_names(model, self)
        held = list(named_parameters(model).values())
        on_meta = any(p.is_meta for p in held)
        if on_meta and weights:
            raise PruneError(
                "the model is on the meta device: it has no weights to score or to cut",
                where=type(model).__name__,
                fix="model.to_empty(device='cpu') and load its weights, then prune; or criterion='random', unverified",
            )
        devices = list(dict.fromkeys(p.device for p in held))
        dtypes = list(dict.fromkeys(p.dtype for p in held if p.is_floating_point()))
        for tensor in self.tensors:
            if devices and tensor.device not in devices and not on_meta:
                raise PruneError(
                    f"the example inputs are on {tensor.device}, the model on {devices[0]}",
                    where=type(model).__name__,
                    fix=f"example_inputs.to({str(devices[0])!r})",
                )
        # of several tensors one may be a mask or a table of another dtype
        alone = self.tensors[0] if len(self.tensors) == 1 else None
        if dtypes and alone is not None and alone.is_floating_point() and alone.dtype not in dtypes:
            given = self.map(lambda t: t.to("meta")) if on_meta else self
            if runs(model, given.args, given.kwargs, gradients=False):  # it converts them itself
                return self
            raise PruneError(
                f"the example inputs are {alone.dtype}, the model is {dtypes[0]}",
                where=type(model).__name__,
                fix=f"example_inputs.to({dtypes[0]})",
            )
        return self


SLIGHTLY = 1.5  # how many times as many pixels cost less than a run for another batch and one for another image size


def larger(images: Tensor) -> Tensor:
    """Images with up to 32 rows and columns more."""
    height, width = images.shape[-2:]
    images = torch.cat([images, images[..., : min(32, height), :]], -2)
    return torch.cat([images, images[..., : min(32, width)].flip(-1)], -1)


def smaller(images: Tensor) -> Tensor:
    """The upper left of images, about half as high and as wide."""
    height, width = images.shape[-2:]
    return images[..., : smaller_size(height), : smaller_size(width)].clone()


def smallest(images: Tensor) -> Tensor:
    """The upper left of large images: 64 rows and columns, which at a stride of 32 leave more than one place."""
    height, width = images.shape[-2:]
    return images[..., : min(64, smaller_size(height)), : min(64, smaller_size(width))].clone()


def smaller_size(size: int) -> int:
    """About half of a size, a multiple of what models that are given images of this size divide it by."""
    step = 32 if size > 64 else 8
    return -(-size // (2 * step)) * step


def takes_each(model: nn.Module, given: list[Any]) -> bool:
    """Whether forward takes the items of a list as one argument each, and not the list as its first one.

    It takes the list where its first parameter is annotated as one, or where there are too many items, or too few.
    """
    signature = inspect.signature(model.forward)
    first = next(iter(signature.parameters.values()), None)
    if first is None or re.match(r"(typing\.)?(list|sequence|iterable)\b", annotation_of(first), re.IGNORECASE):
        return False
    try:
        signature.bind(*given)
    except TypeError:
        return False
    return bool(given)


def annotation_of(parameter: inspect.Parameter) -> str:
    said = parameter.annotation
    return said if isinstance(said, str) else said.__name__ if type(said) is type else str(said)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first tensor; the CPU for a model without any."""
    return next((t.device for _, t in named_tensors(model)), torch.device("cpu"))


def check_names(model: nn.Module, inputs: ExampleInputs) -> None:
    """Raise PruneError where forward has no such arguments, or lacks one."""
    signature = inspect.signature(model.forward)
    parameters = signature.parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [] if open_ended else [name for name in inputs.kwargs if name not in parameters]
    if model._forward_pre_hooks:  # which may add some, or take some away
        return
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        why = f"it has no argument {unknown[0]!r}" if unknown else str(error)
        taken = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters.values()]
        raise PruneError(
            f"the example inputs do not fit forward: {why}",
            where=f"{type(model).__name__}.forward({', '.join(taken)})",
            fix="a tensor, a tuple of positional arguments, or a dict of keyword arguments; (batch,) for what is one argument"
            if inputs.tensors or not (inputs.args or inputs.kwargs)
            else "tensors, such as torch.randn(1, 3, 224, 224), not shapes",
        ) from error


def describe(value: Any) -> Any:
    """JSON-ready description of an argument."""
    if isinstance(value, Tensor):
        found: dict[str, Any] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if not value.is_floating_point() and not value.is_complex() and value.numel():
            found["range"] = [0, 0] if value.is_meta else [int(value.min()), int(value.max())]
        return {"tensor": found}
    if isinstance(value, tuple | list):
        if hasattr(value, "_fields"):
            return {"fields": [[k, describe(v)] for k, v in zip(value._fields, value, strict=True)]}
        return {type(value).__name__: [describe(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[k, describe(v)] for k, v in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    return {"opaque": type(value).__name__}


MOST_ELEMENTS = 1 << 28  # of inputs that are made up


def random_inputs(described: Any, model: nn.Module) -> ExampleInputs:
    """Random inputs for a model that look like the described, in its precision where none of them would be.

    Raises: PruneError where a description is not enough.
    """
    fix = "plan.apply(model, example_inputs=...)"
    if described is None:
        raise PruneError("the plan does not say what the example inputs were like", fix=fix)
    if elements(described) > MOST_ELEMENTS:
        raise PruneError("the plan's example inputs are too large to be made up", fix=fix)
    try:
        made = made_up(described, device_of(model))
        inputs = ExampleInputs.parse((made,) if isinstance(made, list) else made)
    except (RuntimeError, TypeError, ValueError) as error:
        raise PruneError(f"example inputs like those of the plan cannot be made up: {error}", fix=fix) from error
    dtypes = [t.dtype for t in named_parameters(model).values() if t.is_floating_point()]
    own = {t.dtype for t in inputs.tensors if t.is_floating_point()}
    if not dtypes or not own or not own.isdisjoint(dtypes):
        return inputs
    return inputs.map(lambda t: t.to(dtypes[0]) if t.is_floating_point() else t)


def made_up(described: Any, device: torch.device) -> Any:
    """A random value for a description by `describe`."""
    kind, content = next(iter(described.items()))
    if kind == "tensor":
        dtype = DTYPES[content["dtype"]]
        generator = torch.Generator().manual_seed(0)
        if "range" in content:
            low, high = content["range"]
            return torch.randint(low, high + 1, content["shape"], generator=generator).to(device, dtype)
        return torch.randn(content["shape"], generator=generator).to(device, dtype)
    if kind in ("tuple", "list"):
        values = [made_up(v, device) for v in content]
        return tuple(values) if kind == "tuple" else values
    if kind in ("dict", "fields"):
        made = {k: made_up(v, device) for k, v in content}
        return made if kind == "dict" else namedtuple("Inputs", list(made))(**made)
    if kind == "value":
        return content
    raise PruneError(f"the plan cannot make up an input of type {content}", fix="plan.apply(model, example_inputs=...)")
