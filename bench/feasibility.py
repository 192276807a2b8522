"""Which model fits which size of card, with naive settings and with planned ones: peak and step time, predicted.

    python -m bench.feasibility
"""

from dataclasses import replace
from typing import Any

from bench.naive import Recipe
from bench.provenance import take_no_arguments, write_result
from bench.story import rehearse_naive
from memory.assess import Limits, assess_trace
from memory.cards import GIB, Card, lookup
from memory.plan import MemoryPlan
from memory.timing import StepLoad, add_loads, load_of, step_time
from trainer.config import TrainConfig, replaced
from trainer.forecast_text import described
from trainer.planning import forecast, workload

CARDS = ("8gb", "12gb", "16gb", "24gb", "48gb", "96gb", "4090", "h20", "h200")
HOSTS_GIB = (64, 128)
"""Of the host in the last rows of a cell; in the others it is not known, and what blocks keep stays on the card."""
CELLS = (("cogvideox-2b", 17), ("cogvideox-2b", 49), ("cogvideox-5b", 17), ("cogvideox-5b", 49),
         ("cogvideox1.5-5b", 17), ("cogvideox1.5-5b", 81))


def settings(model: str, frames: int) -> TrainConfig:
    """The default run of a published model."""
    return replaced(TrainConfig(), {"model.model": model, "model.weights": "random", "model.frames": frames})


def naive(config: TrainConfig) -> dict[str, Any]:
    """The naive recipe in float32 on every card."""
    config = replaced(config, {"memory.dtype": "float32"})
    trace, run, found = rehearse_naive(config, Recipe()), workload(config), {}
    for name in CARDS:
        card = lookup(name)
        load = add_loads(load_of(span.work, card) for span in trace.spans)
        time = step_time(StepLoad(add_loads(()), load, ()), card)
        plan = MemoryPlan(dtype="float32", checkpoint="none", backbone_copies=2, text_encoder_resident=True, guidance="batched")
        a = assess_trace(run, plan, trace, time, Limits(card))
        found[name] = {"fits": a.fits, "reason": a.reason, "needed_bytes": a.needed_bytes, "step_seconds": time.seconds}
    return found


def _planned(config: TrainConfig, cards: dict[str, Card]) -> dict[str, Any]:
    return {name: described(forecast(config, card).chosen) for name, card in cards.items()}


def main() -> None:
    cells: dict[str, Any] = {}
    for model, frames in CELLS:
        config, cards = settings(model, frames), {name: lookup(name) for name in CARDS}
        cell = cells[f"{model}-{frames}"] = {"naive": naive(config), "planned": _planned(config, cards)}
        for gib in HOSTS_GIB:
            hosted = {name: replace(card, host_bytes=gib * GIB) for name, card in cards.items()}
            cell[f"planned, {gib} GiB of host memory"] = _planned(config, hosted)
        print(model, frames, {n: (p["fits"], round(p["step_seconds"], 1)) for n, p in cell["planned"].items()},
              flush=True)
    write_result("feasibility", {"basis": "predicted", "cards": CARDS, "cells": cells})


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
