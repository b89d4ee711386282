"""The tape: every dispatcher call of one run, with tensors replaced by numbered values.

Coupling reads the tape, not the model, so it can be repeated without running anything. Activations are not kept: a value
is its shape and dtype. Only the contents of small index tensors that do not depend on the inputs are stored.
"""

from __future__ import annotations


class TensorRef:
    """A tensor on the tape. A recorder makes one for each number, so that they compare by identity."""

    __slots__ = ("id",)

    def __init__(self, number: int) -> None:
        self.id = number

    def __repr__(self) -> str:
        return f"Ref({self.id})"
