"""The planner's plan against a grid of plans that were all measured: how much time its choice costs."""

import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import Any

from bench.card.forecasts import plans_of, shrunk
from bench.card.rig import Cell
from bench.card.session import Session, goal, rows

SECONDS = 180
SIZES = (6.0, 9.0)
MODEL = ("2b", 9)  # short steps: the whole grid has to run
NUM_STEPS, NUM_TURNS = 2, 2


def _plain(session: Session, **plan: Any) -> Cell:
    return session.cell(*(("5b", 49) if session.dry else MODEL), **plan)  # toys share their forecasts with the other parts


def _cards(session: Session):
    return tuple(shrunk(session.card, gib) for gib in session.few(SIZES, 1))


def _grid(session: Session) -> list[Cell]:
    """Resident blocks x what blocks keep x where boundaries wait. Nothing is left out for being unlikely."""
    keeps = ((0, 0), (15, 0), (30, 0), (15, 15), (0, 15), (0, 30))
    plans = [dict(resident_blocks=resident, num_keep_attention=attention, num_keep_everything=everything, boundaries=where)
             for resident, (attention, everything), where in itertools.product((None, 15, 0), keeps, ("device", "host"))
             if not (where == "host" and everything == 30)]
    return session.few([_plain(session, **plan) for plan in plans], 3)


def prepare(session: Session) -> None:
    """Ask for all predictions ahead."""
    session.forecaster.ask(plans_of, _plain(session), _cards(session))


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result. The grid runs without a cap; a cell fits a card if what it reserved is available there."""
    found, skipped, chosen, again, regrets, cells = {}, [], {}, {}, {}, {}
    plain = _plain(session)
    for card, (best, _) in zip(_cards(session), session.plans(plain, _cards(session))):
        if best is not None:
            cell = dataclasses.replace(plain, plan=best.plan)
            cells[card.name] = cell
            chosen[card.name] = session.measure(cell, num_steps=NUM_STEPS, cap=card.available_bytes) | {
                "cap_bytes": card.available_bytes, "predicted_step_seconds": best.time.seconds}
    for cell in session.within_budget(_grid(session), skipped, name=Cell.name):
        cells[cell.name()], found[cell.name()] = cell, session.measure(cell, num_steps=NUM_STEPS)
    for card in _cards(session) if not skipped else ():
        fitting = {name: c["step_seconds"] for name, c in found.items()
                   if c.get("reserved_bytes", card.capacity_bytes) <= card.available_bytes}
        if fitting and "step_seconds" in chosen.get(card.name, {}):
            best = min(fitting, key=fitting.get)  # of many, so some of its lead is luck: both anew, in turns, under the cap
            turns = again[card.name] = [{name: session.measure(cells[name], num_steps=NUM_STEPS, cap=card.available_bytes)
                                         for name in (best, card.name)} for _ in range(NUM_TURNS)]
            if all("step_seconds" in cell for turn in turns for cell in turn.values()):
                mean = {name: statistics.fmean(turn[name]["step_seconds"] for turn in turns) for name in turns[0]}
                regrets[card.name] = mean[card.name] / mean[best] - 1
    return {"chosen": chosen, "grid": found, "best_and_chosen_again": again, "regret": regrets, "skipped": skipped,
            "goals": [goal(f"time lost to the best of the grid under {gib:g} GB", regrets.get(card.name), 0.03, unit="%")
                      for gib, card in zip(SIZES, _cards(session))],
            "table": rows(chosen)}
