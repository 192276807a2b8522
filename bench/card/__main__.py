"""The suite for one card: what is predicted is measured, beside its peers. Random weights; no network, no video files.

    python -m bench.card                       parts that have no result yet, as many as 8 minutes hold; once more for the next
    python -m bench.card --only offload speed  some parts; --again measures parts that have a result anew
    python -m bench.card --dry                 every part at toy size on the CPU; the figures mean nothing

Results: bench/results/<card>/PART.json with provenance, a table of goals last.
"""

from memory import environment

environment.prepare()  # before torch is imported: as a run does

import gc
import itertools
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import tyro

from bench.card import cap, choice, feasibility, health, minimum, offload, peaks, short, speed
from bench.card.forecasts import Forecaster, card_here
from bench.card.gauge import Gauge
from bench.card.rig import backbone_of
from bench.card.session import Session, goal_row, print_table, register_toys
from bench.provenance import RESULTS, write_result
from memory.streams import release_pinned
from trainer.run_directory import probe

# Such that parts that follow each other fill eight minutes.
PARTS: dict[str, ModuleType] = {"short": short, "health": health, "peaks": peaks, "cap": cap, "feasibility": feasibility, "minimum": minimum,
                                "speed": speed, "choice": choice, "offload": offload}
QUIET = ("short", "health")
"""What the host takes is part of these: nothing is predicted beside them."""
Part = Literal[*PARTS]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Measure the trainer on the card of this machine."""

    only: tuple[Part, ...] = ()
    """Parts to run; by default all."""
    again: bool = False
    """Measure parts anew that have a result."""
    dry: bool = False
    """Every part at toy size on the CPU: the code runs, the figures mean nothing."""
    out: Path = RESULTS
    """Directory of results; a directory of the card's name is made in it."""
    seconds: float = 480.0
    """Time after which no cell starts; the last one may take longer. A part that would not end in it (by what an H100 needs) is left for the
    next call, unless it is the first. Ctrl-C does the same at once."""
    workers: int | None = None
    """Processes that predict while the card measures; by default half of the cores, at most 8."""

    def __post_init__(self):
        if not 10 <= self.seconds <= 86400:
            raise ValueError(f"--seconds {self.seconds:g}: from 10 to 86400")
        if self.workers is not None and not 0 <= self.workers <= 64:
            raise ValueError(f"--workers {self.workers}: from 0 to 64; 0 predicts in this process")


def run_part(name: str, session: Session, out: Path) -> dict[str, Any]:
    """Measure one part; write its JSON, also of what was measured until the device was lost."""
    started = time.monotonic()
    result = PARTS[name].measure(session, out)
    if session.dry:  # a figure of a dry run reaches no goal and misses none
        result["goals"] = [g | {"reached": None} for g in result["goals"]]
    content = {"part": name, "dry": session.dry, "seconds": round(time.monotonic() - started, 1), "card": session.card.name,
               "fixed_terms": session.fixed, "context_bytes_after": None if session.gauge.lost else session.gauge.context_bytes(), **result}
    write_result(name, content, out)
    return content


def in_time(parts: Sequence[str], seconds: float) -> list[str]:
    """The first parts that end within `seconds`; the very first in any case."""
    ends = itertools.accumulate(PARTS[name].SECONDS for name in parts)
    return [name for i, (name, end) in enumerate(zip(parts, ends)) if end <= seconds or i == 0]


def stored(path: Path) -> dict[str, Any] | None:
    """An earlier result of a part; None if there is none that can be read."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as e:
        print(f"{path}: left out, it cannot be read ({e})", file=sys.stderr)
        return None
    return content if isinstance(content, dict) and isinstance(content.get("goals"), list) else None


def _conclude(out: Path, results: dict[str, Any], *, measured: Sequence[str], left: Sequence[str], again: bool) -> None:
    """Print the goals, how old the results of parts that were not `measured` are, and what is `left` to measure."""
    print_table(f"goals ({out})", [goal_row(name, g) for name, result in results.items() for g in result["goals"]])
    for name in (name for name in results if name not in measured):
        source = results[name].get("provenance", {})
        print(f"{name}: measured {source.get('date')} by {source.get('commit')}; --again --only {name} measures it by the program of today")
    for name, result in results.items():
        if skipped := result.get("skipped"):
            print(f"{name}: {len(skipped)} cells were not measured, as the time ended or a signal came; --again --only {name} measures all")
    if left:
        how = f"the same with --only {' '.join(left)}" if again else "the same command again"
        print(f"not begun: {', '.join(left)}; {how} measures {'them' if len(left) > 1 else 'it'}")


def _opened(config: Suite) -> Session:
    """What all parts share, on a device of which nothing was asked yet."""
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    workers = config.workers if config.workers is not None else min(8, (os.cpu_count() or 1) // 2)
    device = torch.device("cpu") if config.dry else torch.device("cuda", torch.cuda.current_device())
    if config.dry:
        register_toys()
    session = Session(Gauge(device), card_here(dry=config.dry), Forecaster(0 if config.dry else workers), dry=config.dry)
    backbone_of(session.cell("2b", 17))  # imports what all parts need
    gc.freeze()  # and that stays: the collection between two cells need not look at it
    session.calibrate()
    return session


def _measured(parts: Sequence[str], session: Session, out: Path) -> tuple[dict[str, Any], list[str]]:
    """The results of parts, one after the other until the time is used up, a signal comes or the device is lost; and which parts failed."""
    results: dict[str, Any] = {}
    failed: list[str] = []

    def stop(number: int, frame: Any) -> None:
        session.deadline = min(session.deadline, time.monotonic())  # the cell under way is the last, and what was measured is written

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for i, name in enumerate(parts):
            if time.monotonic() > session.deadline or session.gauge.lost:
                break
            if name not in QUIET and (not i or parts[i - 1] in QUIET):  # all that is to come is predicted ahead, once nothing is disturbed
                for part in (PARTS[other] for other in parts[i:] if hasattr(PARTS[other], "prepare")):
                    part.prepare(session)
            try:
                results[name] = run_part(name, session, out)
            except Exception:  # said aloud, and the parts after it are measured
                traceback.print_exc()
                failed.append(name)
            else:
                print_table(f"{name} ({results[name]['seconds']} s)", results[name]["table"])
                sys.stdout.flush()
            session.gauge.release()  # not in the except block, where the traceback holds what the part held
            if not session.gauge.lost:
                release_pinned()  # in sizes that other parts may not ask for
    finally:
        session.forecaster.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return results, failed


def main(config: Suite) -> int:
    started = time.monotonic()
    if not config.dry and not torch.cuda.is_available():
        print("error: there is no CUDA card here; --dry walks through every part on the CPU", file=sys.stderr)
        return 2
    label = "dry" if config.dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = config.out / label
    try:
        probe(out)  # before anything is measured
    except OSError as e:
        print(f"error: --out {config.out}: cannot be written ({e.strerror})", file=sys.stderr)
        return 6
    session = _opened(config)
    wanted = [name for name in PARTS if name in (config.only or PARTS)]
    results = {} if config.again else {name: known for name in wanted if (known := stored(out / f"{name}.json"))}
    missing = [name for name in wanted if name not in results]
    todo = missing if config.dry else in_time(missing, config.seconds)
    session.deadline = float("inf") if config.dry else started + config.seconds
    measured, failed = _measured(todo, session, out)
    results |= measured
    left = [name for name in missing if name not in results and name not in failed]
    _conclude(out, {name: results[name] for name in wanted if name in results}, measured=todo, left=left, again=config.again)
    if session.gauge.lost:
        print(f"error: the device does not answer any more: {session.gauge.lost}", file=sys.stderr)
    if failed:
        print(f"error: failed, see above: {', '.join(failed)}; again with --only {' '.join(failed)}", file=sys.stderr)
    return 1 if failed or session.gauge.lost else 0


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit status, or raises SystemExit where it cannot be parsed."""
    try:
        config = tyro.cli(Suite, args=list(arguments), prog="python -m bench.card")
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return main(config)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
