"""Plans ranked by predicted time, and the first of them that fits: what `memory.search` runs, once or more often.

Recipes from a few traces rank thousands of candidates. They are taken in that order: the sum of live bytes rules most
out, and the caching allocator's simulator decides on *reserved* bytes for those that are left.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memory.assess import Assessment, Limits, Workload, assess_in_full
from memory.cards import Card
from memory.growth import grow
from memory.plan import MemoryPlan, PlanError, Where, is_checkpointed, resident_indices, resolve_keeps
from memory.splice import Recipe, SpliceError
from memory.timeline import Trace
from memory.variants import Candidate, Variant

SEARCHED = (
    "resident_blocks",
    "offload_buffers",
    "passes",
    "num_keep_attention",
    "num_keep_everything",
    "checkpoint",
    "boundaries",
    "kept",
    "feed_forward_chunks",
)
"""Fields of the plan that the search sets, unless they are fixed; `kept` only where it is known what the host has."""
COUNTS = ("num_keep_attention", "num_keep_everything")
BUFFERS = (2, 3, 4)
"""Where blocks stay on the device between those that stream, the link carries two in the time of one, if there is room for them to wait."""
CHUNKS = 8
MAX_REPLAYS = 30
SPREAD = ((7, 3), (7, 4), (7, 5), (7, 6), (8, 2), (8, 6), (9, 3))
"""(blocks, how many keep everything on the host) of short traces: more blocks, however many keep everything, have no other neighbourhoods."""
_SHORT = 5  # blocks of a short trace: the outer two at either end and one that stands for all between


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    best: Assessment | None
    """The fastest plan that fits; None if nothing does."""
    near_misses: tuple[Assessment, ...]
    """Plans that are faster, than the smallest if none fits, and do not fit: the one that misses by least first."""
    smallest: Assessment
    """The plan that needs least of the device, or, where it is the host that lacks room, least of that: says what would do if nothing fits."""
    num_candidates: int
    num_unknown: int
    """Choices of what blocks keep that were left out, because no recorded visit tells what they would do."""
    num_replays: int
    num_traces: int


def _device_bytes(candidate: Candidate) -> tuple[int, float]:
    return max(candidate.device_bytes, candidate.phases_bytes), -candidate.seconds


class Ranking:
    """The plans of a workload on one card that leave all but the searched settings as in `base`; `fixed` ones too."""

    def __init__(self, workload: Workload, card: Card, base: MemoryPlan, fixed: frozenset[str]):
        """Raises PlanError for a field in `fixed` that no plan has, and for more resident blocks than there are."""
        unknown = fixed - {f.name for f in dataclasses.fields(MemoryPlan)}
        if unknown:
            raise PlanError(f"{', '.join(sorted(unknown))}: no such field of a plan")
        free = {name: MemoryPlan.__dataclass_fields__[name].default for name in SEARCHED if name not in fixed}
        self.workload, self.card, self.fixed = workload, card, fixed
        self.short = min(_SHORT, workload.num_blocks)
        self.base = dataclasses.replace(base, **free)
        resident_indices(workload.num_blocks, self.base.resident_blocks)
        self.num_traces = self.num_replays = 0
        self._announced: set[tuple[MemoryPlan, int]] = set()
        self._assessed: dict[MemoryPlan, Assessment] = {}

    def run(self, limits: Limits) -> SearchResult:
        """The fastest plan that fits, the faster ones that do not, and the smallest."""
        candidates: list[Candidate] = []
        for variant in self._variants(limits):
            candidates += self._candidates_of(variant, limits)
            best = self._first_that_fits(sorted(candidates), limits)
            if best is not None and self._is_settled(best.plan):
                break
        smallest = self._smallest(candidates, limits)
        if best is None and smallest.fits:  # what was seen of faster ones made it look too large
            best = smallest
        return self._result(candidates, best, smallest, limits)

    def _smallest(self, candidates: list[Candidate], limits: Limits) -> Assessment:
        # Of plans with the same peak, the slowest keeps least, and leaves least in pieces.
        smallest = self._assess(min(candidates, key=_device_bytes), limits)
        if smallest.fits_card and not smallest.fits:
            for _, alike in itertools.groupby(sorted(candidates, key=lambda c: c.host_bytes), key=lambda c: c.host_bytes):
                candidate = min(alike, key=_device_bytes)
                if _device_bytes(candidate)[0] <= limits.reservable_bytes and (found := self._assess(candidate, limits)).fits_card:
                    return found
        return smallest

    def parked(self, limits: Limits, below: float) -> SearchResult:
        """As `run`, of plans whose blocks keep everything in host memory: all blocks, or else as many as host and link have room for, where
        that may take less than `below` seconds."""
        plan = dataclasses.replace(self.base, checkpoint="none", kept="host")
        self.workload.prepare(self._traces_of_recipe(self._resident(plan)), [self.base])
        every = self._resident_variant(plan)
        candidates = list(every.candidates([plan], *self._places()))
        best = self._first_that_fits(sorted(candidates), limits)
        if best is None or best.time.waits_for_link:  # else none that keep less are faster
            candidates += self._partly_parked("device", every, below)
            best = self._first_that_fits(sorted(candidates), limits)
            if best is None or best.plan.resident_blocks is not None:  # then smaller ones may be
                candidates += self._partly_parked("host", every, below)
                best = self._first_that_fits(sorted(candidates), limits)
        smallest = self._assess(min(candidates, key=lambda c: c.device_bytes), limits)
        return self._result(candidates, best, smallest, limits)

    def _partly_parked(self, boundaries: Where, every: Variant, below: float) -> Iterator[Candidate]:
        """Some blocks keep everything on the host, and the others their attention's output. `every`: of the plan by which all keep everything."""
        num_blocks = self.workload.num_blocks
        plan = dataclasses.replace(self.base, kept="host", boundaries=boundaries, num_keep_attention=num_blocks)
        resident = self._resident(plan)
        self.workload.prepare(self._traces_of_recipe(resident), [self.base])
        variant = self._resident_variant(plan)
        attention, everything = (v.load(resolve_keeps(v.base, num_blocks)) for v in (variant, every))
        mixtures = (attention.towards(everything, number / num_blocks) for number in range(num_blocks))
        if min(variant.time(mixture, None, self.base.offload_buffers).seconds for mixture in mixtures) >= below:
            return  # not worth the other traces
        mixed = [(dataclasses.replace(resident, num_keep_attention=n - number, num_keep_everything=number), n)
                 for n, number in SPREAD if n <= num_blocks]
        self.workload.prepare(mixed, [self.base])
        for wanted in mixed:
            variant.recipe.learn(*self._trace(*wanted))
        yield from variant.candidates([dataclasses.replace(plan, num_keep_attention=num_blocks - number, num_keep_everything=number)
                                       for number in range(num_blocks)], *self._places())  # fmt: skip

    def _result(self, candidates: list[Candidate], best: Assessment | None, smallest: Assessment, limits: Limits) -> SearchResult:
        faster = self._faster(sorted(candidates), best, limits)  # replays some more
        best = next((found for found in faster if found.fits), best)  # what was seen of others made it look too large
        misses = [found for found in faster if not found.fits and found.time.seconds < (best or smallest).time.seconds]
        return SearchResult(
            best=best,
            near_misses=tuple(sorted(misses, key=lambda miss: miss.needed_bytes)),
            smallest=smallest,
            num_candidates=len(candidates),
            num_unknown=sum(variant.num_unknown for variant in {candidate.variant for candidate in candidates}),
            num_replays=self.num_replays,
            num_traces=self.num_traces,
        )

    def _is_settled(self, plan: MemoryPlan) -> bool:
        """Whether the variants to come are not worth their traces: they save memory and never time.

        Once no attention is recomputed, they could buy a block or two that keep everything. Feed-forward chunks, which
        come last, cost half a feed-forward in such a block.
        """
        return "inputs" not in resolve_keeps(plan, self.workload.num_blocks)

    # ---- traces --------------------------------------------------------------------------------------------------

    def _trace(self, plan: MemoryPlan, num_blocks: int) -> tuple[Trace, Sequence[str]]:
        self.num_traces += 1
        return self.workload.trace(plan, num_blocks), resolve_keeps(plan, num_blocks)

    def _prepare(self, plans: Sequence[MemoryPlan]) -> None:
        """Announce the traces that `_variant` needs of the plans, and what `_learn_keeps` needs of the first of them."""
        wanted: list[tuple[MemoryPlan, int]] = []
        for plan in map(self._resident, plans):
            whole = plan == self._resident(self.base) or self._keeps_fixed()
            wanted += self._traces_of_recipe(plan) if whole else [(plan, self.short)]
        wanted += [] if self._keeps_fixed() else self._kept(self._resident(plans[0]))
        if not self._announced.issuperset(wanted):  # otherwise somebody may be at it
            self._announced = set(wanted)
            self.workload.prepare(wanted, [self.base])

    def _cut(self, plan: MemoryPlan, num_blocks: int) -> MemoryPlan:
        """A plan under which all blocks keep the same, for fewer blocks."""
        keeps = set(resolve_keeps(plan, self.workload.num_blocks))
        attention = num_blocks if keeps == {"attention"} else 0
        checkpoint = "none" if keeps == {"everything"} else "all"
        return dataclasses.replace(plan, checkpoint=checkpoint, num_keep_attention=attention, num_keep_everything=0)

    def _recipe(self, plan: MemoryPlan) -> Recipe:
        """Of a plan that leaves everything on the device: from two short traces, if its blocks are all alike."""
        num_blocks, needed = self.workload.num_blocks, self._traces_of_recipe(plan)
        if len(needed) == 2:
            try:
                return grow(*(self._trace(*wanted)[0] for wanted in needed), resolve_keeps(plan, num_blocks)[0], num_blocks)
            except SpliceError:
                pass
        return Recipe.of(*self._trace(plan, num_blocks))

    def _resident_variant(self, plan: MemoryPlan) -> Variant:
        """A variant with a recipe of its own."""
        return Variant(self.workload, self.card, plan, self._recipe(self._resident(plan)))

    def _traces_of_recipe(self, plan: MemoryPlan) -> list[tuple[MemoryPlan, int]]:
        num_blocks = self.workload.num_blocks
        if len(set(resolve_keeps(plan, num_blocks))) > 1 or num_blocks <= _SHORT + 2:
            return [(plan, num_blocks)]
        return [(self._cut(plan, n), n) for n in (_SHORT, _SHORT + 1)]

    def _variants(self, limits: Limits) -> Iterator[Variant]:
        """Recipes from the fastest to the most frugal; each is traced only when the one before did not settle it."""
        plans = [dataclasses.replace(self.base, **fields) for fields in self._savings()]
        plain = None
        self._prepare(plans[:1])
        for plan, following in itertools.zip_longest(plans, plans[1:]):
            found = self._variant(plan, plain, limits)
            if found.fits and not self._keeps_fixed():
                self._learn_keeps(found.recipe, plan)
            if found.fits and following:  # otherwise that one is likely to be too large as well
                self._prepare([following])  # somebody may be at it while this one is looked through
            yield found
            if plain is None and not found.fits and following:
                self._prepare([plans[-1], *plans[1:-1]])
                last = self._variant(plans[-1], found, limits)
                if not last.fits:  # then nothing does
                    yield last
                    return
            plain = plain or found

    def _variant(self, plan: MemoryPlan, plain: Variant | None, limits: Limits) -> Variant:
        resident = self._resident(plan)
        if plain is None or self._keeps_fixed():
            recipe = self._recipe(resident)
        else:
            short, _ = self._trace(self._resident(plain.base), self.short)
            recipe = plain.recipe.with_visits_of(short, *self._trace(resident, self.short)) or self._recipe(resident)
        found = Variant(self.workload, self.card, plan, recipe)
        found.fits = found.least_bytes(*self._places()) <= limits.reservable_bytes
        return found

    def _savings(self) -> list[dict]:
        savings = [{}]
        if "boundaries" not in self.fixed and is_checkpointed(resolve_keeps(self.base, self.workload.num_blocks)):
            savings.append({"boundaries": "host"})
        if "feed_forward_chunks" not in self.fixed:
            savings += [{**fields, "feed_forward_chunks": CHUNKS} for fields in savings]
        return savings

    def _learn_keeps(self, recipe: Recipe, plan: MemoryPlan) -> None:
        """Short traces of the other things that blocks may keep; with boundaries on the host neighbours matter too."""
        self._prepare([plan])
        for kept, num_blocks in self._kept(self._resident(plan)):
            recipe.learn(*self._trace(kept, num_blocks))

    def _kept(self, plan: MemoryPlan) -> list[tuple[MemoryPlan, int]]:
        short, longer = self.short, min(8, self.workload.num_blocks)
        layouts = [(longer, longer // 2, 0) if plan.boundaries == "host" else (short, 0, short), (short, short, 0)]
        if plan.boundaries == "host" and "boundaries" in self.fixed:  # else blocks that keep everything leave their inputs on the card
            layouts.append((longer, longer - longer // 2, longer // 2))
        return [(dataclasses.replace(plan, num_keep_attention=a, num_keep_everything=e), num_blocks) for num_blocks, a, e in layouts]

    @staticmethod
    def _resident(plan: MemoryPlan) -> MemoryPlan:
        return dataclasses.replace(plan, resident_blocks=None)

    def _keeps_fixed(self) -> bool:
        return bool(self.fixed & {"checkpoint", *COUNTS})

    # ---- candidates ----------------------------------------------------------------------------------------------

    def _places(self) -> tuple[Sequence[int | None], Sequence[int]]:
        """Numbers of resident blocks, and of buffers for the others."""
        residents = [self.base.resident_blocks] if "resident_blocks" in self.fixed else [None, *range(self.workload.num_blocks)]
        return residents, [self.base.offload_buffers] if "offload_buffers" in self.fixed else BUFFERS

    def _candidates_of(self, variant: Variant, limits: Limits) -> Iterator[Candidate]:
        plan, num_blocks = variant.base, self.workload.num_blocks
        if self._keeps_fixed() or not variant.fits:
            yield from variant.candidates([plan], *self._places())
            return
        # Attention outputs first: they save most for their size. Then everything, block by block.
        counts = [(number, 0) for number in range(num_blocks + 1)]
        counts += [(num_blocks - number, number) for number in range(1, num_blocks)]
        counts += [(0, number) for number in range(1, num_blocks)]
        plans = [dataclasses.replace(plan, num_keep_attention=a, num_keep_everything=e) for a, e in counts]
        found = list(variant.candidates(plans, *self._places()))
        yield from found
        nearly = [c.device_bytes for c in found if c.plan.num_keep_everything == num_blocks - 1]
        if plan.boundaries == "device" and plan.feed_forward_chunks == 1 and nearly and min(nearly) <= limits.reservable_bytes:
            # Without any recomputation what blocks share lives differently: a trace of its own.
            nothing = dataclasses.replace(plan, checkpoint="none")
            yield from self._resident_variant(nothing).candidates([nothing], *self._places())

    def _assess(self, candidate: Candidate, limits: Limits) -> Assessment:
        if candidate.plan not in self._assessed:
            self.num_replays += 1
            try:
                found = candidate.variant.assess(candidate.plan, limits)
            except SpliceError:  # the visits are known, but do not fit together
                self.num_traces += 1
                found = assess_in_full(self.workload, candidate.plan, limits)
            self._assessed[candidate.plan] = found
        return self._assessed[candidate.plan]

    def _first_that_fits(self, ranked: list[Candidate], limits: Limits) -> Assessment | None:
        """The first of the candidates, ranked by time, that fits."""
        excess: dict[int, int] = {}  # by variant: reserved over live bytes, the least that was seen
        for candidate in ranked:
            expected = candidate.device_bytes + int(0.8 * excess.get(id(candidate.variant), 0))  # forgiving: it varies
            if self.num_replays >= MAX_REPLAYS:
                expected = int(1.15 * candidate.device_bytes)  # out of budget: only look where there is room to spare
            if any(limits.shortage(max(expected, candidate.phases_bytes), candidate.host_bytes)):
                continue
            assessment = self._assess(candidate, limits)
            if assessment.fits:
                return assessment
            seen = max(0, assessment.prediction.reserved_bytes - candidate.device_bytes)
            excess[id(candidate.variant)] = min(seen, excess.get(id(candidate.variant), seen))
        return None

    def _faster(self, ranked: list[Candidate], best: Assessment | None, limits: Limits) -> list[Assessment]:
        """The fastest plan of all, and the best plan's faster neighbours, one for each setting that costs it time: by time."""
        faster = ranked if best is None else [c for c in ranked if c.seconds < best.time.seconds]
        picks: dict[str, Candidate] = {}
        for candidate in faster:
            plan = candidate.plan
            picks.setdefault("fastest", candidate)
            if plan.resident_blocks is None:
                picks.setdefault("all resident", candidate)
            if best is not None:
                different = {name for name in MemoryPlan.__dataclass_fields__ if getattr(plan, name) != getattr(best.plan, name)}
                if different in ({"boundaries"}, {"feed_forward_chunks"}, {"resident_blocks"}):
                    picks.setdefault(*different, candidate)
                if different <= set(COUNTS):
                    picks["keep more"] = candidate  # the last one is the nearest
        found = {candidate.plan: self._assess(candidate, limits) for candidate in picks.values()}
        return sorted(found.values(), key=lambda assessment: assessment.time.seconds)
