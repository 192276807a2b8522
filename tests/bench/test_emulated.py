"""The emulated card: what can be said without a CUDA build of torch, and with one a walk through it at toy size."""

import json
import subprocess
import sys

import pytest
import torch

from bench.card.gauge import Gauge
from bench.card.session import goal
from bench.emulated import measure
from bench.emulated.library import CannotEmulate, environment
from bench.emulated.measure import without
from memory.cards import lookup


def test_a_torch_without_cuda_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(CannotEmulate, match="built without CUDA; install a build with it"):
        environment(lookup("4090"), 24)


def test_what_is_no_card_is_refused():
    with pytest.raises(CannotEmulate, match=r"cpu \(cpu\) is not emulated; one of .*ada"):
        environment(lookup("cpu"), 80)


def test_results_of_what_is_not_computed_have_no_times_and_losses():
    cell = {"step_seconds": 1.0, "peaks": {"teacher": {"allocated_bytes": 5}}, "cells": [{"seconds_by_phase": {}, "num_retries": 0, "loss": 0.0}]}
    assert without(("second", "loss"), cell) == {"peaks": {"teacher": {"allocated_bytes": 5}}, "cells": [{"num_retries": 0}]}


def test_a_part_that_fails_costs_no_part_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure", "--toy", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Emulated")
    monkeypatch.setattr(measure, "Gauge", lambda device: Gauge(torch.device("cpu")))
    monkeypatch.setattr(measure, "register_toys", lambda: None)
    goals = {"goals": [goal("cells", 1, 1)]}
    monkeypatch.setattr(measure, "PARTS", {"peaks": lambda session: goals, "schedule": lambda session: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        measure.main()
    written = json.loads((tmp_path / "emulated.json").read_text())
    assert written["peaks"]["goals"][0]["measured"] == 1 and list(written["measured"]) == ["peaks"] and "schedule" not in written
    monkeypatch.setattr(measure, "PARTS", {"schedule": lambda session: goals})
    assert measure.main() == 0  # what a run does not measure stays as it is
    assert json.loads((tmp_path / "emulated.json").read_text())["measured"].keys() == {"peaks", "schedule"}


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_toy_models_allocate_what_is_predicted(tmp_path):
    subprocess.run([sys.executable, "-m", "bench.emulated", "--toy", "--out", str(tmp_path)], check=True)
    result = json.loads((tmp_path / "emulated.json").read_text())
    ran = [cell for cell in result["peaks"]["cells"] if "allocated_error" in cell]
    assert ran and max(abs(cell["allocated_error"]) for cell in ran) < 0.01
    assert all(s["num_placed_alike"] == s["num_requests"] > 0 for s in result["peaks"]["snapshots"].values())
    growing, fixed = result["runs"]["runs"].values()
    assert growing["segments_grow"] and not fixed["segments_grow"] and all(run["num_retries"] == 0 and run["video"]["reserved_bytes"] > 0 for run in (growing, fixed))
    phases = {name: phase for name, phase in growing["phases"].items() if "predicted_bytes" in phase}
    assert len(phases) == 8 and all(0.99 < phase["predicted_bytes"] / phase["allocated_bytes"] < 1.01 for phase in phases.values())
    assert all(abs(cell["allocated_error"]) < 0.01 for cell in result["drawn"]["cells"])
    assert all("allocated_error" in cell for cell in result["compiled"]["cells"])  # Triton and Inductor take the card for one
    for parts in result["schedule"]["cards"].values():  # whoever waits for each layer takes longer than whoever loads ahead
        seconds = {name: cell["step_seconds"] for name, cell in parts["offload"]["cells"].items()}
        assert seconds["2b-17f sequential, layer by layer"] > seconds["2b-17f ring"] >= 0.99 * seconds["2b-17f all resident"] > 0
    assert all(step["num_waits"] == step["num_driver_allocations"] == step["num_pageable_copies"] == 0 for step in result["steps"])


PINNING = """
import ctypes, torch
from memory.streams import PinningRefused, pinning, release_pinned
torch.zeros(1, device="cuda")
ctypes.CDLL(None).emulated_card_pins(ctypes.c_size_t(1 << 30))
held = []
try:
    while True:
        with pinning():
            held.append(torch.empty(200 << 20, dtype=torch.uint8, pin_memory=True))
except PinningRefused as refused:
    assert len(held) == 4 and refused.pinned_bytes == 4 << 28, refused  # torch rounds up to powers of two
del held
release_pinned()
with pinning():
    assert torch.empty(900 << 20, dtype=torch.uint8, pin_memory=True).is_pinned()
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_what_torch_says_where_a_host_pins_no_more():
    subprocess.run([sys.executable, "-m", "bench.emulated", "--", "-c", PINNING], check=True)
