"""What the health checks, the readings, the log and the live view cost in a step, and whether anything makes the host wait."""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.card.gauge import Gauge
from bench.card.rig import Rig, rigged
from bench.card.session import Session, failures, goal
from memory.meter import Meter
from trainer.metrics import MetricsLog
from trainer.monitor import Monitor, Readings, read_memory, sensors

SECONDS = 140
STEPS_A_ROUND = 3


class _Terminal(io.StringIO):
    """What the live view takes for a terminal."""

    def isatty(self) -> bool:
        return True


def _read(meter: Meter, readings: Readings, rig: Rig) -> None:
    """What the loop reads for a record besides: memory, peaks by phase, seconds by phase."""
    for phase in ("teacher", "student", "backward", "optimizer", None):
        meter.turn_to(phase)
    readings(), meter.highest(), rig.clock.read()


def _round(gauge: Gauge, rig: Rig, between: Callable[[], object]) -> float:
    """Seconds a step, of a few; as in a run: what the host does `between` steps is beside the card's work."""
    started = time.perf_counter()
    for _ in range(STEPS_A_ROUND):
        rig.step()
        between()
    gauge.synchronize()
    return (time.perf_counter() - started) / STEPS_A_ROUND


def _compare(session: Session, kind: str, frames: int, num_rounds: int, directory: Path) -> dict[str, Any]:
    """Steps with and without all that watches, a few in turns, so that a drift of the clock rate is in both."""
    gauge, cell, num_drawn = session.gauge, session.cell(kind, frames), 0
    log, meter = MetricsLog(directory), Meter(gauge.device)
    readings = Readings(meter)
    with rigged(cell, gauge, bare=True) as plain, rigged(cell, gauge, watched=True) as watched:
        taken: dict[str, list[float]] = {"plain": [], "watched": []}
        with watched.health:
            for i in range(num_rounds + 1):
                for name, rig in (("plain", plain), ("watched", watched))[::1 if i % 2 else -1]:
                    monitor = Monitor(100, mode="auto" if rig is watched else "off", stream=_Terminal(),
                                      read_memory=lambda: read_memory(meter) | sensors(gauge.device))
                    watched.health.sinks = (log.write, monitor.step)
                    with monitor:
                        taken[name].append(_round(gauge, rig, partial(_read, meter, readings, rig) if rig is watched else lambda: None))
                    num_drawn += len(monitor.stream.getvalue()) > 0
            with gauge.unsynchronised():
                for _ in range(2):
                    watched.step()
                    _read(meter, readings, watched)
            gauge.synchronize()
            watched.health.flush()
    log.close()
    taken = {name: seconds[1:] for name, seconds in taken.items()}  # the first one warms up
    # A round's ratio: what drifts from round to round is in both of its halves.
    costs = [watched / plain - 1 for plain, watched in zip(taken["plain"], taken["watched"])]
    return {"step_seconds_by_round": taken, "step_seconds": {name: statistics.median(values) for name, values in taken.items()},
            "num_rounds": num_rounds, "num_drawn": num_drawn, "cost_by_round": costs, "cost": statistics.median(costs),
            "cost_standard_error": statistics.stdev(costs) / len(costs)**0.5 if len(costs) > 1 else None}


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result. An operator that waits ends the cell with torch's own message."""
    found, skipped = {}, []
    for kind, frames, num_rounds in session.within_budget(
            session.few([("2b", 17, 12), ("5b", 17, 6)], 1), skipped, name=lambda entry: f"{entry[0]} {entry[1]}f"):
        with tempfile.TemporaryDirectory() as directory:
            attempt = session.gauge.attempt(
                lambda: _compare(session, kind, frames, 1 if session.dry else num_rounds, Path(directory)))
        found[f"{kind} {frames}f"] = attempt.as_json()
    costs = [cell["cost"] for cell in found.values() if "cost" in cell]
    waits = ["synchroniz" in cell.get("failed", "") for cell in found.values()]
    complete = len(costs) == len(found) and not skipped
    return {"cells": found, "skipped": skipped,
            "goals": [goal("cost of the checks and the live view", max(costs) if complete and costs else None, 0.005, unit="%"),
                      goal("cells in which the host had to wait", failures(waits, complete=complete), 0)],
            "table": [[name, f"{cell['cost']:+.2%} ± {cell['cost_standard_error'] or 0:.2%}" if "cost" in cell else "failed"] for name, cell in found.items()]}
