"""What the caching allocator's simulator is made of: rules of sizes, blocks of memory, and pools of the free ones."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from itertools import pairwise

MIN_BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
LARGE_REQUEST_BYTES = 10 << 20
LARGE_ROUND_BYTES = 2 << 20


def round_request(num_bytes: int) -> int:
    """Bytes a request of `num_bytes` occupies in its block: multiples of 512. An empty tensor requests nothing."""
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_bytes(rounded_bytes: int) -> int:
    """Bytes the native allocator asks of the driver when no free block serves a rounded request."""
    if rounded_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < LARGE_REQUEST_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-rounded_bytes // LARGE_ROUND_BYTES) * LARGE_ROUND_BYTES


class Block:
    """A range of one segment; neighbours are linked by address."""

    __slots__ = ("address", "size", "pool", "prev", "next", "in_use", "mapped")

    def __init__(self, address: int, size: int, pool: "Pool"):
        self.address, self.size, self.pool = address, size, pool
        self.prev: Block | None = None
        self.next: Block | None = None
        self.in_use = False
        self.mapped = True


class Pool:
    """Free blocks of one size class and stream."""

    __slots__ = ("least_rest", "page_bytes", "free", "segment_head")

    def __init__(self, is_small: bool, expandable_segments: bool):
        self.least_rest = MIN_BLOCK_BYTES if is_small or expandable_segments else SMALL_REQUEST_BYTES + 1
        self.page_bytes = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        self.free: list[tuple[int, int, Block]] = []  # (size, address, block), sorted: best fit by bisection
        self.segment_head: Block | None = None  # first block of the expandable segment

    def add(self, block: Block) -> None:
        """Take a free block in."""
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Take a free block out."""
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def is_split(self, rest: int) -> bool:
        """Whether a block is cut where `rest` bytes of it are not needed."""
        return rest >= self.least_rest

    def pieces(self, address: int, num_bytes: int, in_use: Mapping[int, int]) -> Iterator[tuple[int, int, bool]]:
        """(address, bytes, free) of the blocks of a segment in which those of `in_use` (address -> bytes) are held.

        A rest that is too small to be split off belongs to the block before it.
        """
        position, end = address, address + num_bytes
        for start, limit in pairwise([*sorted(in_use), end]):
            if start > position:
                yield position, start - position, True
            rest = limit - start - in_use[start]
            position = limit - (rest if self.is_split(rest) else 0)
            yield start, position - start, False
        if position < end:
            yield position, end - position, True


def link(block: Block, before: Block | None, after: Block | None) -> None:
    """Put a block between its neighbours by address."""
    block.prev, block.next = before, after
    if before is not None:
        before.next = block
    if after is not None:
        after.prev = block


def room_of(block: Block) -> int:
    """Bytes of a block and of what it could grow into."""
    following = block.next
    return block.size + (following.size if following is not None and not following.mapped else 0)
