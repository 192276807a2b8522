"""Measured seconds of steps (parts short, peaks and cap of bench.card) beside what the planner predicts for the same plans on the same card.

    python -m bench.times      into bench/results/times.json
"""

import json
from typing import Any, get_args, get_type_hints

from bench.card.forecasts import seconds_of
from bench.card.rig import Cell
from bench.provenance import of_cards, take_no_arguments, write_result
from memory.cards import lookup
from memory.plan import MemoryPlan


def cell_of(settings: str) -> Cell:
    """The inverse of `Cell.name`, for one sample of the model's own size."""
    model, frames, *words = settings.split()
    student_only, fields = "only" in words, dict(word.split("=") for word in words if "=" in word)
    rank = int(fields.pop("rank", 128))
    hints = get_type_hints(MemoryPlan)
    plan = {name: int(text) if int in (hints[name], *get_args(hints[name])) else text for name, text in fields.items()}
    return Cell(model=model, frames=int(frames.removesuffix("f")), rank=rank, student_only=student_only, plan=MemoryPlan(**plan))


def main() -> None:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in (path for part in ("short", "peaks", "cap") for path in of_cards(part)):
        result = json.loads(path.read_text())
        card, cells = lookup(result["card"]), result["cells"]
        for measured in cells.values() if isinstance(cells, dict) else (cell["measured"] for cell in cells):
            settings = measured["settings"]
            if "step_seconds" not in measured or measured.get("num_forecasts_beside") or (card.name, settings) in found:
                continue
            predicted = seconds_of(cell_of(settings), card)
            error = predicted / measured["step_seconds"] - 1
            found[card.name, settings] = {"card": card.name, "settings": settings, "measured_seconds": measured["step_seconds"],
                                          "predicted_seconds": predicted, "error": error}
            print(f"{settings:90} {measured['step_seconds']:8.3f} {predicted:8.3f} {error:+.1%}", flush=True)
    write_result("times", {"cells": list(found.values())})


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
