"""The engine's order of copies and computation, proven by vector clocks: nothing is right by luck."""

import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from race_detector import EmulatedLane, Event, RaceDetector, Stream, emulate
from test_contract import PLANS, apply
from tiny_transformer import Tiny, make_tiny

import memory.activations
from memory.activations import _Parked
from memory.offload import _Ring
from memory.plan import MemoryPlan
from memory.streams import Lane

ASYNCHRONOUS = {name: fields for name, fields in PLANS.items()
                if {"resident_blocks", "boundaries", "kept"} & fields.keys() and not fields.get("compile")}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tensors_move_too(monkeypatch):
    monkeypatch.setitem(memory.activations.offload_activations.__kwdefaults__, "min_bytes", 0)


def races(monkeypatch, plan, step=Tiny.step):
    """What is not in order in two steps, a pass whose graph is dropped, a third step, and undo."""
    tiny, detector = make_tiny("rope"), RaceDetector()
    emulate(monkeypatch, detector)
    with detector:
        applied = apply(tiny, MemoryPlan(**plan), "cpu")
        step(tiny)
        step(tiny)
        tiny.predict(tiny.embeds[:1])
        step(tiny)
        with torch.no_grad():
            tiny.predict(tiny.embeds[:1])  # which sends for the first block again
        detector.declare_host(applied.host_buffers)
        applied.undo()
        tiny.step()
    assert detector.num_copies_beside > 0
    return detector.races


@pytest.mark.parametrize("step", [Tiny.step, Tiny.step_in_lockstep])
@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_every_copy_is_in_order(name, step, monkeypatch):
    assert races(monkeypatch, ASYNCHRONOUS[name], step) == []


@pytest.mark.parametrize("name", ["offload", "boundaries", "kept-offload"])
def test_a_copy_is_waited_for_once(name, monkeypatch):
    tiny, detector, copy, copies, waits = make_tiny("rope"), RaceDetector(), Lane.copy, [], []
    emulate(monkeypatch, detector)
    monkeypatch.setattr(Lane, "copy", lambda lane, pairs, done: (copies.append(done), copy(lane, pairs, done)))
    with detector:
        applied = apply(tiny, MemoryPlan(**PLANS[name]), "cpu")
        applied.count_waits(lambda: nullcontext(waits.append(1)))
        tiny.step()
        detector.declare_host(applied.host_buffers)
        applied.undo()
    assert 0 < len(waits) <= len(copies)
    assert all(not lane._not_joined for part in (applied.offload, applied.activations) if part for lane in part.lanes)


class Unrecorded(Event):
    def record(self, stream):
        pass


def without_waiting_for_compute(monkeypatch):
    copy = Lane.copy

    def early(lane, pairs, done):
        lane._so_far = Unrecorded()
        copy(lane, pairs, done)

    monkeypatch.setattr(Lane, "copy", early)


def without(method, owner):
    return lambda monkeypatch: monkeypatch.setattr(owner, method, lambda *_: None)


def waiting_for_the_first_copy_of_an_event_only(monkeypatch):
    join, joined = Lane.join, set()

    def once(lane, done):
        if done not in joined:
            joined.add(done)
            join(lane, done)

    monkeypatch.setattr(Lane, "join", once)


def letting_go_before_the_copy_out(monkeypatch):
    monkeypatch.setattr(_Parked, "forget_device_copy", lambda parked: setattr(parked, "tensor", None))


def clearing_at_once(monkeypatch):
    def clear(ring):
        ring.masters, ring.slots = {}, []

    monkeypatch.setattr(_Ring, "clear", clear)


def parked_on_their_way_back(tiny):
    """A graph whose backward failed while what block 1 parked was under way, in a cycle that only the collector takes apart."""
    def fail(module, args, kwargs):
        kwargs["hidden_states"].register_hook(lambda gradient: 1 / 0)

    hook, cycle = tiny.blocks[3].register_forward_pre_hook(fail, with_kwargs=True), []
    cycle += [cycle, tiny.predict(tiny.embeds[:1])]
    hook.remove()
    with pytest.raises(ZeroDivisionError):
        cycle[1].sum().backward()
    tiny.gradients()


def before_a_copy_ends(patch, detector, do):
    """From here on `do(stream)` is called in the middle of every copy, once what it copies has been asked for."""
    @contextmanager
    def stream(stream):
        with detector.on(stream):
            yield
            do(stream)

    patch.setattr(torch.cuda, "stream", stream)


def test_garbage_collected_in_the_middle_of_a_copy_waits_on_the_stream_that_computes(monkeypatch):
    tiny, detector, collections, waiting = make_tiny("rope"), RaceDetector(), iter([gc.collect]), []
    emulate(monkeypatch, detector)
    gc.disable()
    try:
        with detector:
            applied = apply(tiny, MemoryPlan(resident_blocks=0, kept="host", checkpoint="none"), "cpu")
            tiny.step()
            parked_on_their_way_back(tiny)
            applied.count_waits(lambda: nullcontext(waiting.append(detector.current)))
            before_a_copy_ends(monkeypatch, detector, lambda stream: next(collections, int)())
            tiny.step()
            detector.declare_host(applied.host_buffers)
            applied.undo()  # nothing is to be waited for when the emulation is over
    finally:
        gc.enable()
    assert next(collections, None) is None and detector.races == []
    assert set(waiting) == {detector.compute}  # whoever takes the time of a wait records its ends on the current stream


def test_a_load_under_way_is_waited_for_where_a_model_is_dropped_as_it_is(monkeypatch):
    tiny, detector = make_tiny("rope"), RaceDetector()
    emulate(monkeypatch, detector)
    with detector:
        applied = apply(tiny, MemoryPlan(resident_blocks=0), "cpu")
        detector.declare_host(applied.host_buffers)
        with torch.no_grad():
            tiny.predict(tiny.embeds[:1])  # which sends for the first block again
        del tiny, applied
        gc.collect()
    assert detector.num_copies_beside > 0 and detector.races == []


def test_a_copy_out_is_waited_for_where_forward_fails(monkeypatch):
    tiny, detector = make_tiny("rope"), RaceDetector()
    emulate(monkeypatch, detector)
    with detector:
        apply(tiny, MemoryPlan(kept="host", checkpoint="none"), "cpu")
        tiny.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.predict(tiny.embeds[:1])
        gc.collect()
    assert detector.num_copies_beside > 0 and detector.races == []


def test_the_host_waits_for_no_copy(monkeypatch):
    copy, are_beside = torch.Tensor.copy_, []

    def seen(destination, source, non_blocking=False):
        are_beside.append(non_blocking)
        return copy(destination, source, non_blocking)

    emulate(monkeypatch, RaceDetector())
    monkeypatch.setattr(torch.Tensor, "copy_", seen)
    EmulatedLane(torch.device("cpu")).copy([(torch.empty(8), torch.ones(8))] * 2, Event())
    assert are_beside == [True, True]


def test_a_load_that_is_interrupted_is_waited_for(monkeypatch):
    tiny, detector = make_tiny("rope"), RaceDetector()
    emulate(monkeypatch, detector)

    def interrupt(stream):
        if stream is applied.activations.load_lane._stream:
            raise KeyboardInterrupt

    with detector:
        applied = apply(tiny, MemoryPlan(kept="host", checkpoint="none"), "cpu")
        tiny.step()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            before_a_copy_ends(patch, detector, interrupt)
            tiny.step()
        gc.collect()
        tiny.step()
        detector.declare_host(applied.host_buffers)
        applied.undo()
    assert detector.races == []


def test_a_copy_that_cannot_begin_does_not_say_for_later_ones_what_computes(monkeypatch):
    detector = RaceDetector()
    emulate(monkeypatch, detector)
    lane, done, other = EmulatedLane(torch.device("cpu")), Event(), Stream("other")
    monkeypatch.setattr(lane._stream, "wait_event", lambda event: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lane.copy([(torch.empty(8), torch.ones(8))], done)
    done.record(lane._stream)
    with detector.on(other):
        lane.join(done)
    assert lane._stream in other.clock and lane._stream not in detector.compute.clock


@pytest.mark.parametrize("sabotage, plan", [
    (without_waiting_for_compute, "offload"),
    (without_waiting_for_compute, "boundaries"),
    (without("join", Lane), "offload"),
    (without("join", Lane), "kept"),
    (waiting_for_the_first_copy_of_an_event_only, "offload"),
    (waiting_for_the_first_copy_of_an_event_only, "kept"),
    (letting_go_before_the_copy_out, "boundaries"),
    (without("_arrive", _Parked), "kept"),
    (clearing_at_once, "offload"),
])  # fmt: skip
def test_what_is_out_of_order_is_found(sabotage, plan, monkeypatch):
    sabotage(monkeypatch)
    assert races(monkeypatch, PLANS[plan]) != []


def test_the_detector_itself():
    detector = RaceDetector()
    other, event = Stream("other"), Event()
    with detector:
        x = torch.ones(8)
        with detector.on(other):
            x[4:].add_(1)
        assert len(detector.races) == 1
        detector.races.clear()
        other.wait_event(event)  # never recorded
        event.record(detector.compute)
        other.wait_event(event)
        with detector.on(other):
            x[:4].add_(1)
        assert detector.races == []
        x[4:].mul_(1)
        assert len(detector.races) == 1
        detector.races.clear()
        event.record(other)
        x[:4].sum()
        assert len(detector.races) == 1
        detector.races.clear()
        detector.compute.wait_event(event)
        x.mul_(2)
        with detector.on(other):
            other.wait_event(event)
            y = x.detach().clone()
        assert len(detector.races) == 1
        detector.races.clear()
        del y
        torch.ones(1)
    assert detector.races == ["memory goes back while other may use it"]
