"""Traces of other plans from a few traces: blocks are alike, so one visit of each kind is enough.

A recorded step is a sequence of spans: visits of blocks, and what lies between. A visit is rewritten so that it can be
put elsewhere (a `Cell`): a death names what dies by where it was born, relative to this block. Cells are kept by what
can make them differ: the walk they belong to, the place in it (the outer two blocks at either end are
special), and what this block and its neighbours keep for backward. `Recipe.splice` then writes the trace of
any choice of keeps and of resident blocks in about 20 ms, `Recipe.peak_bytes` gets the peak alone in a fraction of one.

Two cells that should be equal and are not make the splice refuse (`SpliceError`), and so does a splice that does not free
everything exactly once; such a plan has to be traced in full.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from memory.masters import aligned
from memory.plan import is_checkpointed, resident_indices
from memory.pools import round_request
from memory.slabs import Packing
from memory.timeline import BACKWARD, Span, Storage, Trace, Visit
from memory.work import Work

EDGE = 2  # blocks this near to either end may differ: inputs that need no gradient, nothing to prefetch

# A death's address: ("here", k), the k-th birth of the same span; ("between", number, k), of a span between visits; or
# ("walk", walk, block relative or absolute, part, bytes, category, k), the k-th last of the storages of that size and
# category that a visit leaves behind: what a block passes on comes last, whatever it keeps.
_Reference = tuple


class SpliceError(RuntimeError):
    """Blocks that should be alike are not, or a kind of visit was never recorded."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One span, movable."""

    storages: tuple[Storage, ...]
    """What is born, in order."""
    deaths: tuple[tuple[int, _Reference], ...]
    """(births before it, what dies), in order."""
    work: tuple[Work, ...]
    phase: str
    records_graph: bool
    net_bytes: int
    """Device bytes gained over the cell, rounded as the allocator does."""
    peak_bytes: int
    """Largest gain within the cell."""

    @cached_property
    def left_behind(self) -> dict[tuple[int, str], list[int]]:
        """Births that outlive the span, by size and category, in order."""
        gone = {reference[1] for _, reference in self.deaths if reference[0] == "here"}
        found: dict[tuple[int, str], list[int]] = {}
        for number, storage in enumerate(self.storages):
            if number not in gone:
                found.setdefault(_kind(storage), []).append(number)
        return found

    @cached_property
    def stores(self) -> list[Work]:
        """The work of copies to the host."""
        return [work for work in self.work if work.kind == "to host"]

    def same_as(self, other: "Cell") -> bool:
        return (self.storages, self.deaths, self.phase) == (other.storages, other.deaths, other.phase)


def cells_of(trace: Trace) -> Iterator[tuple[Visit | None, Cell]]:
    """Visit and cell of every span of a trace, in order."""
    born: dict[int, tuple[int, int]] = {}  # storage -> (span, birth number in it)
    births = [[e for e in trace.events[span.start : span.stop] if e >= 0] for span in trace.spans]
    dies_in: dict[int, int] = {}
    number_between = {}
    for number, span in enumerate(trace.spans):
        if span.visit is None:
            number_between[number] = len(number_between)
        for k, storage in enumerate(births[number]):
            born[storage] = (number, k)
        dies_in.update((~e, number) for e in trace.events[span.start : span.stop] if e < 0)
    for number, span in enumerate(trace.spans):
        deaths, gain, peak, num_births = [], 0, 0, 0
        for event in trace.events[span.start : span.stop]:
            storage = trace.storages[event if event >= 0 else ~event]
            num_bytes = device_bytes(storage)
            if event >= 0:
                num_births += 1
                gain += num_bytes
                peak = max(peak, gain)
                continue
            gain -= num_bytes
            origin, k = born[~event]
            if origin == number:
                reference = ("here", k)
            elif trace.spans[origin].visit is None:
                reference = ("between", number_between[origin], k)
            else:
                walk, block, part = trace.spans[origin].visit
                left = [s for s in births[origin][k:] if _kind(trace.storages[s]) == _kind(storage) and dies_in[s] != origin]
                relative = block - (span.visit.block if span.visit else 0)
                reference = ("walk", walk, relative, part, *_kind(storage), len(left))
            deaths.append((num_births, reference))
        yield span.visit, Cell(
            storages=tuple(trace.storages[storage] for storage in births[number]),
            deaths=tuple(deaths),
            work=span.work,
            phase=span.phase,
            records_graph=span.records_graph,
            net_bytes=gain,
            peak_bytes=peak,
        )


Layout = list[tuple[Visit | None, Cell]]
"""A step in order: each span's visit (None between visits) and cell."""


class Recipe:
    """What is known about a step: one layout of all of it, and cells of other choices.

    `layout` and `standing` are of the whole model, everything resident, with `keeps[i]` what block i keeps.
    """

    def __init__(self, layout: Layout, standing: Sequence[Storage], keeps: Sequence[str]):
        self.num_blocks = len(keeps)
        self._layout = layout
        self._cells: dict[tuple, Cell | None] = {}  # None: recorded, but not always the same
        self._is_checkpointed = is_checkpointed(keeps)
        self._keeps: tuple[str, ...] | None = tuple(keeps)  # of the layout, if it is of this very plan
        self._learn(layout, keeps)
        self._standing = standing
        self.block_weights: list[list[Storage]] = [[] for _ in range(self.num_blocks)]
        for storage in standing:
            if storage.block is not None:
                self.block_weights[storage.block].append(storage)

    @classmethod
    def of(cls, trace: Trace, keeps: Sequence[str]) -> "Recipe":
        """A recipe from a full trace."""
        return cls(list(cells_of(trace)), [trace.storages[index] for index in trace.standing], keeps)

    def learn(self, trace: Trace, keeps: Sequence[str]) -> None:
        """Remember the visits of a trace, perhaps of a shorter model, whose blocks keep `keeps`."""
        if len(keeps) != trace.num_blocks:
            raise ValueError(f"{len(keeps)} choices for {trace.num_blocks} blocks")
        self._learn(cells_of(trace), keeps)

    def _learn(self, layout: Iterable[tuple[Visit | None, Cell]], keeps: Sequence[str]) -> None:
        for visit, cell in layout:
            if visit is None:
                continue
            for key in _keys(visit, keeps, cell.records_graph):
                known = self._cells.setdefault(key, cell)
                if known is not None and not known.same_as(cell):
                    self._cells[key] = None

    def with_visits_of(self, short: Trace, variant: Trace, keeps: Sequence[str]) -> "Recipe | None":
        """A recipe for a variant of the plan without a full trace of it.

        `short` and `variant` are traces of the same shorter model without and with it. A span between visits is taken
        from the full trace if the variant leaves it alone, or from the variant if the number of blocks does. None if
        neither is so.
        """
        spans = [
            [cell for visit, cell in self._layout if visit is None],
            *([cell for visit, cell in cells_of(trace) if visit is None] for trace in (short, variant)),
        ]
        if len({len(cells) for cells in spans}) > 1:
            return None
        between = []
        for full, small, changed in zip(*spans, strict=True):
            if not small.same_as(changed) and not small.same_as(full):
                return None
            between.append(full if small.same_as(changed) else changed)
        remaining = iter(between)
        other = copy.copy(self)
        other._layout, other._cells = [(visit, cell if visit else next(remaining)) for visit, cell in self._layout], {}
        other._keeps = None
        other.learn(variant, keeps)
        return other

    def visits(self, keeps: Sequence[str]) -> Iterator[tuple[Visit | None, Cell]]:
        """(visit, cell) of every span of the step, in order. Raises SpliceError."""
        if tuple(keeps) == self._keeps:
            yield from self._layout
            return
        if is_checkpointed(keeps) != self._is_checkpointed:
            # What blocks share (the time embedding) is saved by checkpoints, so its life depends on there being one.
            raise SpliceError("with and without any checkpointed block differ between the blocks; trace this plan in full")
        for visit, cell in self._layout:
            yield visit, cell if visit is None else self._cell(visit, keeps, cell.records_graph)

    def _cell(self, visit: Visit, keeps: Sequence[str], records_graph: bool) -> Cell:
        for key in _keys(visit, keeps, records_graph):
            cell = self._cells.get(key)
            if cell is not None:
                return cell
        kept = keeps[visit.block] if records_graph else "anything"
        problem = "differ among blocks" if key in self._cells else "were not recorded"
        where = f"visits of block {visit.block} of {self.num_blocks} keeping {kept}"
        raise SpliceError(f"{where} {problem}; trace this plan in full")

    def peak_bytes(self, keeps: Sequence[str]) -> int:
        """Largest gain of device bytes over the standing storages within the step."""
        level = peak = 0
        for _, cell in self.visits(keeps):
            peak = max(peak, level + cell.peak_bytes)
            level += cell.net_bytes
        return peak

    def standing(self, num_resident: int | None, num_buffers: int) -> list[Storage]:
        """The storages that live throughout, in the order in which a plan makes them; without `slabs`."""
        resident = resident_indices(self.num_blocks, num_resident)
        flats = [sum(aligned(s.num_bytes) for s in weights) for weights in self.block_weights]
        storages: list[Storage] = []
        for block, weights in enumerate(self.block_weights):
            if block in resident:
                storages += weights
            else:
                storages.append(Storage(num_bytes=flats[block], category="weights", place="pinned"))
        streamed = [flats[block] for block in range(self.num_blocks) if block not in resident]
        slot = Storage(num_bytes=max(streamed, default=0), category="transfer buffers", place="device")
        storages += [slot] * min(num_buffers, len(streamed))
        slabs = ("saved activations", "pinned")
        return storages + [s for s in self._standing if s.block is None and (s.category, s.place) != slabs]

    def slabs(self, keeps: Sequence[str]) -> list[int]:
        """Sizes of the host slabs that activation offload will take: as `memory.slabs` fills them."""
        packing, free, taken = Packing(self.num_blocks), Counter(), Counter()
        for _, cell in self.visits(keeps):
            if cell.phase == BACKWARD:  # when it is through, nothing waits on the host
                free.update(taken)
                taken.clear()
            for num_bytes in (aligned(work.num_bytes) for work in cell.stores):
                taken[num_bytes] += 1
                if free[num_bytes]:
                    free[num_bytes] -= 1
                else:
                    packing.place(num_bytes)
        return packing.sizes

    def splice(self, keeps: Sequence[str], *, num_resident: int | None = None, num_buffers: int = 2) -> Trace:
        """The trace of the step when the blocks keep `keeps` and `num_resident` of them stay on the device (None: all)."""
        slabs = [Storage(num_bytes=n, category="saved activations", place="pinned") for n in self.slabs(keeps)]
        standing = slabs + self.standing(num_resident, num_buffers)
        storages, events, spans = list(standing), [], []
        first: dict[tuple, tuple[int, Cell]] = {}  # span -> storage number of its first birth, and its cell
        number = 0
        for visit, cell in self.visits(keeps):
            start, here = len(events), len(storages)
            origin = ("between", number) if visit is None else ("walk", *visit)
            number += visit is None
            first[origin] = here, cell
            storages += cell.storages
            done = 0
            for births, reference in cell.deaths:
                events.extend(range(here + done, here + births))
                done = births
                events.append(~_resolve(reference, here, visit, first))
            events.extend(range(here + done, here + len(cell.storages)))
            spans.append(
                Span(
                    phase=cell.phase,
                    start=start,
                    stop=len(events),
                    work=cell.work,
                    visit=visit,
                    records_graph=cell.records_graph,
                )
            )
        num_born = len(storages) - len(standing)
        if len(events) != 2 * num_born or len(set(events)) != len(events):
            raise SpliceError("the visits do not fit together: not all that is made is freed once; trace this plan in full")
        return Trace(
            storages=tuple(storages),
            events=tuple(events),
            spans=tuple(spans),
            standing=tuple(range(len(standing))),
            num_blocks=self.num_blocks,
        )


def device_bytes(storage: Storage) -> int:
    """What the allocator takes for a storage on the device; 0 for one on the host."""
    return round_request(storage.num_bytes) if storage.place == "device" else 0


def _kind(storage: Storage) -> tuple[int, str]:
    return storage.num_bytes, storage.category


def _resolve(reference: _Reference, here: int, visit, first: dict[tuple, tuple[int, Cell]]) -> int:
    kind, *where = reference
    if kind == "here":
        return here + where[0]
    if kind == "between":
        return first["between", where[0]][0] + where[1]
    walk, block, part, num_bytes, category, k = where
    start, cell = first.get(("walk", walk, block + (visit.block if visit else 0), part), (0, None))
    left = cell.left_behind.get((num_bytes, category), ()) if cell else ()
    if k > len(left):
        raise SpliceError(f"a visit frees what was never made (walk {walk}, {category}); trace this plan in full")
    return start + left[-k]


def _keys(visit: Visit, keeps: Sequence[str], records_graph: bool) -> list[tuple]:
    """What a visit is filed under, from the narrowest description to the widest that may do."""
    walk, block, part = visit
    place = (walk, part, min(block, EDGE), min(len(keeps) - 1 - block, EDGE))
    if not records_graph:
        return [place]
    window = tuple(keeps[max(0, block - 2) : block + 2])
    before = keeps[block - 1] if block else None
    return [(*place, window), (*place, before, keeps[block]), (*place, keeps[block])]
