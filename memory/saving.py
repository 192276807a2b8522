"""What becomes of the tensors that a block saves for backward.

Autograd applies only the innermost pair of `saved_tensors_hooks`. Two strategies want a say in the same block
(weights in a slot, activations on the host), so they are chained here: the inner one is asked first, and
what it does not want goes to the one around it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Packed(Protocol):
    """Stands in for a saved tensor until backward asks for it."""

    def unpack(self) -> torch.Tensor: ...


class _ThreadState(threading.local):
    # Per thread, because autograd recomputes a CUDA block on a thread of its own.
    def __init__(self):
        self.packers: tuple[Callable[[torch.Tensor], Packed | None], ...] = ()
        self.region: str | None = None
        self.notes: dict | None = None
        self.returns = False


_state = _ThreadState()


@contextmanager
def packing(packer: Callable[[torch.Tensor], Packed | None]) -> Iterator[None]:
    """Within: every tensor saved for backward is offered to `packer`, which returns a stand-in or None.

    A stand-in holds `values_of` the tensor, never the tensor.
    """
    outer = _state.packers
    try:
        _state.packers = (packer, *outer)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _state.packers = outer


def pack(tensor: torch.Tensor) -> Any:
    """The stand-in that the packers in force on this thread give for `tensor`, else its values."""
    for packer in _state.packers:
        packed = packer(tensor)
        if packed is not None:
            return packed
    return values_of(tensor)


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without its place in the graph, which is all that a stand-in may hold of it.

    An operator that saves its own output would otherwise be held by what it holds, out of the garbage collector's sight: a graph
    that no backward walks, as when memory runs out in forward, would never be freed.
    """
    return tensor.detach() if tensor.requires_grad else tensor


def unpack(packed: Any) -> torch.Tensor:
    """The tensor behind what `pack` returned."""
    return packed if isinstance(packed, torch.Tensor) else packed.unpack()


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *tensors):
        ctx.save_for_backward(*tensors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def keep(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """`x`, which requires a gradient, and what has `tensors` as its `saved_tensors` in backward: for a custom function that follows.

    A checkpointed block is recomputed until all is saved again. What an operator saves it may save after it has computed; kept
    by this, before: what needs nothing else in backward is not computed again.
    """
    x = _Keep.apply(x, *tensors)
    return x, x.grad_fn


@contextmanager
def checkpoint_region(name: str, notes: dict) -> Iterator[None]:
    """Mark this thread as inside a checkpointed block: `name` is "forward" or "recompute"; `notes` are those of the call."""
    outer = _state.region, _state.notes
    try:
        _state.region, _state.notes = name, notes
        yield
    finally:
        _state.region, _state.notes = outer


def current_region() -> str | None:
    """"forward" or "recompute" inside a checkpointed block, else None."""
    return _state.region


def current_notes() -> dict | None:
    """Inside a checkpointed block: what its forward wants its recomputation to know, for whoever has something. Else None."""
    return _state.notes


@contextmanager
def returning(returns: bool) -> Iterator[None]:
    """Within, `will_return` is true if `returns`, even where what runs now records no graph."""
    outer = _state.returns
    try:
        _state.returns = returns
        yield
    finally:
        _state.returns = outer


def will_return() -> bool:
    """Whether a backward over the blocks follows what runs now on this thread."""
    return _state.returns or torch.is_grad_enabled()
