"""Stream frozen blocks from host memory to the device, ahead of use.

Frozen weights never change, so nothing is copied back: a block is one copy from its master (one flat, pinned host
buffer) into one of a few device slots that are allocated once. While block i computes, the slot that block i - 1
has left is filled with the block that comes next: i + 1 on the way forward, i - 1 on the way back. Around the turn nothing
needs loading, since the last blocks forward are the first ones backward.

A parameter points at its master, and `state_dict` is readable at any time. While a block runs, its modules hold the slot's
parameters in place of their own: what autograd saves must go on meaning the slot when the block is through, so that one
Parameter cannot point there and back. Trainable parameters and buffers live on the device and never move.

Why a slot cannot be overwritten too early: backward may need a weight long after forward, but it never reads an old slot.
A checkpointed block fetches its weights again when it recomputes, and what recomputation saved is used before backward
reaches another block (autograd runs the nodes of later blocks first). A block that is not checkpointed
saves a reference (block, offset) in place of the weight, and fetches it when backward asks.

On the CPU the same code runs with plain copies: slots are real buffers, different from the masters.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from memory.handle import Handle
from memory.masters import Entry, Master
from memory.patching import replace_forward, require_modules
from memory.plan import resident_indices
from memory.saving import current_region, packing, will_return
from memory.streams import Lane, resolve_device


class _Slot:
    """A device buffer that holds one block at a time."""

    def __init__(self, num_bytes: int, lane: Lane):
        self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=lane.device)
        self.loaded = lane.new_event()
        self.block: int | None = None
        self._parameters: dict[int, list[nn.Parameter]] = {}

    def parameters(self, master: Master) -> list[nn.Parameter]:
        # Blocks are alike, so these are made once. By number, since a layout is long to compare.
        if master.kind not in self._parameters:
            with torch.inference_mode(False):  # later passes may record a graph
                self._parameters[master.kind] = [nn.Parameter(entry.view(self.flat), requires_grad=False) for entry in master.layout]
        return self._parameters[master.kind]


class _Ring:
    """The slots, and which block is in which."""

    def __init__(self, num_blocks: int, device: torch.device):
        self.masters: dict[int, Master] = {}
        self.slots: list[_Slot] = []
        self.num_blocks, self.lane = num_blocks, Lane(device)
        self.num_loads = self.num_late_loads = self.bytes_loaded = 0

    def allocate(self, num_slots: int) -> None:
        kinds: dict[tuple[Entry, ...], int] = {}
        for master in self.masters.values():
            master.kind = kinds.setdefault(master.layout, len(kinds))
        size = max((master.num_bytes for master in self.masters.values()), default=0)
        self.slots = [_Slot(size, self.lane) for _ in range(min(num_slots, len(self.masters)))]

    def clear(self) -> None:
        # A load ahead of use may be under way, and must not write into memory that is something else by then.
        for slot in self.slots:
            self.lane.join(slot.loaded)
        self.masters, self.slots = {}, []

    def __del__(self):
        if not sys.is_finalizing():
            self.clear()

    def acquire(self, index: int, way: str) -> _Slot | None:
        """Get block `index` onto the device for the compute stream, and send for the blocks that come next.

        `way` is "forward" (no backward follows), "turn" (forward, backward follows) or "backward".
        Returns the slot, or None if the block is resident.
        """
        wanted = self._next_streamed(index, way)
        present = {slot.block: slot for slot in self.slots}
        if index in self.masters and index not in present:
            self.num_late_loads += 1
        free = [slot for slot in self.slots if slot.block not in wanted]
        for block in wanted:
            if block not in present:
                # Whatever used this slot was given to the compute stream before now, and the lane waits for that.
                slot, master = free.pop(), self.masters[block]
                slot.block = None  # should the copy be interrupted, it holds neither
                self.lane.copy(master.copies(slot.flat), slot.loaded)
                slot.block = block
                present[block] = slot
                self.num_loads += 1
                self.bytes_loaded += master.num_bytes
        if index not in self.masters:
            return None
        self.lane.join(present[index].loaded)
        return present[index]

    def _next_streamed(self, index: int, way: str) -> list[int]:
        """The streamed blocks needed soonest from block `index` on, as many as there are slots."""
        wanted: list[int] = []
        for block in self._order(index, way):
            if block in self.masters and block not in wanted:
                wanted.append(block)
                if len(wanted) == len(self.slots):
                    break
        return wanted

    def _order(self, index: int, way: str) -> Iterator[int]:
        if way == "backward":
            yield from range(index, -1, -1)
            yield from range(self.num_blocks)  # the next pass starts at the front
        else:
            yield from range(index, self.num_blocks)
            yield from range(self.num_blocks - 1, -1, -1) if way == "turn" else range(self.num_blocks)


@dataclasses.dataclass(frozen=True)
class _WeightReference:
    """What a streamed block that is not checkpointed saves in place of a weight: where to find it again."""

    ring: _Ring
    block: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements

    def unpack(self) -> torch.Tensor:
        slot = self.ring.acquire(self.block, "backward")
        if slot is None:
            raise RuntimeError(f"backward needs a weight of block {self.block}, but its offload was undone meanwhile")
        return slot.flat.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


class Offload(Handle):
    """Handle of `offload_blocks`: counters, buffers, undo."""

    def __init__(self, ring: _Ring):
        super().__init__()
        self._ring = ring
        self._undos.append(ring.clear)

    num_loads = property(lambda self: self._ring.num_loads, doc="Blocks copied to the device so far.")
    num_late_loads = property(
        lambda self: self._ring.num_late_loads, doc="Loads that were issued only when the block was needed."
    )
    bytes_loaded = property(lambda self: self._ring.bytes_loaded, doc="Bytes copied to the device so far.")
    streamed = property(lambda self: frozenset(self._ring.masters), doc="Indices of the streamed blocks.")
    host_buffers = property(lambda self: [m.flat for m in self._ring.masters.values() if m.flat is not None],
                            doc="Masters, one a block, if weights were gathered.")
    device_buffers = property(lambda self: [s.flat for s in self._ring.slots], doc="Slots of the ring.")
    lanes = property(lambda self: [self._ring.lane], doc="What weights are copied on.")


def offload_blocks(
    blocks: Sequence[nn.Module],
    *,
    device: torch.device | str,
    num_resident: int | None = 0,
    num_buffers: int = 2,
    gathered: bool = True,
) -> Offload:
    """Stream the frozen parameters of `blocks` to `device`, `num_resident` blocks excepted.

    Blocks run in the order given. `num_buffers` slots of one block each are allocated on the device. `gathered`: a block's weights
    lie in one pinned buffer, from where copies run beside the computation. Otherwise they are read from where they are, such as
    a file that is mapped into memory: slower, and for passes so few that pinning would take longer.
    While it is applied, streamed weights must not be changed: copies on the device would not follow. Loading, casting and moving them
    is refused.
    Masters are built block by block, so the model may be larger than the device. Parameters that are trainable
    now, buffers and resident blocks move to the device. Checkpointing, if any, goes on top of this.
    Raises ValueError for no blocks, meta tensors, a parameter that two blocks share, fewer than two buffers,
    or blocks without frozen parameters; PlanError for more resident blocks than there are; RuntimeError if applied already.
    """
    blocks = require_modules(blocks, "block offload")
    device = resolve_device(device)
    if num_buffers < 2:
        raise ValueError(f"num_buffers is {num_buffers}; at least 2, so that one loads while the other computes")
    resident = resident_indices(len(blocks), num_resident)
    frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
    _check(blocks, frozen, resident)

    ring = _Ring(len(blocks), device)
    handle = Offload(ring)
    try:
        for index, block in enumerate(blocks):
            streamed = [] if index in resident else frozen[index]
            if streamed:
                ring.masters[index] = Master(block, streamed, gathered=gathered, pin=device.type == "cuda")
                handle._undos.append(ring.masters[index].release)
                handle._undos.append(_refuse_changes(block, streamed))
            handle._undos.append(place(block, device, skip=streamed))
        ring.allocate(num_buffers)
        for index, block in enumerate(blocks):
            wrap = functools.partial(_streamed_forward, ring, index)
            handle._undos.append(replace_forward(block, "block offload", wrap))
    except BaseException:  # out of memory on either side: leave the model as it was
        handle.undo()
        raise
    return handle


def _refuse_changes(block: nn.Module, streamed: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Refuse to load, cast or move what streams, as `.to()` and layerwise casting would; returns the undo function."""
    held = {id(parameter) for parameter in streamed}
    names = [name for name, parameter in block.named_parameters(remove_duplicate=False) if id(parameter) in held]
    holders = [module for module in block.modules() if any(id(parameter) in held for parameter in module._parameters.values())]

    def load(module: nn.Module, state: dict, prefix: str, *_: object) -> None:
        if loaded := next((name for name in names if prefix + name in state), None):
            raise RuntimeError(f"{prefix + loaded} is streamed, and its copy on the device would stay as it is; undo() the offload first")

    def cast_or_move(*_: object, **__: object) -> None:
        raise RuntimeError("weights that are streamed cannot be cast or moved, their copies on the device would not follow; "
                           "do so before the offload, or undo() it first")

    hook = block.register_load_state_dict_pre_hook(load)
    for module in holders:
        module._apply = cast_or_move

    def undo() -> None:
        hook.remove()
        for module in holders:
            del module._apply

    return undo


def _check(blocks: list[nn.Module], frozen: list[list[nn.Parameter]], resident: frozenset[int]) -> None:
    owner: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if tensor.is_meta:
                raise ValueError(f"block {index}: {name} is on the meta device; load the weights before offloading")
        for parameter in frozen[index]:
            if owner.setdefault(id(parameter), index) != index:
                raise ValueError(
                    f"blocks {owner[id(parameter)]} and {index} share a frozen parameter of shape "
                    f"{tuple(parameter.shape)}; a shared parameter cannot be in two slots at once. Untie it first"
                )
        if not frozen[index] and index not in resident:
            raise ValueError(f"block {index} has no frozen parameters to stream; freeze it with requires_grad_(False)")


def place(module: nn.Module, device: torch.device, *, skip: Sequence[nn.Parameter] = ()):
    """Move parameters and buffers of `module` to `device`, except `skip`; returns the undo function.

    Parameter and buffer objects stay the same, only their data moves.
    """
    skipped = {id(parameter) for parameter in skip}
    moved = []

    def undo() -> None:
        for tensor, home in moved:
            tensor.data = tensor.data.to(home)

    try:
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) not in skipped and tensor.device != device:
                moved.append((tensor, tensor.device))
                tensor.data = tensor.data.to(device)
    except BaseException:  # out of memory: leave the module as it was
        undo()
        raise
    return undo


def _streamed_forward(ring: _Ring, index: int, inner):
    def forward(*args, **kwargs):
        region = current_region()
        way = "backward" if region == "recompute" else "turn" if will_return() else "forward"
        slot = ring.acquire(index, way)
        if slot is None:
            return inner(*args, **kwargs)
        master = ring.masters[index]
        saves = region is None and torch.is_grad_enabled()
        referring = packing(functools.partial(_refer_to_weight, ring, index, slot)) if saves else nullcontext()
        with master.seated(slot.parameters(master)), referring:
            return inner(*args, **kwargs)

    return forward


def _refer_to_weight(ring: _Ring, index: int, slot: _Slot, tensor: torch.Tensor) -> _WeightReference | None:
    # Compared by storage, not by address: fake tensors of the simulator have no address.
    if tensor.untyped_storage()._cdata != slot.flat.untyped_storage()._cdata:
        return None
    return _WeightReference(ring, index, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
