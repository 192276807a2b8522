"""Which block a step is in: every walk over the blocks, forward and back, told by hooks on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from memory.timeline import Visit


@dataclass
class _Walk:
    number: int
    last_block: int = -1
    part: int = 0
    num_parts: int = 1
    backward: int | None = None
    """Number of the walk that goes back over this one."""


class Walks:
    """Calls `mark(visit, records_graph)` where a visit of one of `blocks` begins, and `mark(None)` where the last of a walk ends.

    Blocks run in the order given. `together`: several passes run in lockstep (memory.lockstep), one walk in parts.
    `hooks`: for the caller to remove.
    """

    def __init__(self, blocks: Sequence[nn.Module], mark: Callable[..., None], *, together: bool):
        self._num_blocks, self._mark, self._together = len(blocks), mark, together
        self._num_walks, self._last_visit = 0, None
        self._forward: _Walk | None = None
        self.hooks = [hook for index, block in enumerate(blocks) for hook in (
            block.register_forward_pre_hook(self._enter(index)), block.register_forward_hook(self._leave(index)))]  # fmt: skip

    def _enter(self, index: int) -> Callable:
        def hook(module, args):
            again = self._together and self._forward is not None and index == self._forward.last_block
            if self._forward is None or (index <= self._forward.last_block and not again):
                self._forward = self._new_walk()
            walk = self._forward
            walk.last_block, walk.part = index, walk.part + 1 if again else 0
            walk.num_parts = max(walk.num_parts, walk.part + 1)
            self._begin(Visit(walk.number, index, walk.part), torch.is_grad_enabled())

        return hook

    def _leave(self, index: int) -> Callable:
        def hook(module, args, outputs):
            walk, part = self._forward, self._forward.part
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.register_hook(lambda grad: self._enter_backward(walk, index, part))
            if index == self._num_blocks - 1 and part + 1 == walk.num_parts:
                self._end()
                self._forward = None

        return hook

    def _enter_backward(self, walk: _Walk, index: int, part: int) -> None:
        """Backward has reached this block: it runs what made one of its outputs."""
        if walk.backward is None:
            walk.backward = self._new_walk().number
        visit = Visit(walk.backward, index, part)
        if self._last_visit != visit:
            self._begin(visit, True)
            if index == 0:  # what follows backward is no part of its last block
                torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _begin(self, visit: Visit, records_graph: bool) -> None:
        self._last_visit = visit
        self._mark(visit, records_graph)

    def _end(self) -> None:
        self._last_visit = None
        self._mark(None)

    def _new_walk(self) -> _Walk:
        self._num_walks += 1
        return _Walk(self._num_walks - 1)
