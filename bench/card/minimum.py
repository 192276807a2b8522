"""The smallest peak at which whole steps with all three losses run, and what they take."""

from pathlib import Path
from typing import Any

from bench.card.forecasts import peaks_of
from bench.card.rig import Cell
from bench.card.session import Session, goal, rows
from memory.cards import GIB

SECONDS = 115
_SMALLEST = dict(resident_blocks=0, boundaries="host", feed_forward_chunks=8)
LONG = ("1.5", 81)
GOALS = {("5b", 49): 3.0, ("2b", 17): 1.1, LONG: 7.0}  # GiB allocated


def _cells(session: Session) -> dict[tuple[str, int], list[Cell]]:
    """Candidates by goal: fewest bytes of state first, then the plain optimizer."""
    return {key: [session.cell(*key, **_SMALLEST, optimizer=optimizer) for optimizer in ("adamw8bit", "adamw")]
            for key in GOALS}


def prepare(session: Session) -> None:
    """Ask for all predictions ahead."""
    for cells in _cells(session).values():
        session.forecaster.ask(peaks_of, cells[0], session.workspace_bytes)


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result."""
    found, skipped, goals = {}, [], []
    # The long one after each has been measured once, and the plain optimizers with what time is left.
    todo = [(key, cells[i]) for i in (0, 1) for key, cells in _cells(session).items() if not (i and key == LONG)]
    for key, cell in session.within_budget(todo[:3] if session.dry else todo, skipped, name=lambda pair: pair[1].name()):
        # The long one takes the better part of a minute: its first step has to do, all that outlives it was there before.
        found[f"{key[0]} {key[1]}f {cell.plan.optimizer}"] = session.measure(cell, num_steps=1, num_warm=int(key != LONG))
    predicted = {}
    for key, cells in _cells(session).items():
        told = session.forecast(peaks_of, cells[0], session.workspace_bytes)
        if told.worked:
            predicted[f"{key[0]} {key[1]}f"] = told.value[0].allocator.peak_allocated_bytes
        peaks = [cell["allocated_bytes"] for name, cell in found.items()
                 if name.startswith(f"{key[0]} {key[1]}f ") and "allocated_bytes" in cell]
        goals.append(goal(f"GiB allocated, {key[0]} at {key[1]} frames", min(peaks) / GIB if peaks else None, GOALS[key]))
    return {"cells": found, "predicted_allocated_bytes": predicted, "skipped": skipped, "goals": goals, "table": rows(found)}
