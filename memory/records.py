"""What a recorder (`memory.simulate`) writes down while a step runs, and the trace that comes of it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from memory.timeline import BACKWARD, FORWARD, OPTIMIZER, Span, Storage, Trace, Visit
from memory.work import Work


@dataclass(kw_only=True)
class Record:
    """A storage while recording; categories are settled at the end."""

    num_bytes: int
    category: str | None
    place: str
    block: int | None
    born: str
    standing: bool
    died: str | None = None
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
    skipped = set(standing) | {~index for index in standing}
    kept, spans, position = [], [], {}
    for number, event in enumerate(events):
        position[number] = len(kept)
        if event not in skipped:
            kept.append(event)
    position[len(events)] = len(kept)
    work = list(work)
    for number, (destination, source, num_bytes) in copies.items():
        kind = _link(records[destination], records[source])
        if kind is not None:
            work[number] = Work(kind, 0.0, num_bytes)
    for mark, end in pairwise(marks):
        if mark.event == end.event and mark.work == end.work and mark.visit is None:
            continue
        spans.append(
            Span(
                phase=mark.phase,
                start=position[mark.event],
                stop=position[end.event],
                work=tuple(work[mark.work : end.work]),
                visit=mark.visit,
                records_graph=mark.records_graph,
            )
        )
    storages = tuple(
        Storage(num_bytes=r.num_bytes, category=_category(r), place=r.place, block=r.block, in_place=r.in_place)
        for r in records
    )
    return Trace(
        storages=storages,
        events=tuple(kept),
        spans=tuple(spans),
        standing=tuple(standing),
        num_blocks=num_blocks,
    )


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
