"""What the trainer's own blocks (trainer.backbones.lean) change against diffusers', predicted for a whole step.

    python -m bench.lean      into bench/results/lean.json
"""

from typing import Any
from unittest.mock import patch

from bench.feasibility import settings
from bench.provenance import take_no_arguments, write_result
from memory.cards import lookup
from memory.plan import MemoryPlan
from memory.timeline import FORWARD
from memory.timing import load_of
from trainer.assemble import open_backbone
from trainer.backbones import lean
from trainer.rehearse import rehearse

CARDS = ("4090", "h200")
CELLS = (("cogvideox-2b", 17), ("cogvideox-2b", 49), ("cogvideox-5b", 17), ("cogvideox-5b", 49))


def measure(model: str, frames: int) -> dict[str, Any]:
    """Of a step that holds least: bytes that kernels move which only move bytes, live bytes at most in the student's forward passes
    and in the whole step, and seconds of computation by card."""
    config = settings(model, frames)
    trace = rehearse(open_backbone(config.model), config, MemoryPlan(resident_blocks=0, boundaries="host", feed_forward_chunks=8))
    found = trace.prediction()
    return {"moved_bytes": sum(work.num_bytes for work in trace.work if work.kind == "memory"), "peak_bytes": found.peak_bytes,
            "forward_peak_bytes": found.by_phase[FORWARD],
            "seconds": {name: load_of(trace.work, lookup(name)).computing for name in CARDS}}


def main() -> None:
    cells: dict[str, Any] = {}
    for model, frames in CELLS:
        with patch.object(lean, "make_lean", lean.rotate_in_norms):  # which the maker of masks asks of them
            stock = measure(model, frames)
        cells[f"{model}-{frames}"] = {"diffusers": stock, "ours": measure(model, frames)}
        print(model, frames, cells[f"{model}-{frames}"], flush=True)
    write_result("lean", {"basis": "predicted", "cards": CARDS, "cells": cells})


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
