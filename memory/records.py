"""What a recorder (`memory.simulate`) writes down while a step runs, and the trace that comes of it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from memory.timeline import BACKWARD, FORWARD, OPTIMIZER, Span, Storage, Trace, Visit
from memory.work import Work


@dataclass(kw_only=True)
class Record:
    """A storage while recording; categories are settled at the end."""

    num_bytes: int
    born: str
    """The phase."""
    standing: bool
    category: str | None = None
    place: str = "device"
    block: int | None = None
    died: str | None = None
    """The phase; None: it is alive at the end."""
    in_place: bool = False


@dataclass(kw_only=True)
class Mark:
    """Where a span begins."""

    event: int
    work: int
    phase: str
    visit: Visit | None
    records_graph: bool


def settled(
    records: Sequence[Record],
    events: Sequence[int],
    work: Sequence[Work],
    marks: Sequence[Mark],
    *,
    survivors: Collection[int],
    copies: Mapping[int, tuple[int, int, int]],
    num_blocks: int,
) -> Trace:
    """The trace: births and deaths of what does not stand, in spans from each mark to the next.

    `survivors`: records that are alive at the end. `copies`: number of a copy's work -> (to record, from record, bytes).
    """
    standing = [i for i, record in enumerate(records) if record.standing or i in survivors]
    skipped = {*standing, *(~index for index in standing)}
    kept = tuple(event for event in events if event not in skipped)
    position = list(accumulate((event not in skipped for event in events), initial=0))  # of an event among those that are kept
    work = list(work)
    for number, (destination, source, num_bytes) in copies.items():
        kind = _link(records[destination], records[source])
        if kind is not None:
            work[number] = Work(kind, 0.0, num_bytes)
    spans = tuple(
        Span(phase=mark.phase, start=position[mark.event], stop=position[end.event], work=tuple(work[mark.work : end.work]),
             visit=mark.visit, records_graph=mark.records_graph)
        for mark, end in pairwise(marks) if mark.visit is not None or (mark.event, mark.work) != (end.event, end.work)
    )
    storages = tuple(
        Storage(num_bytes=r.num_bytes, category=_category(r), place=r.place, block=r.block, in_place=r.in_place)
        for r in records
    )
    return Trace(storages=storages, events=kept, spans=spans, standing=tuple(standing), num_blocks=num_blocks)


def _category(record: Record) -> str:
    if record.category is not None:
        return record.category
    if record.standing:
        return "other"
    if record.died is None:
        return "optimizer" if record.born == OPTIMIZER else "other"
    if record.born == FORWARD and record.died == BACKWARD:
        return "saved activations"
    return "working set"


def _link(destination: Record, source: Record) -> str | None:
    """The kind of a copy over the host link, weights told apart since they may stay; None if it does not cross."""
    if (destination.place == "device") == (source.place == "device"):
        return None
    if destination.place != "device":
        return "to host"
    return "weights" if source.category == "weights" else "to device"
