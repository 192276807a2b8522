"""Readings without a card, and the bookkeeping of peaks with one that is made up."""

import mmap
import resource

import pytest
import torch

from memory.meter import Meter, resident_bytes, sensors


def test_without_a_card_only_the_host_is_read():
    reading = Meter().read()
    assert reading.allocated_bytes is reading.reserved_bytes is reading.device_used_bytes is None
    assert 1 << 20 < reading.host_bytes <= 1.01 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the kernel keeps the two apart, in batches


def test_resident_memory_grows_with_what_is_touched():
    before = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as held:  # from the system, whatever the heap has left
        assert resident_bytes() - before < 16 << 20
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        assert resident_bytes() - before > 48 << 20


def test_phases_are_recorded_even_when_they_fail():
    meter = Meter()
    with meter.phase("load"):
        pass
    with pytest.raises(KeyError), meter.phase("step"):
        raise KeyError
    with meter.phase("step"):
        pass
    assert list(meter.peaks) == ["load", "step"]
    assert meter.peaks["step"].num_visits == 2 and meter.peaks["step"].host_bytes > 0
    assert meter.peaks["step"].allocated_bytes is None


class MadeUpCard:
    """torch.cuda's counters, driven by the test."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 0
        self.lost = False
        for name, function in {
            "memory_stats_as_nested_dict": lambda device: {
                "allocated_bytes": {"all": {"current": self.now, "peak": self.peak}},
                "reserved_bytes": {"all": {"current": 2 * self.now, "peak": 2 * self.peak}},
            },
            "reset_peak_memory_stats": self.reset,
            "mem_get_info": self.info,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def hold(self, num_bytes):
        self.now = num_bytes
        self.peak = max(self.peak, num_bytes)

    def reset(self, device):
        self.peak = self.now

    def info(self, device):
        if self.lost:
            raise RuntimeError("device lost")
        return 100 - self.now, 100


def test_peaks_belong_to_the_phase_they_happened_in(monkeypatch):
    card, meter = MadeUpCard(monkeypatch), Meter("cuda")
    card.hold(50)
    card.hold(10)
    with meter.phase("step"):
        card.hold(20)
        with meter.phase("backward"):
            card.hold(40)
            card.hold(5)
        card.hold(7)
    with meter.phase("save"):
        pass
    peaks = {name: (peak.allocated_bytes, peak.reserved_bytes) for name, peak in meter.peaks.items()}
    assert peaks == {"backward": (40, 80), "step": (40, 80), "save": (7, 14)}
    assert meter.read().device_used_bytes == 7


def test_phases_that_follow_each_other(monkeypatch):
    card, meter = MadeUpCard(monkeypatch), Meter("cuda")
    for name, most in (("teacher", 30), ("student", 50), ("teacher", 40), (None, 90)):
        meter.turn_to(name)
        card.hold(most)
        card.hold(10)
    with meter.phase("sample"):
        card.hold(60)
    assert meter.highest() == {"teacher": 40, "student": 50, "sample": 60}
    meter.turn_to("optimizer")  # finds what the sample held
    with meter.phase("inner"):
        card.hold(70)
    meter.turn_to(None)
    assert meter.highest()["optimizer"] == 70


def test_without_a_card_the_highest_are_of_the_process():
    meter = Meter()
    meter.turn_to("teacher")
    meter.turn_to(None)
    assert meter.highest() == {"teacher": meter.peaks["teacher"].host_bytes}


def test_a_lost_card_does_not_end_the_run(monkeypatch):
    card, meter = MadeUpCard(monkeypatch), Meter("cuda")
    card.lost = True
    assert meter.read().device_used_bytes is None


@pytest.mark.parametrize("trouble", [RuntimeError("GPU is lost"), ModuleNotFoundError("no NVML"), ValueError("Unknown Error")])
def test_a_sensor_that_fails_is_left_out(monkeypatch, trouble):
    def fail(device):
        raise trouble

    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 312_000)
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 71)
    assert sensors("cuda") == {"temperature_celsius": 71, "power_watts": 312.0} and sensors("cpu") == {}
    monkeypatch.setattr(torch.cuda, "temperature", fail)
    assert sensors("cuda") == {"power_watts": 312.0}


@pytest.mark.gpu
def test_a_real_card_is_read():
    meter = Meter("cuda")
    with meter.phase("step"):
        held = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    assert meter.peaks["step"].reserved_bytes >= meter.peaks["step"].allocated_bytes >= held.nbytes
    reading = meter.read()
    assert reading.device_total_bytes >= reading.device_used_bytes >= reading.reserved_bytes >= reading.allocated_bytes
