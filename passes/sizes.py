"""Which arguments of which functions are sizes, and what they become. Methods and functions of one name share a handler.

A handler gets the rewriter and the old node and returns the new node, or None where nothing in it needs to change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from fxprune.passes.tape import Ref, collect

if TYPE_CHECKING:
    from fxprune.passes.rewrite import Rewriter

FUSED_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math")
Handler = Callable[["Rewriter", fx.Node], fx.Node | None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def file(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return file


def function_name(node: fx.Node) -> str:
    """The name that has a handler: that of the method or function, also where the op itself is called (`aten.view.default`)."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
        return str(node.target._schema.name.partition("::")[2])
    return getattr(node.target, "__name__", "")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def with_argument(r: Rewriter, node: fx.Node, position: int, name: str, value: Any) -> fx.Node:
    """The node carried over with one argument replaced (it is already in terms of the new graph)."""
    args = [r.argument(a) for a in node.args]
    kwargs = {k: r.argument(v) for k, v in node.kwargs.items()}
    if len(args) > position:
        args[position] = value
    else:
        kwargs[name] = value
    return r.emit(node, args, kwargs)


def resized(r: Rewriter, given: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """Size arguments one by one; -1 stays where it can."""
    return [r.size(g, w) for g, w in zip(given, wanted, strict=True)]


def sizes_after(r: Rewriter, node: fx.Node, start: int, name: str = "size") -> tuple[list[Any], bool]:
    """The sizes among a node's arguments, given one by one or as one sequence, and whether as a sequence."""
    if name in node.kwargs:
        return list(node.kwargs[name]), True  # type: ignore[arg-type]
    rest = node.args[start:]
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        return list(rest[0]), True
    return list(rest), False


@handles("view", "reshape", "expand", "broadcast_to", "view_copy", "new_zeros", "new_ones", "new_empty", "_unsafe_view")
def shape_of_result(r: Rewriter, node: fx.Node) -> fx.Node | None:
    if any(isinstance(a, torch.dtype) for a in node.args[1:2]):
        return None
    key = next((k for k in ("size", "shape") if k in node.kwargs), "size")
    given, packed = sizes_after(r, node, 1, key)
    new = resized(r, given, r.after(r.result(node)))
    rest = {k: r.argument(v) for k, v in node.kwargs.items() if k != key}
    return r.emit(node, (r.new[node.args[0]], tuple(new)) if packed else (r.new[node.args[0]], *new), rest)  # type: ignore[index]


@handles("zeros", "ones", "empty", "rand", "randn")
def created(r: Rewriter, node: fx.Node) -> fx.Node | None:
    given, packed = sizes_after(r, node, 0)
    new = resized(r, given, r.after(r.result(node)))
    rest = {k: r.argument(v) for k, v in node.kwargs.items() if k != "size"}
    return r.emit(node, (tuple(new),) if packed else tuple(new), rest)


@handles("arange", "linspace", "logspace", "eye", "hann_window", "tensor", "as_tensor")
def made_whole(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """Entries that differ by their place are made as in the original and then cut."""
    whole = r.emit(node, r.argument(tuple(node.args)), r.argument(dict(node.kwargs)))
    for cut in r.cuts(r.result(node)):
        whole = r.graph.call_method("index_select", (whole, cut.dims[0], r.constant(cut.keep)))
    return whole


@handles("full", "new_full")
def filled(r: Rewriter, node: fx.Node) -> fx.Node | None:
    at = 0 if function_name(node) == "full" else 1
    given = argument(node, at, "size")
    return with_argument(r, node, at, "size", tuple(resized(r, given, r.after(r.result(node)))))


@handles("unflatten")
def unflatten(r: Rewriter, node: fx.Node) -> fx.Node | None:
    dim = argument(node, 1, "dim") % len(r.before(r.result(node.args[0])))
    given = list(argument(node, 2, "sizes"))
    wanted = r.after(r.result(node))[dim : dim + len(given)]
    return with_argument(r, node, 2, "sizes", tuple(resized(r, given, wanted)))


@handles("repeat", "tile")
def repeat(r: Rewriter, node: fx.Node) -> fx.Node | None:
    given, packed = sizes_after(r, node, 1, "repeats" if node.target == "repeat" else "dims")
    before, after = r.after(r.result(node.args[0])), r.after(r.result(node))
    before = (1,) * (len(after) - len(before)) + before
    given = [1] * (len(after) - len(given)) + given
    wanted = [a // b if b else 0 for a, b in zip(after, before, strict=True)]
    new = resized(r, given, wanted)
    return r.emit(node, (r.new[node.args[0]], tuple(new)) if packed else (r.new[node.args[0]], *new), {})  # type: ignore[index]


@handles("repeat_interleave")
def repeat_interleave(r: Rewriter, node: fx.Node) -> fx.Node | None:
    times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    source, target = r.result(node.args[0]), r.result(node)
    if dim is None or isinstance(r.result(times), Ref):
        return None
    dim %= len(r.before(source))
    args, kwargs = [r.argument(a) for a in node.args], {k: r.argument(v) for k, v in node.kwargs.items()}
    repeats = r.size(times, r.after(target)[dim] // r.after(source)[dim])
    if len(args) > 1:
        args[1] = repeats
    else:
        kwargs["repeats"] = repeats
    if node.kwargs.get("output_size") is not None:
        kwargs["output_size"] = r.size(node.kwargs["output_size"], r.after(target)[dim])
    return r.emit(node, args, kwargs)


@handles("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk", "hsplit")
def split(r: Rewriter, node: fx.Node) -> fx.Node | None:
    source = r.result(node.args[0])
    dim = argument(node, 2, "dim", 0) % len(r.before(source))
    parts = [r.after(ref)[dim] for ref in collect(r.result(node), Ref)]
    if not any(dim in c.dims for c in r.cuts(source)):
        return None
    # the halves need not be equal any more: explicit sizes
    return r.emit(node, (r.new[node.args[0]], list(parts), dim), {}, method="split")  # type: ignore[index]


def place(r: Rewriter, ref: Ref, dim: int) -> Tensor:
    """Where each index of a dimension is among the kept ones; -1 for removed ones, which is an index for who wants any."""
    kept = r.positions(ref, dim)
    table = torch.full((r.before(ref)[dim],), -1)
    table[kept] = torch.arange(len(kept))
    return table


def run_of(positions: Tensor) -> slice | None:
    """The slice that picks these positions, if they are consecutive."""
    start, n = int(positions[0]), len(positions)
    return slice(start, start + n) if torch.equal(positions, torch.arange(start, start + n)) else None


def picked(r: Rewriter, source: Ref, target: Ref, dim: int, out_dim: int, chosen: Tensor) -> Tensor:
    """Kept positions in the source of the entries `chosen` (original indices) that the result keeps."""
    return place(r, source, dim)[chosen[r.positions(target, out_dim)]]


@handles("getitem", "setitem")
def getitem(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """x[index]: along dimensions that shrank, numbers, slices and index tensors are mapped to kept positions."""
    return indexed(r, node, node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))


@handles("slice", "index")
def called_index(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The ops that an index comes down to, called by name."""
    if function_name(node) == "index":
        return indexed(r, node, tuple(slice(None) if i is None else i for i in argument(node, 1, "indices")))
    dim = argument(node, 1, "dim", 0) % len(r.before(r.result(node.args[0])))
    bounds = slice(*(argument(node, 2 + i, name) for i, name in enumerate(("start", "end", "step"))))
    return indexed(r, node, (*[slice(None)] * dim, bounds))


def indexed(r: Rewriter, node: fx.Node, index: tuple[Any, ...]) -> fx.Node | None:
    source = r.result(node.args[0])
    if not isinstance(source, Ref):
        return None
    shape = r.before(source)
    spans = [span(r, i) for i in index]
    at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    fill = (slice(None),) * (len(shape) - sum(spans))
    full = (*index[:at], *fill, *index[at + 1 :]) if at < len(index) else (*index, *fill)
    target = r.result(node) if node.target is not operator.setitem else None
    if target is not None and not isinstance(target, Ref):
        return None
    left = r.after(source)
    new: list[Any] = []
    dim = out = 0
    for i in full:
        ref = r.result(i) if isinstance(i, fx.Node) else None
        shrunk = dim < len(shape) and left[dim] < shape[dim]
        if i is None or isinstance(i, bool):
            new.append(i)
            out += 1
            continue
        if not shrunk:
            new.append(r.argument(i) if not isinstance(i, slice) else bounds(r, i))
        else:
            new.append(mapped(r, source, target, dim, out, i))
        if isinstance(i, slice):
            out += 1
        elif isinstance(ref, Ref) and len(r.before(ref)) and out <= dim:
            out += len(r.before(ref)) if r.capture.tape.values[ref.id].dtype != torch.bool else 1
        elif isinstance(i, list):
            out += 1
        dim += span(r, i)
    while new and at == len(index) and isinstance(new[-1], slice) and new[-1] == slice(None) and len(new) > len(index):
        new.pop()
    args = [r.new[node.args[0]], tuple(new) if len(new) != 1 else new[0]]  # type: ignore[index]
    if node.target not in (operator.getitem, operator.setitem):
        return r.graph.call_function(operator.getitem, tuple(args))
    return r.emit(node, args + [r.argument(a) for a in node.args[2:]], {})


def span(r: Rewriter, i: Any) -> int:
    """How many dimensions one entry of an index takes up."""
    if i is None or i is Ellipsis or isinstance(i, bool):
        return 0
    ref = r.result(i) if isinstance(i, fx.Node) else None
    if isinstance(ref, Ref) and r.capture.tape.values[ref.id].dtype in (torch.bool, torch.uint8):
        return len(r.before(ref))
    return 1


def bounds(r: Rewriter, i: slice) -> slice:
    """A slice over a dimension that did not shrink: its bounds keep their values."""
    return slice(*(r.argument(b) for b in (i.start, i.stop, i.step)))


def known(r: Rewriter, bound: Any) -> Any:
    """A bound of a slice in the original: a number, that of a node, or that in a constant tensor."""
    value = r.result(bound)
    data = r.capture.tape.values[value.id].data if isinstance(value, Ref) else None
    return value if data is None else int(data)


def mapped(r: Rewriter, source: Ref, target: Ref | None, dim: int, out: int, i: Any) -> Any:
    """One entry of an index along a dimension that shrank."""
    size = r.before(source)[dim]
    table = place(r, source, dim)
    if isinstance(i, slice):
        original = slice(*(known(r, b) for b in (i.start, i.stop, i.step)))
        if original == slice(None):
            return original
        chosen = table[torch.arange(size)[original]]
        chosen = chosen[chosen >= 0]
        run = run_of(chosen)
        if run is None:
            return r.constant(chosen)
        at_start, at_end = run.start == 0, run.stop == len(r.positions(source, dim))
        return slice(None if at_start else run.start, None if at_end else run.stop)
    if isinstance(i, int) or isinstance(r.result(i), int):
        value = i if isinstance(i, int) else r.capture.results[i]
        return int(table[value % size])
    data = torch.as_tensor(i) if isinstance(i, list) else r.capture.tape.values[r.result(i).id].data
    assert data is not None, "a computed index along a labelled dimension is frozen by its rule"
    data = data.cpu()
    if data.dtype in (torch.bool, torch.uint8):
        data = data.nonzero().flatten()
    if target is not None and data.dim() == 1:
        data = data[r.positions(target, out)]
    places = table[data % size]
    return r.constant(places if target is not None else places[places >= 0])


@handles("index_select", "select", "narrow", "roll", "flip", "channel_shuffle", "native_channel_shuffle")
def along_one_dim(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """Index maps along one dimension: the op is run on the dimension's indices and becomes a gather among the kept."""
    source, target = r.result(node.args[0]), r.result(node)
    name = function_name(node)
    ndim = len(r.before(source))
    dims: Any = argument(node, 1, "dim", 0)
    if name == "roll":
        dims = argument(node, 2, "dims")
    elif "shuffle" in name:
        dims = 1
    elif name == "flip":
        return None  # what is kept, reversed, is what is kept of the reversed
    dims = [d % ndim for d in (dims if isinstance(dims, tuple | list) else [dims])]
    shrunk = [d for d in dims if any(d in c.dims for c in r.cuts(source))]
    if not shrunk:
        return None
    dim = shrunk[0]
    size = r.before(source)[dim]
    if name == "select":
        index = argument(node, 2, "index")
        value = index if isinstance(index, int) else r.capture.results[index]
        return with_argument(r, node, 2, "index", int(place(r, source, dim)[value % size]))
    order = original_order(r, node, name, size, dims.index(dim))
    if name == "narrow":
        chosen = place(r, source, dim)[order]
        run = run_of(chosen[chosen >= 0])
        assert run is not None, "what is kept of a run is a run among the kept"
        return r.graph.call_method("narrow", (r.new[node.args[0]], dim, run.start, run.stop - run.start))  # type: ignore[index]
    positions = picked(r, source, target, dim, dim, order)
    made = r.gather(node.args[0], dim, positions)  # type: ignore[arg-type]
    if made is r.new[node.args[0]]:  # type: ignore[index]
        made = r.graph.call_method("clone", (made,))  # as these ops return one: either may be written to
    others = [i for i, d in enumerate(dims) if d != dim]
    if name == "roll" and others:
        shifts = argument(node, 1, "shifts")
        rest = tuple(r.argument(shifts[i]) for i in others)
        return r.graph.call_method("roll", (made, rest, tuple(dims[i] for i in others)))
    return made


def original_order(r: Rewriter, node: fx.Node, name: str, size: int, which: int) -> Tensor:
    """Source index of every result index, in the original program."""
    indices = torch.arange(size)
    if name == "roll":
        shifts = argument(node, 1, "shifts")
        shift = shifts[which] if isinstance(shifts, tuple | list) else shifts
        return indices.roll(r.capture.results[shift] if isinstance(shift, fx.Node) else shift)
    if name == "narrow":
        start, length = (
            r.capture.results[a] if isinstance(a, fx.Node) else a
            for a in (argument(node, 2, "start"), argument(node, 3, "length"))
        )
        return indices.narrow(0, start, length)
    if name == "index_select":
        data = r.capture.tape.values[r.result(argument(node, 2, "index")).id].data
        assert data is not None
        return data.cpu()
    groups = argument(node, 1, "groups")
    return indices.view(groups, -1).t().reshape(-1)


@handles("pad", "constant_pad_nd")
def pad(r: Rewriter, node: fx.Node) -> fx.Node | None:
    amounts = list(argument(node, 1, "pad"))
    source, target = r.result(node.args[0]), r.result(node)
    ndim = len(r.before(source))
    for i in range(0, len(amounts), 2):
        dim = ndim - 1 - i // 2
        left = amounts[i] if isinstance(amounts[i], int) else r.capture.results[amounts[i]]
        if not any(dim in c.dims for c in [*r.cuts(source), *r.cuts(target)]):
            amounts[i], amounts[i + 1] = r.argument(amounts[i]), r.argument(amounts[i + 1])
            continue
        kept = r.positions(target, dim)
        before = int((kept < left).sum()) if left > 0 else -int((r.positions(source, dim) < -left).sum())
        amounts[i], amounts[i + 1] = before, len(kept) - r.after(source)[dim] - before
    return with_argument(r, node, 1, "pad", amounts)


@handles("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def normalized_shape(r: Rewriter, node: fx.Node) -> fx.Node | None:
    given = argument(node, 1, "normalized_shape")
    given = list(given) if isinstance(given, tuple | list) else [given]
    wanted = r.after(r.result(node.args[0]))[-len(given) :]
    return with_argument(r, node, 1, "normalized_shape", tuple(resized(r, given, wanted)))


def groups_left(r: Rewriter, ref: Ref, dim: int, groups: int) -> int:
    """How many of the groups of a dimension keep any entry."""
    kept = r.positions(ref, dim)
    return len(torch.unique(kept // (r.before(ref)[dim] // groups)))


@handles("group_norm")
def group_norm(r: Rewriter, node: fx.Node) -> fx.Node | None:
    given = argument(node, 1, "num_groups")
    return with_argument(r, node, 1, "num_groups", r.size(given, groups_left(r, r.result(node.args[0]), 1, r.number_of(given))))


def channel_dim(r: Rewriter, node: fx.Node) -> int:
    """The channel dimension of a convolution's input, which may come without a batch."""
    return len(r.before(r.result(node.args[0]))) - len(r.before(r.result(argument(node, 1, "weight")))) + 1


@handles("native_group_norm")
def native_group_norm(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """(x, weight, bias, N, C, positions, groups, eps)"""
    source = r.result(node.args[0])
    args = [r.argument(a) for a in node.args]
    args[4] = r.size(node.args[4], r.after(source)[1])
    args[6] = r.size(node.args[6], groups_left(r, source, 1, r.number_of(node.args[6])))
    return r.emit(node, args, r.argument(dict(node.kwargs)))


@handles("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def conv_groups(r: Rewriter, node: fx.Node) -> fx.Node | None:
    at = 8 if function_name(node) == "convolution" else 6
    given = argument(node, at, "groups", 1)
    groups = r.number_of(given)
    if groups == 1:
        return None
    left = groups_left(r, r.result(node.args[0]), channel_dim(r, node), groups)
    return with_argument(r, node, at, "groups", r.size(given, left))


@handles("_grouped_mm", "grouped_mm")
def grouped_product(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The kernel takes rows of multiples of 16 bytes: what is left of others is padded."""
    return r.graph.call_function(in_whole_lines, r.argument(tuple(node.args)), r.argument(dict(node.kwargs)))


LINE = 16  # bytes


def in_whole_lines(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch._grouped_mm` of operands of any width: zeros fill them up where they are cut to another one."""
    step = LINE // a.element_size()
    rows, columns = -b.shape[-2] % step, -b.shape[-1] % step
    if rows or columns:
        a, b, wide = F.pad(a, (0, rows)), F.pad(b, (0, columns, 0, rows)), b.shape[-1]
        return torch._grouped_mm(a, b, *args, **kwargs)[..., :wide]
    return torch._grouped_mm(a, b, *args, **kwargs)


@handles("as_strided")
def as_strided(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """Followed only where every element stays at its place, in one of the two usual orders."""
    after, before = r.after(r.result(node)), r.before(r.result(node))
    given, strides = list(argument(node, 1, "size")), tuple(argument(node, 2, "stride"))
    plain = strides == torch.empty(before, device="meta").stride()
    order = torch.contiguous_format if plain else torch.channels_last
    now = torch.empty(after, device="meta").to(memory_format=order).stride()
    return r.emit(node, (r.new[node.args[0]], tuple(resized(r, given, after)), now), {})  # type: ignore[index]


@handles(*(f"_scaled_dot_product_{kind}" for kind in FUSED_ATTENTION))
def fused_attention_scale(r: Rewriter, node: fx.Node) -> fx.Node | None:
    width = r.before(r.result(node.args[0]))[-1]
    if r.after(r.result(node.args[0]))[-1] == width or node.kwargs.get("scale") is not None:
        return None
    return r.emit(node, r.argument(tuple(node.args)), {**r.argument(dict(node.kwargs)), "scale": width**-0.5})


@handles("scaled_dot_product_attention")
def attention_scale(r: Rewriter, node: fx.Node) -> fx.Node | None:
    """The default scale comes from the width of a head: where that shrinks, the original one is written out."""
    query = r.result(node.args[0] if node.args else node.kwargs["query"])
    width = r.before(query)[-1]
    if r.after(query)[-1] == width or argument(node, 6, "scale") is not None:
        return None
    return with_argument(r, node, 6, "scale", width**-0.5)
