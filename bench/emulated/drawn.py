"""Peaks of steps whose plans are drawn at random, predicted and measured: combinations that nobody thought of."""

import random
from typing import Any

from bench.card import peaks
from bench.card.rig import Cell
from bench.card.session import Session, goal
from memory.plan import MemoryPlan, varied
from trainer.backbones import published

NUM_BLOCKS, NUM_CELLS = 8, 48
"""Blocks of a model, whose widths are the published ones, so that many steps take minutes; steps."""
_FIELDS = dict(
    dtype=("native", "native", "float32", "bfloat16", "float16"), resident_blocks=(None, None, 0, 0, 1, 3, 7), offload_buffers=(2, 2, 3, 5),
    passes=("sequential", "sequential", "lockstep"), checkpoint=("all", "all", "none", "every:2", "every:3", "first:3", "first:7"),
    num_keep_attention=(0, 0, 0, 1, 3, 8), num_keep_everything=(0, 0, 0, 1, 2, 5), boundaries=("device", "host"), kept=("device", "device", "host"),
    feed_forward_chunks=(1, 1, 2, 3, 7, 16), optimizer=("adamw", "adamw8bit"), guidance=("sequential", "batched"))
_KEPT = ("allocated_bytes", "reserved_bytes", "num_retries", "grown_bytes", "out_of_memory", "failed")
_SIDES = ((480, 720), (256, 384), (320, 512), (752, 496))  # height, width


def _shortened(model: str) -> str:
    """The name of a published model with `NUM_BLOCKS` blocks."""
    name = f"{model}/{NUM_BLOCKS}"
    published.TRANSFORMERS[name] = published.TRANSFORMERS[model] | {"num_layers": NUM_BLOCKS}
    for table in (published.NATIVE_DTYPES, published.SIZES, published.VAES, published.SCHEDULERS):
        table[name] = table[model]
    return name


def drawn(count: int) -> list[Cell]:
    """Cells of published models, shortened: plans, sizes, ranks and batches at random, the same ones every time."""
    dice, cells = random.Random(0), []
    while len(cells) < count:
        model = dice.choice(list(published.HUB_IDS))
        plan = varied(MemoryPlan(), NUM_BLOCKS, **{name: dice.choice(values) for name, values in _FIELDS.items()})
        cell = Cell(model=_shortened(model), frames=dice.choice((9, 17, 25)), side=dice.choice(_SIDES), rank=dice.choice((4, 16, 64, 128, 512)),
                    batch_size=dice.choice((1, 1, 2, 3)), plan=plan or MemoryPlan())
        cells += [cell] * (plan is not None)
    return cells


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """Of a comparison what is shown, and what went wrong."""
    kept = {name: value for name, value in row.items() if name in ("settings", "allocated_error", "reserved_error")}
    return kept | {side: {name: row[side][name] for name in _KEPT if name in row[side]} for side in ("predicted", "measured")}


def measure(session: Session) -> dict[str, Any]:
    """The part's result."""
    rows = [_brief(peaks.compared(session, cell)) for cell in drawn(3 if session.dry else NUM_CELLS)]
    ran = [row for row in rows if "allocated_error" in row]
    largest = {kind: max((abs(row[f"{kind}_error"]) for row in ran), default=None) for kind in ("allocated", "reserved")}
    return {"cells": rows, "goals": [goal("steps that failed", len(rows) - len(ran), 0),
                                     goal("largest error of allocated", largest["allocated"], 0.01, unit="%"),
                                     goal("largest error of reserved", largest["reserved"], 0.025, unit="%")]}
