"""How long planning takes, every cell in a fresh process, which knows no traces yet; and how much slower the plan is than the best.

    python -m bench.planning                              into bench/results/planning.json
    python -m bench.planning cogvideox-5b 49 4gb          one cell, as JSON on stdout
"""

import json
import math
import subprocess
import sys
import time
from typing import Any
from unittest.mock import patch

CARDS = ("2gb", "4gb", "8gb", "12gb", "24gb", "4090", "48gb", "h20", "h200")
CELLS = (("cogvideox-2b", 17), ("cogvideox-2b", 49), ("cogvideox-5b", 49))


def search_once(model: str, frames: int, name: str) -> dict[str, Any]:
    """Seconds of the search, once the model's configuration is read, and what it looked at."""
    from bench.feasibility import settings
    from memory.cards import lookup
    from trainer.planning import forecast, workload

    config = settings(model, frames)
    workload(config)
    started = time.perf_counter()
    result = forecast(config, lookup(name)).result
    return {"search_seconds": time.perf_counter() - started, "fits": result.best is not None,
            "num_candidates": result.num_candidates, "num_traces": result.num_traces, "num_replays": result.num_replays}


def measure(model: str, frames: int, name: str) -> dict[str, Any]:
    """`search_once` in a process of its own, and the seconds of all of that process, imports included."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "bench.planning", model, str(frames), name]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return {**json.loads(done.stdout), "process_seconds": time.perf_counter() - started}


def regret(model: str, frames: int, name: str) -> float | None:
    """By how much the plan's step is slower than that of the fastest plan that fits, found by simulating the allocator for every
    candidate in order of time that its live bytes do not rule out, of all variants. None: nothing fits; infinite: only the search found
    nothing. Predicted, both."""
    from bench.feasibility import settings
    from memory.cards import lookup
    from memory.ranking import Ranking
    from trainer.planning import forecast

    def first_of_all(self, ranked, limits):
        possible = (c for c in ranked if not any(limits.shortage(max(c.device_bytes, c.phases_bytes), c.host_bytes)))
        return next((found for found in (self._assess(c, limits) for c in possible) if found.fits), None)

    config, card = settings(model, frames), lookup(name)
    chosen = forecast(config, card).result.best
    with patch.object(Ranking, "_first_that_fits", first_of_all), patch.object(Ranking, "_is_settled", lambda *_: False):
        best = forecast(config, card).result.best
    if best is None:
        return None
    return chosen.time.seconds / best.time.seconds - 1 if chosen else math.inf


def main() -> None:
    if len(sys.argv) == 4:  # of `measure`, a process for each
        model, frames, name = sys.argv[1:]
        print(json.dumps(search_once(model, int(frames), name)))
        return
    from bench.provenance import take_no_arguments, write_result

    take_no_arguments(__doc__)

    cells: dict[str, Any] = {}
    for model, frames in CELLS:
        cells[f"{model}-{frames}"] = {name: measure(model, frames, name) | {"regret": regret(model, frames, name)} for name in CARDS}
        print(model, frames, {name: (round(c["search_seconds"], 1), c["regret"]) for name, c in cells[f"{model}-{frames}"].items()}, flush=True)
    write_result("planning", {"cards": CARDS, "cells": cells})


if __name__ == "__main__":
    main()
