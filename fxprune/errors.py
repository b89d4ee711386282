"""The one exception type: what went wrong, where, and how to mend it."""

from __future__ import annotations


class PruneError(Exception):
    """A request that cannot be carried out; nothing has been changed when it is raised.

    >>> print(PruneError("ratio must lie in [0, 1), not 1.5", fix="pass ratio=0.5"))
    ratio must lie in [0, 1), not 1.5
      fix: pass ratio=0.5

    Arguments:
        what: one clause that says what is wrong.
        where: the node, module or parameter it concerns, if there is one.
        fix: what the caller can do.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  at {where}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))
