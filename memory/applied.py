"""What `memory.plan.apply_plan` returns. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from memory.handle import Handle

if TYPE_CHECKING:
    import torch

    from memory.plan import Keep, MemoryPlan


class AppliedPlan(Handle):
    """Handle of `apply_plan`: counters, buffers, undo. A narrowing of the dtype is undone in dtype, not in the lost bits."""

    def __init__(self, plan: MemoryPlan, keeps: tuple[Keep, ...]):
        super().__init__()
        self.plan, self.keeps = plan, keeps
        self.offload = self.checkpointing = self.activations = None
        self.lockstep = None
        """Runs several passes together (memory.lockstep), where the plan has them run so."""

    @property
    def num_recomputes(self) -> int:
        """Block recomputations so far."""
        return sum(self.checkpointing.num_recomputes) if self.checkpointing else 0

    @property
    def num_loads(self) -> int:
        """Blocks copied to the device so far."""
        return self.offload.num_loads if self.offload else 0

    @property
    def bytes_streamed(self) -> int:
        """Weight bytes copied to the device so far."""
        return self.offload.bytes_loaded if self.offload else 0

    @property
    def bytes_parked(self) -> int:
        """Activation bytes copied to the host so far; as many come back in backward."""
        return self.activations.bytes_stored if self.activations else 0

    @property
    def host_buffers(self) -> list[torch.Tensor]:
        """Flat byte buffers in host memory (pinned on a card): masters, and slabs of activations once a step has run."""
        return [buffer for part in (self.offload, self.activations) if part for buffer in part.host_buffers]

    @property
    def device_buffers(self) -> list[torch.Tensor]:
        """Flat byte buffers on the device that streamed blocks pass through."""
        return self.offload.device_buffers if self.offload else []

    def count_waits(self, waiting: Callable[[], AbstractContextManager]) -> None:
        """Enter `waiting()` wherever the computation waits for a copy of weights or activations."""
        for part in (self.offload, self.activations):
            for lane in part.lanes if part else ():
                lane.waiting = waiting

    def hooked(self) -> AbstractContextManager:
        """Within: hooks on every module inside of a block are called, which compiled blocks would pass over."""
        from memory.compiling import uncompiled

        return uncompiled() if self.plan.compile else nullcontext()
