"""Measured seconds of whole steps (bench.card) beside what the planner predicts for the same plans on the same card.

    python -m bench.times          into bench/results/times.json, from the results of cards that are there
"""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bench.card.forecasts import seconds_of
from bench.card.rig import Cell
from bench.provenance import RESULTS, write_result
from memory.cards import lookup
from memory.plan import MemoryPlan

PARTS = ("peaks",)
"""Parts whose cells are whole steps by the planner's own operators, one of each."""


def cell_of(settings: str) -> Cell:
    """The inverse of `Cell.name`."""
    model, frames, *words = settings.split()
    student_only, fields = "only" in words, dict(word.split("=") for word in words if "=" in word)
    rank = int(fields.pop("rank", 128))
    hints = get_type_hints(MemoryPlan)
    plan = {name: int(text) if int in (hints[name], *get_args(hints[name])) else text for name, text in fields.items()}
    return Cell(model=model, frames=int(frames.removesuffix("f")), rank=rank, student_only=student_only, plan=MemoryPlan(**plan))


def measured_in(content: Any) -> Iterator[dict[str, Any]]:
    """All cells of a part's result that ran."""
    if isinstance(content, dict):
        if "step_seconds" in content:
            yield content
        for value in content.values():
            yield from measured_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from measured_in(value)


def main() -> None:
    found = []
    for path in sorted(p for part in PARTS for p in RESULTS.glob(f"*/{part}.json")):
        result = json.loads(path.read_text())
        card = lookup(result["card"])
        for measured in measured_in(result["cells"]):
            predicted = seconds_of(cell_of(measured["settings"]), card)
            found.append({"card": card.name, "settings": measured["settings"], "measured_seconds": measured["step_seconds"],
                          "predicted_seconds": predicted, "error": predicted / measured["step_seconds"] - 1})
            print(f"{measured['settings']:90} {measured['step_seconds']:8.3f} {predicted:8.3f} {found[-1]['error']:+.1%}", flush=True)
    errors = [cell["error"] for cell in found]
    write_result("times", {"cells": found, "typical_error": math.sqrt(statistics.mean(e * e for e in errors)),
                           "largest_error": max(errors, key=abs), "median_error": statistics.median(errors)})


if __name__ == "__main__":
    main()
