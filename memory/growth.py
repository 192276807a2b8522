"""The step of a long model from two short traces, the second one block longer than the first.

Blocks are alike, so a visit in the middle stands for all in the middle. What lies between the visits (the optimizer, sums
over all blocks) is read as a sequence of numbered patterns: the 4n norms of n blocks are one pattern 4n times. Sizes,
counts and numbers that one more block changes are carried on in a straight line. What does not follow such lines
makes `grow` refuse (`SpliceError`), and the model has to be traced in full.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from memory.splice import EDGE, Cell, Layout, Recipe, SpliceError, cells_of, device_bytes
from memory.timeline import Storage, Trace, Visit
from memory.work import Work

_LONGEST_PATTERN = 48  # a block has 28 parameters
_FEWEST_REPEATS = 3

# An item of a sequence: what must be equal in both traces, and numbers that may follow a line.
_Item = tuple[tuple, tuple[float, ...]]


@dataclass(frozen=True)
class _Run:
    """A pattern some times over; each time its numbers grow by the same amounts."""

    first: tuple[_Item, ...]
    steps: tuple[tuple[float, ...], ...]
    repeats: int

    def carried_on(self, longer: "_Run", num_more: int) -> "_Run":
        """What follows this run and its counterpart in the longer model, `num_more` blocks further than this one."""
        if self.kinds != longer.kinds:
            raise SpliceError("what lies between the blocks changes in kind with their number")

        def line(here: tuple[float, ...], there: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(a + (b - a) * num_more for a, b in zip(here, there, strict=True))

        first = tuple((kind, line(here, there)) for (kind, here), (_, there) in zip(self.first, longer.first, strict=True))
        steps = tuple(line(here, there) for here, there in zip(self.steps, longer.steps, strict=True))
        return _Run(first, steps, self.repeats + (longer.repeats - self.repeats) * num_more)

    @property
    def kinds(self) -> list[tuple]:
        return [kind for kind, _ in self.first]

    def items(self) -> Iterator[_Item]:
        for time in range(self.repeats):
            for (kind, numbers), steps in zip(self.first, self.steps, strict=True):
                yield kind, tuple(number + step * time for number, step in zip(numbers, steps, strict=True))


def grow(short: Trace, longer: Trace, keep: str, num_blocks: int) -> Recipe:
    """A recipe for `num_blocks` blocks that all keep `keep`, from traces of fewer, everything resident. Raises SpliceError."""
    if longer.num_blocks != short.num_blocks + 1 or short.num_blocks <= 2 * EDGE:
        raise ValueError(f"traces of {short.num_blocks} and {longer.num_blocks} blocks: one more, and a middle, are needed")
    segments = [[(walk, list(spans)) for walk, spans in groupby(cells_of(trace), _walk_of)] for trace in (short, longer)]
    if [walk for walk, _ in segments[0]] != [walk for walk, _ in segments[1]]:
        raise SpliceError("one more block changes what is walked over")
    num_more = num_blocks - short.num_blocks
    layout: Layout = []
    between: list[Cell] = []
    for (walk, here), (_, there) in zip(*segments, strict=True):
        if walk is None:
            for (_, a), (_, b) in zip(here, there, strict=True):
                between.append(_carried_on(a, b, num_more, between))
                layout.append((None, between[-1]))
        else:
            layout += _stretched(walk, here, there, num_blocks)
    return Recipe(layout, _standing(short, longer, num_more), [keep] * num_blocks)


def _walk_of(entry: tuple[Visit | None, Cell]) -> int | None:
    return None if entry[0] is None else entry[0].walk


def _stretched(walk: int, here: Layout, there: Layout, num_blocks: int) -> Layout:
    """A walk over more blocks. Blocks of the longer trace must be those of the shorter one, and one more."""
    cells, more = ({(visit.block, visit.part): cell for visit, cell in spans} for spans in (here, there))
    parts = [visit.part for visit, _ in here if visit.block == here[0][0].block]
    length = len(here) // len(parts)
    if (len(cells), len(more), len(there)) != (len(here), len(there), len(here) + len(parts)):
        raise SpliceError(f"walk {walk} does not visit every block once")
    if not all(cell.same_as(cells[_counterpart(block, length + 1, length), part]) for (block, part), cell in more.items()):
        raise SpliceError(f"blocks differ in walk {walk}")
    blocks = range(num_blocks) if here[0][0].block == 0 else reversed(range(num_blocks))
    return [(Visit(walk, block, part), cells[_counterpart(block, num_blocks, length), part]) for block in blocks for part in parts]


def _counterpart(block: int, num_blocks: int, length: int) -> int:
    """The block of a model of `length` that is like `block` of `num_blocks`: by its distance from the nearer end."""
    if block <= EDGE:
        return block
    return max(EDGE, block - num_blocks + length)


def _standing(short: Trace, longer: Trace, num_more: int) -> list[Storage]:
    """What lives throughout, in the order of the short trace; the other blocks' weights come where block `EDGE`'s are."""
    def items(trace: Trace) -> list[_Item]:
        found = [trace.storages[index] for index in trace.standing]
        return [_born(s)[:1] + ((s.num_bytes, s.block),) if s.block is not None else _born(s) for s in found]

    return [Storage(num_bytes=int(numbers[0]), category=kind[1], place=kind[2],
                    block=int(numbers[1]) if len(numbers) > 1 else None)
            for kind, numbers in _sequence(items(short), items(longer), num_more)]


def _born(storage: Storage) -> _Item:
    return ("born", storage.category, storage.place, storage.in_place), (storage.num_bytes,)


def _sequence(here: Sequence[_Item], there: Sequence[_Item], num_more: int) -> list[_Item]:
    runs, counterparts = list(_runs(here)), list(_runs(there))
    if len(runs) != len(counterparts):
        raise SpliceError("what lies between the blocks changes in kind with their number")
    return [item for a, b in zip(runs, counterparts, strict=True) for item in a.carried_on(b, num_more).items()]


def _runs(items: Sequence[_Item]) -> Iterator[_Run]:
    """The sequence as runs, each the one that covers most from where it starts."""
    position = 0
    while position < len(items):
        best = _Run((items[position],), (tuple(0 for _ in items[position][1]),), 1)
        for period in range(1, min(_LONGEST_PATTERN, (len(items) - position) // _FEWEST_REPEATS) + 1):
            run = _run_at(items, position, period)
            if run.repeats >= _FEWEST_REPEATS and run.repeats * period > best.repeats * len(best.first):
                best = run
        yield best
        position += best.repeats * len(best.first)


def _run_at(items: Sequence[_Item], position: int, period: int) -> _Run:
    first, second = (tuple(items[start:start + period]) for start in (position, position + period))
    alike = [kind for kind, _ in first] == [kind for kind, _ in second]
    steps = tuple(tuple(b - a for a, b in zip(x[1], y[1])) for x, y in zip(first, second)) if alike else ()
    repeats = 1
    while alike and position + (repeats + 1) * period <= len(items):
        again = items[position + repeats * period:position + (repeats + 1) * period]
        alike = all(kind == wanted and numbers == tuple(n + s * repeats for n, s in zip(start, step, strict=True))
                    for (kind, numbers), (wanted, start), step in zip(again, first, steps, strict=True))
        repeats += alike
    return _Run(first, steps, repeats)


def _carried_on(short: Cell, longer: Cell, num_more: int, before: Sequence[Cell]) -> Cell:
    """A span between visits, as it is with `num_more` more blocks; `before`: those that come before it, grown already."""
    if (short.phase, short.records_graph) != (longer.phase, longer.records_graph):
        raise SpliceError("one more block changes what is walked over")
    if short.same_as(longer) and short.work == longer.work:
        return short
    storages: list[Storage] = []
    deaths: list[tuple[int, tuple]] = []
    level = peak = 0
    for kind, numbers in _sequence(_events(short), _events(longer), num_more):
        whole = [int(number) for number in numbers]
        if kind[0] == "born":
            storages.append(Storage(num_bytes=whole[0], category=kind[1], place=kind[2], in_place=kind[3]))
            level += device_bytes(storages[-1])
            peak = max(peak, level)
            continue
        if kind[0] == "here":
            gone, reference = storages[whole[0]], ("here", *whole)
        elif kind[0] == "between":
            gone, reference = before[whole[0]].storages[whole[1]], ("between", *whole)
        else:
            walk, block, part, num_bytes, k = whole
            gone = Storage(num_bytes=num_bytes, category=kind[1], place="device")
            reference = ("walk", walk, block, part, num_bytes, kind[1], k)
        deaths.append((len(storages), reference))
        level -= device_bytes(gone)
    work = [Work(kind[0], numbers[0], int(numbers[1]))
            for kind, numbers in _sequence(_work(short), _work(longer), num_more)]
    return replace(short, storages=tuple(storages), deaths=tuple(deaths), work=tuple(work), net_bytes=level, peak_bytes=peak)


def _events(cell: Cell) -> list[_Item]:
    """Births and deaths in order."""
    items: list[_Item] = []
    born = 0
    for births, (kind, *where) in cell.deaths:
        items += [_born(storage) for storage in cell.storages[born:births]]
        born = births
        if kind == "walk":
            walk, block, part, num_bytes, category, k = where
            items.append(((kind, category), (walk, block, part, num_bytes, k)))
        else:
            items.append(((kind,), tuple(where)))
    return items + [_born(storage) for storage in cell.storages[born:]]


def _work(cell: Cell) -> list[_Item]:
    return [((work.kind,), (work.flops, work.num_bytes)) for work in cell.work]
