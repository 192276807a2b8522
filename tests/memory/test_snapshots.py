"""Recorded histories, replayed. The card that records is the simulator itself, with addresses in no order."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from memory.allocator import CachingAllocator
from memory.snapshots import replay_snapshot

MIB = 1 << 20
PAGE = 1 << 21


def entry(action, addr, size, stream=0):
    return {"action": action, "addr": addr, "size": size, "stream": stream}


class Card:
    """An allocator that records what it does, as `torch.cuda.memory._snapshot()` shows it."""

    def __init__(self, seed: int, expandable: bool):
        self.numbers, self.expandable, self.history, self.bases = random.Random(seed), expandable, [], set()
        self.segments: dict[int, tuple[int, int]] = {}  # address -> bytes, stream
        self.allocator = CachingAllocator(expandable_segments=expandable, driver=self.driver)
        self.requested: dict[int, tuple[int, int]] = {}

    def driver(self, num_bytes):
        while (base := self.numbers.randrange(1000) << 70) in self.bases:  # far apart
            pass
        self.bases.add(base)
        if self.expandable:
            self.base = base
        else:
            self.segments[base] = num_bytes, self.stream
            self.history.append(entry("segment_alloc", base, num_bytes, self.stream))
        return base

    def malloc(self, num_bytes, stream):
        self.stream, self.base, reserved = stream, 0, self.allocator.stats.reserved_bytes
        address = self.allocator.malloc(num_bytes, stream)
        if self.expandable and self.allocator.stats.reserved_bytes > reserved:
            self.history.append(entry("segment_map", self.base, self.allocator.stats.reserved_bytes - reserved, stream))
        self.history.append(entry("alloc", address, num_bytes, stream))
        self.requested[address] = num_bytes, stream

    def free(self, position):
        address = sorted(self.requested)[position % len(self.requested)]
        num_bytes, stream = self.requested.pop(address)
        self.allocator.free(address)
        self.history += [entry(action, address, num_bytes, stream) for action in ("free_requested", "free_completed")]

    def empty_cache(self):
        reserved = self.allocator.stats.reserved_bytes
        self.allocator.empty_cache()
        starts = {address for address, _, _ in self.allocator.blocks()}
        for base in sorted(self.segments.keys() - starts):
            num_bytes, stream = self.segments.pop(base)
            self.history.append(entry("segment_free", base, num_bytes, stream))
        if self.expandable and self.allocator.stats.reserved_bytes < reserved:
            self.history.append(entry("segment_unmap", 0, reserved - self.allocator.stats.reserved_bytes))

    def snapshot(self, start=0):
        blocks = self.allocator.blocks()
        segments = [{"device": 0, "address": base, "total_size": size, "stream": stream, "is_expandable": False,
                     "segment_type": "small" if size == PAGE else "large",
                     "blocks": [{"size": n, "state": "active_allocated" if used else "inactive"}
                                for address, n, used in blocks if base <= address < base + size]}
                    for base, (size, stream) in self.segments.items()]  # fmt: skip
        return {"device_traces": [self.history[start:]], "segments": segments}


SIZES = st.one_of(st.integers(1, MIB), st.integers(MIB, 12 * MIB), st.sampled_from([13 * MIB, 14 * MIB - 512, 15 * MIB + 512]))
PROGRAMS = st.lists(
    st.one_of(st.tuples(st.just("malloc"), SIZES, st.integers(0, 1)), st.tuples(st.just("free"), st.integers(0, 99)),
              st.tuples(st.just("empty_cache"))), min_size=5, max_size=80)  # fmt: skip


def run(card, program):
    for action, *arguments in program:
        if action != "free" or card.requested:
            getattr(card, action)(*arguments)


@settings(max_examples=150, deadline=None)
@given(program=PROGRAMS, seed=st.integers(0, 99), early=st.integers(0, 80))
def test_every_request_is_served_alike_wherever_recording_begins(program, seed, early):
    card = Card(seed, expandable=False)
    run(card, program[:early])
    start = len(card.history)
    peak = reserved = card.allocator.stats.reserved_bytes
    run(card, program[early:])
    for recorded in card.history[start:]:
        reserved += {"segment_alloc": 1, "segment_free": -1}.get(recorded["action"], 0) * recorded["size"]
        peak = max(peak, reserved)
    result = replay_snapshot(card.snapshot(start))
    assert result.num_requests == result.num_placed_alike == sum(e["action"] == "alloc" for e in card.history[start:])
    assert result.num_unmatched == 0
    assert result.recorded_peak_reserved_bytes == result.simulated.peak_reserved_bytes == peak


def test_a_rest_that_was_not_split_off_belongs_to_the_block_before_it():
    card = Card(0, expandable=False)
    half = MIB // 2
    run(card, [("malloc", 40 * MIB, 0), ("free", 0), ("malloc", 41 * half, 0), ("malloc", 39 * half, 0), ("free", 0),
               ("malloc", 20 * MIB, 0), ("free", 1)])  # fmt: skip
    start = len(card.history)
    run(card, [("malloc", 39 * half, 0), ("free", 0)])  # the block of 20 MiB and a rest is gone at the end: nothing tells its size
    result = replay_snapshot(card.snapshot(start))
    assert (result.num_requests, result.num_placed_alike) == (1, 1)


@settings(max_examples=100, deadline=None)
@given(program=PROGRAMS, seed=st.integers(0, 99))
def test_expandable_segments_from_the_first_allocation_on(program, seed):
    card = Card(seed, expandable=True)
    run(card, [("malloc", 512, 0), *program])
    result = replay_snapshot(card.snapshot())
    assert result.num_placed_alike == result.num_requests
    assert result.recorded_peak_reserved_bytes == result.simulated.peak_reserved_bytes == card.allocator.stats.peak_reserved_bytes


def test_a_request_served_elsewhere_is_noticed():
    segments = [{"device": 0, "address": base, "total_size": 12 * MIB, "stream": 0, "is_expandable": False,
                 "segment_type": "large", "blocks": [{"size": 12 * MIB, "state": state}]}
                for base, state in ((100 * MIB, "inactive"), (200 * MIB, "active_allocated"))]  # fmt: skip
    result = replay_snapshot({"device_traces": [[entry("alloc", 200 * MIB, 12 * MIB)]], "segments": segments})
    assert (result.num_requests, result.num_placed_alike) == (1, 0)  # of two equal blocks the lower one is taken


def test_segments_of_which_the_snapshot_does_not_tell():
    history = [
        entry("segment_alloc", 1000, 12 * MIB),
        entry("alloc", 1000, 12 * MIB),
        entry("free_requested", 5, 64),
        entry("free_completed", 5, 64),
        entry("free_requested", 1000, 12 * MIB),
        entry("free_completed", 1000, 12 * MIB),
        entry("segment_free", 1000, 12 * MIB),
        {"action": "oom", "device_free": 5, "size": 1 << 40, "stream": 0},
        entry("segment_alloc", 2000, 14 * MIB),
        entry("alloc", 2000, 13 * MIB),
    ]
    result = replay_snapshot({"device_traces": [history]})
    assert result.recorded_peak_reserved_bytes == 14 * MIB
    assert result.simulated.peak_reserved_bytes == 14 * MIB
    assert (result.num_events, result.num_unmatched, result.num_placed_alike) == (10, 1, 2)
