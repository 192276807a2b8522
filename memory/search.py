"""The fastest plan that fits a card, and why each faster one does not.

A handful of traces (`memory.simulate`) of the run's own step gives recipes (`memory.splice`) for every combination of
what blocks keep and how many stay on the device. Thousands of candidates are then ranked by predicted time
(`memory.timing`), and taken in that order: the sum of live bytes rules most out, and the caching allocator's simulator decides on
*reserved* bytes for those that are left. "Fits" means reserved bytes plus the context plus a margin, in every
phase of the run, and pinned and plain memory on the host.

Everything is predicted. Guidance, precision and the optimizer change what is computed or are the caller's to choose, so
they are taken as given.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from memory.allocator import round_request
from memory.cards import GIB, Card
from memory.plan import MemoryPlan, PlanError, parse_checkpoint, resolve_keeps
from memory.simulate import Prediction, Trace, pinned_bytes
from memory.splice import Recipe, SpliceError
from memory.timing import Load, StepTime, add_loads, load_of, step_time

SEARCHED = ("resident_blocks", "num_keep_attention", "num_keep_everything", "checkpoint", "boundaries", "feed_forward_chunks")
"""Fields of the plan that the search sets, unless they are fixed."""
CHUNKS = 4
MARGIN = 0.03
MAX_REPLAYS = 30
_SHORT = 5  # blocks of a short trace: the outer two at either end and one that stands for all between
_PHASE_FRAGMENTATION = 1.06  # reserved over allocated of phases that are given as a figure (assumed)


@dataclass(frozen=True, kw_only=True)
class PhaseNeed:
    """A phase of the run other than the step: prompt encoding, sampling, decoding, saving."""

    name: str
    device_bytes: int
    """Peak on the device, without the transformer."""
    with_backbone: bool
    """Whether the transformer's resident blocks and slots are on the device meanwhile."""
    host_bytes: int = 0
    """Peak on the host, without the transformer's masters."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be planned for."""

    model: str
    num_blocks: int
    trace: Callable[[MemoryPlan, int], Trace]
    """`trace(plan, num_blocks)`: one step of the model cut to `num_blocks` blocks under `plan`, on fake tensors, with
    the blocks watched and all that stands declared (`Recorder.adopt_model`). Any dtype conversion already done."""
    phases: Callable[[MemoryPlan], Sequence[PhaseNeed]] = lambda plan: ()
    """The other phases of the run under a plan."""
    host_bytes: int = 3 * GIB
    """What the process takes of the host besides: interpreter, libraries, CUDA's own (assumed)."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """One plan on one card, predicted."""

    plan: MemoryPlan
    fits: bool
    reason: str
    """Empty if it fits; otherwise what is missing and in which phase."""
    prediction: Prediction
    by_phase: dict[str, int]
    """Device bytes of every phase of the run, allocated."""
    needed_bytes: int
    """Reserved at the peak of the whole run, and the context: the least a card must have usable, without margin."""
    host_bytes: int
    time: StepTime


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    best: Assessment | None
    """The fastest plan that fits; None if nothing does."""
    near_misses: tuple[Assessment, ...]
    """Faster plans that do not fit, the one that misses by least first."""
    smallest: Assessment
    """The plan that needs least of the device: says what card would do if nothing fits."""
    num_candidates: int
    num_replays: int
    num_traces: int


@dataclass(frozen=True, order=True)
class _Candidate:
    seconds: float
    device_bytes: int  # sum of live bytes: reserved is never less
    host_bytes: int
    plan: MemoryPlan = field(compare=False)
    variant: "_Variant" = field(compare=False)


class Limits:
    """What a card and a host have to give, and the margin kept free of it."""

    def __init__(self, card: Card, *, margin: float = MARGIN, host_bytes: int | None = None):
        self.card = card
        self.reservable_bytes = card.available_bytes - int(margin * card.usable_bytes)
        self.host_bytes = card.host_bytes if host_bytes is None else host_bytes

    def shortage(self, assessment_bytes: int, host_bytes: int) -> tuple[int, int]:
        """(device bytes, host bytes) missing."""
        host = 0 if self.host_bytes is None else host_bytes - self.host_bytes
        return max(0, assessment_bytes - self.reservable_bytes), max(0, host)


class _Variant:
    """Plans that differ in keeps and resident blocks only: one recipe."""

    def __init__(self, workload: Workload, card: Card, base: MemoryPlan, recipe: Recipe, tf32: bool):
        self.workload, self.card, self.base, self.recipe, self.tf32 = workload, card, base, recipe, tf32
        self._loads: dict[int, Load] = {}
        weights = recipe.standing(0, base.offload_buffers)
        self.flats = [s.num_bytes for s in weights if s.place == "pinned" and s.category == "weights"]

    def loads(self, keeps: Sequence[str]) -> tuple[Load, list[Load]]:
        """What lies between walks, and each walk."""
        between, walks = [], {}
        for visit, cell in self.recipe.visits(keeps):
            load = self._loads.get(id(cell))
            if load is None:
                load = self._loads[id(cell)] = load_of(cell.work, self.card, tf32=self.tf32)
            if visit is None:
                between.append(load)
            else:
                walks.setdefault(visit[0], []).append(load)
        return add_loads(between), [add_loads(loads) for loads in walks.values()]

    def time(self, loads: tuple[Load, list[Load]], num_resident: int | None) -> StepTime:
        between, walks = loads
        num_streamed = 0 if num_resident is None else len(self.flats) - num_resident
        streamed_bytes = num_streamed * max(self.flats, default=0)
        walked = [(walk, streamed_bytes) for walk in walks]
        return step_time(between, walked, self.card, streamed_share=num_streamed / max(1, len(self.flats)))

    def candidates(self, plans: Sequence[MemoryPlan], residents: Sequence[int | None]) -> Iterator[_Candidate]:
        """Every plan with every number of resident blocks, as far as the recipe knows it."""
        standing = {}
        for plan in plans:
            keeps = resolve_keeps(plan, self.recipe.num_blocks)
            try:
                gain, loads, slabs = self.recipe.peak_bytes(keeps), self.loads(keeps), sum(self.recipe.slabs(keeps))
            except SpliceError:
                continue
            for num_resident in residents:
                if num_resident not in standing:
                    standing[num_resident] = self._standing_bytes(num_resident)
                device, host = standing[num_resident]
                yield _Candidate(
                    self.time(loads, num_resident).seconds,
                    device + gain + round_request(self.card.cublas_workspace_bytes),
                    host + slabs + self.workload.host_bytes,
                    dataclasses.replace(plan, resident_blocks=num_resident),
                    self,
                )

    def _standing_bytes(self, num_resident: int | None) -> tuple[int, int]:
        storages = self.recipe.standing(num_resident, self.base.offload_buffers)
        device = sum(round_request(s.num_bytes) for s in storages if s.place == "device" and s.num_bytes)
        host = sum(pinned_bytes(s.num_bytes) for s in storages if s.place == "pinned" and s.category == "weights")
        return device, host

    def assess(self, plan: MemoryPlan, limits: Limits, expandable_segments: bool) -> Assessment:
        keeps = resolve_keeps(plan, self.recipe.num_blocks)
        trace = self.recipe.splice(keeps, num_resident=plan.resident_blocks, num_buffers=plan.offload_buffers)
        time = self.time(self.loads(keeps), plan.resident_blocks)
        return _assess(self.workload, plan, trace, time, limits, expandable_segments)


def _assess(
    workload: Workload, plan: MemoryPlan, trace: Trace, time: StepTime, limits: Limits, expandable_segments: bool
) -> Assessment:
    workspace = limits.card.cublas_workspace_bytes
    prediction = trace.prediction(workspace_bytes=workspace, expandable_segments=expandable_segments)
    by_phase, reserved, host = dict(prediction.by_phase), prediction.reserved_bytes, prediction.host_bytes
    masters = prediction.pinned_bytes
    for need in workload.phases(plan):
        standing = by_phase["load"] if need.with_backbone else workspace
        by_phase[need.name] = standing + need.device_bytes
        reserved = max(reserved, int(by_phase[need.name] * _PHASE_FRAGMENTATION))
        host = max(host, need.host_bytes + (masters if need.with_backbone else 0))
    host += workload.host_bytes
    device_short, host_short = limits.shortage(reserved, host)
    reason = ""
    if device_short:
        reason = f"needs {device_short / GIB:.2f} GiB more on the card in {max(by_phase, key=by_phase.get)}"
    elif host_short:
        reason = f"needs {host_short / GIB:.2f} GiB more of host memory"
    return Assessment(
        plan=plan,
        fits=not reason,
        reason=reason,
        prediction=prediction,
        by_phase=by_phase,
        needed_bytes=reserved + limits.card.context_bytes,
        host_bytes=host,
        time=time,
    )


def assess(
    workload: Workload,
    plan: MemoryPlan,
    card: Card,
    *,
    margin: float = MARGIN,
    host_bytes: int | None = None,
    expandable_segments: bool = True,
    tf32: bool = True,
) -> Assessment:
    """Predict one plan as given, from a full trace of it. Raises PlanError if plan and model do not go together."""
    limits = Limits(card, margin=margin, host_bytes=host_bytes)
    resolve_keeps(plan, workload.num_blocks)
    trace = workload.trace(plan, workload.num_blocks)
    between, walks, weights = [], {}, {}
    for span in trace.spans:
        load = load_of(span.work, card, tf32=tf32)
        number = None if span.visit is None else span.visit[0]
        walks.setdefault(number, []).append(load)
        weights[number] = weights.get(number, 0) + sum(w.num_bytes for w in span.work if w.kind == "weights")
    between = add_loads(walks.pop(None, []))
    streamed = 0 if plan.resident_blocks is None else workload.num_blocks - plan.resident_blocks
    time = step_time(
        between,
        [(add_loads(loads), weights[number]) for number, loads in walks.items()],
        card,
        streamed_share=streamed / workload.num_blocks,
    )
    return _assess(workload, plan, trace, time, limits, expandable_segments)


def search(
    workload: Workload,
    card: Card,
    *,
    base: MemoryPlan | None = None,
    fixed: Collection[str] = (),
    margin: float = MARGIN,
    host_bytes: int | None = None,
    expandable_segments: bool = True,
    tf32: bool = True,
) -> SearchResult:
    """The fastest plan for `workload` that fits `card`.

    `base` gives the fields that are not searched; fields named in `fixed` keep its value. `margin` is the share of the
    card's usable bytes left free; `host_bytes` what the host has (None: what `card` knows, else unlimited).
    `expandable_segments` and `tf32` must be what the run will set.
    Raises PlanError, when `base` with its fixed fields cannot be.
    """
    return _Search(workload, card, base or MemoryPlan(), frozenset(fixed), expandable_segments, tf32).run(
        Limits(card, margin=margin, host_bytes=host_bytes)
    )


class _Search:
    def __init__(self, workload, card, base, fixed, expandable_segments, tf32):
        unknown = fixed - {f.name for f in dataclasses.fields(MemoryPlan)}
        if unknown:
            raise PlanError(f"{', '.join(sorted(unknown))}: no such field of a plan")
        free = {name: MemoryPlan.__dataclass_fields__[name].default for name in SEARCHED if name not in fixed}
        self.workload, self.card, self.fixed = workload, card, fixed
        self.expandable_segments, self.tf32 = expandable_segments, tf32
        self.base = dataclasses.replace(base, **free)
        self.num_traces = self.num_replays = self.num_candidates = 0

    def run(self, limits: Limits) -> SearchResult:
        candidates: list[_Candidate] = []
        for variant in self._variants():
            found = list(self._candidates_of(variant, limits))
            self.num_candidates += len(found)
            candidates += found
            best, tried = self._first_that_fits(sorted(candidates), limits)
            # Later variants save memory and never time. Once no attention is recomputed, what they could still buy is
            # a block or two that keep everything: not worth the traces.
            if best is not None and "inputs" not in resolve_keeps(best.plan, self.workload.num_blocks):
                break
        misses = self._near_misses(sorted(candidates), best, tried, limits)
        smallest = min(candidates, key=lambda c: (c.device_bytes, c.seconds))
        return SearchResult(
            best=best,
            near_misses=tuple(misses),
            smallest=best if best and best.plan == smallest.plan else self._assess(smallest, limits),
            num_candidates=self.num_candidates,
            num_replays=self.num_replays,
            num_traces=self.num_traces,
        )

    # ---- traces --------------------------------------------------------------------------------------------------

    def _trace(self, plan: MemoryPlan, num_blocks: int) -> tuple[Trace, Sequence[str]]:
        self.num_traces += 1
        return self.workload.trace(plan, num_blocks), resolve_keeps(plan, num_blocks)

    def _recipe(self, plan: MemoryPlan) -> Recipe:
        return Recipe(*self._trace(plan, self.workload.num_blocks))

    def _variants(self) -> Iterator[_Variant]:
        """Recipes from the fastest to the most frugal; each is traced only when the one before did not settle it."""
        plain = self._resident(self.base)
        recipe, short = self._recipe(plain), None
        for fields in self._savings():
            plan = dataclasses.replace(self.base, **fields)
            known = recipe
            if fields and self._keeps_fixed():
                known = self._recipe(self._resident(plan))
            elif fields:
                short = short or self._trace(plain, _SHORT)[0]
                variant, keeps = self._trace(self._resident(plan), _SHORT)
                known = recipe.with_visits_of(short, variant, keeps) or self._recipe(self._resident(plan))
            self._learn_keeps(known, plan)
            yield _Variant(self.workload, self.card, plan, known, self.tf32)

    def _savings(self) -> list[dict]:
        savings = [{}]
        checkpointed = parse_checkpoint(self.base.checkpoint) != ("first", 0)
        if "boundaries" not in self.fixed and checkpointed:
            savings.append({"boundaries": "host"})
        if "feed_forward_chunks" not in self.fixed:
            savings += [{**fields, "feed_forward_chunks": CHUNKS} for fields in savings]
        return savings

    def _learn_keeps(self, recipe: Recipe, plan: MemoryPlan) -> None:
        """Short traces of the other things that blocks may keep; with boundaries on the host neighbours matter too."""
        if self._keeps_fixed():
            return
        layouts = [(_SHORT, _SHORT, 0), (_SHORT, 0, _SHORT)]
        if plan.boundaries == "host":
            layouts = [(_SHORT, _SHORT, 0), (8, 4, 0)]
        for num_blocks, num_attention, num_everything in layouts:
            kept = dataclasses.replace(plan, num_keep_attention=num_attention, num_keep_everything=num_everything)
            recipe.learn(*self._trace(self._resident(kept), num_blocks))

    @staticmethod
    def _resident(plan: MemoryPlan) -> MemoryPlan:
        return dataclasses.replace(plan, resident_blocks=None)

    def _keeps_fixed(self) -> bool:
        return bool(self.fixed & {"checkpoint", "num_keep_attention", "num_keep_everything"})

    # ---- candidates ----------------------------------------------------------------------------------------------

    def _residents(self) -> list[int | None]:
        if "resident_blocks" in self.fixed:
            return [self.base.resident_blocks]
        return [None, *range(self.workload.num_blocks)]

    def _candidates_of(self, variant: _Variant, limits: Limits) -> Iterator[_Candidate]:
        plan, num_blocks = variant.base, self.workload.num_blocks
        if self._keeps_fixed():
            yield from variant.candidates([plan], self._residents())
            return
        # Attention outputs first: they save most for their size. Then everything, block by block.
        counts = [(number, 0) for number in range(num_blocks + 1)]
        counts += [(num_blocks - number, number) for number in range(1, num_blocks)]
        counts += [(0, number) for number in range(1, num_blocks)]
        plans = [dataclasses.replace(plan, num_keep_attention=a, num_keep_everything=e) for a, e in counts]
        found = list(variant.candidates(plans, self._residents()))
        yield from found
        nearly = [c.device_bytes for c in found if c.plan.num_keep_everything == num_blocks - 1]
        if plan.feed_forward_chunks == 1 and nearly and min(nearly) <= limits.reservable_bytes:
            # Without any recomputation what blocks share lives differently: a trace of its own.
            nothing = dataclasses.replace(plan, checkpoint="none")
            plain = _Variant(self.workload, self.card, nothing, self._recipe(self._resident(nothing)), self.tf32)
            yield from plain.candidates([nothing], self._residents())

    def _assess(self, candidate: _Candidate, limits: Limits) -> Assessment:
        self.num_replays += 1
        return candidate.variant.assess(candidate.plan, limits, self.expandable_segments)

    def _first_that_fits(self, ranked: list[_Candidate], limits: Limits) -> tuple[Assessment | None, list[Assessment]]:
        """The first of the candidates, ranked by time, that fits; and those that were tried before it."""
        excess: dict[int, int] = {}  # by variant: reserved over live bytes, as last seen
        best, tried = None, []
        for candidate in ranked:
            # A little of the excess is forgiven, since it varies; out of budget, only room to spare is looked at.
            share = 0.8 if self.num_replays < MAX_REPLAYS else 1.5
            expected = candidate.device_bytes + int(share * excess.get(id(candidate.variant), 0))
            if any(limits.shortage(expected, candidate.host_bytes)):
                continue
            assessment = self._assess(candidate, limits)
            if assessment.fits:
                best = assessment
                break
            tried.append(assessment)
            excess[id(candidate.variant)] = max(0, assessment.prediction.reserved_bytes - candidate.device_bytes)
        return best, tried

    def _near_misses(self, ranked, best, tried, limits) -> list[Assessment]:
        """The fastest plan of all, and the best plan's faster neighbours: one for each setting that costs it time."""
        faster = ranked if best is None else [c for c in ranked if c.seconds < best.time.seconds]
        picks: dict[str, _Candidate] = {}
        for candidate in faster:
            plan = candidate.plan
            picks.setdefault("fastest", candidate)
            if plan.resident_blocks is None:
                picks.setdefault("all resident", candidate)
            if best is not None:
                for name in ("boundaries", "feed_forward_chunks", "resident_blocks"):
                    if dataclasses.replace(plan, **{name: getattr(best.plan, name)}) == best.plan and plan != best.plan:
                        picks.setdefault(name, candidate)
                both = {name: getattr(best.plan, name) for name in ("num_keep_attention", "num_keep_everything")}
                if dataclasses.replace(plan, **both) == best.plan:
                    picks["keep more"] = candidate  # the last one is the nearest
        seen: dict[MemoryPlan, Assessment] = {a.plan: a for a in tried}
        plans = {candidate.plan: candidate for candidate in picks.values()}
        misses = [seen.get(plan) or self._assess(candidate, limits) for plan, candidate in plans.items()]
        return sorted((miss for miss in misses if not miss.fits), key=lambda miss: miss.needed_bytes)
