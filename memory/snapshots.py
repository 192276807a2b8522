"""Histories recorded on a card, replayed through the allocator's simulator.

`torch.cuda.memory._record_memory_history()`, run, `_snapshot()`: a recording checks the simulator without a card. What the
card's allocator held when recording began follows from the state that the snapshot shows at its end and the history run
backwards. From there the simulator gets the same requests, and every answer is compared: not only how much is reserved,
but at which address a request is served.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from memory.allocator import AllocatorStats, CachingAllocator
from memory.pools import SMALL_SEGMENT_BYTES, round_request

_GROWS, _SHRINKS = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")


@dataclass(frozen=True, kw_only=True)
class SnapshotReplay:
    """A recorded history beside what the simulator makes of the same requests."""

    simulated: AllocatorStats
    recorded_peak_reserved_bytes: int
    """By the card's own segment events."""
    num_events: int
    num_requests: int
    """Allocations in the history."""
    num_placed_alike: int
    """Of these, how many the simulator serves at the address that the card's allocator chose."""
    num_unmatched: int
    """Frees of blocks that were allocated before recording began and of which the snapshot does not tell: not simulated."""


class _Before:
    """What the card's allocator held before a history: native segments, and in them the blocks that were in use.

    Expandable segments are left out: their history has to begin with the first allocation.
    """

    def __init__(self, snapshot: dict):
        self.segments: dict[int, tuple[int, int, bool]] = {}  # address -> bytes, stream, whether of the small pool
        self._blocks: dict[int, int] = {}  # address -> bytes
        for segment in snapshot.get("segments", ()):
            if segment["device"] == 0 and not segment.get("is_expandable"):
                address = segment["address"]
                self.segments[address] = segment["total_size"], segment["stream"], segment["segment_type"] == "small"
                for block in segment["blocks"]:  # side by side
                    if block["state"] != "inactive":
                        self._blocks[address] = block["size"]
                    address += block["size"]
        self._order = sorted(self._blocks)
        for entry in reversed(snapshot["device_traces"][0]):
            self._take_back(entry)

    def held(self, address: int, num_bytes: int) -> dict[int, int]:
        """The blocks in use between two addresses."""
        within = slice(bisect_left(self._order, address), bisect_left(self._order, address + num_bytes))
        return {block: self._blocks[block] for block in self._order[within]}

    def _take_back(self, entry: dict) -> None:
        action, address, size = entry["action"], entry.get("addr"), entry["size"]
        if action == "alloc" and address in self._blocks:
            index = bisect_left(self._order, address)
            del self._blocks[address], self._order[index]
            if index and address not in self.segments:
                # A free block, from whose start every request is served, began here. So the block before ended here,
                # with a rest perhaps that was too small to be split off: no event tells of those.
                self._blocks[self._order[index - 1]] = address - self._order[index - 1]
        elif action == "free_completed":
            self._blocks[address] = round_request(size)
            insort(self._order, address)
        elif action == "segment_alloc":
            self.segments.pop(address, None)
        elif action == "segment_free":
            self.segments[address] = size, entry.get("stream", 0), size == SMALL_SEGMENT_BYTES


class _Driver:
    """Puts a new segment where the card's driver put it, if at that moment it was asked for the same."""

    def __init__(self, expandable_segments: bool):
        self.upcoming: list[tuple[int, int]] = []  # (address, bytes) recorded since the last request
        self._expandable_segments, self._elsewhere = expandable_segments, 1 << 62

    def __call__(self, num_bytes: int) -> int:
        for address, recorded_bytes in self.upcoming:
            if self._expandable_segments or recorded_bytes == num_bytes:
                return address
        self._elsewhere += num_bytes
        return self._elsewhere - num_bytes


def _peak_reserved(history: Sequence[dict], reserved: int) -> int:
    """Largest reserved bytes by the recorded segment events, from `reserved` at the beginning on."""
    peak = reserved
    for entry in history:
        if entry["action"] in _GROWS:
            reserved += entry["size"]
        elif entry["action"] in _SHRINKS:
            reserved -= entry["size"]
        peak = max(peak, reserved)
    return peak


def replay_snapshot(snapshot: dict) -> SnapshotReplay:
    """Replay the first card's part of `torch.cuda.memory._snapshot()` (recorded with `_record_memory_history`) through the simulator.

    Segments are native or expandable, as the history shows. A run of recorded `segment_free` or `segment_unmap` means
    that the cache was given back, by the program or by a retry, and gives it back here.
    """
    history = snapshot["device_traces"][0]
    expandable_segments = any(entry["action"] == "segment_map" for entry in history)
    driver = _Driver(expandable_segments)
    allocator = CachingAllocator(expandable_segments=expandable_segments, driver=driver)
    addresses: dict[int, int] = {}  # the card's -> ours, of blocks in use
    before = _Before(snapshot)
    for address, (num_bytes, stream, is_small) in before.segments.items():
        held = before.held(address, num_bytes)
        allocator.adopt(address, num_bytes, held, is_small=is_small, stream=stream)
        addresses.update(zip(held, held))
    pending: dict[int, int] = {}
    recorded_peak = _peak_reserved(history, allocator.stats.reserved_bytes)
    num_requests = num_placed_alike = num_unmatched = 0
    previous = ""
    for entry in history:
        action, address, size = entry["action"], entry.get("addr"), entry["size"]  # being out of memory has no address
        if action == "alloc":
            addresses[address] = allocator.malloc(size, entry.get("stream", 0))
            driver.upcoming.clear()
            num_requests += 1
            num_placed_alike += addresses[address] == address
        elif action == "free_requested":
            if address in addresses:
                pending[address] = addresses.pop(address)
                allocator.request_free(pending[address])
            else:
                num_unmatched += 1
        elif action == "free_completed":
            ours = pending.pop(address, None)
            if ours is not None and allocator.is_pending(ours):  # otherwise empty_cache() has completed it already
                allocator.complete_free(ours)
        elif action in _GROWS:
            driver.upcoming.append((address, size))
        elif action in _SHRINKS and previous not in _SHRINKS:
            allocator.empty_cache()
        previous = action
    return SnapshotReplay(
        simulated=allocator.stats,
        recorded_peak_reserved_bytes=recorded_peak,
        num_events=len(history),
        num_requests=num_requests,
        num_placed_alike=num_placed_alike,
        num_unmatched=num_unmatched,
    )
