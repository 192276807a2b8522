"""Under the memory of smaller cards: the planner's plan really runs, and where the naive recipe breaks."""

import dataclasses
from pathlib import Path
from typing import Any

from bench.card.forecasts import plans_of, shrunk
from bench.card.rig import Cell
from bench.card.session import Session, failures, goal, rows
from bench.naive import Naive
from memory.cards import Card

SECONDS = 175
LARGE, SMALL = ((24.0, 49), (48.0, 49), (96.0, 49)), ((8.0, 17), (12.0, 17), (16.0, 17))  # (GiB, frames of the 5b)
NUM_STEPS = 3


def _cases(session: Session) -> list[tuple[Card, int]]:
    held = session.sizes([gib for gib, _ in LARGE + SMALL])
    return [(shrunk(session.card, gib), frames) for gib, frames in session.few([case for case in LARGE + SMALL if case[0] in held], 1)]


def _plans(session: Session, frames: int) -> tuple[Cell, tuple[Card, ...]]:
    """What to ask the planner: one cell, on all of its cards."""
    return session.cell("5b", frames), tuple(card for card, f in _cases(session) if f == frames)


def prepare(session: Session) -> None:
    """Ask for all predictions ahead."""
    for frames in dict.fromkeys(frames for _, frames in _cases(session)):
        session.forecaster.ask(plans_of, *_plans(session, frames))


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
            "failed": attempt.failed, "broke_in": None if attempt.worked else stages[-1]}


def came_to(naive: dict[str, Any]) -> str:
    """How far the naive recipe came, in words."""
    if naive["ran"]:
        return "runs"
    return f"breaks in {naive['broke_in']}" if naive["out_of_memory"] else f"failed: {naive['failed']}"


def _planned(session: Session, card: Card, frames: int) -> dict[str, Any]:
    """Three steps of the whole recipe by the plan for a card, under that card's cap."""
    plain, cards = _plans(session, frames)
    best, why = session.plans(plain, cards)[cards.index(card)]
    if best is None:
        return {"failed": why}
    cell = dataclasses.replace(plain, plan=best.plan)
    return session.measure(cell, num_steps=NUM_STEPS - 1, cap=card.available_bytes) | {
        "cap_bytes": card.available_bytes,
        "predicted": {"reserved_bytes": best.prediction.reserved_bytes, "step_seconds": best.time.seconds}}


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result. Random weights are drawn before the cap is set; the steps run under it."""
    found, skipped, naive = {}, [], {}
    cases = _cases(session)
    large = [case for case in cases if case[1] == LARGE[0][1]]
    for card, frames in session.within_budget(large, skipped, name=lambda case: case[0].name):
        found[f"5b {frames}f {card.name}"] = _planned(session, card, frames)
    for card, _ in session.within_budget(large, skipped, name=lambda case: f"naive {case[0].name}"):
        naive[card.name] = _naive(session, card.available_bytes)
    for card, frames in session.within_budget(cases[len(large):], skipped, name=lambda case: case[0].name):
        found[f"5b {frames}f {card.name}"] = _planned(session, card, frames)
    ran = [name for name in (f"5b {frames}f {card.name}" for card, frames in large) if "step_seconds" in found.get(name, {})]
    broken = ["step_seconds" not in entry for entry in found.values()]
    return {
        "cells": found, "naive": naive, "skipped": skipped,
        "goals": [goal("of 24, 48 and 96 GB, those under which three steps ran",
                       len(ran) if session.dry or (len(large) == len(LARGE) and not skipped) else None, 3, at_least=True),
                  goal("plans said to fit that did not run", failures(broken, complete=not skipped), 0)],
        "table": rows(found) + [[f"naive 2b 17f {name}", came_to(r)] for name, r in naive.items()],
    }
