"""What goes with residual branches, in a model of the original's class.

A block that has lost a branch gets its program as forward. Where a forward around it takes other paths than at capture, and so
calls the block with other arguments than its program is for (as decoders of transformers do), modules stand in place of the
removed ones that return zeros, and every forward is the class's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxprune.passes.errors import GuardError
from fxprune.passes.ir.module_tree import named_modules, named_tensors, private_copy
from fxprune.passes.ir.pytree import ATOMS, collect, map_tensors
from fxprune.passes.rewrite.pruned_module import PrunedModule, RewrittenForward
from fxprune.passes.rewrite.rewrite import drop
from fxprune.plan import plan_between


class Silent(nn.Module):
    """Stands where a module of a removed branch was: returns zeros, which differ from its first tensor in their last dimension.

    A cache that it is given would not be written to, and others count by what is in it: that is an error.

    Arguments:
        result: what the module returned, with an empty tensor, shape (last dimension, 0), in place of each that has that shape,
            and None in place of other tensors.
    """

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        odd = next((leaf for leaf in leaves((args, kwargs)) if not (isinstance(leaf, Tensor) or type(leaf) in ATOMS)), None)
        if odd is not None:
            raise GuardError(f"a residual branch that was removed cannot write to a {type(odd).__name__}: use_cache=False")
        like = collect((args, kwargs), Tensor)[0]
        return map_tensors(self.result, lambda t: like.new_zeros((*like.shape[:-1], t.shape[0])))


def leaves(x: Any) -> list[Any]:
    if isinstance(x, tuple | list):
        return [leaf for v in x for leaf in leaves(v)]
    return [leaf for v in x.values() for leaf in leaves(v)] if isinstance(x, dict) else [x]


def drop_removed(
    model: nn.Module, pruned: PrunedModule, made: nn.Module, is_right: Callable[[], bool], run: Callable[[nn.Module], Any]
) -> bool:
    """Delete from `made` what goes with residual branches, and let the forwards around do without; whether there is any.

    Arguments:
        model: the original.
        pruned: the pruned model.
        made: a copy of the model with cut tensors and its own forwards; changed.
        is_right: whether `made` computes what the pruned model does.
        run: calls a model on the example inputs.
    """
    gone = plan_between(model, pruned).removed
    if not gone:
        return False
    there = {path for path, _ in named_modules(pruned)}
    paths = [path for path, _ in named_modules(made) if path not in there]
    outermost = [path for path in paths if path.rpartition(".")[0] in there]
    loose = [name for name in gone & dict(named_tensors(made)).keys() if not name.startswith(tuple(f"{p}." for p in paths))]
    drop(made, outermost, loose)
    blocks = sorted({place.rpartition(".")[0] for place in (*outermost, *loose)})

    def take_programs() -> None:
        for path in blocks:
            forward = vars(pruned.get_submodule(path)).get("forward")
            if isinstance(forward, RewrittenForward):  # that of its class reads what is not there
                take_program(made.get_submodule(path), forward.module, forward.programs)

    take_programs()
    if loose or is_right():
        return True
    for path in blocks:
        vars(made.get_submodule(path)).pop("forward", None)
    for path, result in results(model, outermost, run).items():
        made.get_submodule(path.rpartition(".")[0]).add_module(path.rpartition(".")[2], Silent(result))
    if not is_right():
        drop(made, [path for path in outermost if path in dict(named_modules(made))], ())
        take_programs()
    return True


def results(model: nn.Module, paths: list[str], run: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """What some modules return where they are called, as `Silent` takes it."""
    found: dict[str, Any] = {}

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = collect((args, kwargs), Tensor)
            if given and all(isinstance(leaf, Tensor) or type(leaf) in ATOMS for leaf in leaves(out)):
                like = given[0].shape[:-1]
                found[path] = map_tensors(
                    out, lambda t: t.new_empty(t.shape[-1], 0) if t.dim() and t.shape[:-1] == like else None
                )

        return hook

    copy = private_copy(model)
    for path in paths:
        copy.get_submodule(path).register_forward_hook(look(path), with_kwargs=True)
    run(copy)
    return found


def take_program(module: nn.Module, source: nn.Module, programs: Any) -> None:
    """Give a module the pruned program of its counterpart as its forward, with the constants that it refers to."""
    vars(module)["forward"] = RewrittenForward(module, programs)
    for name, tensor in constants_of(source):
        if name not in module._buffers:
            module.register_buffer(name, tensor.clone(), persistent=False)


def constants_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors that the programs of a module have made, by name."""
    made = ("_kept_index_", "_tensor_constant")
    return [(name, t) for name, t in module._buffers.items() if t is not None and name.startswith(made)]
