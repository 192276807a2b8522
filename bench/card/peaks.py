"""Measured peaks by phase against the simulator's, over a grid of models, sizes and plans."""

import gzip
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.card.forecasts import peaks_of
from bench.card.rig import Cell, rigged
from bench.card.session import Session, failures, goal
from memory.assess import MARGIN
from memory.cards import GIB
from memory.snapshots import replay_snapshot

SECONDS = 270


def cells(session: Session) -> list[Cell]:
    """At least 40: model x frames x precision x checkpointing x offload x boundaries x rank x optimizer x guidance."""
    ring, host = dict(resident_blocks=0), dict(resident_blocks=0, boundaries="host")
    plans: list[tuple[str, int, dict[str, Any]]] = []
    for kind, frames in (("2b", 17), ("5b", 9)):
        plans += [(kind, frames, fields) for fields in (
            {}, ring, host, dict(boundaries="host"), dict(resident_blocks=10), dict(resident_blocks=0, offload_buffers=3),
            dict(guidance="batched"), ring | dict(passes="lockstep"), host | dict(passes="lockstep"), ring | dict(feed_forward_chunks=4),
            host | dict(feed_forward_chunks=4),
            ring | dict(optimizer="adamw8bit"), ring | dict(rank=16), dict(num_keep_attention=15))]
    plans += [("2b", 9, fields) for fields in (
        dict(dtype="float32"), dict(dtype="bfloat16"), host | dict(dtype="bfloat16", rank=256), dict(checkpoint="none"),
        dict(checkpoint="every:2"), dict(checkpoint="first:10"), dict(num_keep_everything=10),
        ring | dict(num_keep_attention=30, kept="host"), host | dict(guidance="batched"), ring | dict(checkpoint="none"))]
    plans += [("5b", 17, fields) for fields in ({}, host, dict(num_keep_attention=21))]
    plans += [("5b", 49, host), ("2b", 49, host), ("2b", 49, {})]
    return session.few([session.cell(kind, frames, **fields) for kind, frames, fields in plans], 4)


def prepare(session: Session) -> None:
    """Ask for all predictions ahead."""
    for cell in cells(session):
        session.forecaster.ask(peaks_of, cell, session.workspace_bytes)


def compared(session: Session, cell: Cell, *, num_warm: int = 1) -> dict[str, Any]:
    """The peaks of a step of `cell`, predicted and measured, after `num_warm` others."""
    measured = session.measure(cell, num_steps=1, num_warm=num_warm)
    told = session.forecast(peaks_of, cell, session.workspace_bytes)  # has been on its way meanwhile
    if not told.worked:
        return {"settings": cell.name(), "predicted": told.as_json(), "measured": measured}
    prediction, _ = told.value
    row = {"settings": cell.name(), "predicted": {
        "allocated_bytes": prediction.allocator.peak_allocated_bytes, "reserved_bytes": prediction.reserved_bytes,
        "by_phase": prediction.by_phase}, "measured": measured}
    if "allocated_bytes" in measured:
        for kind in ("allocated_bytes", "reserved_bytes"):
            row[f"{kind[:-6]}_error"] = row["predicted"][kind] / measured[kind] - 1
        row["allocated_error_by_phase"] = {name: prediction.by_phase[name] / peak["allocated_bytes"] - 1
                                           for name, peak in measured["peaks"].items() if name in prediction.by_phase}
    return row


def _fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A constant of this card from every other cell, checked on the rest."""
    fit: dict[str, Any] = {}
    for kind in ("allocated_bytes", "reserved_bytes"):
        missing = [r["measured"][kind] - r["predicted"][kind] for r in rows]
        offset = statistics.median(missing[::2]) if missing else 0
        others = rows[1::2]
        fit[kind] = {
            "offset_bytes": offset, "num_fitted": len(missing[::2]), "num_checked": len(others),
            "largest_error": max((abs(r[f"{kind[:-6]}_error"]) for r in others), default=None),
            "largest_error_with_offset": max(
                (abs((r["predicted"][kind] + offset) / r["measured"][kind] - 1) for r in others), default=None)}
    return fit


def _caps(session: Session, rows: list[dict[str, Any]], skipped: list[str]) -> dict[str, Any]:
    """Run cells once more with exactly the reserved bytes that were predicted, and the planner's margin."""
    chosen = [r for r in rows if "resident_blocks" in r["settings"] or "keep" in r["settings"]][:4]
    by_name, result = {cell.name(): cell for cell in cells(session)}, {}
    for row in session.within_budget(chosen, skipped, name=lambda r: "cap " + r["settings"]):
        cap = int(row["predicted"]["reserved_bytes"] * (1 + MARGIN))
        found = session.measure(by_name[row["settings"]], num_steps=2, cap=cap)
        result[row["settings"]] = {"cap_bytes": cap, "ran": "step_seconds" in found, "num_retries": found.get("num_retries")}
    return result


def thin(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Of an allocator's snapshot what `memory.snapshots` replays: one list a field, streams numbered."""
    history = snapshot["device_traces"][0]
    streams = {stream: i for i, stream in enumerate(dict.fromkeys(entry.get("stream", 0) for entry in history))}
    actions = sorted({entry["action"] for entry in history})
    return {"actions": actions, "action": [actions.index(e["action"]) for e in history], "addr": [e.get("addr", 0) for e in history],
            "size": [e.get("size", 0) for e in history], "stream": [streams[e.get("stream", 0)] for e in history]}


def thick(thinned: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `thin`, as far as a replay needs it."""
    columns = zip(thinned["action"], thinned["addr"], thinned["size"], thinned["stream"])
    return {"device_traces": [[{"action": thinned["actions"][a], "addr": addr, "size": size, "stream": stream}
                               for a, addr, size, stream in columns]]}


def _snapshots(session: Session, out: Path) -> dict[str, Any]:
    """Histories of the allocator over two steps, as fixtures that need no card, and the simulator's replay of each."""
    if not session.gauge.is_card:
        return {}
    fields = {"2b-9f-plain": {}, "2b-9f-host": dict(resident_blocks=0, boundaries="host"), "2b-9f-keep-attention": dict(num_keep_attention=30)}
    chosen = {label: session.cell("2b", 9, rank=16, **plan) for label, plan in fields.items()}
    return {label: session.gauge.attempt(partial(_snapshot, session, cell, out / f"snapshot-{label}.json.gz")).as_json()
            for label, cell in chosen.items()}


def _snapshot(session: Session, cell: Cell, path: Path) -> dict[str, Any]:
    session.gauge.release()  # recording begins where nothing is reserved
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=1_000_000)
    try:
        with rigged(cell, session.gauge) as rig:
            rig.step()
            rig.step()
            history = thin(torch.cuda.memory._snapshot())
    finally:
        torch.cuda.memory._record_memory_history(None)
    path.write_bytes(gzip.compress(json.dumps(history, separators=(",", ":")).encode(), 9, mtime=0))
    replayed = replay_snapshot(thick(history))
    return {"file": path.name, "settings": cell.name(), "num_events": replayed.num_events, "num_unmatched": replayed.num_unmatched,
            "num_requests": replayed.num_requests, "num_placed_alike": replayed.num_placed_alike,
            "recorded_peak_reserved_bytes": replayed.recorded_peak_reserved_bytes,
            "simulated_peak_reserved_bytes": replayed.simulated.peak_reserved_bytes}


def measure(session: Session, out: Path) -> dict[str, Any]:
    """The part's result."""
    rows, skipped = [], []
    snapshots = _snapshots(session, out)
    for cell in session.within_budget(cells(session), skipped, name=Cell.name):
        rows.append(compared(session, cell))
    ran = [r for r in rows if "allocated_error" in r]
    caps = _caps(session, ran, skipped)
    worst = {kind: max((abs(r[f"{kind}_error"]) for r in ran), default=None) for kind in ("allocated", "reserved")}
    elsewhere = [s["num_requests"] - s["num_placed_alike"] for s in snapshots.values() if "num_requests" in s]
    phases = max((abs(e) for r in ran for e in r["allocated_error_by_phase"].values()), default=None)
    return {
        "cells": rows, "skipped": skipped, "at_the_cap": caps, "snapshots": snapshots, "fit": _fit(ran),
        "goals": [goal("cells measured", len(ran), 40, at_least=True),
                  goal("largest error of allocated", worst["allocated"], 0.01, unit="%"),
                  goal("largest error of allocated in any phase", phases, 0.01, unit="%"),
                  goal("largest error of reserved", worst["reserved"], 0.025, unit="%"),
                  goal("requests that the simulator serves at another address", max(elsewhere, default=None), 0),
                  goal("plans said to fit that failed at their cap",
                       failures([not c["ran"] for c in caps.values()], complete=not skipped), 0)],
        "table": [[r["settings"], f"{r['measured']['allocated_bytes'] / GIB:.3f} GiB", f"{r['allocated_error']:+.2%}",
                   f"{r['reserved_error']:+.2%}"] for r in ran],
    }
