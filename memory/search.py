"""The fastest plan that fits a card, and why each faster one does not.

A handful of traces (`memory.simulate`) of the run's own step gives recipes (`memory.splice`) for every combination of
what blocks keep and how many stay on the device. Thousands of candidates are then ranked by predicted time
(`memory.timing`), and taken in that order: the sum of live bytes rules most out, and the caching allocator's simulator
decides on *reserved* bytes for those that are left (`memory.assess`).

Everything is predicted. Guidance, precision and the optimizer change what is computed or are the caller's to choose, so
they are taken as given.
"""

import dataclasses
import functools
from collections.abc import Collection

from memory.assess import MARGIN, Assessment, Limits, Workload
from memory.cards import Card
from memory.plan import MemoryPlan, is_checkpointed, resolve_keeps
from memory.ranking import COUNTS, Ranking, SearchResult

HOST_SHARE = 0.8
"""Largest share of the available host memory that a plan which keeps things there may take: pinned memory cannot be swapped out."""
HOST_GAIN = 0.03
"""Share of the step's time that such a plan has to save: predictions of time are no finer."""


def search(
    workload: Workload,
    card: Card,
    *,
    base: MemoryPlan | None = None,
    fixed: Collection[str] = (),
    margin: float = MARGIN,
    host_bytes: int | None = None,
) -> SearchResult:
    """The fastest plan for `workload` that fits `card`.

    `base` gives the fields that are not searched; fields named in `fixed` keep its value. `margin` is the share of the
    card's usable bytes left free; `host_bytes` what the host has (None: what `card` knows, else unlimited).
    Raises PlanError, when `base` with its fixed fields cannot be.
    """
    base, fixed, limits = base or MemoryPlan(), frozenset(fixed), Limits(card, margin=margin, host_bytes=host_bytes)
    if card.unified:
        fixed |= {"resident_blocks", "passes", "boundaries", "kept"}

    ranking = functools.partial(Ranking, workload, card)
    try:
        found = ranking(base, fixed).run(limits)
        if found.best is not None and "passes" not in fixed and found.best.time.waits_for_link:
            # In lockstep the link is asked for less, and more memory is.
            found = _merged(found, ranking(dataclasses.replace(base, passes="lockstep"), fixed | {"passes"}).run(limits))
        if found.best is not None and limits.host_bytes is not None and _could_park(found.best, workload, fixed):
            some = Limits(card, margin=margin, host_bytes=int(HOST_SHARE * limits.host_bytes))
            worth = (1 - HOST_GAIN) * found.best.time.seconds
            parked = ranking(base, fixed).parked(some, worth)
            if parked.best and parked.best.time.seconds > worth:
                parked = dataclasses.replace(parked, best=None)
            found = _merged(found, parked)
        return found
    finally:
        workload.prepare((), ())  # no trace is wanted any more


def _could_park(best: Assessment, workload: Workload, fixed: frozenset[str]) -> bool:
    """Whether the plan computes something twice that it need not, if the host has room for what blocks keep."""
    free = not fixed & {"kept", "checkpoint", "boundaries", *COUNTS}
    return free and is_checkpointed(resolve_keeps(best.plan, workload.num_blocks))


def _merged(one: SearchResult, two: SearchResult) -> SearchResult:
    best = min((found.best for found in (one, two) if found.best), key=lambda best: best.time.seconds, default=None)
    smallest = min(one.smallest, two.smallest, key=lambda smallest: smallest.needed_bytes)
    misses = {miss.plan: miss for miss in (*one.near_misses, *two.near_misses) if miss.time.seconds < (best or smallest).time.seconds}
    counts = {f.name: getattr(one, f.name) + getattr(two, f.name) for f in dataclasses.fields(one) if f.name.startswith("num_")}
    return SearchResult(
        best=best,
        near_misses=tuple(sorted(misses.values(), key=lambda miss: miss.needed_bytes)),
        smallest=smallest,
        **counts,
    )
