"""Step time of the planner's plan under 24, 48 and 96 GB against plain resident blocks with checkpointing.

A step is the student's pass alone, with the teacher cached: recomputation is what the planner saves, and the teacher has none.
"""

import dataclasses
from pathlib import Path
from typing import Any

from bench.card.forecasts import plans_of, shrunk
from bench.card.rig import Cell
from bench.card.session import Session, goal, rows

SECONDS = 170
SIZES = (24.0, 48.0, 96.0)
MODELS = (("5b", 49), ("2b", 49))
WANTED = {24.0: 0.12, 48.0: 0.20, 96.0: 0.22}


def _cards(session: Session):
    """The last one may park what blocks keep on the host, if that pays."""
    sizes = session.sizes(SIZES)
    return *(shrunk(session.card, gib) for gib in session.few(sizes, 1)), *(shrunk(session.card, gib, with_host=True) for gib in sizes[:1])


def _plain(session: Session, kind: str, frames: int) -> Cell:
    return session.cell(kind, frames, student_only=not session.dry)  # toys share their forecasts with the other parts


def prepare(session: Session) -> None:
    """Ask for all predictions ahead."""
    for kind, frames in MODELS:
        session.forecaster.ask(plans_of, _plain(session, kind, frames), _cards(session))


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result."""
    found, skipped, gains = {}, [], {}
    todo = []
    for kind, frames in session.few(MODELS, 1):
        plain = _plain(session, kind, frames)
        todo.append((f"{kind} {frames}f plain", plain, None))
        for card, (best, _) in zip(_cards(session), session.plans(plain, _cards(session))):
            if best is not None and not (card.name.endswith("-host") and best.plan.kept == "device"):  # that would be the first one again
                cell = dataclasses.replace(plain, plan=best.plan)
                todo.append((f"{kind} {frames}f {card.name}", cell, card.available_bytes))
    for name, cell, cap in session.within_budget(todo, skipped, name=lambda entry: entry[0]):
        found[name] = session.measure(cell, num_steps=2, cap=cap) | {"cap_bytes": cap}
    for name, cell in found.items():
        plain = found.get(" ".join(name.split()[:2]) + " plain", {})
        if not name.endswith("plain") and "step_seconds" in cell and "step_seconds" in plain:
            gains[name] = 1 - cell["step_seconds"] / plain["step_seconds"]
    device, hosted = (f"5b 49f {shrunk(session.card, SIZES[0], with_host=with_host).name}" for with_host in (False, True))
    wanted = {name for name, _, _ in todo}
    goals = [goal(f"time saved, 5b at 49 frames under {gib:g} GB", gains.get(f"5b 49f {shrunk(session.card, gib).name}"), WANTED[gib], at_least=True, unit="%")
             for gib in session.few(SIZES, 1)]
    goals.append(goal("time saved, 5b at 49 frames under 24 GB, where blocks may keep things on the host",
                      gains.get(hosted if hosted in wanted else device), 0.20, at_least=True, unit="%"))
    return {"cells": found, "time_saved": gains, "skipped": skipped, "goals": goals, "table": rows(found)}
