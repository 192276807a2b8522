"""The suite for one card: what is predicted is measured, beside its peers. Random weights; no network, no video files.

    python -m bench.card                       every part that has no result yet, under 9 minutes
    python -m bench.card --only offload speed  some parts; --again measures parts that have a result anew
    python -m bench.card --dry                 every part at toy size on the CPU; the figures mean nothing

Results: bench/results/<card>/PART.json with provenance, a table of goals last.
"""

import os
import sys

# Read when the allocator and cuBLAS start, so set before torch is imported: as a run does.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")

import json
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import tyro

from bench.card import cap, choice, feasibility, health, minimum, offload, peaks, speed
from bench.card.forecasts import Forecaster, card_here
from bench.card.gauge import Gauge
from bench.card.session import Session, register_toys
from bench.provenance import RESULTS, write_result

PARTS: dict[str, ModuleType] = {"peaks": peaks, "offload": offload, "minimum": minimum, "speed": speed, "cap": cap,
                                "feasibility": feasibility, "choice": choice, "health": health}
Part = Literal["peaks", "offload", "minimum", "speed", "cap", "feasibility", "choice", "health"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Measure the trainer on the card of this machine."""

    only: tuple[Part, ...] = ()
    """Parts to run; by default all."""
    again: bool = False
    """Measure parts anew that have a result."""
    dry: bool = False
    """Every part at toy size on the CPU: the code runs, the figures mean nothing."""
    out: Path = RESULTS
    """Directory of results; a directory of the card's name is made in it."""
    stretch: float = 1.0
    """Times the usual time for every part: what is skipped for lack of time at 1 may run at 3."""
    workers: int | None = None
    """Processes that predict while the card measures; by default half of the cores, at most 6."""


def calibrate(session: Session) -> None:
    """What a context and cuBLAS cost on this card. Call it before anything else multiplies matrices."""
    gauge = session.gauge
    if not gauge.is_card:
        session.fixed = {"context_bytes": 0, "cublas_workspace_bytes": 0}
        return
    x = torch.ones(64, 64, device=gauge.device, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    y = x @ x
    session.workspace_bytes = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes()
    gauge.synchronize()
    free, total = torch.cuda.mem_get_info()
    session.fixed = {
        "context_bytes": total - free - torch.cuda.memory_reserved(), "cublas_workspace_bytes": session.workspace_bytes,
        "total_bytes": total, "assumed_context_bytes": session.card.context_bytes,
        "assumed_cublas_workspace_bytes": session.card.cublas_workspace_bytes,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"], "note": "context: all that is used and not reserved by this process"}


def run_part(name: str, session: Session, out: Path, *, stretch: float = 1.0) -> dict[str, Any]:
    """Measure one part within its budget and write its JSON."""
    started, module = time.monotonic(), PARTS[name]
    session.deadline = float("inf") if session.dry else started + stretch * module.BUDGET_S
    result = module.measure(session, out)
    if session.dry:  # a figure of a dry run reaches no goal and misses none
        result["goals"] = [g | {"reached": None} for g in result["goals"]]
    content = {"part": name, "dry": session.dry, "budget_seconds": stretch * module.BUDGET_S,
               "seconds": round(time.monotonic() - started, 1), "card": session.card.name, "fixed_terms": session.fixed, **result}
    write_result(name, content, out)
    session.gauge.release()
    return content


def print_table(title: str, rows: list[list[str]]) -> None:
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]))


def goal_rows(name: str, content: dict[str, Any]) -> list[list[str]]:
    """One row a goal."""
    shown = []
    for g in content["goals"]:
        value = "not measured" if g["measured"] is None else f"{g['measured']:.4g}"
        shown.append([f"{name}: {g['goal']}", value, g["wanted"], {True: "reached", False: "MISSED", None: "-"}[g["reached"]]])
    return shown


def main(config: Card) -> int:
    if not config.dry and not torch.cuda.is_available():
        print("error: there is no CUDA card here; --dry walks through every part on the CPU", file=sys.stderr)
        return 2
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    device = torch.device("cpu") if config.dry else torch.device("cuda", torch.cuda.current_device())
    if config.dry:
        register_toys()
    workers = config.workers if config.workers is not None else min(6, (os.cpu_count() or 1) // 2)
    label = "dry" if config.dry else re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = config.out / label
    out.mkdir(parents=True, exist_ok=True)
    session = Session(Gauge(device), card_here(dry=config.dry), Forecaster(0 if config.dry else workers), dry=config.dry)
    calibrate(session)
    wanted = [name for name in PARTS if name in (config.only or PARTS)]
    missing = [name for name in wanted if config.again or not (out / f"{name}.json").exists()]
    results = {}
    try:
        for name in missing:
            if hasattr(PARTS[name], "prepare"):
                PARTS[name].prepare(session)
        for name in missing:
            results[name] = run_part(name, session, out, stretch=config.stretch)
            print_table(f"{name} ({results[name]['seconds']} s)", results[name]["table"])
            if results[name]["skipped"]:
                print(f"not measured for lack of time: {len(results[name]['skipped'])}")
            sys.stdout.flush()
    finally:
        session.forecaster.close()
    for name in (name for name in wanted if name not in results):
        results[name] = json.loads((out / f"{name}.json").read_text())
    print_table(f"goals ({out})", [row for name in wanted for row in goal_rows(name, results[name])])
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Card)))
