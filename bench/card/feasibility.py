"""Under the memory of smaller cards: the planner's plan really runs, and where the naive recipe breaks."""

import dataclasses
from pathlib import Path
from typing import Any

from bench.card.forecasts import plans_of, shrunk
from bench.card.session import Session, goal, rows
from bench.naive import Naive

BUDGET_S = 65
SIZES = (24.0, 48.0, 96.0, 8.0, 12.0, 16.0)
NUM_STEPS = 3


def _cards(session: Session):
    return tuple(shrunk(session.card, gib) for gib in session.few(SIZES, 1))


def prepare(session: Session) -> None:
    session.forecaster.ask(plans_of, session.cell("5b", 49), _cards(session))


def _naive(session: Session, cap: int) -> dict[str, Any]:
    """Build and step the naive recipe under a cap, and say how far it came."""
    stages: list[str] = []

    def run() -> dict[str, Any]:
        with session.gauge.capped(cap):
            naive = Naive(session.cell("2b", 17, dtype="float32").config(), session.gauge.device, session.recipe(), stages.append)
            try:
                naive.step()
            finally:
                naive.__dict__.clear()
        return {}

    attempt = session.gauge.attempt(run)
    return {"cap_bytes": cap, "ran": attempt.worked, "out_of_memory": attempt.out_of_memory,
            "broke_in": None if attempt.worked else stages[-1]}


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result. Random weights are drawn before the cap is set; the steps run under it."""
    found, skipped, naive = {}, [], {}
    plain = session.cell("5b", 49)
    plans = session.forecaster.answer(plans_of, plain, _cards(session))
    todo = list(zip(_cards(session), plans))
    for card, (best, smallest) in session.within_budget(todo, skipped, name=lambda pair: pair[0].name):
        name = f"5b 49f {card.name}"
        if best is None:
            found[name] = {"failed": f"the planner says it does not fit: {smallest.reason}"}
            continue
        cell = dataclasses.replace(plain, plan=best.plan)
        found[name] = session.measure(cell, num_steps=NUM_STEPS - 1, cap=card.available_bytes).as_json() | {
            "settings": cell.name(), "cap_bytes": card.available_bytes,
            "predicted": {"reserved_bytes": best.prediction.reserved_bytes, "step_seconds": best.time.seconds}}
    for card in session.within_budget(_cards(session)[:3], skipped, name=lambda card: f"naive {card.name}"):
        naive[card.name] = _naive(session, card.available_bytes)
    ran = [f"5b 49f {card.name}" for card in _cards(session)[:3] if "step_seconds" in found.get(f"5b 49f {card.name}", {})]
    broken = [entry for entry in found.values() if "out_of_memory" in entry]
    return {
        "cells": found, "naive": naive, "skipped": skipped,
        "goals": [goal("of 24, 48 and 96 GB, those under which three steps ran", len(ran), 3, at_least=True),
                  goal("plans said to fit that ran out of memory", len(broken), 0)],
        "table": rows(found) + [[f"naive 2b 17f {name}", "ran" if r["ran"] else f"broke in {r['broke_in']}"] for name, r in naive.items()],
    }
