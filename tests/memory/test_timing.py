"""The roofline, against seconds worked out by hand."""

from dataclasses import replace

import pytest
import torch

from memory.cards import lookup
from memory.timeline import OPTIMIZER, Visit
from memory.timing import (CONVOLUTION_FRACTION, FP32_FRACTION, PARKING_OVERHEAD, STREAMING_OVERHEAD, Load, Ring, StepLoad, Walk, add_loads,
                           arrival_waits, load_of, step_time)
from memory.work import Work, work_of

CARD = replace(
    lookup("h100"), tensor_rate=1e15, fp32_rate=1e14, memory_bandwidth=4e12, host_link_bandwidth=2e10, matmul_fraction=0.5,
    attention_fraction=0.4, attention_backward_fraction=0.25, flash_fraction=0.3, flash_backward_fraction=0.15, memory_fraction=0.5,
    bf16=True,
)  # fmt: skip
NO_BF16 = replace(CARD, bf16=False)


@pytest.mark.parametrize(("kind", "card", "bound", "seconds"), [
    ("matmul", CARD, "matrix products", 6e12 / 5e14),
    ("convolution", CARD, "matrix products", 6e12 / (1e15 * CONVOLUTION_FRACTION)),
    ("attention", CARD, "attention", 6e12 / 4e14),
    ("attention backward", CARD, "attention", 6e12 / 2.5e14),
    ("matmul32", CARD, "matrix products", 6e12 / (1e14 * FP32_FRACTION)),
    ("attention32", CARD, "attention", 6e12 / 5e13),
    ("attention backward32", CARD, "attention", 6e12 / 2.5e13),
    ("attention32", NO_BF16, "attention", 6e12 / (1e14 * FP32_FRACTION)),
])  # fmt: skip
def test_an_operator_takes_its_share_of_the_rate(kind, card, bound, seconds):
    load = load_of([Work(kind, 6e12, 1000)], card)
    assert load.compute.pop(bound) == pytest.approx(seconds) and not any(load.compute.values())
    assert (load.to_device, load.to_host) == (0, 0)


def test_what_takes_longer_to_move_than_to_compute_is_memory_traffic():
    load = load_of([Work("matmul", 1e9, 4 * 10**9), Work("memory", 0.0, 2 * 10**9)], CARD)
    assert load.compute.pop("memory traffic") == pytest.approx(6e9 / 2e12) and not any(load.compute.values())


def test_transfers_are_counted_and_streamed_weights_left_to_the_plan():
    load = load_of([Work("to host", 0.0, 3), Work("to host", 0.0, 4), Work("to device", 0.0, 5), Work("weights", 0.0, 6)], CARD)
    assert (load.to_device, load.to_host) == (5 / 2e10, 7 / 2e10) and not any(load.compute.values())


def _load(seconds, to_device=0.0, to_host=0.0, num_operators=0):
    return Load({**load_of([], CARD).compute, "matrix products": seconds}, to_device, to_host, num_operators)


def test_loads_add_up():
    total = add_loads([_load(1.0, 2.0, 3.0), _load(0.5, 4.0, 5.0)])
    assert total.computing == total.compute["matrix products"] == 1.5 and (total.to_device, total.to_host) == (6.0, 8.0)


def _walk(visits, *, records=False, back=False, share=1.0):
    blocks = range(len(visits))
    return Walk(visits, blocks[::-1] if back else blocks, [records or back] * len(visits), share)


def _ring(seconds, num_blocks, num_slots=2, resident=()):
    return Ring(seconds, frozenset(range(num_blocks)) - set(resident), num_slots)


@pytest.mark.parametrize(("walk", "seconds", "waited", "overhead"), [
    (_load(2.0), 0.0, 0.0, 20 * STREAMING_OVERHEAD),
    (_load(2.0), 2.0, 0.0, 20 * STREAMING_OVERHEAD),
    (_load(2.0), 3.0, 8.0, 20 * STREAMING_OVERHEAD),  # all but the first two, which are there
    (_load(2.0, to_host=1.0), 2.0, 0.0, 20 * (STREAMING_OVERHEAD + PARKING_OVERHEAD)),  # the other way beside it
])  # fmt: skip
def test_a_walk_takes_the_longer_of_computing_and_moving(walk, seconds, waited, overhead):
    step = StepLoad(_load(0.0), _load(0.25, to_device=0.5, to_host=0.5), [_walk([walk] * 10)])
    time = step_time(step, CARD, ring=_ring(seconds, 10))
    assert time.by_bound["matrix products"] == pytest.approx(20.25)
    assert time.by_bound["host link"] == pytest.approx(1.0 + waited)  # between walks nothing hides
    assert time.by_bound["overhead"] == pytest.approx(overhead)
    assert time.seconds == pytest.approx(21.25 + waited + overhead) and time.bottleneck == "matrix products"


@pytest.mark.parametrize(("num_slots", "waited"), [(2, 3 * 0.2), (3, 0.0)])
def test_where_blocks_stay_between_those_that_stream_a_third_slot_lets_the_link_run_ahead(num_slots, waited):
    """Of three that stream in a row the last is sent for when the first is through. On average the link has 4 seconds for every 3.6."""
    ring = _ring(1.2, 12, num_slots, resident=(3, 7, 11))
    assert arrival_waits([_walk([_load(1.0)] * 12)], ring) == pytest.approx([waited])


def test_the_last_blocks_forward_are_still_there_when_backward_begins():
    """The other two are waited for, half a second each, either way; after that, all four of the next walk."""
    walks = [_walk([_load(1.0)] * 4, records=True), _walk([_load(1.0)] * 4, back=True)]
    assert arrival_waits(walks, _ring(1.5, 4)) == pytest.approx([1.0, 1.0])
    assert arrival_waits([*walks, walks[0]], _ring(1.5, 4)) == pytest.approx([1.0, 1.0, 4 * 0.5])
    assert arrival_waits(walks, _ring(1.5, 4, num_slots=9)) == [0.0, 0.0]


@pytest.mark.parametrize(("sends", "waited"), [
    ((0.0, 2.0, 2.0, 0.0), 2.0),  # blocks 3 and 2 are at hand; 1 and 0 are sent for one block ahead
    ((2.0, 0.0, 2.0, 0.0, 0.0), 1.0),  # it has the time of a block between that keeps nothing there
])  # fmt: skip
def test_what_a_block_keeps_on_the_host_is_sent_for_at_the_one_after_it(sends, waited):
    walk = _walk([_load(1.0, to_device=seconds) for seconds in sends], back=True)
    assert arrival_waits([walk], None) == pytest.approx([waited])


def test_weights_and_what_blocks_keep_share_the_link():
    walk = _walk([_load(1.0, to_device=2.0), _load(1.0), _load(1.0)], back=True)
    assert arrival_waits([walk], None) == pytest.approx([1.0])
    assert arrival_waits([walk], _ring(1.5, 3)) == pytest.approx([1.5])  # of block 0 they are there in second 3.5, not 2.5


def test_in_lockstep_a_blocks_calls_fetch_its_weights_once_and_what_each_parked_by_itself():
    def waits(**loads):
        walk = Walk([_load(0.5, **loads)] * 8, [3, 3, 2, 2, 1, 1, 0, 0], [True] * 8)
        return step_time(StepLoad(_load(0.0), _load(0.0), [walk]), CARD, ring=_ring(1.5, 4)).by_bound["host link"]

    assert waits() == pytest.approx(sum(arrival_waits([_walk([_load(1.0)] * 4, back=True)], _ring(1.5, 4)))) == pytest.approx(1.0)
    assert waits(to_device=1.0) > 7 * 0.5  # each is sent for at the one before it


@pytest.mark.parametrize(("stored", "held_up"), [
    ([0.0] * 6, 0.0),
    ([1.0] * 6, 0.0),
    ([0.0, 2.5, 0.0, 0.0, 0.0, 0.0], 0.0),  # from second 1 on: there before the fourth block ends
    ([0.0, 4.0, 0.0, 0.0, 0.0, 0.0], 1.0),
    ([2.0] * 6, 2.0),  # the fourth one's is there in second 8, when the sixth could have ended in 6
    ([2.0, 2.0, 0.0, 2.0, 2.0, 0.0], 0.0),  # more than the link carries, but not where it is in the way
    ([0.0, 0.0, 0.0, 0.0, 9.0, 9.0], 0.0),  # nobody waits for what the last two leave
])  # fmt: skip
def test_a_block_waits_for_what_the_last_but_one_before_it_stored(stored, held_up):
    walk = _walk([_load(1.0, to_host=seconds) for seconds in stored], records=True)
    assert walk.held_up == pytest.approx(held_up)
    assert step_time(StepLoad(_load(0.0), _load(0.0), [walk]), CARD).by_bound["host link"] == walk.held_up


def test_in_lockstep_calls_without_a_graph_only_pass_time():
    """A teacher's call of a second before each of the student's."""
    walk = Walk([_load(1.0), _load(1.0, to_host=4.0)] * 4, [0, 0, 1, 1, 2, 2, 3, 3], [False, True] * 4)
    assert walk.held_up == pytest.approx(1.0)  # the second one's, stored from second 5 on, is there in 9, when the fourth could have ended in 8


def test_a_walk_towards_another_is_between_them_at_each_block():
    here, there = (_walk(loads, records=True, share=0.5) for loads in ([_load(1.0), _load(3.0, to_host=2.0)], [_load(2.0, to_device=4.0), _load(1.0)]))
    assert here.towards(there, 0.25) == _walk([_load(1.25, to_device=1.0), _load(2.5, to_host=1.5)], records=True, share=0.5)


def test_all_but_the_optimizers_work_is_repeated():
    spans = [("teacher", None, False, _load(0.25)), *((phase, Visit(walk, block), walk > 0, _load(seconds)) for walk, phase, seconds, blocks in (
        (0, "teacher", 1.0, range(4)), (1, "student forward", 2.0, range(4)), (2, "student backward", 0.5, range(3, -1, -1))) for block in blocks),
             (OPTIMIZER, None, False, _load(0.125))]
    step = StepLoad.of(spans)
    walks = [Walk([_load(1.0)] * 4, [0, 1, 2, 3], [False] * 4), Walk([_load(2.0)] * 4, [0, 1, 2, 3], [True] * 4), Walk([_load(0.5)] * 4, [3, 2, 1, 0], [True] * 4)]
    assert step == StepLoad(_load(0.125), _load(0.25), walks) and [walk.turns for walk in walks] == [False, True, False]
    once, often = (step_time(step, CARD, ring=_ring(2.5, 4), repeats=repeats) for repeats in (1, 4))
    assert once.by_bound["host link"] == sum(arrival_waits(walks, _ring(2.5, 4))) > 0
    assert often.seconds - 0.125 == pytest.approx(4 * (once.seconds - 0.125))


def test_operators_are_counted_as_often_as_they_run():
    load = load_of([Work("matmul", 1.0, 1), Work("memory", 0.0, 1), Work("to host", 0.0, 4), Work("to device", 0.0, 5), Work("weights", 0.0, 6)], CARD)
    assert load.num_operators == 2 and add_loads([load, load]).num_operators == 4
    spans = [("teacher", None, False, _load(0.25, num_operators=10)), ("teacher", Visit(0, 0), False, _load(1.0, num_operators=100)),
             ("student forward", Visit(1, 0), True, _load(2.0, num_operators=1000)), ("student forward", None, False, _load(2.0, num_operators=5)),
             (OPTIMIZER, None, False, _load(0.125, num_operators=7))]
    time = step_time(StepLoad.of(spans, teacher_share=0.1), CARD, repeats=3)
    assert time.num_operators == pytest.approx(3 * (1 + 10 + 1000 + 5) + 7)


def test_a_teacher_whose_samples_are_kept_counts_as_often_as_it_is_asked():
    spans = [("teacher", None, False, _load(0.25, to_device=0.5)), *(("teacher", Visit(0, block), False, _load(1.0, to_host=0.5)) for block in range(4)),
             *(("student forward", Visit(1, block), True, _load(9.0)) for block in range(4)), ("student forward", None, False, _load(0.5)),
             (OPTIMIZER, None, False, _load(0.125))]
    whole, without, tenth = (step_time(StepLoad.of(spans, teacher_share=share), CARD, ring=_ring(2.0, 4)) for share in (1.0, 0.0, 0.1))
    teacher = whole.seconds - without.seconds
    assert teacher == pytest.approx(0.25 + 0.5 + 4.0 + 2.0 + 4.0 * (STREAMING_OVERHEAD + PARKING_OVERHEAD))  # two of its four blocks are waited for
    assert tenth.seconds == pytest.approx(without.seconds + teacher / 10)


def test_what_is_overwritten_is_not_read():
    x, y = torch.empty(1000), torch.empty(1000)
    aten = torch.ops.aten
    assert work_of(aten.copy_.default, (x, y), x).num_bytes == 8000
    assert work_of(aten.zero_.default, (x,), x).num_bytes == work_of(aten.fill_.Scalar, (x, 1.0), x).num_bytes == 4000
    assert work_of(aten.add_.Tensor, (x, y), x).num_bytes == 12000
    made = torch.empty(10)
    assert work_of(aten.new_empty.default, (x, [10]), made) is None  # nothing is written either
    assert work_of(aten.new_zeros.default, (x, [10]), made).num_bytes == 40
    assert work_of(aten.zeros_like.default, (x,), x).num_bytes == 4000
