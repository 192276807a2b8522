"""What is measured on the emulated card: bytes, and on its clock the order of things. Called in a Python that has one
(`python -m bench.emulated`)."""

import argparse
import ctypes
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from memory import environment

environment.prepare()  # before torch is imported: as a run does

import torch

from bench.card import feasibility, minimum, peaks
from bench.card.forecasts import Forecaster, card_here
from bench.card.gauge import Gauge
from bench.card.rig import Cell, rigged
from bench.card.session import Session, goal, goal_row, print_table, register_toys
from bench.emulated import drawn, runs, schedule
from bench.emulated.library import DEFAULT_CARD
from bench.provenance import provenance, write_result
from memory.assess import MARGIN, compiled_fragmentation

_MEANINGLESS = ("loss", "table")  # nothing is computed, and tables are made of the rest
_COUNTERS = ("num_kernels", "num_products", "num_copies", "num_pageable_copies", "bytes_to_card", "bytes_to_host", "num_waits")
_HOST = dict(resident_blocks=0, boundaries="host")
_STEPS = (("2b", 17, {}), ("2b", 17, _HOST), ("5b", 17, {}), ("5b", 17, dict(resident_blocks=0, passes="lockstep")), ("5b", 49, _HOST))
_COMPILED = (("2b", 17, {}), ("2b", 17, _HOST | dict(feed_forward_chunks=8)), ("2b", 49, _HOST), ("2b", 9, dict(checkpoint="none")),
             ("2b", 9, dict(checkpoint="every:2")), ("2b", 9, dict(resident_blocks=0, num_keep_everything=10, kept="host")), ("5b", 17, dict(num_keep_attention=21)),
             ("5b", 17, dict(checkpoint="none")), ("5b", 17, _HOST | dict(passes="lockstep", feed_forward_chunks=8)), ("5b", 49, _HOST),
             ("5b", 49, _HOST | dict(feed_forward_chunks=8, optimizer="adamw8bit")), ("5b", 49, _HOST | dict(feed_forward_chunks=2)),
             ("5b", 49, _HOST | dict(passes="lockstep", feed_forward_chunks=8)))


def counters() -> dict[str, int]:
    """What the card was asked for so far."""
    found = (ctypes.c_uint64 * len(_COUNTERS))()
    ctypes.CDLL(None).emulated_card_counters(found)
    return dict(zip(_COUNTERS, found))


def without(words: tuple[str, ...], value: Any) -> Any:
    """A result without the entries that have one of `words` in their name."""
    if isinstance(value, dict):
        return {key: without(words, item) for key, item in value.items() if not any(word in key for word in words)}
    return [without(words, item) for item in value] if isinstance(value, list) else value


def part_of_suite(part: ModuleType, session: Session) -> dict[str, Any]:
    """A part of the card suite, its histories of the allocator thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        return without(("second", *_MEANINGLESS), part.measure(session, Path(scratch)))


def asked_for(session: Session, cell: Cell) -> dict[str, Any]:
    """What the host gives the card to do in a step, how long it needs for that, and whether it waits or allocates meanwhile."""
    with rigged(cell, session.gauge) as rig:
        for _ in range(2):
            rig.step()
        session.gauge.synchronize()
        num_steps, before, allocator, taken = 3, counters(), session.gauge.counters(), []
        with session.gauge.unsynchronised():  # an operator that waits raises
            for _ in range(num_steps):
                started = time.perf_counter()
                rig.step()
                taken.append(time.perf_counter() - started)
        after, allocated = counters(), session.gauge.counters()
        return {"settings": cell.name(), "num_steps": num_steps, "host_seconds": min(taken),
                **{name: (after[name] - before[name]) / num_steps for name in _COUNTERS},
                "num_driver_allocations": allocated["num_driver_allocations"] - allocator["num_driver_allocations"]}


def steps(session: Session) -> list[dict[str, Any]]:
    """What several plans ask of a card in a step."""
    return [asked_for(session, session.cell(kind, frames, **plan)) for kind, frames, plan in _STEPS]


def compiled(session: Session) -> dict[str, Any]:
    """Peaks of steps with compiled blocks, beside what is predicted for blocks as they are."""
    cells = session.few([session.cell(kind, frames, compile=True, **plan) for kind, frames, plan in _COMPILED], 3)
    rows = [peaks.compared(session, cell, num_warm=2) for cell in cells]
    ran = [(cell, row["measured"], row["predicted"]) for cell, row in zip(cells, rows) if "allocated_error" in row]
    allocated = max((m["allocated_bytes"] / p["allocated_bytes"] for _, m, p in ran), default=None)
    reserved = max((m["reserved_bytes"] / p["reserved_bytes"] / compiled_fragmentation(cell.plan) for cell, m, p in ran), default=None)
    return {"cells": without(("second", *_MEANINGLESS), rows), "goals": [
        goal("steps that failed", len(rows) - len(ran), 0), goal("allocated, over what is predicted for blocks as they are", allocated, 1.01),
        goal("reserved, over what the planner reckons with", reserved, 1 + MARGIN)]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.emulated")
    parser.add_argument("--card", default=DEFAULT_CARD)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    if options.toy:
        register_toys()
    session = Session(Gauge(torch.device("cuda", 0)), card_here(dry=options.toy), Forecaster(0), dry=options.toy)
    session.calibrate()
    session.gauge.release()  # its workspaces; whole runs make theirs when they need them
    other = "" if options.card == DEFAULT_CARD else options.card
    name, command = f"emulated-{other}" if other else "emulated", "python -m bench.emulated" + f" --card {other}" * bool(other)
    path = options.out / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= {"card": torch.cuda.get_device_name(), "fixed_terms": session.fixed}
    content.pop("provenance", None)
    for part in options.only or PARTS:
        content[part] = PARTS[part](session)
        source = provenance()
        content["measured"] = content.get("measured", {}) | {part: {key: source[key] for key in ("date", "commit")} | {"torch": source["versions"]["torch"]}}
        if options.toy and "goals" in content[part]:  # a toy's figure reaches no goal and misses none
            content[part]["goals"] = [g | {"reached": None} for g in content[part]["goals"]]
        write_result(name, content, options.out, command=command)  # without the options, which name a path
        session.gauge.release()
        if "goals" in content[part]:
            print_table(part, [goal_row(part, g) for g in content[part]["goals"]])
        else:
            print_table(part, [[step["settings"], f"{step['num_kernels']:,.0f} kernels", f"{step['host_seconds']:.2f} s of the host"] for step in content[part]])
        sys.stdout.flush()
    return 0


PARTS: dict[str, Callable[[Session], Any]] = {
    "peaks": partial(part_of_suite, peaks), "minimum": partial(part_of_suite, minimum), "feasibility": partial(part_of_suite, feasibility),
    "drawn": drawn.measure, "runs": runs.measure, "steps": steps, "compiled": compiled,
    "schedule": lambda session: without((*_MEANINGLESS, "peaks"), schedule.measure(session)),
    "buffers": lambda session: without((*_MEANINGLESS, "peaks"), schedule.buffers(session))}

if __name__ == "__main__":
    sys.exit(main())
