"""One layer as a model of its own: channels of what it is given and returns go, and all of it that is coupled to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.inputs import ExampleInputs
from fxprune.layers.calls import LayerCall
from fxprune.passes.errors import PruneError
from fxprune.passes.ir.module_tree import copy_tree, fetch, named_modules, named_tensors, own_copy, walk
from fxprune.passes.ir.slices import apply_slices
from fxprune.passes.rewrite.pruned_module import RewrittenForward
from fxprune.pipeline import Compilation
from fxprune.plan import plan_carried
from fxprune.selection.indices import parse_indices
from fxprune.selection.options import Options


class Alone(nn.Module):
    """A layer between linear ones, which write the channels of its inputs and read those of its output."""

    def __init__(self, layer: nn.Module, call: LayerCall) -> None:
        super().__init__()
        like = next((t for _, t in named_tensors(layer) if t.is_floating_point() or t.is_complex()), torch.zeros(0))
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.call, self.place = call, place
        self.inputs = nn.ModuleList(nn.Linear(1, shape[call.dim], bias=False, **place) for shape in call.shapes)
        self.outputs = nn.Linear(call.width, 1, bias=False, **place)
        self.layer = layer

    def example(self) -> tuple[Tensor, ...]:
        """Inputs with one entry along channels, which comes last."""
        if not self.call.shapes:
            return (torch.zeros((1, 1), dtype=torch.long, device=self.place["device"]),)
        generator, made = torch.Generator().manual_seed(0), []
        for shape in self.call.shapes:
            dim = self.call.dim % len(shape)
            made.append(torch.randn([*shape[:dim], *shape[dim + 1 :], 1], generator=generator).to(**self.place))
        return tuple(made)

    def forward(self, *given: Tensor) -> Tensor:
        made = [write(x).movedim(-1, self.call.dim) for x, write in zip(given, self.inputs, strict=False)]
        out = self.layer(*made or given)
        out = out[0] if isinstance(out, tuple) else out
        read: Tensor = self.outputs(out.movedim(self.call.dim, -1))
        return read


def remove_alone(layer: Any, call: LayerCall, remove: Mapping[str, Sequence[int]], *, inplace: bool) -> Any:
    """The layer without channels of the model `Alone`, by place; raises PruneError where they cannot go, or not alone."""
    remove = {place: parse_indices(indices, "indices", layer) for place, indices in remove.items()}
    training = {module: module.training for module in walk(layer)}
    alone = Alone(layer, call)
    try:
        small = pruned_alone(alone.eval(), remove)
    except PruneError as error:
        fix = re.sub(r"remove=\{.*?: (\[[^\]]*\]).*", r"indices=\1", error.fix or "")
        raise PruneError(
            said_of_layer(error.what).replace("remove", "indices", 1), where=type(layer).__name__, fix=said_of_layer(fix)
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    made = layer if inplace else copy_tree(layer, {id(t): own_copy(t) for _, t in named_tensors(layer)})
    become(made, small)
    return made


def said_of_layer(text: str) -> str:
    """What is said of the places of `Alone`, as who gave a layer alone reads it."""
    text = re.sub(r"\b(inputs|outputs)(\.\d+)?(:\d+)?", r"its \1", text)
    text = re.sub(r"\b(its (?:inputs|outputs)) has\b", r"\1 have", text)
    text = text.replace("another layer in remove", "a layer with more channels")
    return text.replace("layer.", "").replace("layer:", "its weight:")


def pruned_alone(alone: Alone, remove: Mapping[str, Sequence[int]]) -> Any:
    options = Options.parse(alone, remove=remove)
    inputs = ExampleInputs.parse(alone.example(), alone)
    small = Compilation(alone, inputs, options.coupling).prune(options)
    on_meta = any(t.is_meta for _, t in named_tensors(alone))
    if not on_meta and any(isinstance(vars(m).get("forward"), RewrittenForward) for m in walk(small.layer)):
        small = Compilation(alone, inputs, options.coupling).prune(options, same_class=True)
    return small


def become(layer: nn.Module, small: Any) -> None:
    """Give a layer the sizes, the attributes and, where it has one, the program of the layer in a pruned `Alone`."""
    slices = plan_carried(small).slices
    for name, new in named_tensors(small.layer):
        if name.rpartition(".")[2].startswith("_kept_index_"):
            continue
        old: Tensor = fetch(layer, name)
        grad, old.grad = old.grad, None
        old.data = new.detach()
        if grad is not None:
            old.grad = apply_slices(slices.get(f"layer.{name}", ()), grad)
    for path, changed in named_modules(small.layer):
        module = layer.get_submodule(path)
        for name, value in vars(changed).items():
            if name == "forward":
                vars(module)[name] = RewrittenForward(module, value.programs)
            elif isinstance(value, int | float | tuple) and name != "training" and name in vars(module):
                object.__setattr__(module, name, value)
        for name, buffer in changed._buffers.items():
            if name not in module._buffers:
                module.register_buffer(name, buffer, persistent=False)
