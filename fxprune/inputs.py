"""Example inputs: what is accepted, a plain description of them, and others like them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import named_parameters
from fxprune.passes.ir.pytree import collect, map_tensors


def parse_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tensor is one, a tuple several, a dict keywords."""
    if example_inputs is None:
        raise PruneError(
            "example inputs are missing",
            fix="example_inputs=torch.randn(1, 3, 224, 224), or what forward takes",
        )
    if isinstance(example_inputs, dict) and all(isinstance(k, str) for k in example_inputs):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def check_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, weights: bool = True) -> None:
    """Raise PruneError where the arguments cannot be what the model takes: names, devices, dtypes.

    A model without `weights`, on the meta device, will do where they do not matter, and so will inputs on any device.
    """
    if not isinstance(model, nn.Module):
        what = f"model is of type {type(model).__name__}, not a torch.nn.Module"
        raise PruneError(what, fix="pass the module itself")
    check_names(model, args, kwargs)
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
    tensors: list[Tensor] = collect((args, kwargs), Tensor)
    for tensor in tensors:
        if devices and tensor.device not in devices and not on_meta:
            raise PruneError(
                f"the example inputs are on {tensor.device}, the model on {devices[0]}",
                where=type(model).__name__,
                fix=f"example_inputs.to({str(devices[0])!r})",
            )
    # of several tensors one may be a mask or a table of another dtype
    if dtypes and len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].dtype not in dtypes:
        raise PruneError(
            f"the example inputs are {tensors[0].dtype}, the model is {dtypes[0]}",
            where=type(model).__name__,
            fix=f"example_inputs.to({dtypes[0]})",
        )


def check_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise PruneError where forward has no such arguments, or lacks one."""
    signature = inspect.signature(model.forward)
    parameters = signature.parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [] if open_ended else [name for name in kwargs if name not in parameters]
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        why = f"it has no argument {unknown[0]!r}" if unknown else str(error)
        taken = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters.values()]
        raise PruneError(
            f"the example inputs do not fit forward: {why}",
            where=f"{type(model).__name__}.forward({', '.join(taken)})",
            fix="a tensor, a tuple of positional arguments, or a dict of keyword arguments",
        ) from error


def describe_inputs(example_inputs: Any) -> Any:
    """JSON-ready description of example inputs: structure, shapes, dtypes and the range of integers."""
    if isinstance(example_inputs, Tensor):
        found: dict[str, Any] = {
            "shape": list(example_inputs.shape),
            "dtype": str(example_inputs.dtype).removeprefix("torch."),
        }
        if not example_inputs.is_floating_point() and not example_inputs.is_complex() and example_inputs.numel():
            found["range"] = [int(example_inputs.min()), int(example_inputs.max())]
        return {"tensor": found}
    if isinstance(example_inputs, tuple | list):
        return {
            type(example_inputs).__name__ if not hasattr(example_inputs, "_fields") else "tuple": [
                describe_inputs(v) for v in example_inputs
            ]
        }
    if isinstance(example_inputs, dict):
        return {"dict": [[k, describe_inputs(v)] for k, v in example_inputs.items()]}
    if example_inputs is None or isinstance(example_inputs, bool | int | float | str):
        return {"value": example_inputs}
    return {"opaque": type(example_inputs).__name__}


def empty_inputs(described: Any, device: torch.device) -> Any:
    """Random inputs that look like the described; raises PruneError where a description is not enough."""
    kind, content = next(iter(described.items()))
    if kind == "tensor":
        dtype = getattr(torch, content["dtype"])
        generator = torch.Generator().manual_seed(0)
        if "range" in content:
            low, high = content["range"]
            return torch.randint(low, high + 1, content["shape"], generator=generator).to(device, dtype)
        return torch.randn(content["shape"], generator=generator).to(device, dtype)
    if kind in ("tuple", "list"):
        values = [empty_inputs(v, device) for v in content]
        return tuple(values) if kind == "tuple" else values
    if kind == "dict":
        return {k: empty_inputs(v, device) for k, v in content}
    if kind == "value":
        return content
    raise PruneError(f"the plan cannot make up an input of type {content}", fix="plan.apply(model, example_inputs=...)")


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The size of the first dimension of the first tensor that has any; None where there is none."""
    return next((t.shape[0] for t in collect((args, kwargs), Tensor) if t.dim()), None)


def batch_of_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same inputs, the first of the batch alone."""
    batch = batch_of(args, kwargs)
    return map_tensors((args, kwargs), lambda t: t[:1] if t.dim() and t.shape[0] == batch else t)


def larger(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same inputs with one more in the batch; some tensor has dimensions."""
    batch = batch_of(args, kwargs)
    return map_tensors((args, kwargs), lambda t: torch.cat([t, t[:1].roll(1, -1)]) if t.dim() and t.shape[0] == batch else t)


def other_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The same inputs at a second batch size and at a second image size, with a name for each."""
    tensors: Sequence[Tensor] = [t for t in collect((args, kwargs), Tensor) if t.dim()]
    if not tensors:
        return
    yield "batch", *larger(args, kwargs)
    images = [t for t in tensors if t.dim() in (4, 5) and t.is_floating_point() and min(t.shape[-2:]) >= 8]
    if images:
        height, width = images[0].shape[-2:]

        def grown(t: Tensor) -> Tensor:
            if t.dim() >= 4 and t.is_floating_point() and t.shape[-2:] == (height, width):
                t = torch.cat([t, t[..., : min(32, height), :]], -2)
                return torch.cat([t, t[..., : min(32, width)].flip(-1)], -1)
            return t

        yield "image size", *map_tensors((args, kwargs), grown)
