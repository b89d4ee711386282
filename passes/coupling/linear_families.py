"""Linear families: channels that meet nothing but linear maps, sums and norms, so that they can be rotated among themselves.

Every op that touches a family is tried on random values (`equivariance`). If all commute with rotations, then rotating the
dimensions of parameters that carry the family rotates every value that carries it, and changes no output, by induction over the
ops. Two kinds of op do not commute and can be put out of the way first, by a change of parameters: a *scale* for each channel
(the gain of a norm, batch norm in evaluation, a layer scale) goes into the layers behind it, if these are all that reads it, or
into those before it, if these are all it reads; and the centring of a LayerNorm goes into all that is added to its stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fxprune.passes.coupling.families import Family
from fxprune.passes.coupling.family_walk import FamilyWalk, TracedUses
from fxprune.passes.coupling.linear_family import Key, LinearFamily, Member, NotLinear, Scale, Space
from fxprune.passes.coupling.solution import Solution


class Folding:
    """Where the scales of a family go, so that nothing is left that does not commute with rotations.

    Arguments:
        walk: what the calls of the program do to the family.
    """

    def __init__(self, walk: FamilyWalk) -> None:
        self.walk = walk
        self.found_spaces: dict[Key, Space] = {}

    def space(self, key: Key) -> Space:
        return self.found_spaces.setdefault(self.walk.spaces.find(key)[0], Space())

    def solve(self) -> LinearFamily:
        values = self.walk.trace.values
        held = {self.walk.spaces.find(key)[0] for key in self.walk.gains}
        names = {name for scale in self.walk.scales for name in scale.tensors.values()}
        for key in list(self.walk.spaces.parent):
            root, sign = self.walk.spaces.find(key)
            if root in held and values[key[0]].from_input:
                raise NotLinear("is scaled by what is also added to it")
            if values[key[0]].name is not None and root not in held:
                self.space(key).leaves.append((key, sign))
                if values[key[0]].name in names:
                    raise NotLinear(f"is scaled by {values[key[0]].name}, which is used elsewhere too")
        for key, where, by_weight in self.walk.exits:
            self.space(key).exits.append(where)
            self.space(key).mixes |= not by_weight
        self.attach_scales()
        while any(self.fold(scale) for scale in self.walk.scales):
            pass  # one that went may let another one go
        for scale in self.walk.scales:
            if scale.tensors and not self.gone(scale):
                raise NotLinear(f"is scaled by {scale.name} between sums, so that the scale can go into no layer")
        return self.result()

    def attach_scales(self) -> None:
        signs: dict[Key, set[int]] = {}
        for scale in self.walk.scales:
            for key, held in ((scale.source, self.space(scale.source).out), (scale.result, self.space(scale.result).into)):
                held.append(scale)
                root, sign = self.walk.spaces.find(key)
                signs.setdefault(root, set()).add(sign)
        for key in list(self.walk.spaces.parent):
            root, sign = self.walk.spaces.find(key)
            if root not in signs and self.walk.trace.values[key[0]].from_input:
                signs[root] = {sign}
        for root, both in signs.items():
            if len(both) > 1:
                raise NotLinear("is scaled on both sides of a product")
            some = self.space(root)
            some.leaves = [(key, sign * next(iter(both))) for key, sign in some.leaves]

    def gone(self, scale: Scale) -> str:
        """Whether a scale went `up` or `down` into tensors; empty if it did not."""
        down = "down" if self.space(scale.result).through is scale else ""
        return "up" if self.space(scale.source).through is scale else down

    def fold(self, scale: Scale) -> bool:
        """Put a scale into the layers before it, or into those behind it; whether that was done just now."""
        left, right = self.space(scale.source), self.space(scale.result)
        if not scale.tensors or self.gone(scale) or left is right:
            return False
        writes_only = not left.exits and all(sign > 0 for _, sign in left.leaves)
        fed = all(self.gone(s) == "up" for s in left.into)
        if not scale.norms and left.out == [scale] and writes_only and fed and left.through is None:
            left.through = scale
            return True
        reads_only = not right.mixes and all(sign < 0 for _, sign in right.leaves)
        if right.into == [scale] and reads_only and all(self.gone(s) == "down" for s in right.out) and right.through is None:
            right.through = scale
            return True
        return False

    def chain(self, some: Space) -> tuple[Scale, ...]:
        """The scales that go into the tensors of a space, from the nearest one on."""
        scale, found = some.through, list[Scale]()
        while scale is not None:
            found.append(scale)
            after = self.space(scale.result if self.gone(scale) == "up" else scale.source)
            scale = after.through
        return tuple(found)

    def centred(self, some: Space) -> bool:
        """Whether what is in a space, or becomes part of one by scales alone, has its mean taken away wherever it is read."""
        if some.through is not None and self.gone(some.through) == "up":
            return self.centred(self.space(some.through.result))
        if not any(scale.kind == "centred norm" for scale in some.out):
            return False
        other = next((s.name for s in some.out if s.kind != "centred norm"), None) or next(iter(some.exits), None)
        if other is not None:
            raise NotLinear(f"is centred by a LayerNorm in one place, and read as it is by {other}")
        if not all(self.gone(s) == "up" or (s.kind == "centred norm" and not s.tensors) for s in some.into):
            raise NotLinear("is a sum of what is not centred")
        return True

    def result(self) -> LinearFamily:
        uses: dict[str, list[tuple[Key, Member]]] = {}
        for some in list(self.found_spaces.values()):
            scales, centred = self.chain(some), self.centred(some)
            for key, sign in some.leaves:
                name = str(self.walk.trace.values[key[0]].name)
                for carrier in self.walk.dims[key[0]]:
                    if len(carrier.dims) > 1:
                        raise NotLinear(f"is in several dimensions of {name}")
                    member = Member(name, carrier.dims[0], scales, centred, sign < 0, carrier.runs)
                    uses.setdefault(name, []).append((key, member))
        members: dict[tuple[str, int], Member] = {}
        untied: list[str] = []
        for name, found in uses.items():
            alike = len({treatment(m) for _, m in found}) == len({m.dim for _, m in found})
            for key, member in found:
                own = name if alike else self.own_name(name, key)
                untied += [own] if own != name and own not in untied else []
                made = replace(member, name=own)
                if treatment(members.setdefault((own, member.dim), made)) != treatment(made):
                    raise NotLinear(f"is in {name}, which is used several times in different places")
        normed = self.walk.norms or any(scale.norms for scale in self.walk.scales)
        return LinearFamily(
            self.walk.family,
            *self.walk.rows.shape,
            self.walk.whole,
            tuple(members.values()),
            tuple(self.walk.scales),
            normed,
            tuple(untied),
        )

    def own_name(self, name: str, key: Key) -> str:
        """The name under which one call reads a tied tensor."""
        node = self.walk.program.capture.node_at(self.walk.trace.ops[key[1]].node)
        path = str(node.target) if node is not None and node.op == "call_module" else ""
        found = [alias for alias in self.walk.program.aliases[name] if path and alias.rpartition(".")[0] == path]
        if not found:
            raise NotLinear(f"is in {name}, which is used several times in different places")
        return found[0]


def treatment(member: Member) -> object:
    """What is done to a member, for comparison."""
    return (
        member.dim,
        tuple(tuple(scale.tensors.values()) for scale in member.scales),
        member.centred,
        member.reads,
        member.runs,
    )


def linear_families(
    solution: Solution, found: Sequence[Family], aliases: Mapping[str, Sequence[str]], norms: frozenset[str]
) -> tuple[list[LinearFamily], dict[str, str]]:
    """The families that can be rotated, and for the others why not, by name; frozen ones are left out.

    Arguments: as for `TracedUses`; `found` are the families of the coupling.
    """
    program = TracedUses(solution, aliases, norms)
    linear: list[LinearFamily] = []
    reasons: dict[str, str] = {}
    for family in found:
        if family.kept_whole is not None:
            continue
        try:
            walk = FamilyWalk(program, family)
            walk.follow_all()
            linear.append(Folding(walk).solve())
        except NotLinear as error:
            reasons[family.name] = str(error)
    return linear, reasons
