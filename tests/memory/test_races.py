"""The engine's order of copies and computation, proven by vector clocks: nothing is right by luck."""

import pytest
import torch
from race_detector import Event, RaceDetector, Stream, emulate
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


def letting_go_before_the_copy_out(monkeypatch):
    monkeypatch.setattr(_Parked, "forget_device_copy", lambda parked: setattr(parked, "tensor", None))


def clearing_at_once(monkeypatch):
    def clear(ring):
        ring.masters, ring.slots = {}, []

    monkeypatch.setattr(_Ring, "clear", clear)


@pytest.mark.parametrize("sabotage, plan", [
    (without_waiting_for_compute, "offload"),
    (without_waiting_for_compute, "boundaries"),
    (without("join", Lane), "offload"),
    (without("join", Lane), "kept"),
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
