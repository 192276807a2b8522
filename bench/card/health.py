"""What the health checks, the readings and the log cost in a step, and whether anything makes the host wait."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.card.rig import Rig, rigged
from bench.card.session import Session, goal
from memory.meter import Meter
from trainer.metrics import MetricsLog
from trainer.monitor import read_memory

BUDGET_S = 15


def _read(meter: Meter, rig: Rig) -> None:
    """What the loop reads for a record besides: memory, peaks by phase, seconds by phase."""
    for phase in ("teacher", "student", "backward", "optimizer", None):
        meter.turn_to(phase)
    read_memory(meter), meter.highest(), rig.clock.read()


def _compare(session: Session, kind: str, frames: int, num_pairs: int, directory: Path) -> dict[str, Any]:
    """Steps with and without the checks, in turns, so that a drift of the clock rate is in both."""
    gauge, cell = session.gauge, session.cell(kind, frames)
    log, meter = MetricsLog(directory), Meter(gauge.device)
    with rigged(cell, gauge) as plain, rigged(cell, gauge, watched=True) as watched:
        watched.health.sinks = (log.write,)
        taken: dict[str, list[float]] = {"plain": [], "watched": []}
        with watched.health:
            for i in range(num_pairs + 2):
                for name, rig in (("plain", plain), ("watched", watched)):
                    rig.step()
                    if rig is watched:
                        _read(meter, rig)
                    gauge.synchronize()
                    if i >= 2:
                        taken[name].append(sum(rig.clock.read().values()))
            with gauge.unsynchronised():
                for _ in range(2):
                    watched.step()
                    _read(meter, watched)
            gauge.synchronize()
            watched.health.flush()
    log.close()
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {"step_seconds": medians, "num_pairs": num_pairs, "cost": medians["watched"] / medians["plain"] - 1}


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result. An operator that waits ends the cell with torch's own message."""
    found, skipped = {}, []
    for kind, frames, num_pairs in session.within_budget(
            session.few([("2b", 17, 6), ("5b", 17, 4)], 1), skipped, name=lambda entry: f"{entry[0]} {entry[1]}f"):
        with tempfile.TemporaryDirectory() as directory:
            attempt = session.gauge.attempt(
                lambda: _compare(session, kind, frames, 2 if session.dry else num_pairs, Path(directory)), may_fail=(RuntimeError,))
        found[f"{kind} {frames}f"] = attempt.as_json()
    costs = [cell["cost"] for cell in found.values() if "cost" in cell]
    waits = sum("synchroniz" in cell.get("failed", "") for cell in found.values())
    return {"cells": found, "skipped": skipped,
            "goals": [goal("cost of the checks", max(costs, default=None), 0.005),
                      goal("cells in which the host had to wait", waits, 0)],
            "table": [[name, f"{cell['cost']:+.2%}" if "cost" in cell else "failed"] for name, cell in found.items()]}
