"""How long a step takes, predicted: a roofline over the recorded work, and transfers beside it.

An operator takes the longer of computing and moving its bytes, at the fractions of the card's rates that were measured on such
cards, by others (bench/published.toml) or by us (`memory.cards`). Weights and activations cross the host link beside the computation, which waits
where a block's weights, or what it keeps on the host, have not arrived, and where blocks in a row store more than the link carries meanwhile. Good
for ranking plans; not a promise.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from memory.cards import Card
from memory.timeline import OPTIMIZER, TEACHER, Visit
from memory.work import Work

BOUNDS = ("matrix products", "attention", "memory traffic", "host link", "overhead")
_BOUND_OF = {"matmul": "matrix products", "convolution": "matrix products", "attention": "attention", "attention backward": "attention"}

CONVOLUTION_FRACTION = 0.2
"""Share of the tensor rate that the autoencoder's convolutions reach (bench/published.toml)."""
FP32_FRACTION = 0.7
"""Share of the rate without tensor cores that float32 products reach (the same)."""
TYPICAL_ERROR, LARGEST_ERROR = 0.14, 0.24
"""Of seconds predicted so against those that others measured of CogVideoX (bench/published.py): root mean square, and largest."""

STREAMING_OVERHEAD = 0.002
"""Share of a walk's time lost when all blocks stream: events and slots that are not ideally filled (assumed)."""
PARKING_OVERHEAD = 0.002
"""The same for activations on the host (assumed)."""
LAUNCH_S = 20e-6
"""The host's time to give a card an operator, Python included (assumed, of a fast one)."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Predicted seconds of one optimizer step."""

    by_bound: dict[str, float]
    """Seconds by what limits them."""
    num_operators: float = 0.0
    """Operators that the host launches, each of one or a few kernels (copies over the host link excepted)."""

    @property
    def seconds(self) -> float:
        return sum(self.by_bound.values())

    @property
    def launching(self) -> float:
        """Seconds of the host to give all operators to a card: no step is shorter. Plans are not ranked by it, as hosts are not known."""
        return LAUNCH_S * self.num_operators

    @property
    def bottleneck(self) -> str:
        return max(self.by_bound, key=self.by_bound.get)

    @property
    def waits_for_link(self) -> bool:
        """Whether the host link takes more than a hundredth of it."""
        return self.by_bound["host link"] > 0.01 * self.seconds


@dataclass(frozen=True)
class Load:
    """What one stretch of a step asks of a card."""

    compute: dict[str, float]
    """Seconds by bound, without transfers."""
    to_device: float
    """Seconds for which activations take the host link."""
    to_host: float
    num_operators: float = 0

    @property
    def computing(self) -> float:
        """Seconds without transfers."""
        return sum(self.compute.values())

    def times(self, share: float) -> "Load":
        """`share` times as much."""
        compute = {bound: share * seconds for bound, seconds in self.compute.items()}
        return Load(compute, share * self.to_device, share * self.to_host, share * self.num_operators)


@dataclass(frozen=True)
class Ring:
    """How weights pass through slots on the card (`memory.offload`)."""

    seconds: float
    """For which a block's weights take the host link."""
    streamed: frozenset[int]
    """Numbers of the blocks whose weights do."""
    num_slots: int


@dataclass(frozen=True)
class Walk:
    """One walk over the blocks."""

    visits: Sequence[Load]
    """In order."""
    blocks: Sequence[int]
    """Whose visits they are."""
    recording: Sequence[bool]
    """Which of them record a graph, or go back through one."""
    share: float = 1.0
    """How often a step takes it."""

    @cached_property
    def total(self) -> Load:
        """Of all visits."""
        return add_loads(self.visits)

    @cached_property
    def calls(self) -> list[tuple[int, float, float]]:
        """(block, seconds of computing, seconds of the link to the device) of each visit."""
        return [(block, load.computing, load.to_device) for block, load in zip(self.blocks, self.visits, strict=True)]

    @cached_property
    def shortest(self) -> float:
        """Seconds of computing in the shortest visit."""
        return min(computing for _, computing, _ in self.calls)

    @property
    def turns(self) -> bool:
        """Whether the next walk goes back over this one."""
        return self.recording[-1] and self.blocks[0] <= self.blocks[-1]

    @cached_property
    def held_up(self) -> float:
        """Seconds for which computing waits for the link to the host.

        A call that records ends when what the last but one before it stored is there: then its memory is given up (`memory.activations`).
        """
        now = free = waited = 0.0
        leaving = deque([0.0, 0.0])
        for load, records in zip(self.visits, self.recording, strict=True) if self.total.to_host else ():
            free = max(free, now) + load.to_host
            now += load.computing
            if records:
                waiting = max(0.0, leaving.popleft() - now)
                now, waited = now + waiting, waited + waiting
                leaving.append(free)
        return waited

    def towards(self, other: "Walk", share: float) -> "Walk":
        """One in which each visit does `share` of what it does in `other`, and the rest of what it does here."""
        visits = [add_loads((here.times(1 - share), there.times(share))) for here, there in zip(self.visits, other.visits, strict=True)]
        return Walk(visits, self.blocks, self.recording, self.share)


@dataclass(frozen=True)
class StepLoad:
    """What a whole step asks of a card."""

    optimizer: Load
    between: Load
    """Between walks over the blocks."""
    walks: Sequence[Walk]

    @classmethod
    def of(cls, stretches: Iterable[tuple[str, Visit | None, bool, Load]], *, teacher_share: float = 1.0) -> "StepLoad":
        """From (phase, visit, whether it records a graph, load) of every span of a step. `teacher_share`: how often a step has the teacher."""
        optimizer, between, walks = [], [], {}
        for phase, visit, records, load in stretches:
            share = teacher_share if phase == TEACHER else 1.0
            if visit is not None:
                walk = walks.setdefault(visit.walk, Walk([], [], [], share))
                walk.visits.append(load)
                walk.blocks.append(visit.block)
                walk.recording.append(records)
            elif phase == OPTIMIZER:
                optimizer.append(load)
            else:
                between.append(load if share == 1.0 else load.times(share))
        return cls(add_loads(optimizer), add_loads(between), list(walks.values()))

    def towards(self, other: "StepLoad", share: float) -> "StepLoad":
        """A step in which `share` of the blocks do what they do in `other`, whose walks are the same, and the rest what they do here."""
        return StepLoad(self.optimizer, self.between,
                        [here.towards(there, share) for here, there in zip(self.walks, other.walks, strict=True)])


def load_of(work: Iterable[Work], card: Card) -> Load:
    """The seconds and transfers of some operators on `card`."""
    compute = dict.fromkeys(BOUNDS, 0.0)
    to_device = to_host = num_operators = 0
    rates = {
        "matmul": card.tensor_rate * card.matmul_fraction,
        "convolution": card.tensor_rate * CONVOLUTION_FRACTION,
        "attention": card.tensor_rate * card.attention_fraction,
        "attention backward": card.tensor_rate * card.attention_backward_fraction,
    }
    # Float32 products run without tensor cores: nobody sets TF32. Fused attention in float32 is a kernel of FlashAttention-2's time,
    # and makes each product of three in TF32, whatever is set (DefaultGemmType in torch's mem_eff_attention/gemm_kernel_utils.h).
    rates["matmul32"] = card.fp32_rate * FP32_FRACTION
    for kind, share in (("attention", card.flash_fraction), ("attention backward", card.flash_backward_fraction)):
        rates[f"{kind}32"] = card.tensor_rate * share / 6 if card.bf16 else card.fp32_rate * FP32_FRACTION
    bandwidth = card.memory_bandwidth * card.memory_fraction
    for kind, flops, num_bytes in work:
        if kind == "to device":
            to_device += num_bytes
        elif kind == "to host":
            to_host += num_bytes
        elif kind != "weights":  # streamed weights are counted by the plan, which says how many stream
            num_operators += 1
            moving = num_bytes / bandwidth
            computing = flops / rates[kind] if flops else 0.0
            compute["memory traffic" if moving >= computing else _BOUND_OF[kind.removesuffix("32")]] += max(moving, computing)
    link = card.host_link_bandwidth
    return Load(compute, to_device / link, to_host / link, num_operators)


def add_loads(loads: Iterable[Load]) -> Load:
    """The sum of stretches."""
    compute = dict.fromkeys(BOUNDS, 0.0)
    to_device = to_host = num_operators = 0
    for load in loads:
        for bound, seconds in load.compute.items():
            compute[bound] += seconds
        to_device += load.to_device
        to_host += load.to_host
        num_operators += load.num_operators
    return Load(compute, to_device, to_host, num_operators)


def arrival_waits(walks: Sequence[Walk], ring: Ring | None) -> list[float]:
    """For how many seconds each walk of a step waits for what crosses the host link to the card, sent for as the program does.

    A block's weights are sent for when a slot is left (`memory.offload`), what it keeps on the host when backward reaches the one after it
    that keeps something there (`memory.activations`): that one's visit has the load.
    """
    parks = any(walk.total.to_device for walk in walks)
    if not parks and (ring is None or ring.seconds <= min((walk.shortest for walk in walks), default=0.0)):
        return [0.0] * len(walks)
    ring = ring or Ring(0.0, frozenset(), 0)
    num_slots = min(ring.num_slots, len(ring.streamed))
    now = free = 0.0  # when computing and the link are through with all that they were given

    def sent(at: float, seconds: float) -> float:
        """When it arrives."""
        nonlocal free
        free = max(free, at) + seconds
        return free

    weights, is_slot_left, waits = deque([0.0] * num_slots), False, []  # the first blocks' were sent for at the end of the step before
    for walk in walks:
        num_leaving = len(ring.streamed) - (num_slots if walk.turns else 0)  # blocks that leave their slots to others
        num_parked = sum(to_device > 0 for *_, to_device in walk.calls)
        parked, waited, before = 0.0, 0.0, None
        for block, computing, to_device in walk.calls:
            ready = now
            if to_device or not num_parked:
                ready, parked = max(ready, parked), 0.0
            if block != before and is_slot_left:
                weights.append(sent(now, ring.seconds))
                is_slot_left = False
            if block != before and block in ring.streamed:
                ready = max(ready, weights.popleft())
                num_leaving -= 1
                is_slot_left = num_leaving >= 0
            before = block
            if to_device:  # is what the next one has parked
                parked = sent(ready, to_device)
                num_parked -= 1
            waited += ready - now
            now = ready + computing
        if walk.turns:  # the last blocks forward are the first ones backward, and still there
            weights.extend([now] * num_slots)
        waits.append(waited)
    return waits


def step_time(step: StepLoad, card: Card, *, ring: Ring | None = None, repeats: float = 1.0) -> StepTime:
    """The time of a step, with weights that stream through `ring`; all but the optimizer's work counts `repeats` times."""
    # Activations stored outside any walk find nothing to hide behind.
    once, total = ({**load.compute, "host link": load.to_device + load.to_host} for load in (step.optimizer, step.between))
    num_operators = step.between.num_operators
    for walk, waited in zip(step.walks, arrival_waits(step.walks, ring)):
        load, share = walk.total, walk.share
        num_operators += share * load.num_operators
        for bound, seconds in load.compute.items():
            total[bound] += share * seconds
        total["host link"] += share * max(waited, walk.held_up)
        if ring:
            total["overhead"] += share * load.computing * STREAMING_OVERHEAD * len(ring.streamed) / len(set(walk.blocks))
        if load.to_device or load.to_host:
            total["overhead"] += share * load.computing * PARKING_OVERHEAD
    return StepTime(by_bound={bound: once[bound] + repeats * total[bound] for bound in BOUNDS},
                    num_operators=step.optimizer.num_operators + repeats * num_operators)
