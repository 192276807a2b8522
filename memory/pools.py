"""What the caching allocator's simulator is made of: blocks of memory, and pools of the free ones."""

from bisect import bisect_left, insort

MIN_BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
LARGE_REQUEST_BYTES = 10 << 20
LARGE_ROUND_BYTES = 2 << 20


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

    __slots__ = ("is_small", "page_bytes", "free", "segment_head")

    def __init__(self, is_small: bool):
        self.is_small = is_small
        self.page_bytes = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        self.free: list[tuple[int, int, Block]] = []  # (size, address, block), sorted: best fit by bisection
        self.segment_head: Block | None = None  # first block of the expandable segment

    def add(self, block: Block) -> None:
        """Take a free block in."""
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Take a free block out."""
        del self.free[bisect_left(self.free, (block.size, block.address))]


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
