"""The frozen parameters of a block in one flat buffer: where each of them lies, and the master on the host that slots are filled from."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from memory.streams import pinning, release_pinned

ALIGNMENT = 256  # bytes, as cudaMalloc aligns: kernels choose by alignment, and must choose as for ordinary weights


def aligned(num_bytes: int) -> int:
    """Bytes that `num_bytes` take of a flat buffer: multiples of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a parameter lies in its block's flat buffer (bytes)."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None
    """Where dimensions lie in another order than the shape's, as kernels choose by that, too; else None."""

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        num_bytes = self.shape.numel() * self.dtype.itemsize
        values = flat[self.offset : self.offset + num_bytes].view(self.dtype)
        return values.view(self.shape) if self.stride is None else values.as_strided(self.shape, self.stride, values.storage_offset())


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor covers its stretch of storage without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _layout(parameters: Sequence[nn.Parameter]) -> tuple[tuple[Entry, ...], int]:
    """The entries of `parameters` in a flat buffer, and the bytes of that buffer."""
    entries, end = [], 0
    for parameter in parameters:
        stride = parameter.stride() if is_dense(parameter) and not parameter.is_contiguous() else None
        entries.append(Entry(end, parameter.dtype, parameter.shape, stride))
        end += aligned(parameter.nbytes)
    return tuple(entries), end


class Master:
    """The frozen parameters of one block on the host: in one flat buffer, or left where they are."""

    def __init__(self, block: nn.Module, parameters: Sequence[nn.Parameter], *, gathered: bool, pin: bool):
        self.parameters = list(parameters)
        position = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.seats = [(module._parameters, name, position[id(parameter)]) for module in block.modules()
                      for name, parameter in module._parameters.items() if id(parameter) in position]
        """Where modules hold the parameters: their dictionary, the name in it, which parameter."""
        self.home = parameters[0].device
        self.layout, self.num_bytes = _layout(parameters)
        self.kind = 0
        """The same number for blocks of the same layout."""
        self.flat: torch.Tensor | None = None
        if gathered:
            try:
                self._gather(pin)
            except BaseException:  # the first ones may be in the buffer already
                self.release()
                raise

    def _gather(self, pin: bool) -> None:
        with pinning():
            self.flat = torch.empty(self.num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin)
        for parameter, entry in zip(self.parameters, self.layout, strict=True):
            view = entry.view(self.flat)
            view.copy_(parameter.data)
            parameter.data = view  # the old storage is freed here: never two copies of more than one parameter

    def copies(self, slot: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(destination, source) pairs that fill a slot's flat buffer."""
        if self.flat is not None:
            return [(slot[: self.num_bytes], self.flat)]
        return [(entry.view(slot), parameter.data) for entry, parameter in zip(self.layout, self.parameters, strict=True)]

    @contextmanager
    def seated(self, guests: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, the block's modules hold `guests` in place of the parameters."""
        try:
            self._seat(guests)
            yield
        finally:
            self._seat(self.parameters)

    def _seat(self, parameters: Sequence[nn.Parameter]) -> None:
        for held, name, position in self.seats:
            held[name] = parameters[position]

    def release(self) -> None:
        self._seat(self.parameters)  # an interrupt may have left guests
        if self.flat is None:
            return
        for parameter in self.parameters:
            parameter.data = parameter.data.to(self.home, copy=True)
        self.flat = None
        release_pinned()  # block by block: never two copies of more than one
