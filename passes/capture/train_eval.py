"""Evaluation and training in one capture.

The reference for the two modes of a model is two captures, one in each mode (see `programs.py`). This is an optimisation of
it: the forward of a module that reads its mode (`self.training`) is captured in evaluation, and then once more in training,
as two branches of one graph. What follows continues from `select_by_mode` nodes. Where the two cannot be joined, the whole
model is captured a second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxprune.passes.capture.builder import RESHAPES, GraphBuilder
from fxprune.passes.capture.frames import COMPARED, Diverged, Frame, Repetition, branch, code, leaves
from fxprune.passes.capture.modules import form_of
from fxprune.passes.capture.proxy import PROXIES, Items, TensorProxy
from fxprune.passes.capture.rollback import ModuleState
from fxprune.passes.errors import ReadsMissing
from fxprune.passes.ir.module_tree import Apart, modes_in_training, walk
from fxprune.passes.ir.program import REGIONS, assigned, select_by_mode
from fxprune.passes.ir.pytree import TensorRef, attributes_of, like_dict, record

# Functions that are told the mode, or a fraction that depends on it, and couple the same channels in either.
TOLD = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, F.batch_norm}
TOLD |= {F.scaled_dot_product_attention, torch.dropout, torch.batch_norm, *REGIONS}


@dataclass(slots=True)
class Branch:
    """Numbers of the nodes of the two branches: evaluation from `begin`, training from `middle`, up to `end`.

    `alike`: whether they are known to do the same but for flags and fractions, and for what is done to single numbers.
    """

    begin: int
    middle: int
    end: int
    alike: bool


@dataclass(slots=True)
class Modes:
    """What a capture knows of the two modes.

    Attributes:
        trained: the mode of each module in training; None where only a second capture can tell.
        branches: the branches so far.
        in_training: whether a training branch is being captured.
        separate: whether the modes cannot be joined.
        trains_on_values: whether a forward reads values in training, in a run that has none.
        again: what ran a second time in training: the numbers of its first node and of the one behind it, and what comes out.
        alike: the forms of layers that were found to do the same in both modes (see `form_of`).
    """

    trained: dict[nn.Module, bool] | None
    branches: list[Branch] = field(default_factory=list)
    in_training: bool = False
    separate: bool = False
    trains_on_values: bool = False
    again: list[tuple[int, int, set[fx.Node]]] = field(default_factory=list)
    alike: set[Hashable] = field(default_factory=set)

    @classmethod
    def of(cls, root: nn.Module) -> Modes:
        return cls(None if root.training else modes_in_training(root))

    def forget(self, begin: int) -> None:
        """The nodes from the one with the number `begin` on are gone."""
        self.branches = [b for b in self.branches if b.end <= begin]
        self.again = [a for a in self.again if a[1] <= begin]

    def note(self, frame: Frame, end: int, out: list[Any]) -> None:
        """A call ran a second time; `out` are the leaves of what comes out, beside arguments that it has changed."""
        self.again.append((frame.begin, end, {v.node for v in (*out, *leaves(frame.given)) if type(v) in PROXIES}))

    def mixed(self, builder: GraphBuilder) -> bool:
        """Whether anything uses a tensor of what ran a second time that has not come out of it.

        What comes out are a result, attributes and arguments.
        """
        index, inside = builder.index, dict[int, list[tuple[int, set[fx.Node]]]]()
        for begin, end, out in self.again:
            for number in range(begin, end):
                inside.setdefault(number, []).append((end, out))
        used = ((index[node], n) for node in (builder.graph.nodes if inside else ()) for n in node.all_input_nodes)
        return any(
            at >= end and n not in out and type(builder.results.get(n)) is TensorRef and n.op != "get_attr"
            for at, n in used
            for end, out in inside.get(index[n], ())
        )

    @contextlib.contextmanager
    def training(self, modules: list[nn.Module]) -> Iterator[None]:
        """Put modules in the modes that they have in training."""
        assert self.trained is not None
        before = {m: vars(m)["training"] for m in modules}
        self.in_training = True
        try:
            for m in modules:
                vars(m)["training"] = self.trained.get(m, True)
            yield
        finally:
            self.in_training = False
            for m, mode in before.items():
                vars(m)["training"] = mode

    def apart(self, modules: Mapping[str, nn.Module]) -> Apart | None:
        """The modules that do not follow the root's mode; None where that is not known."""
        trained = self.trained
        if trained is None:
            return None
        evaluating = frozenset(path for path, m in modules.items() if not trained[m])
        return {False: frozenset(path for path, m in modules.items() if m.training), True: evaluating}

    def membership(self, graph: fx.Graph, index: dict[fx.Node, int]) -> dict[fx.Node, bool | None] | None:
        """For nodes of a branch the mode they belong to (`CapturedProgram.only`); None where what follows uses a branch.

        Parameters that a branch reads first are read in either mode.
        """
        only: dict[fx.Node, bool | None] = {}
        numbered = {index[node]: node for node in graph.nodes if node.op != "get_attr"} if self.branches else {}
        for both in self.branches:
            for at in range(both.begin, both.end):
                node = numbered.get(at)
                if node is not None:
                    mode = at >= both.middle
                    only[node] = mode if only.get(node, mode) == mode else None
        for node in graph.nodes if only else ():
            for mode in (False, True):
                if only.get(node, mode) == mode:
                    needed = [node.args[mode]] if node.target is select_by_mode else node.all_input_nodes
                    if any(only.get(n, mode) != mode for n in needed if isinstance(n, fx.Node)):
                        return None
        return only


def captured_in_both(builder: GraphBuilder, modes: Modes, frame: Frame, forward: Any, out: Any) -> Any:
    """The result of a forward that asked for its mode, good for both modes.

    Arguments:
        builder: which has just captured the forward in evaluation mode.
        frame: of that call.
        out: its result.
    """
    if modes.in_training:
        return out
    if modes.separate or frame.module.training or modes.trained is None:
        modes.separate = True
        return out
    inner = list(walk(frame.module))
    trains = any(modes.trained.get(m, True) for m in inner)  # else all of it is kept in evaluation
    if not trains or any(outer.asked for outer in builder.frames if outer is not frame):  # which is captured again itself
        return out
    with builder.paused():
        form = form_of(frame.module, frame.args, frame.kwargs)
    if form is not None and form in modes.alike:
        return out
    after = ModuleState(inner)
    if (told := repeated(builder, modes, frame, forward, out, after)) is not None:
        if not told and form is not None:
            modes.alike.add(form)
        return out
    middle, first_op, retry = len(builder.index), len(builder.recorder.op_trace.ops), builder.retry
    builder.retry = False
    try:
        with modes.training(inner):
            builder.forget_reads(frame.begin)  # those are the other branch's
            trained = forward(*frame.args, **frame.kwargs)
    except Exception as error:  # what training needs (targets, say) is not there
        trained = None
        modes.trains_on_values |= isinstance(error, ReadsMissing)
    finally:
        builder.retry = retry
    stored = after.take_back(builder.stored, builder.index, middle)
    before, then = [out, *(s[2] for s in stored)], [trained, *(s[3] for s in stored)]
    with builder.paused():
        found, same = joined(builder, modes, frame.begin, middle, first_op, before, then)
    for (attributes, name, value, _), chosen in zip(stored, found[1:], strict=True):
        if chosen is not value:
            attributes[name] = chosen
    modes.note(frame, len(builder.index), leaves(found))
    if same and form is not None:
        modes.alike.add(form)
    return found[0]


def same_in_training(builder: GraphBuilder, modes: Modes, root: Frame, forward: Any, out: Any) -> bool:
    """Whether a whole forward that asked for its mode does the same in training, but for flags and fractions, told so by now.

    It starts from what it found on its modules, as a second capture would, which is to tell where this does not.
    """
    state = builder.stored
    if modes.separate or modes.trained is None or any(map(state.numbers_changed, state.before)):
        return False
    state.put_back()
    return repeated(builder, modes, root, forward, out, ModuleState(())) is not None


def repeated(
    builder: GraphBuilder, modes: Modes, frame: Frame, forward: Any, out: Any, after: ModuleState
) -> dict[fx.Node, Any] | None:
    """The nodes of a forward that training only gives other flags or fractions, told so by now; None where it does more.

    Nothing is evaluated a second time: the forward is handed the nodes that it has created in evaluation. `after`: what that
    has left on its modules, which is put back.
    """
    nodes = branch(builder, frame.begin, len(builder.index))
    others = {assigned, *RESHAPES, *builder.evaluator.opaque}
    if any(n.target in others or n not in builder.values for n in nodes):
        return None
    guards, grad_modes, calls = list(builder.guards), list(builder.grad_modes), len(builder.module_calls)
    builder.repetition = again = Repetition(nodes)
    try:
        with modes.training(list(walk(frame.module))):
            builder.forget_reads(frame.begin)
            trained = forward(*frame.args, **frame.kwargs)
        if next(again.left, None) is not None or any(n.target not in TOLD for n in again.told):
            return None
    except (Diverged, Exception):
        return None
    finally:
        builder.repetition, builder.guards, builder.grad_modes = None, guards, grad_modes
        del builder.module_calls[calls:]
        stored = after.take_back(builder.stored, builder.index, frame.begin)
    before, then = leaves([out, *(s[2] for s in stored)]), leaves([trained, *(s[3] for s in stored)])
    if len(before) != len(then) or not all(map(identical, before, then)):
        return None
    modes.note(frame, len(builder.index), before)
    with builder.paused():
        for node, (args, kwargs) in again.told.items():
            tell_mode(builder, node, args, kwargs)
    return again.told


def identical(a: Any, b: Any) -> bool:
    """Whether two leaves of what a forward returns are one node, or equal."""
    if type(a) in PROXIES and type(b) in PROXIES:
        return a.node is b.node
    return a is b or (type(a) is type(b) and type(a) in COMPARED and str(a) == str(b))


def joined(
    builder: GraphBuilder, modes: Modes, begin: int, middle: int, first_op: int, out: Any, trained: Any
) -> tuple[Any, bool]:
    """What follows two branches continues from this: `out`, where they do the same, else a node that selects by mode.

    Also whether they do the same to the last flag. `first_op` is the number of the training branch's first dispatcher call.
    """
    end = len(builder.index)
    before, after = (leaves(out), leaves(trained))
    same = len(before) == len(after) and all(interchangeable(builder, a, b) for a, b in zip(before, after, strict=True))
    if not same:
        modes.separate = True
    told = told_apart(builder, begin, middle, end, out, trained) if same else {}
    if told is not None:
        builder.roll_back(middle, first_op)
        for node, (args, kwargs) in told.items():
            tell_mode(builder, node, args, kwargs)
        return out, same and not told
    alike = any(frame.plain for frame in builder.frames) and (
        code(builder, begin, middle, out, loosely=True) == code(builder, middle, end, trained, loosely=True)
    )
    selected = select(builder, out, trained)
    modes.branches.append(Branch(begin, middle, end, alike))
    return selected, False


def tell_mode(builder: GraphBuilder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give a node arguments of training that differ from those of evaluation in flags and fractions."""

    def chosen(now: Any, then: Any) -> Any:
        if type(now) in (bool, float) and (type(now), now) != (type(then), then):
            with builder.graph.inserting_before(node):
                made = builder.create_node("call_function", select_by_mode, (now, then), {})
            builder.results[made], builder.depends[made] = None, False  # a flag is no number that sizes are computed from
            return made
        if isinstance(now, tuple | list):
            return type(now)([chosen(a, b) for a, b in zip(now, then, strict=True)])
        return now

    node.args = chosen(node.args, args)
    node.kwargs = {name: chosen(value, kwargs[name]) for name, value in node.kwargs.items()}


def interchangeable(builder: GraphBuilder, a: Any, b: Any) -> bool:
    """Whether one can stand in for the other in what follows."""
    if type(a) is TensorProxy and type(b) is TensorProxy:
        if (a.value.shape, a.value.dtype, a.value.device) != (b.value.shape, b.value.dtype, b.value.device):
            return False
        fractions = a.value.is_floating_point() or a.value.is_complex()
        computed = builder.depends[a.node] or builder.depends[b.node]
        # others may be looked up by: what is known of their contents would be true of one mode alone
        return a.value.is_meta or (fractions and computed) or torch.equal(a.value, b.value)
    if type(a) in PROXIES or type(b) in PROXIES or type(a) is not type(b):
        return a is b
    return a is b or (type(a) in COMPARED and bool(a == b))


def select(builder: GraphBuilder, a: Any, b: Any) -> Any:
    """`a` with every tensor replaced by a node that stands for either."""
    if type(a) in PROXIES:
        return a if a.node is b.node else builder.create_proxy("call_function", select_by_mode, (a, b), {})
    if isinstance(a, Items):
        items = [select(builder, x, y) for x, y in zip(a, b, strict=True)]
        return Items.of(a.node, a.value, items) if isinstance(a.value, tuple) and hasattr(a.value, "_fields") else tuple(items)
    if type(a) in (tuple, list):
        return type(a)([select(builder, x, y) for x, y in zip(a, b, strict=True)])
    if isinstance(a, dict):
        return like_dict(a, {k: select(builder, v, b[k]) for k, v in a.items()})
    with attributes_of(a) as now, attributes_of(b) as then:
        return a if now is None or then is None else record(type(a), select(builder, now, then))


def told_apart(
    builder: GraphBuilder, begin: int, middle: int, end: int, out: Any, trained: Any
) -> dict[fx.Node, tuple[Any, Any]] | None:
    """The nodes of the evaluation branch that training gives other flags or fractions, with its arguments.

    None where the branches differ in anything else.
    """
    nodes, others = branch(builder, begin, middle), branch(builder, middle, end)
    if len(nodes) != len(others):
        return None
    now, then = code(builder, begin, middle, out), code(builder, middle, end, trained)
    if now == then:
        return {}
    told = [i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a != b]
    if any(i == len(nodes) or nodes[i].target not in TOLD for i in told):
        return None
    loose, other = (code(builder, *ends, loosely=True) for ends in ((begin, middle, out), (middle, end, trained)))
    twins = dict(zip(others, nodes, strict=True))
    if not len(loose) == len(other) == len(now) or any(loose[i] != other[i] for i in told):
        return None
    given = fx.node.map_arg([(others[i].args, others[i].kwargs) for i in told], lambda n: twins.get(n, n))
    return {nodes[i]: found for i, found in zip(told, given, strict=True)}
