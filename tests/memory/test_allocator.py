"""The allocator simulator, rule by rule, then as invariants over random programs."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.allocator import CachingAllocator, replay
from memory.pools import round_request, segment_bytes

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize("requested, rounded", [(0, 0), (1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_round_up_to_512_bytes(requested, rounded):
    assert round_request(requested) == rounded


@pytest.mark.parametrize(
    "rounded, segment",
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (107 * MIB, 108 * MIB),
    ],
)
def test_segment_sizes(rounded, segment):
    assert segment_bytes(rounded) == segment
    allocator = CachingAllocator()
    allocator.malloc(rounded)
    assert allocator.stats.reserved_bytes == segment


def test_small_and_large_pools_are_separate():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(12 * MIB))
    allocator.malloc(512)  # the cached 12 MiB block must not serve it
    assert allocator.stats.reserved_bytes == 14 * MIB


def test_streams_have_pools_of_their_own():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(12 * MIB, stream=0))
    allocator.malloc(12 * MIB, stream=7)
    assert allocator.stats.reserved_bytes == 24 * MIB
    allocator.malloc(12 * MIB, stream=0)
    assert allocator.stats.reserved_bytes == 24 * MIB


def test_best_fit_takes_the_smallest_block_that_is_large_enough():
    allocator = CachingAllocator()
    small, large = allocator.malloc(12 * MIB), allocator.malloc(14 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(12 * MIB) == small
    assert allocator.malloc(12 * MIB) == large


def test_small_blocks_split_from_512_bytes_on():
    allocator = CachingAllocator()
    first = allocator.malloc(MIB)
    assert allocator.malloc(MIB - 512) == first + MIB
    assert allocator.malloc(512) == first + 2 * MIB - 512
    assert allocator.stats.reserved_bytes == 2 * MIB


def test_large_blocks_split_only_above_1_mib_and_the_rest_counts_as_allocated():
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(12 * MIB))
    allocator.malloc(11 * MIB)
    assert allocator.stats.allocated_bytes == 12 * MIB  # 1 MiB is left over, not split off
    other = CachingAllocator()
    other.free(other.malloc(12 * MIB))
    other.malloc(11 * MIB - 512)
    assert other.stats.allocated_bytes == 11 * MIB - 512


def test_freed_neighbours_merge_but_segments_do_not():
    allocator = CachingAllocator()
    first, second = allocator.malloc(8 * MIB), allocator.malloc(14 * MIB)
    third = allocator.malloc(9 * MIB)  # fits behind `first` in its 20 MiB segment
    assert third == first + 8 * MIB
    for address in (first, second, third):
        allocator.free(address)
    assert allocator.malloc(20 * MIB) == first
    assert allocator.stats.reserved_bytes == 34 * MIB
    allocator.malloc(15 * MIB)  # the cached 14 MiB segment is too small and has no neighbour
    assert allocator.stats.reserved_bytes == 50 * MIB


def test_a_block_that_another_stream_still_reads_is_active_and_not_reused():
    allocator = CachingAllocator()
    address = allocator.malloc(12 * MIB)
    allocator.request_free(address)
    assert allocator.stats.allocated_bytes == 0 and allocator.blocks()[0] == (address, 12 * MIB, True)
    assert allocator.malloc(12 * MIB) != address
    allocator.complete_free(address)
    assert allocator.malloc(12 * MIB) == address


def test_a_segment_with_one_live_block_cannot_be_given_back():
    allocator = CachingAllocator()
    keep, drop = allocator.malloc(2 * MIB), allocator.malloc(9 * MIB)
    allocator.free(drop)
    allocator.empty_cache()
    assert allocator.stats.reserved_bytes == 20 * MIB
    allocator.free(keep)
    allocator.empty_cache()
    allocator.malloc(24 * MIB)
    assert allocator.stats.reserved_bytes == allocator.stats.peak_reserved_bytes == 24 * MIB


def test_expandable_segments_grow_by_pages_and_leave_no_gaps():
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    assert allocator.stats.reserved_bytes == 40 * MIB  # pages of 20 MiB
    assert allocator.malloc(10 * MIB) == first + 30 * MIB
    allocator.malloc(512)
    assert allocator.stats.reserved_bytes == 42 * MIB  # pages of 2 MiB in the small pool
    allocator.free(first)
    allocator.malloc(31 * MIB)  # the 30 MiB hole is too small, the end grows
    assert allocator.stats.reserved_bytes == 82 * MIB


def test_an_expandable_tail_is_extended_rather_than_left_behind():
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.malloc(30 * MIB)
    allocator.free(first)
    assert allocator.malloc(50 * MIB) == first
    assert allocator.stats.reserved_bytes == 60 * MIB


def test_expandable_best_fit_counts_the_room_to_grow():
    allocator = CachingAllocator(expandable_segments=True)
    hole, _ = allocator.malloc(40 * MIB), allocator.malloc(36 * MIB)  # 4 MiB are left at the growing end
    allocator.free(hole)
    assert allocator.malloc(3 * MIB) == hole  # although the 4 MiB block at the end is the smaller one


def test_of_equal_holes_in_an_expandable_segment_the_lower_one_is_taken():
    allocator = CachingAllocator(expandable_segments=True)
    lower, _, upper, _ = (allocator.malloc(12 * MIB) for _ in range(4))
    allocator.free(lower)
    allocator.free(upper)
    assert allocator.malloc(12 * MIB) == lower


def test_large_expandable_blocks_split_from_512_bytes_on():
    allocator = CachingAllocator(expandable_segments=True)
    allocator.malloc(20 * MIB - 512)
    assert allocator.stats.allocated_bytes == 20 * MIB - 512


def test_empty_cache_unmaps_whole_pages_only():
    allocator = CachingAllocator(expandable_segments=True)
    hole, _ = allocator.malloc(50 * MIB), allocator.malloc(10 * MIB)
    allocator.free(hole)
    allocator.empty_cache()
    assert allocator.stats.reserved_bytes == 20 * MIB  # the third page holds 10 MiB free and 10 MiB live
    assert allocator.malloc(45 * MIB) == hole  # mapped again at the lowest address
    assert allocator.stats.reserved_bytes == 60 * MIB


def test_pages_are_unmapped_behind_a_live_block_and_mapped_where_they_were():
    allocator = CachingAllocator(expandable_segments=True)
    live, hole, _ = allocator.malloc(10 * MIB), allocator.malloc(50 * MIB), allocator.malloc(20 * MIB)
    allocator.free(hole)
    allocator.empty_cache()
    assert allocator.blocks() == [(live, 10 * MIB, True), (hole, 10 * MIB, False), (hole + 50 * MIB, 20 * MIB, True)]
    assert allocator.stats.reserved_bytes == 40 * MIB  # the first page holds 10 MiB live and 10 MiB free
    assert allocator.malloc(10 * MIB) == hole and allocator.malloc(30 * MIB) == hole + 10 * MIB
    assert allocator.stats.reserved_bytes == 80 * MIB


def test_a_segment_found_in_use_has_no_pieces_that_would_not_have_been_split_off():
    allocator = CachingAllocator()
    allocator.adopt(0, 40 * MIB, {0: 10 * MIB, 12 * MIB: 8 * MIB, 21 * MIB: 19 * MIB}, is_small=False, stream=0)
    assert allocator.blocks() == [(0, 10 * MIB, True), (10 * MIB, 2 * MIB, False), (12 * MIB, 9 * MIB, True), (21 * MIB, 19 * MIB, True)]


def test_replay_frees_what_it_names():
    stats = replay([0, 1, ~0, 2, ~1, ~2], [12 * MIB, 0, 12 * MIB])
    assert (stats.peak_allocated_bytes, stats.peak_reserved_bytes, stats.allocated_bytes) == (12 * MIB, 12 * MIB, 0)


programs = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), st.integers(1, 40 * MIB), st.integers(0, 1)),
        st.tuples(st.just("malloc"), st.integers(1, 2 * MIB), st.integers(0, 1)),
        st.tuples(st.just("free"), st.integers(0, 1 << 30), st.just(0)),
        st.tuples(st.just("request_free"), st.integers(0, 1 << 30), st.just(0)),
        st.tuples(st.just("empty_cache"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(program=programs, expandable=st.booleans())
def test_invariants_over_random_programs(program, expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    live, pending = {}, []
    for action, value, stream in program:
        if action == "malloc":
            live[allocator.malloc(value, stream)] = value
        elif action in ("free", "request_free") and live:
            address = sorted(live)[value % len(live)]
            del live[address]
            getattr(allocator, action)(address)
            if action == "request_free":
                pending.append(address)
        elif action == "empty_cache":
            allocator.empty_cache()
        pending = [address for address in pending if allocator.is_pending(address)]
        check(allocator, live, pending)
    for address in live:
        allocator.free(address)
    allocator.empty_cache()
    assert allocator.blocks() == []
    assert (allocator.stats.allocated_bytes, allocator.stats.reserved_bytes) == (0, 0)


def check(allocator, live, pending):
    blocks, stats = allocator.blocks(), allocator.stats
    for (address, size, _), (following, _, _) in zip(blocks, blocks[1:]):
        assert address + size <= following, "blocks overlap"
    by_address = {address: size for address, size, in_use in blocks if in_use}
    assert set(by_address) == set(live) | set(pending)
    assert all(by_address[address] >= requested for address, requested in live.items())
    assert stats.allocated_bytes == sum(by_address[address] for address in live)
    assert stats.reserved_bytes == sum(size for _, size, _ in blocks)
    assert stats.peak_reserved_bytes >= stats.reserved_bytes >= sum(by_address.values()) >= stats.allocated_bytes
    for pool in allocator._pools.values():
        block = pool.segment_head
        assert block is None or block.prev is None
        while block is not None and block.next is not None:  # an expandable segment, mapped or not, is without gaps
            assert block.next.prev is block and block.next.address == block.address + block.size
            block = block.next


@pytest.mark.parametrize("expandable", [False, True])
def test_fifty_thousand_events_replay_in_a_moment(expandable):
    numbers = random.Random(0)
    sizes, events, live = [], [], []
    while len(events) < 50_000:
        if len(live) < 50 or (numbers.random() < 0.5 and len(live) < 400):
            live.append(len(sizes))
            events.append(len(sizes))
            sizes.append(numbers.choice([512, 4 * KIB, 300 * KIB, 3 * MIB, 65 * MIB, 65 * MIB, 130 * MIB]))
        else:
            events.append(~live.pop(numbers.randrange(len(live))))
    start = time.process_time()
    stats = replay(events, sizes, expandable_segments=expandable)
    assert time.process_time() - start < 2.0  # 0.2 s on an idle core; the bound leaves room for a busy one
    assert stats.peak_reserved_bytes >= stats.peak_allocated_bytes > 0


def test_an_expandable_segment_of_which_nothing_is_mapped_is_given_back():
    reserved: list[int] = []

    def driver(num_bytes: int) -> int:
        reserved.append(num_bytes)
        return len(reserved) << 61

    allocator = CachingAllocator(expandable_segments=True, driver=driver)
    first = allocator.malloc(30 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.stats.reserved_bytes == 0
    second = allocator.malloc(30 * MIB)
    assert second != first and len(reserved) == 2
    allocator.empty_cache()  # it is in use: it stays
    assert allocator.malloc(30 * MIB) == second + 30 * MIB and len(reserved) == 2
