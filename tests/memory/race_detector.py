"""Streams and events without a card: who may run before whom, and what two streams touch without an order between them.

Every operator is run at once and filed under the stream that is current. Vector clocks say which earlier accesses of other
streams come before it for certain: those that an event was recorded after, and that this stream waited for. Two accesses to the
same bytes, one of them a write, with no order between them are a race; so is memory that goes back to the compute stream's
allocator while another stream may still use it. What an engine does right by luck on a card, it has to do right here by order.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memory.activations
import memory.offload
from memory.streams import Lane
from memory.work import _moves_nothing


class Stream:
    """A vector clock: of every stream, how much of it has happened before what comes next on this one."""

    def __init__(self, name: str):
        self.name, self.clock = name, {self: 0}

    def wait_event(self, event: "Event") -> None:
        for stream, time in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def tick(self) -> int:
        self.clock[self] += 1
        return self.clock[self]


class Event:
    """As CUDA's: to wait for one that was never recorded is to wait for nothing."""

    def __init__(self):
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


@dataclass
class _Access:
    start: int
    stop: int
    stream: Stream
    time: int
    writes: bool


@dataclass
class _Memory:
    """A storage's accesses that another stream may still have to be ordered after."""

    accesses: list[_Access] = field(default_factory=list)
    on_host: bool = False
    keeper: weakref.ref | None = None


class RaceDetector(TorchDispatchMode):
    """`with RaceDetector() as detector:` and streams that are its own; afterwards `detector.races` says what was not in order."""

    def __init__(self):
        super().__init__()
        self.compute = self.current = Stream("compute")
        self.races: list[str] = []
        self.num_copies_beside = 0
        self._memory: dict[int, _Memory] = {}
        self._freed: list[_Memory] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in memory.simulate

    @contextlib.contextmanager
    def on(self, stream: Stream):
        outer, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._give_back()
        outputs = func(*args, **kwargs)
        arguments = _arguments(func)
        if arguments is not None:
            touched = [(value, writes) for value, writes in zip(args, arguments.values())]
            touched += [(value, arguments[name]) for name, value in kwargs.items()]
            if not func._schema.is_mutable:
                touched.append((outputs, True))
            time = self.current.tick()
            for value, writes in touched:
                for tensor in _tensors(value):
                    self._touch(func._schema.name, tensor, time, writes)
            self.num_copies_beside += self.current is not self.compute
        return outputs

    def declare_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Pinned memory is kept by its own allocator until copies are done."""
        for tensor in tensors:
            self._known(tensor).on_host = True

    def _known(self, tensor: torch.Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            self._memory[key] = _Memory(keeper=weakref.ref(storage, lambda _: self._freed.append(self._memory.pop(key))))
        return self._memory[key]

    def _touch(self, what: str, tensor: torch.Tensor, time: int, writes: bool) -> None:
        if not tensor.numel():
            return
        known, stream = self._known(tensor), self.current
        itemsize = tensor.element_size()
        start = tensor.storage_offset() * itemsize
        if tensor.is_contiguous():
            span = tensor.numel()
        else:
            span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        access = _Access(start, start + span * itemsize, stream, time, writes)
        remaining = []
        for other in known.accesses:
            is_before = other.time <= stream.clock.get(other.stream, 0)
            overlaps = other.start < access.stop and access.start < other.stop and (other.writes or writes)
            if overlaps and not is_before:
                self.races.append(f"{what} on {stream.name} {'writes' if writes else 'reads'} what {other.stream.name} "
                                  f"{'writes' if other.writes else 'reads'} at no certain time")  # fmt: skip
            covered = access.start <= other.start and other.stop <= access.stop and (writes or not other.writes)
            if not (is_before and covered and (other.stream is stream or writes)):
                remaining.append(other)
        known.accesses = [*remaining, access]

    def _give_back(self) -> None:
        """Memory that was let go since the last operator is the compute stream's allocator's from here on."""
        for known in self._freed:
            late = {a.stream.name for a in known.accesses if a.time > self.compute.clock.get(a.stream, 0) and a.stream is not self.compute}
            if late and not known.on_host:
                self.races.append(f"memory goes back while {', '.join(sorted(late))} may use it")
        self._freed.clear()

    def __exit__(self, *reason):
        self._give_back()
        return super().__exit__(*reason)


@functools.cache
def _arguments(func) -> dict[str, bool] | None:
    """Whether an operator writes into each of its arguments, by name; None if it reads and writes no memory."""
    schema = func._schema
    if "empty" in schema.name or _moves_nothing(func):
        return None
    return {argument.name: argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments}


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, (list, tuple)) else []


class EmulatedLane(Lane):
    """A lane as on a card."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._stream = Stream(f"lane {id(self) % 1000}")

    def new_event(self) -> Event:
        return Event()


def emulate(monkeypatch, detector: RaceDetector) -> None:
    """Let the engine's lanes, and what it asks of torch.cuda, be the detector's."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: detector.current)
    monkeypatch.setattr(torch.cuda, "stream", detector.on)
    for module in (memory.offload, memory.activations):
        monkeypatch.setattr(module, "Lane", EmulatedLane)
