"""A simulator of CUDA's caching allocator: what a list of allocations and frees will *reserve*.

"Fits" is a question about reserved bytes, and reserved bytes depend on how requests are rounded, pooled,
split, merged and cached. The rules are those of torch's `c10/cuda/CUDACachingAllocator.cpp` (2.13), native
and with `expandable_segments:True`:

* a request is rounded up to 512 bytes; up to 1 MiB it is served by the small pool, above by the large pool;
* each stream has pools of its own: memory freed on one stream is never handed to another;
* a request takes the smallest free block that is large enough, at the lowest address among equals;
* a miss reserves a new segment: 2 MiB in the small pool, 20 MiB for requests under 10 MiB, otherwise the request
  rounded up to 2 MiB; with expandable segments a pool is one growing segment, mapped in pages of 2 or 20 MiB;
* a block is split when the rest is at least 512 bytes (small pool, expandable) or over 1 MiB (large pool);
* a freed block merges with free neighbours of its segment and stays reserved until the cache is given back: then every segment
  (or mapped page) without a live block goes.

Not simulated: a full card (whoever asks compares what is reserved with what there is), CUDA graphs' private pools,
`max_split_size_mb` and garbage collection (both off by default).
The driver's own address choice is unknown; addresses here grow, which decides ties between equal blocks only.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memory.pools import (
    LARGE_ROUND_BYTES,
    SMALL_REQUEST_BYTES,
    Block,
    Pool,
    link,
    room_of,
    round_request,
    segment_bytes,
)

_ENDLESS = 1 << 60  # address space of an expandable segment; the real one is 9/8 of the card, mapped in part


@dataclass(kw_only=True)
class AllocatorStats:
    """The counters of `torch.cuda.memory_stats()` that planning needs, in bytes."""

    allocated_bytes: int = 0
    """In blocks that tensors hold now."""
    reserved_bytes: int = 0
    """Held from the driver."""
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0


class CachingAllocator:
    """One device's allocator. `driver` maps a new segment's bytes to its address; by default addresses grow."""

    def __init__(self, *, expandable_segments: bool = False, driver: Callable[[int], int] | None = None):
        self.expandable_segments = expandable_segments
        self.stats = AllocatorStats()
        self._pools: dict[tuple[bool, int], Pool] = {}
        self._live: dict[int, Block] = {}  # address -> block that is active
        self._pending: set[int] = set()  # addresses freed by the program, but still awaited by a stream
        self._next_address = LARGE_ROUND_BYTES
        self._driver = driver or self._ascending

    # ---- what a program does -------------------------------------------------------------------------------------

    def malloc(self, num_bytes: int, stream: int = 0) -> int:
        """Serve a request and return its address."""
        size = round_request(num_bytes)
        pool = self._pool(size <= SMALL_REQUEST_BYTES, stream)
        block = self._best_fit(pool, size)
        if block is None:
            block = self._grow(pool, size) if self.expandable_segments else self._new_segment(pool, size)
        self._split(block, size)
        self._use(block)
        return block.address

    def _use(self, block: Block) -> None:
        block.in_use = True
        self._live[block.address] = block
        stats = self.stats
        stats.allocated_bytes += block.size
        if stats.allocated_bytes > stats.peak_allocated_bytes:
            stats.peak_allocated_bytes = stats.allocated_bytes

    def free(self, address: int) -> None:
        """Free at once: no other stream uses the block."""
        self.request_free(address)
        self.complete_free(address)

    def request_free(self, address: int) -> None:
        """The program dropped the block; a stream named by `record_stream` may still use it."""
        self.stats.allocated_bytes -= self._live[address].size
        self._pending.add(address)

    def complete_free(self, address: int) -> None:
        """Every stream has passed the block: it can be reused."""
        self._pending.remove(address)
        block = self._live.pop(address)
        block.in_use = False
        self._merge(block)
        block.pool.add(block)

    def is_pending(self, address: int) -> bool:
        """Whether the block was freed by the program but is still awaited by a stream."""
        return address in self._pending

    def empty_cache(self) -> None:
        """Give back every segment, or expandable page, that holds no live block."""
        for address in list(self._pending):  # the real allocator synchronizes with the streams first
            self.complete_free(address)
        for pool in self._pools.values():
            for _, _, block in list(pool.free):
                if pool.segment_head is not None:
                    self._unmap_pages(block)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    self.stats.reserved_bytes -= block.size
            head = pool.segment_head
            if head is not None and not head.mapped and head.next is None:
                pool.segment_head = None  # nothing of it is mapped: its addresses are given back, too

    def adopt(self, address: int, num_bytes: int, in_use: Mapping[int, int], *, is_small: bool, stream: int) -> None:
        """Start out with a native segment in which the blocks `in_use` (address -> bytes, rounded) are held."""
        self._take(num_bytes)
        pool, previous = self._pool(is_small, stream), None
        for start, size, is_free in pool.pieces(address, num_bytes, in_use):
            block = Block(start, size, pool)
            link(block, previous, None)
            previous = block
            if is_free:
                pool.add(block)
            else:
                self._use(block)

    def blocks(self) -> list[tuple[int, int, bool]]:
        """(address, bytes, in use) of every block that occupies reserved memory, by address."""
        found = [(block.address, block.size, True) for block in self._live.values()]
        for pool in self._pools.values():
            found.extend((block.address, block.size, False) for _, _, block in pool.free)
        return sorted(found)

    # ---- finding memory ------------------------------------------------------------------------------------------

    def _pool(self, is_small: bool, stream: int) -> Pool:
        pool = self._pools.get((is_small, stream))
        if pool is None:
            pool = self._pools[is_small, stream] = Pool(is_small, self.expandable_segments)
        return pool

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        free = pool.free
        index = bisect_left(free, (size,))
        if index == len(free):
            return None
        if pool.segment_head is not None:
            # The block at the growing end counts with the room it could grow into, so it is taken last.
            while index + 1 < len(free) and room_of(free[index + 1][2]) < room_of(free[index][2]):
                index += 1
        return free.pop(index)[2]

    def _take(self, num_bytes: int) -> None:
        """Account for `num_bytes` more from the driver."""
        self.stats.reserved_bytes += num_bytes
        self.stats.peak_reserved_bytes = max(self.stats.peak_reserved_bytes, self.stats.reserved_bytes)

    def _new_segment(self, pool: Pool, size: int) -> Block:
        num_bytes = segment_bytes(size)
        self._take(num_bytes)
        return Block(self._driver(num_bytes), num_bytes, pool)

    def _ascending(self, num_bytes: int) -> int:
        address = self._next_address
        self._next_address += num_bytes
        return address

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if not block.pool.is_split(rest):
            return
        remainder = Block(block.address + size, rest, block.pool)
        block.size = size
        link(remainder, block, block.next)
        block.pool.add(remainder)

    def _merge(self, block: Block) -> None:
        """Absorb free neighbours of the same kind (mapped or not). The block itself is in no list."""
        for neighbour in (block.prev, block.next):
            if neighbour is None or neighbour.in_use or neighbour.mapped != block.mapped:
                continue
            if neighbour.mapped:
                neighbour.pool.remove(neighbour)
            if neighbour.pool.segment_head is neighbour:
                neighbour.pool.segment_head = block
            if neighbour is block.prev:
                block.address = neighbour.address
                link(block, neighbour.prev, block.next)
            else:
                link(block, block.prev, neighbour.next)
            block.size += neighbour.size

    # ---- expandable segments -------------------------------------------------------------------------------------

    def _grow(self, pool: Pool, size: int) -> Block:
        """Map pages at the lowest address where free and unmapped neighbours together hold `size`."""
        if pool.segment_head is None:
            pool.segment_head = Block(self._driver(_ENDLESS), _ENDLESS, pool)
            pool.segment_head.mapped = False
        candidate = self._growth_start(pool, size)
        if not candidate.mapped:
            self._map_pages(candidate, min(candidate.size, size))
        while candidate.size < size:
            following = candidate.next
            self._map_pages(following, min(size - candidate.size, following.size))
            candidate = following  # it absorbed the block before it
        pool.remove(candidate)
        return candidate

    @staticmethod
    def _growth_start(pool: Pool, size: int) -> Block:
        block = pool.segment_head
        while True:  # ends: the last block is unmapped and endless
            if not block.mapped:
                start = block.prev if block.prev is not None and not block.prev.in_use else block
                room, walker = 0, start
                while room < size and walker is not None and not walker.in_use:
                    room += walker.size
                    walker = walker.next
                if room >= size:
                    return start
            block = block.next

    def _map_pages(self, block: Block, size: int) -> None:
        page = block.pool.page_bytes
        num_bytes = -(-size // page) * page
        self._take(num_bytes)
        rest = Block(block.address + num_bytes, block.size - num_bytes, block.pool)
        rest.mapped = False
        block.mapped = True
        block.size = num_bytes
        if rest.size:
            link(rest, block, block.next)
        self._merge(block)
        block.pool.add(block)

    def _unmap_pages(self, block: Block) -> None:
        """Give back the whole pages inside a free block; what lies before and after them stays mapped."""
        page, pool = block.pool.page_bytes, block.pool
        offset = block.address - pool.segment_head.address  # pages are relative to where the segment starts
        begin, end = -(-offset // page) * page, (offset + block.size) // page * page
        if begin >= end:
            return
        pool.remove(block)
        before, after = begin - offset, offset + block.size - end
        if before:
            head = Block(block.address, before, pool)
            link(head, block.prev, block)
            pool.add(head)
        if after:
            tail = Block(block.address + block.size - after, after, pool)
            link(tail, block, block.next)
            pool.add(tail)
        block.address, block.size, block.mapped = block.address + before, end - begin, False
        self.stats.reserved_bytes -= block.size
        self._merge(block)


def replay(events: list[int], sizes: list[int], *, expandable_segments: bool = False) -> AllocatorStats:
    """Peaks after a list of events: `i` allocates storage i of `sizes[i]` bytes, `~i` frees it."""
    allocator = CachingAllocator(expandable_segments=expandable_segments)
    malloc, free, addresses = allocator.malloc, allocator.free, {}
    for event in events:
        if event >= 0:
            if sizes[event]:  # an empty tensor asks the allocator for nothing
                addresses[event] = malloc(sizes[event])
        elif sizes[~event]:
            free(addresses.pop(~event))
    return allocator.stats
