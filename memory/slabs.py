"""Host memory for what activation offload stores: in slabs of a power of two bytes, since pinned allocations are rounded up to one."""

import torch

from memory.masters import aligned
from memory.streams import Lane, pinning
from memory.timeline import pinned_bytes

MAX_SLAB_BYTES = 2**31


class Packing:
    """Where in which slab each tensor goes: the first slab with room, or one more."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.sizes: list[int] = []
        """Of the slabs, in bytes."""
        self._used: list[int] = []

    def place(self, num_bytes: int) -> tuple[int, int]:
        """(slab, first byte in it). A new slab has room for one such tensor of every block, up to `MAX_SLAB_BYTES`."""
        for slab, (size, used) in enumerate(zip(self.sizes, self._used, strict=True)):
            if used + num_bytes <= size:
                break
        else:
            slab = len(self.sizes)
            self.sizes.append(pinned_bytes(max(num_bytes, min(num_bytes * self.num_blocks, MAX_SLAB_BYTES))))
            self._used.append(0)
        start = self._used[slab]
        self._used[slab] += num_bytes
        return slab, start


class HostBuffer:
    """A piece of host memory and the events of the last copy into and out of it."""

    def __init__(self, flat: torch.Tensor, lane: Lane):
        self.flat = flat
        self.stored, self.loaded = lane.new_event(), lane.new_event()


class Arena:
    """Buffers in slabs. What is given back serves the next request of its size."""

    def __init__(self, lane: Lane, num_blocks: int):
        self.lane, self.num_blocks = lane, num_blocks
        self.slabs: list[torch.Tensor] = []
        self._packing = Packing(num_blocks)
        self._free: dict[int, list[HostBuffer]] = {}

    def take(self, num_bytes: int) -> HostBuffer:
        """A buffer of at least `num_bytes`. Raises MemoryError."""
        num_bytes = aligned(num_bytes)
        if self._free.get(num_bytes):
            return self._free[num_bytes].pop()
        slab, start = self._packing.place(num_bytes)
        for size in self._packing.sizes[len(self.slabs) :]:
            with pinning():
                self.slabs.append(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.lane.device.type == "cuda"))
        return HostBuffer(self.slabs[slab][start : start + num_bytes], self.lane)

    def give_back(self, buffer: HostBuffer) -> None:
        self._free.setdefault(buffer.flat.numel(), []).append(buffer)
