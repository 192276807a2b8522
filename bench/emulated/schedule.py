"""The parts of the card suite that are about time, and what a third buffer is worth, on the emulated card's clock: the program's own order of
kernels, copies, events and waits, at the rates of several cards. Predicted; see `bench.emulated.clock` for what is not in it."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.card import cap, choice, offload
from bench.card.forecasts import seconds_of, shrunk
from bench.card.gauge import Gauge
from bench.card.session import Session, failures, goal
from bench.emulated.clock import Clock
from bench.overlap import link_rates
from memory.cards import GIB, Card, lookup
from memory.ranking import SEARCHED

BUFFERED = (8.0, 12.0, 16.0)
"""GiB of cards on which some blocks of the 5b stay and others stream, at 17 frames about as fast as they compute."""
HOST_GIB = 128
"""Of the host, for plans that park there what blocks keep."""


def cards() -> dict[str, Card]:
    """Whose rates are taken: a consumer's card, the same behind half the link, and a data centre's."""
    ample = {name: replace(lookup(name), host_bytes=HOST_GIB * GIB) for name in ("rtx-4090", "h100")}
    slow = replace(ample["rtx-4090"], name="rtx-4090-pcie3", host_link_bandwidth=link_rates()["pcie3-x16"])
    return {"rtx-4090": ample["rtx-4090"], "rtx-4090, PCIe 3": slow, "h100": ample["h100"]}


def measure(session: Session) -> dict[str, Any]:
    """By card, the parts' results, and all their goals."""
    found, goals = {}, []
    for name, card in cards().items():
        clock = Clock(card)
        found[name] = _on(clock, replace(session, card=card, gauge=_Gauge(session.gauge.device, clock)))
        goals += [g | {"goal": f"{name}: {g['goal']}"} for part in found[name].values() for g in part["goals"]]
    return {"cards": found, "goals": goals}


class _Gauge(Gauge):
    """One whose record of activity is the clock's: the profiler sees nothing here."""

    def __init__(self, device: torch.device, clock: Clock):
        super().__init__(device)
        self.activity = clock.activity


def _on(clock: Clock, session: Session) -> dict[str, Any]:
    with clock, tempfile.TemporaryDirectory() as scratch:
        overlap, beside = offload.hidden(session, []), offload.side_by_side(session, [])
        results = {"offload": {"cells": beside, "overlap": overlap, "goals": offload.goals(beside, {}, overlap)},
                   "cap": cap.measure(session, Path(scratch)), "choice": choice.measure(session, Path(scratch))}
    for name, cell in offload.whole_steps(session).items():
        beside[name]["predicted_step_seconds"] = seconds_of(cell, session.card)
    return results


def buffers(session: Session) -> dict[str, Any]:
    """By card and cap, the planner's plan beside that for two buffers: seconds on the clock, and predicted."""
    plain = session.cell("5b", 17)
    ways = {"two": tuple(name for name in SEARCHED if name != "offload_buffers"), "chosen": SEARCHED}
    found: dict[str, dict[str, Any]] = {}
    for name, card in cards().items():
        small, clock = [shrunk(card, gib) for gib in session.few(BUFFERED, 1)], Clock(card)
        gauge = _Gauge(session.gauge.device, clock)
        for way, free in ways.items():
            for capped, (best, why) in zip(small, session.plans(plain, tuple(small), free)):
                if best is None:
                    cell = {"failed": why}
                else:
                    with clock:
                        cell = replace(session, card=capped, gauge=gauge).measure(replace(plain, plan=best.plan), num_steps=1, num_warm=2)
                    cell |= {"num_buffers": best.plan.offload_buffers, "predicted_step_seconds": best.time.seconds}
                found.setdefault(name, {}).setdefault(f"{capped.capacity_bytes / GIB:.0f} GB", {})[way] = cell
    cells = [cell for caps in found.values() for pair in caps.values() for cell in pair.values()]
    errors = [cell["predicted_step_seconds"] / cell["step_seconds"] - 1 for cell in cells if "step_seconds" in cell]
    return {"cards": found, "goals": [goal("steps that failed", failures(["step_seconds" not in cell for cell in cells], complete=True), 0),
                                      goal("largest error of predicted seconds", max(map(abs, errors), default=None), 0.01, unit="%")]}
