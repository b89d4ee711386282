"""Programs module by module: each call of a module that was traced through becomes a call of that module again.

The captured program is flat. The recorded calls say which of its lines ran inside which module, what the module was given and
what it returned. Where all that a module's lines use comes in by its arguments or is its own, and all that others use of
them goes out by its result, its lines become a program of their own, and one line calls the module. Other lines stay where
the module was called.

A module in whose lines nothing was rewritten, those of modules that it calls included, keeps its own forward: on the pruned
tensors, it does what its lines say. Its program is not written down.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxprune.passes.capture.modules import own_call
from fxprune.passes.ir.module_tree import TreeNames
from fxprune.passes.ir.program import UNKNOWN, Built, ModelTensor, TracedCall
from fxprune.passes.ir.pytree import TensorRef, collect
from fxprune.passes.rewrite.call_structures import Steps, constructed, nodes_in, parts_of, reading
from fxprune.passes.rewrite.call_tree import Call, call_name, call_tree, touched_paths
from fxprune.passes.rewrite.guards import given_as_captured
from fxprune.passes.rewrite.programs import FlatProgram, Line, Name, Program, is_pure, names_in, renamed, without_dead

PLAIN = (bool, int, float, str, type(None))


class NotSeparable(Exception):
    """The lines of a module cannot be told apart from those around them."""


class Nesting:
    """One flat program, taken apart by its module calls.

    Arguments:
        flat: the program.
        results: what each captured node evaluated to.
        calls: of modules that were traced through.
        tree: the pruned module tree.
        inline: paths of modules whose lines stay where they are called.

    Attributes:
        found: for each path the programs of its calls.
        rewritten: paths of modules in which something was rewritten, but for modules in them that are called.
        around: for each path those of the modules that call it, and of those around them.
        shared: for each path the tensors of the root that its programs refer to.
        reads: for each line the names of those that it refers to.
    """

    def __init__(
        self,
        flat: FlatProgram,
        results: Mapping[fx.Node, Any],
        calls: Sequence[TracedCall],
        tree: TreeNames,
        inline: frozenset[str],
    ) -> None:
        self.flat, self.results, self.tree, self.inline = flat, results, tree, inline
        self.line_of = {line.name: line for line in flat.program.lines}
        self.position = {line.name: i for i, line in enumerate(flat.program.lines)}
        self.found: dict[str, list[Program]] = {}
        self.rewritten: set[str] = set()
        self.separated: set[Call] = set()
        self.around: dict[str, set[str]] = {}
        self.shared: dict[str, set[str]] = {}
        self.numbers: dict[str, bool] = {}
        self.signatures: dict[Any, inspect.Signature] = {}  # of forwards, by class
        self.top = call_tree(flat, calls)
        self.touched = touched_paths(self.top)
        self.users: dict[str, list[int]] = {}
        self.reads = {line.name: names_in(line) for line in flat.program.lines}
        for i, names in enumerate(self.reads.values()):
            for name in names:
                self.users.setdefault(name, []).append(i)
        self.handed: dict[str, list[tuple[Call, bool]]] = {}  # the calls that are given a line's value, or return it (True)

    def run(self) -> Program:
        """The program of the root; those of other modules are put into `found`."""
        self.note_handed(self.top)
        lines = self.emitted(self.top)
        return Program(tuple(without_dead(self.with_reads(lines, "", {}))))

    def note_handed(self, parent: Call) -> None:
        for call in parent.body:
            if isinstance(call, Call) and not call.emptied:
                for returned, x in ((False, (call.call.args, call.call.kwargs)), (True, call.call.out)):
                    for node in nodes_in(x):
                        named = self.flat.names.get(node)
                        if type(named) is Name:
                            self.handed.setdefault(named.name, []).append((call, returned))
                self.note_handed(call)

    # -- programs --------------------------------------------------------------------------------------------------------

    def emitted(self, parent: Call, above: tuple[str, ...] = ()) -> list[Line]:
        """The lines of a call, in which the calls that can be separated are one line each; `above` are the paths it is in."""
        lines: list[Line] = []
        for item in parent.body:
            if isinstance(item, Line):
                lines.append(item)
                continue
            path = item.call.path
            if path not in self.touched:
                with contextlib.suppress(NotSeparable):
                    produced = self.results_read(item, own := [*item.all_lines()])
                    self.check_sources(item, own)
                    lines += [*self.called(item, parent.call.path), *produced]
                    continue
            inner = self.emitted(item, (*above, path))
            try:
                produced = self.results_read(item, inner)
                program = self.program(item, inner)
                lines += [] if item.emptied else [*self.called(item, parent.call.path), *produced]
            except NotSeparable:
                lines += inner
                continue
            self.found.setdefault(path, []).append(program)
            self.around.setdefault(path, set()).update(above)
            self.separated.add(item)
            if self.is_touched(item):
                self.rewritten.add(path)
        return lines

    def is_touched(self, call: Call) -> bool:
        """Whether the rewrite changed a line of a call, but for those of modules in it that are called again."""
        return call.touched or any(self.is_touched(inner) for inner in call.calls() if inner not in self.separated)

    def results_read(self, call: Call, lines: list[Line]) -> list[Line]:
        """The lines by which others read a call's result; raises NotSeparable where they use more than that."""
        if call.call.path not in self.tree.modules or call.call.path in self.inline:
            raise NotSeparable
        inner = dict.fromkeys(line.name for line in lines)
        produced: list[Line] = []
        wanted = [n for n in inner if n in self.position and self.used_outside(n, call)]
        ways = {n: steps for n, steps in reversed(list(self.leaves(call.call.out))) if n in inner} if wanted else {}
        for name in wanted:
            if name in ways:
                produced += reading(name, Name(call_name(call)), ways[name])
            elif not self.is_known_outside(name, inner):
                raise NotSeparable
        return produced

    def check_sources(self, call: Call, lines: list[Line]) -> None:
        """Raise NotSeparable where a forward computes with what another call has stored on a module, and may not store now."""
        known = {line.name for line in lines}
        known.update(name for name, _ in self.leaves((call.call.args, call.call.kwargs)))
        for name in {name for line in lines for name in self.reads[line.name]} - known:
            line = self.line_of.get(name)
            if line is not None and line.op != "get_attr" and not self.is_number(name):
                raise NotSeparable

    def program(self, call: Call, lines: list[Line]) -> Program:
        """The program of a call; raises NotSeparable where it uses what is not its own, nor given to it."""
        path = call.call.path
        arguments, given = self.arguments(call, self.tree.modules[path])
        out = self.value(call.call.out)
        body = self.with_reads([*arguments, *lines, *constructed(out, Line("output", "output", "output"))], path, given)
        return Program(tuple(without_dead(body)))

    def used_outside(self, name: str, call: Call) -> bool:
        if any(not call.first <= i <= call.last for i in self.users.get(name, ())):
            return True
        for other, returned in self.handed.get(name, ()):
            within = call.first <= other.first and other.last <= call.last
            if not within or (other is call and not returned):
                return True
        return False

    def is_known_outside(self, name: str, inner: Collection[str]) -> bool:
        """Whether a line of a call is a number that can be written down outside of it."""
        if not self.is_number(name):
            return False
        return all(n not in inner or self.is_known_outside(n, inner) for n in self.reads[name])

    def called(self, call: Call, parent: str) -> list[Line]:
        """The line that calls a module, after those that make its arguments."""
        args = self.value((tuple(call.call.args), dict(call.call.kwargs)))
        returned = [n for n, steps in self.leaves(call.call.out) if steps == ()]  # the result is a tensor itself
        mine = [n for n in returned if call.first <= self.position.get(n, -1) <= call.last]
        return constructed(
            args, Line(mine[0] if mine else call_name(call), "call_module", call.call.path, meta={"module": parent})
        )

    def arguments(self, call: Call, module: nn.Module) -> tuple[list[Line], dict[str, Name]]:
        """The lines that read a module's arguments, and by name what lines of others are there."""
        traced = call.call
        owner = module if "forward" in vars(module) else type(module)
        signature = self.signatures.get(owner) or self.signatures.setdefault(owner, signature_of(module))
        bound = signature.bind(*traced.args, **traced.kwargs).arguments
        lines: list[Line] = []
        reads: list[Line] = []
        given: dict[str, Name] = {}
        fixed: list[tuple[Name, Any]] = []
        gone = self.flat.removed
        for parameter, (kind, default) in {p.name: (p.kind, p.default) for p in signature.parameters.values()}.items():
            plain = isinstance(default, PLAIN)
            if parameter not in bound and not plain:
                continue
            value = bound.get(parameter, default)
            star = "*" if kind is inspect.Parameter.VAR_POSITIONAL else "**" if kind is inspect.Parameter.VAR_KEYWORD else ""
            key = f"argument {parameter}"  # no other line is called so
            lines.append(Line(key, "placeholder", f"{star}{parameter}", (default,) if plain else ()))
            for steps, leaf in parts_of(value):
                name = f"{key}{''.join(f'.{k}' for _, k in steps)}"
                named = self.leaf_name(leaf)
                if star == "**" and len(steps) == 1 and isinstance(leaf, PLAIN):  # where it was None, it may be left out
                    reads.append(Line(name, "call_method", "get", (Name(key), steps[0][1])))
                elif steps:
                    reads += reading(name, Name(key), steps)
                if named is not None:
                    given.setdefault(named, Name(name))
                if isinstance(leaf, ModelTensor) or (leaf not in gone and isinstance(self.results.get(leaf), TensorRef)):
                    fixed.append((Name(name), ...))
                elif named is None and isinstance(leaf, PLAIN):
                    fixed.append((Name(name), leaf))
        if fixed:
            names, values = zip(*fixed, strict=True)
            why = f"{traced.path} was captured with other arguments"
            reads.append(Line("as captured", "call_function", given_as_captured, (names, values, why)))
        required = max((i for i, line in enumerate(lines) if not line.args and line.target[0] != "*"), default=-1)
        lines = [line._replace(args=()) if i < required else line for i, line in enumerate(lines)]  # defaults come last
        return [*lines, *reads], given

    def leaf_name(self, leaf: Any) -> str | None:
        """The line that stands for a leaf of a structure; None for a literal."""
        if isinstance(leaf, ModelTensor):
            return f"get_attr {leaf.name}"
        named = self.flat.names.get(leaf) if isinstance(leaf, fx.Node) else None
        if type(named) is not Name:
            return None
        line = self.line_of[named.name]
        return f"get_attr {line.target}" if line.op == "get_attr" else named.name

    def leaves(self, x: Any) -> Iterator[tuple[str, Steps]]:
        """The lines that a structure holds, and how they are read off it."""
        for steps, leaf in parts_of(x):
            name = self.leaf_name(leaf)
            if name is not None:
                yield name, steps

    def value(self, x: Any) -> Any:
        """A structure as an argument of a line; raises NotSeparable where a program cannot write it down."""
        if x is UNKNOWN:
            raise NotSeparable
        if isinstance(x, ModelTensor):
            return Name(f"get_attr {x.name}")
        if isinstance(x, fx.Node):
            name = self.leaf_name(x)
            if name is not None:
                return Name(name)
            if x in self.flat.removed:
                return None  # nothing uses it
            number = self.flat.names.get(x, self.results.get(x, UNKNOWN))
            if number is UNKNOWN or collect(number, TensorRef):
                raise NotSeparable
            return number
        if isinstance(x, Built):
            return Built(x.create, {k: self.value(v) for k, v in x.parts.items()}, x.by_position)
        if isinstance(x, tuple | list):
            return type(x)([self.value(v) for v in x])
        return {k: self.value(v) for k, v in x.items()} if isinstance(x, dict) else x

    def with_reads(self, lines: list[Line], path: str, given: Mapping[str, Name]) -> list[Line]:
        """Lines of one module, with arguments for what is outside, and reads of tensors and sizes before their first use."""
        known: dict[str, Name] = dict(given)
        made: list[Line] = []
        read = functools.partial(self.known_here, path, known, made)
        for line in lines:
            args, kwargs = renamed(line.args, read), renamed(line.kwargs, read) if line.kwargs else {}
            if line.op != "placeholder":
                target = self.tree.relative(line.target, path, module=True) if line.op == "call_module" else line.target
                if target is None:
                    raise NotSeparable
                line = Line(line.name, line.op, target, args, kwargs, line.meta)  # (`_replace` takes several times longer)
            made.append(line)
            if line.name not in known:
                known[line.name] = Name(line.name)
        return made

    def known_here(self, path: str, known: dict[str, Name], made: list[Line], name: str) -> Name:
        """What stands for a line in the program of the module at `path`, which is read there if it is not `known`."""
        found = known.get(name)
        if found is None:
            read = functools.partial(self.known_here, path, known, made)
            found = known[name] = self.read_here(name, path, read, made)
        return found

    def read_here(self, name: str, path: str, read: Callable[[str], Name], made: list[Line]) -> Name:
        """Write down a read of a tensor, or of a size, in the program of the module at `path`."""
        line = self.line_of.get(name)
        target = name.removeprefix("get_attr ") if line is None else line.target if line.op == "get_attr" else None
        if target is not None:
            key = f"get_attr {target}"
            if name != key:
                return read(key)
            local = self.tree.relative(str(target), path, module=False)
            if local is None and "." not in str(target):
                local = str(target)
                self.shared.setdefault(path, set()).add(local)  # a constant of the program
            if local is None:
                raise NotSeparable
            made.append(Line(key, "get_attr", local))
            return Name(key)
        if line is None or not self.is_number(name):
            raise NotSeparable
        made.append(line._replace(args=renamed(line.args, read), kwargs=renamed(line.kwargs, read)))
        return Name(name)

    def is_number(self, name: str) -> bool:
        """Whether a line reads a size, or computes with sizes alone: it can be written down wherever its sources are known."""
        if name not in self.numbers:
            line = self.line_of[name]
            reads = line.reads_size or (line.target is getattr and line.args[1] == "shape")
            sources = names_in(line)
            computes = is_pure(line) and bool(sources) and line.op != "get_attr" and all(map(self.is_number, sources))
            self.numbers[name] = reads or computes
        return self.numbers[name]


def signature_of(module: nn.Module) -> inspect.Signature:
    return inspect.signature(module.forward if own_call(type(module)) is None else module)
