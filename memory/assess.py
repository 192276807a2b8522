"""One plan on one card: what every phase of the run needs, whether that fits, and how long a step takes. Predicted.

"Fits" means reserved bytes plus the context plus a margin on the card, in every phase, and pinned and plain memory on
the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memory import environment
from memory.cards import GIB, Card
from memory.plan import SHARDING_BUFFERS, MemoryPlan, resolve_keeps, streamed_indices
from memory.timeline import Prediction, Trace, shown
from memory.timing import Ring, StepLoad, StepTime, load_of, step_time

MARGIN = 0.03
_PHASE_FRAGMENTATION = 1.06  # reserved over allocated of phases that are given as a figure (assumed)
_FIXED_FRAGMENTATION = 0.3  # of what such a phase needs itself, as much more where segments do not grow (assumed; an emulated card found 0.28)


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
    of_streaming: bool = False
    """Whether `host_bytes` are needed only where blocks stream."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be planned for."""

    num_blocks: int
    trace: Callable[[MemoryPlan, int], Trace]
    """`trace(plan, num_blocks)`: one step of the model cut to `num_blocks` blocks under `plan`, on fake tensors, with
    the blocks watched and all that stands declared (`Recorder.adopt_model`). Any dtype conversion already done."""
    phases: Callable[[MemoryPlan], Sequence[PhaseNeed]] = lambda plan: ()
    """The other phases of the run under a plan; what `memory.search` sets on its own account does not matter to them."""
    prepare: Callable[[Sequence[tuple[MemoryPlan, int]], Sequence[MemoryPlan]], None] = lambda traces, phases: None
    """Called with most of the traces, roughly in order, and of the phases that a search will ask for, so that they can be computed
    ahead; with nothing, when no more are wanted."""
    repeats: float = 1.0
    """Gradient accumulation: how often an optimizer step does what a trace shows, the optimizer's own work excepted."""
    teacher_share: float = 1.0
    """Share of these repeats in which the teacher runs: less than 1 where its samples are cached and used again."""
    host_bytes: int = 3 * GIB
    """What the process takes of the host besides: interpreter, libraries, CUDA's own (assumed)."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """One plan on one card, predicted."""

    plan: MemoryPlan
    fits: bool
    reason: str
    """Empty if it fits; otherwise what is missing and in which phase."""
    fits_card: bool
    """Whether the card has room for it; the host may still be short."""
    prediction: Prediction
    by_phase: dict[str, int]
    """Device bytes of every phase of the run, allocated."""
    needed_bytes: int
    """Reserved at the peak of the whole run, plus the context: the least a card must have usable, margin excluded. Where it
    shares the host's memory, what the host needs included."""
    host_bytes: int
    time: StepTime
    trace: Trace = field(repr=False, compare=False)
    """The step itself."""


def compiled_fragmentation(plan: MemoryPlan) -> float:
    """Upper bound, margin aside, of what a step reserves under `plan` relative to the prediction, which is for blocks that are not compiled.
    Compiled ones allocate what is predicted, and reserve more (`bench.emulated`, part compiled)."""
    return 1.06 if plan.compile else 1.0


class Limits:
    """What a card and a host have to give, and the margin kept free of it."""

    def __init__(self, card: Card, *, margin: float = MARGIN, host_bytes: int | None = None):
        self.card = card
        self.reservable_bytes = card.available_bytes - int(margin * card.usable_bytes)
        self.host_bytes = card.host_bytes if host_bytes is None else host_bytes

    def shortage(self, reserved_bytes: int, host_bytes: int) -> tuple[int, int]:
        """(device bytes, host bytes) missing. Where card and host share one memory both are of that."""
        reserved_bytes += host_bytes if self.card.unified else 0
        host = 0 if self.host_bytes is None else host_bytes - self.host_bytes
        return max(0, reserved_bytes - self.reservable_bytes), max(0, host)


@dataclass(frozen=True, kw_only=True)
class OtherPhases:
    """What the phases around the step need under one plan, the transformer included where it is there."""

    by_phase: dict[str, int]
    reserved_bytes: int
    host_bytes: int


def other_phases(needs: Sequence[PhaseNeed], *, streams: bool, standing_bytes: int, workspace_bytes: int, masters_bytes: int) -> OtherPhases:
    """The needs of all phases but the step. `streams`: whether blocks do; `standing_bytes`: what the plan leaves on the device between
    steps; `workspace_bytes`: both workspaces of matrix products, of which the one of backward is not there before the transformer is."""
    by_phase = {need.name: need.device_bytes + (standing_bytes if need.with_backbone else workspace_bytes // 2) for need in needs}
    more = 0 if environment.expandable_segments() else _FIXED_FRAGMENTATION
    reserved = [by_phase[need.name] * _PHASE_FRAGMENTATION + need.device_bytes * more for need in needs]
    hosts = [need.host_bytes + (masters_bytes if need.with_backbone else 0) for need in needs if streams or not need.of_streaming]
    return OtherPhases(by_phase=by_phase, reserved_bytes=int(max(reserved, default=0)), host_bytes=max(hosts, default=0))


def assess_trace(workload: Workload, plan: MemoryPlan, trace: Trace, time: StepTime, limits: Limits) -> Assessment:
    """Whether the step of `trace` and the other phases fit."""
    workspace = limits.card.cublas_workspace_bytes
    prediction = trace.prediction(workspace_bytes=workspace, expandable_segments=environment.expandable_segments())
    others = other_phases(workload.phases(plan), streams=plan.resident_blocks is not None, standing_bytes=prediction.by_phase["load"],
                          workspace_bytes=workspace, masters_bytes=prediction.host_bytes)
    step = int(prediction.reserved_bytes * compiled_fragmentation(plan))
    reserved = max(step, others.reserved_bytes)
    host = max(prediction.host_bytes, others.host_bytes) + workload.host_bytes
    device_short, host_short = limits.shortage(reserved, host)
    reason = ""
    if device_short:
        tightest = prediction.by_phase if step == reserved else others.by_phase  # not by what is allocated: shares differ
        where = "of this machine's memory" if limits.card.unified else "on the card"
        reason = f"needs {device_short / GIB:.2f} GiB more {where} in {shown(max(tightest, key=tightest.get))}"
    elif host_short:
        reason = f"needs {host_short / GIB:.2f} GiB more of host memory"
    return Assessment(
        plan=plan,
        fits=not reason,
        reason=reason,
        fits_card=not device_short,
        prediction=prediction,
        by_phase=prediction.by_phase | others.by_phase,
        needed_bytes=reserved + limits.card.context_bytes + (host if limits.card.unified else 0),
        host_bytes=host,
        time=time,
        trace=trace,
    )


def assess(workload: Workload, plan: MemoryPlan, card: Card, *, margin: float = MARGIN, host_bytes: int | None = None) -> Assessment:
    """Predict one plan as given, from a full trace of it. Raises PlanError if plan and model do not go together."""
    return assess_in_full(workload, plan, Limits(card, margin=margin, host_bytes=host_bytes))


def assess_in_full(workload: Workload, plan: MemoryPlan, limits: Limits) -> Assessment:
    """`assess` against limits that are known already."""
    resolve_keeps(plan, workload.num_blocks)
    trace = workload.trace(plan, workload.num_blocks)
    load = StepLoad.of(((span.phase, span.visit, span.records_graph, load_of(span.work, limits.card)) for span in trace.spans),
                       teacher_share=workload.teacher_share)
    time = step_time(load, limits.card, ring=_ring(plan, trace, workload.num_blocks, limits.card), repeats=workload.repeats)
    return assess_trace(workload, plan, trace, time, limits)


def _ring(plan: MemoryPlan, trace: Trace, num_blocks: int, card: Card) -> Ring | None:
    """How weights stream under a plan of which the trace is. Blocks are alike."""
    if plan.num_shards > 1:  # what the other cards hold comes over the same link
        streamed, num_slots, share = streamed_indices(num_blocks, 0), SHARDING_BUFFERS, 1 - 1 / plan.num_shards
    else:
        streamed, num_slots, share = streamed_indices(num_blocks, plan.resident_blocks), plan.offload_buffers, 1.0
    if not streamed:
        return None
    slot_bytes = trace.standing_bytes("transfer buffers") / min(num_slots, len(streamed))
    return Ring(share * slot_bytes / card.host_link_bandwidth, streamed, num_slots)
