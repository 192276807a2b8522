"""Histories recorded on a card, replayed through the allocator's simulator.

`torch.cuda.memory._record_memory_history()`, run, `_snapshot()`: a small recording checks the simulator without a card.
"""

from dataclasses import dataclass

from memory.allocator import AllocatorStats, CachingAllocator


@dataclass(frozen=True, kw_only=True)
class SnapshotReplay:
    """A recorded history beside what the simulator makes of the same requests."""

    simulated: AllocatorStats
    recorded_peak_reserved_bytes: int
    """By the card's own segment events."""
    num_events: int
    num_unmatched: int
    """Frees of blocks that were allocated before recording began: not simulated."""


def replay_snapshot(
    snapshot: dict, *, device: int = 0, capacity_bytes: int | None = None, expandable_segments: bool | None = None
) -> SnapshotReplay:
    """Replay `torch.cuda.memory._snapshot()` (recorded with `_record_memory_history`) through the simulator.

    Record from the first allocation on: segments older than the history are in neither figure.
    `expandable_segments=None` takes what the history shows. A run of recorded `segment_free` or `segment_unmap` means
    that the cache was given back, by the program or by a retry, and gives it back here.
    """
    history = snapshot["device_traces"][device]
    if expandable_segments is None:
        expandable_segments = any(entry["action"] == "segment_map" for entry in history)
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, expandable_segments=expandable_segments)
    addresses: dict[int, int] = {}
    pending: dict[int, int] = {}
    reserved = peak = num_unmatched = 0
    previous = ""
    for entry in history:
        action, address, size = entry["action"], entry["addr"], entry["size"]
        if action == "alloc":
            addresses[address] = allocator.malloc(size, entry.get("stream", 0))
        elif action == "free_requested":
            if address in addresses:
                pending[address] = addresses.pop(address)
                allocator.request_free(pending[address])
            else:
                num_unmatched += 1
        elif action == "free_completed" and address in pending:
            ours = pending.pop(address)
            if allocator.is_pending(ours):  # otherwise empty_cache() has completed it already
                allocator.complete_free(ours)
        elif action in ("segment_alloc", "segment_map"):
            reserved += size
            peak = max(peak, reserved)
        elif action in ("segment_free", "segment_unmap"):
            reserved -= size
            if previous not in ("segment_free", "segment_unmap"):
                allocator.empty_cache()
        previous = action
    return SnapshotReplay(
        simulated=allocator.stats,
        recorded_peak_reserved_bytes=peak,
        num_events=len(history),
        num_unmatched=num_unmatched,
    )
