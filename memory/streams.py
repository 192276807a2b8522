"""Copies beside the computation: a stream and its events on a card, plain copies on the CPU.

The host never waits. The compute stream and a lane wait for each other by events only, and no tensor is handed to
`record_stream`, which would make the time of a free, and with it the peak, depend on timing.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from memory.cards import size_text
from memory.host import under_wsl


class PinningRefused(MemoryError):
    """No more of the host's memory can be pinned than the `pinned_bytes` that this process has."""

    def __init__(self, pinned_bytes: int):
        hint = "; WSL limits it, and its setting memory= may raise that" if under_wsl() else ""
        super().__init__(f"no more of the host's memory can be pinned than the {size_text(pinned_bytes)} that are{hint}")
        self.pinned_bytes = pinned_bytes


def resolve_device(device: torch.device | str) -> torch.device:
    """`device` with its index filled in, as tensors report it."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


@contextmanager
def pinning() -> Iterator[None]:
    """Around what pins host memory. Raises PinningRefused if the host cannot give it: torch says that as if the card were full."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        raise PinningRefused(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)) from e


def release_pinned() -> None:
    """Give pinned memory that nothing refers to back to the host: torch keeps it for requests of the same size."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a load ahead of use may still read it
        torch._C._host_emptyCache()


class _Copying(threading.local):
    """The compute stream, while this thread issues a lane's copies: the current stream is the lane's then, and the garbage collector, which may
    run in between, calls `join`."""

    compute: torch.cuda.Stream | None = None


_copying = _Copying()


class Lane:
    """One direction of copies on `device`, ordered among themselves."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._so_far = self.new_event()
        self._not_joined: set[torch.cuda.Event] = set()
        """Ends of copies that the compute stream has yet to wait for."""
        self.waiting: Callable[[], AbstractContextManager] = nullcontext
        """Entered around what the computation waits for: on the CPU a copy itself, on a card the stream's wait for it."""

    def new_event(self) -> torch.cuda.Event | None:
        """An event to hand to `copy`; None on the CPU, where a copy is done when `copy` returns."""
        return torch.cuda.Event() if self.device.type == "cuda" else None

    @torch.no_grad()
    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], done: torch.cuda.Event | None) -> None:
        """Copy each (destination, source), then record `done`.

        The copies start after everything given to the compute stream up to this call, so the destination is free and the source
        is written, by another lane too if the compute stream has joined that. Host tensors that are not pinned keep the host waiting.
        """
        if self._stream is None:
            with self.waiting():
                for destination, source in pairs:
                    destination.copy_(source)
            return
        self._not_joined.add(done)
        compute = torch.cuda.current_stream(self.device)
        self._so_far.record(compute)
        self._stream.wait_event(self._so_far)
        try:
            _copying.compute = compute
            with torch.cuda.stream(self._stream):
                for destination, source in pairs:
                    destination.copy_(source, non_blocking=True)
        finally:
            done.record(self._stream)  # of what an interrupt cut short as well
            _copying.compute = None

    def join(self, done: torch.cuda.Event | None) -> None:
        """Let the compute stream, not the host, wait for the copy that `done` was last handed to. It is one stream, so once is enough."""
        if done in self._not_joined:
            compute = _copying.compute
            with self.waiting() if compute is None else nullcontext():  # whoever takes the time does so on the current stream
                (compute or torch.cuda.current_stream(self.device)).wait_event(done)
            self._not_joined.discard(done)
