"""A recorded step: which storage lives when, where, and for what; and what a device makes of it.

Sizes are the bytes that tensors ask for; rounding, pooling and caching are the allocator's (`memory.allocator`). All figures
that come out of here are *predicted*.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from memory.allocator import AllocatorStats, replay
from memory.pools import round_request
from memory.work import Work

CATEGORIES = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "saved activations",
    "working set",
    "transfer buffers",
    "other",
)
PLACES = ("device", "pinned")
TEACHER, FORWARD, BACKWARD, OPTIMIZER = "teacher", "student forward", "student backward", "optimizer"
_SHOWN = {FORWARD: "student", BACKWARD: "backward"}


def shown(phase: str) -> str:
    """The name that people are shown of a trace's phase, the one that runs measure it under."""
    return _SHOWN.get(phase, phase)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """One allocation: what it asked for, what it was for, where it is."""

    num_bytes: int
    category: str
    place: str
    block: int | None = None
    """The block whose frozen weight this is, if any."""
    in_place: bool = False
    """Whether it takes the very memory of what died just before: autograd adds gradients in place, and a linear layer its bias."""


class Visit(NamedTuple):
    """One pass in one block, forward or back."""

    walk: int
    """Number of the walk over all blocks, in order of their beginnings."""
    block: int
    part: int = 0
    """Number of the pass, of several that walk together."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of the timeline within one phase, and within one visit of one block or between blocks."""

    phase: str
    start: int
    """First event."""
    stop: int
    """One past the last event."""
    work: tuple[Work, ...]
    """What the operators compute and move, in order."""
    visit: Visit | None = None
    """None between blocks."""
    records_graph: bool = False
    """Whether this visit belongs to a forward with gradient, or its backward: what a block keeps matters here."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A recorded step, in the order in which things happened.

    `events`: `i` is the birth of storage i, `~i` its death. `standing` storages live before the first event and
    throughout: weights, adapters, optimizer state, buffers.
    """

    storages: tuple[Storage, ...]
    events: tuple[int, ...]
    spans: tuple[Span, ...]
    standing: tuple[int, ...]
    num_blocks: int

    @property
    def work(self) -> list[Work]:
        """What all spans compute and move, in order."""
        return [work for span in self.spans for work in span.work]

    def sharded(self, num_shards: int) -> "Trace":
        """The same step with every streamed block's master divided among `num_shards` devices, and no longer on the host."""
        def divided(storage: Storage) -> Storage:
            if storage.category != "weights" or storage.place != "pinned":
                return storage
            return replace(storage, num_bytes=-(-storage.num_bytes // num_shards), place="device")

        return replace(self, storages=tuple(map(divided, self.storages)))

    def device_events(self, *, num_steps: int = 1, workspace_bytes: int = 0) -> tuple[list[int], list[int]]:
        """(events, sizes) of the device for `memory.allocator.replay`: the standing storages, then the step.

        `workspace_bytes` (cuBLAS): half for forward's thread, half for autograd's (`memory.standing`).
        """
        on_device = [storage.place == "device" for storage in self.storages]
        sizes = [storage.num_bytes for storage in self.storages]
        step: list[int] = []
        goes_by: dict[int, int] = {}  # a storage made in place -> the one whose memory it has
        for event in self.events:
            if event >= 0 and self.storages[event].in_place:
                goes_by[event] = ~step.pop()
            elif on_device[event if event >= 0 else ~event]:
                step.append(event if event >= 0 else ~goes_by.get(~event, ~event))
        standing = [index for index in self.standing if on_device[index]]
        if workspace_bytes:
            standing += [len(sizes), len(sizes) + 1]
            sizes += [workspace_bytes // 2] * 2
        return standing + step * num_steps, sizes

    def timeline(self, *, place: str = "device", rounded: bool = True) -> Iterator[tuple[str, int, dict[str, int]]]:
        """(phase, live bytes, live bytes by category) after each birth at `place`, the standing storages first.

        The dict is one and the same throughout, and changes. `rounded`: as the allocator rounds requests.
        """
        live = dict.fromkeys(CATEGORIES, 0)
        size = [round_request(s.num_bytes) if rounded else s.num_bytes for s in self.storages]
        total = 0
        for index in self.standing:
            storage = self.storages[index]
            if storage.place == place:
                live[storage.category] += size[index]
                total += size[index]
        yield "load", total, live
        for span in self.spans:
            yield span.phase, total, live  # what a phase finds is part of its peak
            for event in self.events[span.start : span.stop]:
                index = event if event >= 0 else ~event
                storage = self.storages[index]
                if storage.place != place:
                    continue
                change = size[index] if event >= 0 else -size[index]
                live[storage.category] += change
                total += change
                if event >= 0:
                    yield span.phase, total, live

    def peaks(self) -> dict[str, int]:
        """Largest sum of live device bytes by phase; "load" is what stands throughout."""
        by_phase: dict[str, int] = {}
        for phase, total, _ in self.timeline():
            by_phase[phase] = max(by_phase.get(phase, 0), total)
        return by_phase

    def prediction(
        self,
        *,
        expandable_segments: bool = False,
        workspace_bytes: int = 0,
    ) -> "Prediction":
        """Peaks by category and phase, and what the caching allocator would reserve for two steps in a row.

        `workspace_bytes` (cuBLAS) are taken from the same allocator, as "other".
        """
        by_phase = self.peaks()
        peak = max(by_phase.values())
        at_peak = next(dict(live) for _, total, live in self.timeline() if total == peak)
        workspace = 2 * round_request(workspace_bytes // 2)
        at_peak["other"] += workspace
        events, sizes = self.device_events(num_steps=2, workspace_bytes=workspace_bytes)
        stats = replay(events, sizes, expandable_segments=expandable_segments)
        return Prediction(
            peak_bytes=peak + workspace,
            by_category=at_peak,
            by_phase={phase: total + workspace for phase, total in by_phase.items()},
            allocator=stats,
            host_bytes=self._host_peak(),
        )

    def _host_peak(self) -> int:
        """Peak bytes that are pinned, each allocation rounded up to a power of two, as torch's host cache does."""
        total = peak = 0
        for event in [*self.standing, *self.events]:
            storage = self.storages[event if event >= 0 else ~event]
            if storage.place == "pinned":
                num_bytes = pinned_bytes(storage.num_bytes)
                total += num_bytes if event >= 0 else -num_bytes
                peak = max(peak, total)
        return peak

    def standing_bytes(self, category: str, place: str = "device") -> int:
        """Bytes of the standing storages of one category, as asked for."""
        storages = [self.storages[index] for index in self.standing]
        return sum(s.num_bytes for s in storages if (s.category, s.place) == (category, place))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step will need, predicted. Bytes."""

    peak_bytes: int
    """Largest sum of live device storages, each rounded to 512 bytes."""
    by_category: dict[str, int]
    """At that moment; adds up to `peak_bytes` exactly."""
    by_phase: dict[str, int]
    """Largest sum within each phase."""
    allocator: AllocatorStats
    """What the caching allocator makes of it: allocated includes what it could not split off."""
    host_bytes: int
    """Pinned for masters of streamed blocks and for what blocks keep on the host."""

    @property
    def reserved_bytes(self) -> int:
        return self.allocator.peak_reserved_bytes


def pinned_bytes(num_bytes: int) -> int:
    """Bytes that a pinned allocation takes: torch's caching host allocator rounds up to a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0
