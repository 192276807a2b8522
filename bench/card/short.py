"""Seconds of steps so short that the host may be what takes the time, while nothing else asks for its cores.

The cells of part peaks are measured beside the processes that predict them: that changes no byte, and a host that shares its
cores gives the card its kernels more slowly. What the planner says of these seconds: `bench.times`.
"""

from pathlib import Path
from typing import Any

from bench.card import peaks
from bench.card.rig import Cell
from bench.card.session import Session, goal, rows

SECONDS = 70
NUM_STEPS, NUM_WARM = 4, 2


def _cells(session: Session) -> list[Cell]:
    """Every fourth of those of part peaks with few frames."""
    return session.few([cell for cell in peaks.cells(session) if cell.frames <= 17][::4], 2)


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result."""
    skipped: list[str] = []
    found = {cell.name(): session.measure(cell, num_steps=NUM_STEPS, num_warm=NUM_WARM)
             for cell in session.within_budget(_cells(session), skipped, name=Cell.name)}
    ran = [cell for cell in found.values() if "step_seconds" in cell]
    spread = max((max(cell["all_step_seconds"]) / min(cell["all_step_seconds"]) - 1 for cell in ran), default=None)
    return {"cells": found, "skipped": skipped, "table": rows(found),
            "goals": [goal("forecasts under way meanwhile", max((cell["num_forecasts_beside"] for cell in ran), default=None), 0),
                      goal("steps of one cell: the longest longer than the shortest by", spread, 0.05, unit="%")]}
