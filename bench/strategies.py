"""Each memory strategy and the sensible combinations on the 2b and the 5b: peak and step time, predicted for one card.

    python -m bench.strategies

Also batch size (memory by slope and intercept), rank, frames and guidance. Measured peaks at small size on the CPU, and at
full size on a card, are `python run.py bench peaks`.
"""

from typing import Any

from bench.feasibility import settings
from bench.provenance import take_no_arguments, write_result
from memory.cards import GIB, lookup
from memory.ranking import SEARCHED
from trainer.backbones.published import TRANSFORMERS
from trainer.config import replaced
from trainer.forecast_text import described
from trainer.planning import forecast

CARD = "h200"
NOTHING = {"memory.checkpoint": "none"}
CELLS = (("cogvideox-2b", 49), ("cogvideox-5b", 17), ("cogvideox-5b", 49))


def strategies(num_blocks: int) -> dict[str, dict[str, Any]]:
    """The changes of each, by name."""
    return {
        "no checkpointing": NOTHING,
        "checkpoint all": {},
        "checkpoint every 2nd": {"memory.checkpoint": "every:2"},
        "checkpoint first half": {"memory.checkpoint": f"first:{num_blocks // 2}"},
        "keep attention": {"memory.num_keep_attention": num_blocks},
        "stream all, no checkpointing": {"memory.resident_blocks": 0} | NOTHING,
        "stream all": {"memory.resident_blocks": 0},
        "stream all, 4 buffers": {"memory.resident_blocks": 0, "memory.offload_buffers": 4},
        "stream all, lockstep": {"memory.resident_blocks": 0, "memory.passes": "lockstep"},
        "boundaries on host": {"memory.boundaries": "host"},
        "stream all, boundaries on host": {"memory.resident_blocks": 0, "memory.boundaries": "host"},
        "stream all, boundaries on host, lockstep": {
            "memory.resident_blocks": 0, "memory.boundaries": "host", "memory.passes": "lockstep"},
        "4 chunks": {"memory.feed_forward_chunks": 4},
        "stream all, boundaries on host, 4 chunks": {
            "memory.resident_blocks": 0, "memory.boundaries": "host", "memory.feed_forward_chunks": 4},
        "keep all on host": {"memory.kept": "host"} | NOTHING,
        "8-bit AdamW": {"memory.optimizer": "adamw8bit"},
        "float32": {"memory.dtype": "float32"},
        "float32, no checkpointing": {"memory.dtype": "float32"} | NOTHING,
        "guidance batched": {"memory.guidance": "batched"},
        "two backbones": {"memory.backbone_copies": 2},
        "text encoder resident": {"memory.text_encoder_resident": True},
        "batch 2": {"data.batch_size": 2}, "batch 4": {"data.batch_size": 4},
        "rank 64": {"optim.rank": 64}, "rank 512": {"optim.rank": 512},
    }


def main() -> None:
    cells: dict[str, Any] = {}
    card = lookup(CARD)
    for model, frames in CELLS:
        found = cells[f"{model}-{frames}"] = {}
        for name, changes in strategies(TRANSFORMERS[model]["num_layers"]).items():
            a = forecast(replaced(settings(model, frames), changes), card, SEARCHED).chosen
            found[name] = described(a) | {"step_peak_bytes": a.prediction.peak_bytes}
            print(model, frames, name, f"{a.prediction.peak_bytes / GIB:.2f} GiB {a.time.seconds:.2f} s", flush=True)
    write_result("strategies", {"basis": "predicted", "card": card.label, "cells": cells})


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
