"""Plans that share a recipe, and what each needs in time and live bytes: what `memory.ranking` ranks."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from memory.assess import Assessment, Limits, Workload, assess_trace, other_phases
from memory.cards import Card
from memory.plan import MemoryPlan, resolve_keeps, streamed_indices
from memory.pools import round_request
from memory.splice import Cell, Recipe, SpliceError, device_bytes
from memory.timeline import pinned_bytes
from memory.timing import Load, Ring, StepLoad, StepTime, load_of, step_time


@dataclass(frozen=True, order=True)
class Candidate:
    """One plan, ordered by time."""

    seconds: float
    device_bytes: int  # sum of live bytes in the step: reserved is never less
    phases_bytes: int  # reserved in the other phases
    host_bytes: int
    plan: MemoryPlan = field(compare=False)
    variant: "Variant" = field(compare=False)


class Variant:
    """Plans that differ in keeps and resident blocks only: one recipe."""

    def __init__(self, workload: Workload, card: Card, base: MemoryPlan, recipe: Recipe):
        self.workload, self.card, self.base, self.recipe = workload, card, base, recipe
        self.workspace = round_request(card.cublas_workspace_bytes)
        self._loads: dict[int, Load] = {}
        self.num_unknown = 0
        self.fits = True
        """Whether some of its plans may: the live bytes of the one that keeps least do."""
        masters = [s.num_bytes for s in recipe.standing(0, base.offload_buffers) if s.place == "pinned" and s.category == "weights"]
        self._loading = max(masters) / card.host_link_bandwidth  # seconds of a block's weights

    def load(self, keeps: Sequence[str]) -> StepLoad:
        """What the step asks for when the blocks keep `keeps`, streaming excepted."""
        return StepLoad.of(((cell.phase, visit, cell.records_graph, self._load_of(cell)) for visit, cell in self.recipe.visits(keeps)),
                           teacher_share=self.workload.teacher_share)

    def _load_of(self, cell: Cell) -> Load:
        load = self._loads.get(id(cell))
        if load is None:
            load = self._loads[id(cell)] = load_of(cell.work, self.card)
        return load

    def time(self, load: StepLoad, num_resident: int | None, num_buffers: int) -> StepTime:
        """Of a step with `num_resident` blocks resident (None: all), the others streamed through `num_buffers` slots."""
        streamed = streamed_indices(self.recipe.num_blocks, num_resident)
        ring = Ring(self._loading, streamed, num_buffers) if streamed else None
        return step_time(load, self.card, ring=ring, repeats=self.workload.repeats)

    def candidates(self, plans: Sequence[MemoryPlan], residents: Sequence[int | None], buffers: Sequence[int]) -> Iterator[Candidate]:
        """Every plan with every number of resident blocks, as far as the recipe knows it, and with as many of `buffers` as it takes until
        it does not wait for the link."""
        standing, needs = {}, self.workload.phases(self.base)
        for plan in plans:
            keeps = resolve_keeps(plan, self.recipe.num_blocks)
            try:
                gain, load, slabs = self.recipe.peak_bytes(keeps), self.load(keeps), sum(self.recipe.slabs(keeps))
            except SpliceError:
                self.num_unknown += 1
                continue
            for num_resident in residents:
                for num_buffers in buffers:
                    place = num_resident, num_buffers
                    if place not in standing:
                        standing[place] = self._standing_bytes(*place)
                    device, host = standing[place]
                    others = other_phases(
                        needs,
                        streams=num_resident is not None,
                        standing_bytes=device,
                        workspace_bytes=self.workspace,
                        masters_bytes=host + slabs,
                    )
                    time = self.time(load, *place)
                    yield Candidate(
                        time.seconds,
                        device + gain,
                        others.reserved_bytes,
                        max(host + slabs, others.host_bytes) + self.workload.host_bytes,
                        dataclasses.replace(plan, resident_blocks=num_resident, offload_buffers=num_buffers),
                        self,
                    )
                    if not time.waits_for_link:
                        break

    def least_bytes(self, residents: Sequence[int | None], buffers: Sequence[int]) -> int:
        """Live bytes of the step as the plan stands, with as few resident blocks and buffers as may be."""
        standing = min(self._standing_bytes(num_resident, min(buffers))[0] for num_resident in residents)
        return standing + self.recipe.peak_bytes(resolve_keeps(self.base, self.recipe.num_blocks))

    def _standing_bytes(self, num_resident: int | None, num_buffers: int) -> tuple[int, int]:
        storages = self.recipe.standing(num_resident, num_buffers)
        device = self.workspace + sum(map(device_bytes, storages))
        host = sum(pinned_bytes(s.num_bytes) for s in storages if s.place == "pinned" and s.category == "weights")
        return device, host

    def assess(self, plan: MemoryPlan, limits: Limits) -> Assessment:
        keeps = resolve_keeps(plan, self.recipe.num_blocks)
        trace = self.recipe.splice(keeps, num_resident=plan.resident_blocks, num_buffers=plan.offload_buffers)
        time = self.time(self.load(keeps), plan.resident_blocks, plan.offload_buffers)
        return assess_trace(self.workload, plan, trace, time, limits)
