"""RUN/memory.json: what a run is predicted to need, for the live view and the report. Everything in it is predicted.

{"card", "budget_bytes", "plan": {...}, "guidance_scale", "num_processes", "predicted": {"step_seconds", "needed_bytes", "peak_bytes", "peak_bytes_by_phase": {phase: bytes},
"categories": [name, ...], "timeline": [[phase, [bytes of each category]], ...]}}: the timeline is one step, in order, thinned.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from memory.assess import Assessment
from memory.cards import Card
from memory.timeline import CATEGORIES, Trace, shown
from trainer.config import TrainConfig
from trainer.distributed import num_ranks
from trainer.planning import forecast_as_given
from trainer.run_files import MEMORY, nested, read_object, write_json

NUM_POINTS = 400


@dataclass(frozen=True)
class MemoryForecast:
    """What makes the content of memory.json for a run on `card`."""

    card: Card
    known: Assessment | None = None
    """What the planner said of the plan that it chose."""

    def __call__(self, config: TrainConfig) -> dict[str, Any]:
        found = self.known
        if found is None or found.plan != config.memory:
            found = forecast_as_given(config, self.card)
        peaks = {shown(name): value for name, value in found.by_phase.items()}
        peaks.pop("load")  # of the steps, whose optimizer has its state; reading the model is below them, and not predicted
        return {
            "card": self.card.name, "budget_bytes": self.card.usable_bytes, "plan": asdict(found.plan),
            **_varying(config),
            "predicted": {
                # Of a CPU the rates are guesses, and where the host is the limit they are those of a usual one.
                "step_seconds": None if self.card.is_cpu or found.time.launching > found.time.seconds else found.time.seconds,
                "needed_bytes": found.needed_bytes, "peak_bytes": max(found.by_phase.values()),
                "peak_bytes_by_phase": peaks,
                "categories": list(CATEGORIES), "timeline": thinned(found.trace)}}


def _varying(config: TrainConfig) -> dict[str, Any]:
    """What a run may go on with another of: the guidance scale of its samples, and the number of processes, who share the batch."""
    return {"guidance_scale": config.output.guidance_scale, "num_processes": num_ranks()}


def thinned(trace: Trace) -> list[list[Any]]:
    """About NUM_POINTS points of a step, each the highest of its share, so that no peak is lost; none spans two phases."""
    totals = [(phase, total) for phase, total, _ in trace.timeline()]
    length, chosen = max(1, len(totals) // NUM_POINTS), set()
    for _, run in groupby(enumerate(totals), key=lambda point: point[1][0]):
        points = list(run)
        for start in range(0, len(points), length):
            chosen.add(max(points[start:start + length], key=lambda point: point[1][1])[0])
    return [[shown(phase), list(live.values())]
            for i, (phase, _, live) in enumerate(trace.timeline()) if i in chosen]


def keep_forecast(run_dir: Path, config: TrainConfig, forecast: MemoryForecast | None) -> dict[str, float]:
    """Write memory.json, unless it is there for this very plan, card and number of processes and these samples; returns the facts that the live view shows.

    Without `forecast` a file that is about others is removed, and there are no facts.
    """
    path = run_dir / MEMORY
    content = read_object(path)
    ours = {"plan": json.loads(json.dumps(asdict(config.memory))), **_varying(config)}
    same = all(content.get(name) == value for name, value in ours.items())
    if not same or forecast and content.get("card") != forecast.card.name:
        content = forecast(config) if forecast else {}
        if content:
            write_json(path, content, indent=None)
        else:
            path.unlink(missing_ok=True)
    return facts(content)


def facts(content: Mapping[str, Any]) -> dict[str, float]:
    """What the live view shows of memory.json."""
    shown = {"budget_bytes": nested(content, "budget_bytes"), "predicted_peak_bytes": nested(content, "predicted", "needed_bytes"),
             "predicted_step_seconds": nested(content, "predicted", "step_seconds")}
    return {name: value for name, value in shown.items() if value is not None}
