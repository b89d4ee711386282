"""Opaque modules: one node of the graph, run under the recorder, rewritten by changing what their forward reads.

The tensors inside are cut like any others. Integer attributes are what sizes in Python code come from: standard layers have
a table; for other modules the attributes whose change makes the module's own calls come out right are those that stood, as
integers, for a labelled dimension that shrank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxprune.passes.attributes import changed_attributes
from fxprune.passes.tape import Ref, collect

if TYPE_CHECKING:
    from fxprune.passes.rewrite import Rewriter


def opaque_attributes(r: Rewriter, path: str) -> dict[str, dict[str, Any]]:
    """Attribute edits by module path for everything inside an opaque module."""
    edits: dict[str, dict[str, Any]] = {}
    for call in r.capture.calls.get(path, ()):
        module = r.capture.root.get_submodule(call.module)
        refs = collect(call.args, Ref)
        before, after = [r.before(x) for x in refs], [r.after(x) for x in refs]
        edits.setdefault(call.module, {}).update(changed_attributes(module, before, after, r.shapes_of(call.module)))
    return edits
