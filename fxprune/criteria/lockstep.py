"""Forwards of several batches side by side, each stopped where it calls the next block: block by block for all batches.

Each forward runs in a thread of its own, one at a time, and waits at the call of a block until it is told the result. So what
is in memory of a forward is what Python holds there: what goes into one block, whatever the code around the blocks does.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from fxprune.passes.errors import PruneError

RUNNING = threading.local()


class BlockCall(NamedTuple):
    """The call of a block: its path, what it is given, and its own forward."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Callable[..., Any]

    def run(self) -> Any:
        return self.forward(*self.args, **self.kwargs)


class Closed(BaseException):
    """Ends a forward that nobody waits for."""


class PausedForward:
    """A forward that stops at each call of a block.

    Arguments:
        work: calls the model, whose blocks are `stopping`; it is run without gradients.

    Attributes:
        call: of the block where it has stopped; None before it is started and once it has ended.
        result: what `work` returned.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.call, self.result = work, None, None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.closing = False
        self.go, self.stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=contextvars.copy_context().run, args=(self.run,), daemon=True)

    call: BlockCall | None

    def advance(self, answer: Any = None) -> BlockCall | None:
        """Go on to the next call of a block, with the result of the last one; raises what the forward raises."""
        self.answer, self.call = answer, None
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.go.release()
        self.stopped.acquire()
        if self.error is not None:
            raise self.error
        return self.call

    def close(self) -> None:
        if self.thread.is_alive():
            self.closing = True
            self.go.release()
            self.thread.join()

    def run(self) -> None:
        RUNNING.forward = self
        try:
            with torch.no_grad(), BaseTorchFunctionMode():
                self.result = self.work()
        except Closed:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.stopped.release()

    def stop(self, call: BlockCall) -> Any:
        """In the thread of the forward: wait until the result of a block is known."""
        self.call = call
        del call
        self.stopped.release()
        self.go.acquire()
        if self.closing:
            raise Closed
        answer, self.answer = self.answer, None
        return answer


@contextlib.contextmanager
def stopping(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Have the forwards of a model stop at the calls of these modules."""
    before: list[tuple[dict[str, Any], Any]] = []
    for path in paths:
        held = vars(model.get_submodule(path))
        before.append((held, held.get("forward")))
        held["forward"] = stopped(path, model.get_submodule(path).forward)
    try:
        yield
    finally:
        for held, forward in reversed(before):
            del held["forward"]
            if forward is not None:
                held["forward"] = forward


def stopped(path: str, run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        paused = getattr(RUNNING, "forward", None)
        return run(*args, **kwargs) if paused is None else paused.stop(BlockCall(path, args, kwargs, run))

    return forward


class Lockstep:
    """Forwards that go from block to block together.

    Arguments:
        paths: of the blocks, in their order.
        works: of the forwards, as for `PausedForward`.

    Attributes:
        forwards: each with its result in the end.
    """

    def __init__(self, paths: Sequence[str], works: Sequence[Callable[[], Any]]) -> None:
        self.order = {path: i for i, path in enumerate(paths)}
        self.forwards = [PausedForward(work) for work in works]

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *error: object) -> None:
        for forward in self.forwards:
            forward.close()

    def stages(self) -> Iterator[tuple[str, list[int]]]:
        """The path of each block that is called, with the numbers of the forwards that wait there, which are to be answered.

        A forward that calls others of the blocks waits until the rest has come as far.
        """
        for forward in self.forwards:
            forward.advance()
        while waiting := [(self.order[f.call.path], i) for i, f in enumerate(self.forwards) if f.call is not None]:
            first = min(waiting)[0]
            at = [i for place, i in waiting if place == first]
            call = self.call(at[0])
            yield call.path, at
            if any(self.forwards[i].call is call for i in at):
                raise RuntimeError("a forward was not told the result of a block")

    def call(self, number: int) -> BlockCall:
        call = self.forwards[number].call
        assert call is not None
        return call

    def answer(self, number: int, result: Any) -> None:
        """Go on with the result of the block that a forward waits for."""
        self.forwards[number].advance(result)


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords for a model that can keep what attention has computed, for later tokens: here there are none."""
    return {**kwargs, "use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else kwargs


def no_blocks(model: nn.Module, what: str, fix: str) -> PruneError:
    text = f"{what} goes block by block, and {type(model).__name__} has no list of blocks"
    return PruneError(f"{text}: modules of one class, with layers of their own, in a ModuleList or a Sequential", fix=fix)
