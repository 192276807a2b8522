"""Keep activations in host memory between forward and backward.

Two things a block leaves for backward can wait on the host: its boundaries (the inputs that the block before it
computed, all that a fully checkpointed block keeps) and, on request, whatever else it keeps. What all blocks share (time
embedding, rotary tables) and the parameters stay.

Forward: a tensor is copied out while its block computes; its device memory is given up, once the compute stream has waited for the
copy, in the second block after the one that computed it, as tensors of that block come, as many bytes for as many, and at the latest
when that block ends. So what a block keeps has two blocks' time to arrive. Backward: when the first tensor of a block is asked for,
those of the block before it are sent for, so they arrive while this block recomputes. Either way the device holds what two blocks
keep. What the last two blocks compute stays there: backward needs it first. Where several passes walk together (`memory.lockstep`),
all of this goes by calls of blocks. Host memory comes from an arena that is filled in the
first step and used again in every later one.
"""

import functools
import inspect
import sys
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from memory.handle import Handle
from memory.masters import is_dense
from memory.patching import replace_forward, require_modules
from memory.saving import packing, values_of
from memory.slabs import Arena
from memory.streams import Lane, release_pinned, resolve_device


class _Parked:
    """One tensor in host memory: on its way there, waiting, or on its way back."""

    def __init__(self, parking: "ActivationOffload", group: "_Group", tensor: torch.Tensor, is_boundary: bool):
        self.parking, self.group, self.is_boundary = parking, group, is_boundary
        self.shape, self.stride, self.dtype, self.num_bytes = tensor.shape, tensor.stride(), tensor.dtype, tensor.nbytes
        self.tensor: torch.Tensor | None = values_of(tensor)
        self._version = tensor._version
        self.num_uses = 0
        self.is_loading = False
        self.arena = parking.arena
        self.buffer = self.arena.take(tensor.nbytes)
        # The buffer may be one that was read for an earlier backward: who gave it back has waited for that.
        parking.store_lane.copy([(self._host(), tensor)], self.buffer.stored)
        parking.bytes_stored += tensor.nbytes

    def _host(self) -> torch.Tensor:
        host = self.buffer.flat[: self.num_bytes].view(self.dtype)
        return host.as_strided(self.shape, self.stride, host.storage_offset())

    def forget_device_copy(self) -> None:
        """Forward is past this: after the copy out, the memory is free for the compute stream.

        Raises RuntimeError where something was written into the tensor meanwhile: the copy may have some of it.
        """
        if self.tensor is not None:
            _require_unchanged(self.tensor, self._version)
        self.parking.store_lane.join(self.buffer.stored)
        self.tensor = None

    def load(self) -> None:
        """Send for the tensor. Its memory is the compute stream's, which has waited for the copy out before."""
        if self.tensor is None and self.num_uses > 0:
            self.tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.parking.device)
            self.is_loading = True
            self.parking.load_lane.copy([(self.tensor, self._host())], self.buffer.loaded)
            self._version = self.tensor._version
            self.parking.bytes_loaded += self.tensor.nbytes

    def unpack(self) -> torch.Tensor:
        self.num_uses = max(self.num_uses, 1)  # a retained graph may ask once more
        if self.tensor is not None:
            _require_unchanged(self.tensor, self._version)
        self.load()
        self._arrive()
        self.group.send_for_previous()
        tensor = self.tensor
        self.num_uses -= 1
        if self.num_uses == 0:
            self.tensor = None  # autograd holds it from here on
        return tensor

    def _arrive(self) -> None:
        """Let compute wait for the copies that touch the device tensor, so that its memory can be used again after."""
        self.parking.store_lane.join(self.buffer.stored)
        if self.is_loading:
            self.parking.load_lane.join(self.buffer.loaded)
            self.is_loading = False

    def __del__(self):
        # The graph is gone, perhaps without a backward: a load under way must not outlive its memory.
        if hasattr(self, "buffer") and not sys.is_finalizing():
            self._arrive()
            self.arena.give_back(self.buffer)


class _Staying:
    """A tensor that stays on the device, since backward comes to its block first; the block before is sent for then."""

    def __init__(self, group: "_Group", tensor: torch.Tensor):
        self.group, self.tensor, self._version = group, values_of(tensor), tensor._version
        group.stays = True

    def unpack(self) -> torch.Tensor:
        _require_unchanged(self.tensor, self._version)
        self.group.send_for_previous()
        return self.tensor


class _Group:
    """What one call of one block parked."""

    def __init__(self, previous: "_Group | None"):
        # Weak, so that neither a group nor a tensor outlives the graph that saved it.
        while previous is not None and not previous.stays and not _alive(previous):
            previous = previous._previous()  # a block that keeps nothing is not in the way
        self._previous = weakref.ref(previous) if previous is not None else lambda: None
        self.stays = False
        """Whether something of it stays on the device."""
        self._has_sent = False
        self.parked: list[weakref.ref[_Parked]] = []
        self._by_tensor: dict[tuple, weakref.ref[_Parked]] = {}

    def park(self, parking: "ActivationOffload", tensor: torch.Tensor, is_boundary: bool) -> _Parked:
        """`tensor` on its way to the host; the same one if several operators save the same tensor."""
        source = tensor if is_dense(tensor) else tensor.contiguous()
        key = (*_identity(tensor), tensor.stride(), tensor._version)
        known = self._by_tensor.get(key)
        # An entry lives as long as its storage is held on the device, so the identity is not of a later tensor.
        parked = known() if known is not None else None
        if parked is None:
            parking.make_room(source.nbytes)
            parked = _Parked(parking, self, source, is_boundary)
            self.parked.append(weakref.ref(parked))
            if source is tensor:
                self._by_tensor[key] = self.parked[-1]
        parked.num_uses += 1
        return parked

    def send_for_previous(self) -> None:
        if not self._has_sent:
            self._has_sent = True
            for parked in _alive(self._previous()):
                parked.load()


def _alive(group: _Group | None) -> list[_Parked]:
    """What is parked of a group, if there is one."""
    return [parked for reference in group.parked if (parked := reference()) is not None] if group is not None else []


def _require_unchanged(tensor: torch.Tensor, version: int) -> None:
    """What autograd asks of the tensors that it keeps itself."""
    if tensor._version != version:
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} that is kept for backward was changed in place")


def _identity(tensor: torch.Tensor) -> tuple:
    # By storage, not by address: fake tensors of the simulator have no address.
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.dtype


class ActivationOffload(Handle):
    """Handle of `offload_activations`: counters, buffers, undo. What is parked stays valid until its graph is gone."""

    def __init__(self, device: torch.device, num_blocks: int):
        super().__init__()
        self.device = device
        self.store_lane, self.load_lane = Lane(device), Lane(device)
        self.arena = Arena(self.store_lane, num_blocks)
        self._undos.append(self._leave_arena)
        self.bytes_stored = 0
        """Bytes copied to the host so far."""
        self.bytes_loaded = 0
        """Bytes copied back to the device so far."""
        self._group: _Group | None = None
        self._group_before: _Group | None = None
        self._leaving: deque[weakref.ref[_Parked]] = deque()
        self._room = 0
        self._num_after = -1
        self._num_calls = self._num_passes = 1

    host_buffers = property(lambda self: list(self.arena.slabs), doc="Slabs of host memory, allocated in the first step.")
    lanes = property(lambda self: [self.store_lane, self.load_lane], doc="What activations are copied on, to the host and back.")

    def _leave_arena(self) -> None:
        """The host gets its memory back; what a graph still reads, torch keeps for the next pinned memory once that is gone."""
        self.arena = Arena(self.store_lane, self.arena.num_blocks)
        release_pinned()

    def start_block(self, num_after: int) -> _Group:
        """A call of the block after which `num_after` others come."""
        if num_after == self._num_after:
            self._num_calls += 1
            self._num_passes = max(self._num_calls, self._num_passes)
        else:  # it will be called as often as the block before it
            self._num_passes = self._num_calls if num_after + 1 == self._num_after else 1
            self._num_after, self._num_calls = num_after, 1
        # Boundaries of the block before were computed by the one before that.
        leaving = [parked for parked in _alive(self._group_before) if not parked.is_boundary]
        leaving += [parked for parked in _alive(self._group) if parked.is_boundary]
        self._leaving = deque(map(weakref.ref, leaving))
        self._group_before, self._group, self._room = self._group, _Group(self._group), 0
        return self._group

    @property
    def num_calls_after(self) -> int:
        """How many calls of blocks are to come in this walk."""
        return (self._num_after + 1) * self._num_passes - self._num_calls

    def end_block(self) -> None:
        while self._leaving:
            self._forget_oldest()

    def make_room(self, num_bytes: int) -> None:
        """So many bytes are about to be parked: what was computed two blocks before gives up as many on the device, the oldest first."""
        self._room += num_bytes
        while self._leaving and self._room >= 0:
            self._room -= self._forget_oldest()

    def _forget_oldest(self) -> int:
        """Returns the bytes that were given up on the device."""
        parked = self._leaving.popleft()()
        if parked is None:
            return 0
        parked.forget_device_copy()
        return parked.num_bytes


def offload_activations(
    blocks: Sequence[nn.Module],
    *,
    device: torch.device | str,
    boundary_names: Sequence[str] = (),
    boundaries: bool = True,
    kept: bool = False,
    min_bytes: int = 2**20,
) -> ActivationOffload:
    """Move what `blocks` keep for backward to the host: boundaries, and with `kept` all else of at least `min_bytes`.

    `boundary_names` are the arguments of a block's forward that the block before computed. Apply it after
    checkpointing. Raises ValueError for no blocks, nothing to move, or names that a block's forward does not have;
    RuntimeError if applied already.
    """
    blocks = require_modules(blocks, "activation offload")
    if not boundaries and not kept:
        raise ValueError("activation offload matched nothing: boundaries and kept are both False")
    if boundaries and not boundary_names:
        raise ValueError("boundaries go to the host, but boundary_names is empty: name the arguments that blocks pass on")
    signatures = [inspect.signature(block.forward) for block in blocks]
    for index, signature in enumerate(signatures):
        unknown = [name for name in boundary_names if name not in signature.parameters]
        if unknown:
            raise ValueError(f"block {index} has no argument {unknown[0]!r}; it has {', '.join(signature.parameters)}")

    handle = ActivationOffload(resolve_device(device), len(blocks))
    for index, block in enumerate(blocks):
        held = [tensors for module in block.modules() for tensors in (module._parameters, module._buffers)]
        pick = functools.partial(_pick, held, signatures[index], tuple(boundary_names), boundaries, kept, min_bytes)
        wrap = functools.partial(_parking_forward, handle, len(blocks) - 1 - index, pick)
        handle._undos.append(replace_forward(block, "activation offload", wrap))
    return handle


def _parking_forward(handle: ActivationOffload, num_after: int, pick, inner):
    """`num_after`: how many blocks come after this one."""

    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        group, num_calls_after = handle.start_block(num_after), handle.num_calls_after
        passed_on, wanted = pick(args, kwargs)

        def packer(tensor):
            # Some kernels keep their random state in CPU tensors.
            if tensor.device != handle.device or not wanted(tensor):
                return None
            is_boundary = _identity(tensor) in passed_on
            if num_calls_after + is_boundary <= 1:  # one of the last two computed it
                handle.make_room(tensor.nbytes)
                return _Staying(group, tensor)
            return group.park(handle, tensor, is_boundary)

        with packing(packer):
            outputs = inner(*args, **kwargs)
        handle.end_block()
        return outputs

    return forward


def _pick(held, signature, boundary_names, boundaries, kept, min_bytes, args, kwargs):
    """What the block before passed on, and which of the tensors that one call of one block saves go to the host, as a predicate.
    `held`: where its modules hold parameters and buffers, whose memory may be another at every call."""
    arguments = signature.bind(*args, **kwargs).arguments
    passed_on = {_identity(arguments[name]) for name in boundary_names if arguments.get(name) is not None}
    if not kept:
        return passed_on, lambda tensor: _identity(tensor) in passed_on
    stays = {tensor.untyped_storage()._cdata for tensors in held for tensor in tensors.values() if tensor is not None}
    for name, argument in arguments.items():
        if name not in boundary_names:
            stays |= {leaf.untyped_storage()._cdata for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor)}

    def wanted(tensor: torch.Tensor) -> bool:
        if _identity(tensor) in passed_on:
            return boundaries
        return tensor.nbytes >= min_bytes and tensor.untyped_storage()._cdata not in stays

    return passed_on, wanted
