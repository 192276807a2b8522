"""A forecast as a command line, as plain data and as tables."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from memory.advice import difference, words_of
from memory.assess import Assessment, compiled_fragmentation
from memory.cards import GIB, Card
from memory.plan import MemoryPlan
from memory.ranking import SEARCHED
from memory.timeline import shown
from memory.timing import LARGEST_ERROR, TYPICAL_ERROR
from trainer.assemble import only_planned
from trainer.config import TrainConfig
from trainer.live_view import duration, seconds_text
from trainer.planning import Forecast, step_seconds, verdict
from trainer.run_directory import program

_WORDS = {"usable_bytes": "usable memory", "context_bytes": "CUDA's context", "matmul_fraction": "matrix products", "attention_fraction": "attention",
          "attention_backward_fraction": "its backward", "flash_fraction": "FlashAttention-2", "flash_backward_fraction": "its backward",
          "memory_fraction": "element-wise work", "host_link_bandwidth": "host link"}  # fields of Card; others by their name


def command(config: TrainConfig, plan: MemoryPlan, origins: dict[str, str], num_cards: int = 1) -> str:
    """A command line that asks for this plan; what is at its default there, --profile chooses anew. WORD stands for what has to be said of
    published models, and was not."""
    words = [*program(num_cards)]
    given = [path.split(".") for path, origin in origins.items() if origin == "flag" or origin.startswith("file ")]
    for section, name in given:
        if section != "memory":
            words += words_of(name, getattr(getattr(config, section), name))
    if config.model.model != "shapes":
        if not {("data", "concept"), ("data", "prompts")} & {*map(tuple, given)}:
            words += ["--concept", "WORD"]
        if config.loss.beta and not (config.data.preserve or config.data.preserve_file):
            words += ["--preserve", "WORD"]
    default = MemoryPlan()
    for f in fields(MemoryPlan):  # what was given is not to be planned anew, whatever it is
        if getattr(plan, f.name) != getattr(default, f.name) or ["memory", f.name] in given:
            words += words_of(f.name, getattr(plan, f.name))
    return shlex.join(words)


def as_json(found: Forecast, origins: dict[str, str]) -> dict[str, Any]:
    """The forecast as plain data; sizes in bytes, all predicted."""
    def plain(a: Assessment) -> dict[str, Any]:
        return described(a) | {"step_seconds": step_seconds(a, found.card)}

    return {
        "model": found.config.model.model, "card": found.card.name, "capacity_bytes": found.card.capacity_bytes,
        "verdict": verdict(found),
        "num_candidates": found.result.num_candidates, **plain(found.chosen),
        "alternatives": [plain(miss) | {"reason": miss.reason} for miss in found.result.near_misses],
        "command": None if only_planned(found.chosen.plan) else command(found.config, found.chosen.plan, origins, found.num_cards),
        "num_cards": found.num_cards,
        "by_placement": {name: plain(a) for name, a in found.by_placement().items()},
    }


def described(a: Assessment) -> dict[str, Any]:
    """One plan and what it needs, as plain data."""
    return {
        "settings": asdict(a.plan), "fits": a.fits,
        "predicted": {"peak_bytes": max(a.by_phase.values()), "step_peak_bytes": a.prediction.peak_bytes,
                      "reserved_bytes": a.prediction.reserved_bytes, "needed_bytes": a.needed_bytes,
                      "host_bytes": a.host_bytes, "by_category": a.prediction.by_category, "by_phase": _shown(a.by_phase)},
        "step_seconds": a.time.seconds, "step_seconds_by_bound": a.time.by_bound,
    }


def _shown(by_phase: dict[str, int]) -> dict[str, int]:
    return {shown(phase): num_bytes for phase, num_bytes in by_phase.items()}


def print_forecast(found: Forecast, origins: dict[str, str], *, explain: bool) -> None:
    """The forecast on stdout, for people."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console, a = Console(), found.chosen
    more = compiled_fragmentation(a.plan) - 1
    uncompiled = f", as if no block were compiled, but for {more:.0%} that compiled ones reserve more" if a.plan.compile else ""
    num_steps = found.config.optim.steps
    total = f"; {num_steps} steps take {duration(math.ceil(num_steps * found.step_seconds))}" if found.result.best else ""
    console.print(Text(verdict(found) + total, style="bold"))
    console.print(f"(all figures predicted{uncompiled}; {found.result.num_candidates} plans compared; times that others measured differ from such "
                  f"predictions by {TYPICAL_ERROR:.0%} (root mean square), {LARGEST_ERROR:.0%} at most; short steps take longer where the host is the limit)",
                  highlight=False)
    searched = (*SEARCHED, "num_shards") if found.num_cards > 1 else SEARCHED
    table = Table(Column("setting", overflow="fold"), "value", "origin", title="settings", title_justify="left")
    for f in fields(MemoryPlan):
        origin = origins.get(f"memory.{f.name}", "default")
        planned = f.name in searched and origin == "default"
        table.add_row(f.name, str(getattr(a.plan, f.name)), "planned" if planned else Text(origin))
    console.print(table)
    for title, rows in (("GiB at the step's peak", a.prediction.by_category), ("GiB by phase", _shown(a.by_phase))):
        table = Table("", "GiB", title=title, title_justify="left")
        for name, num_bytes in rows.items():
            table.add_row(name, f"{num_bytes / GIB:.3f}")
        console.print(table)
    rest = "all else" if found.card.is_cpu else f"CUDA's own context {found.card.context_bytes / GIB:.2f} GiB, host memory"
    console.print(f"reserved by torch {a.prediction.reserved_bytes / GIB:.2f} GiB, {rest} {a.host_bytes / GIB:.2f} GiB"
                  + (" (--host 64gb: faster plans may use what it has)" if found.host_may_help else ""),
                  highlight=False)
    if found.num_cards > 1:
        table = Table(f"on each of {found.num_cards} cards", "GiB", "host GiB", "s a step", "", title="frozen blocks", title_justify="left")
        for name, way in found.by_placement().items():
            table.add_row(name, f"{way.needed_bytes / GIB:.2f}", f"{way.host_bytes / GIB:.2f}", f"{step_seconds(way, found.card):.2f}",
                          way.reason or "fits")
        console.print(table)
    if found.result.near_misses:
        table = Table("faster plans that do not fit", "s a step", "why", title_justify="left")
        for miss in found.result.near_misses:
            table.add_row(_difference(miss.plan, a.plan), f"{step_seconds(miss, found.card):.2f}", miss.reason)
        console.print(table)
    if explain:
        for line in _explained(found):
            console.print(line, highlight=False)
    if found.result.best and not only_planned(a.plan):
        print(command(found.config, a.plan, origins, found.num_cards))


def _explained(found: Forecast) -> Iterator[str]:
    """What limits the step, how fast the host has to be, and which figures of the card are assumed."""
    time = found.chosen.time
    yield "time of a step by what limits it: " + ", ".join(f"{bound} {seconds_text(seconds)}" for bound, seconds in time.by_bound.items())
    if not found.card.is_cpu:
        yield (f"host: about {time.num_operators:,.0f} operators a step, most of them one kernel; it is the limit where it takes more "
               f"than {1e6 * time.seconds / time.num_operators:,.0f} µs for each")
    yield f"assumed of {found.card.label}, not measured: {', '.join(_assumption(found.card, name) for name in found.card.assumed)}"
    yield f"rates: {found.card.source}"


def _assumption(card: Card, name: str) -> str:
    """A field of the card and its value in words."""
    value, kind = getattr(card, name), name.rpartition("_")[2]
    text = {"bytes": f"{value / GIB:.2f} GiB", "bandwidth": f"{value / 1e9:.3g} GB/s", "rate": f"{value / 1e12:.3g} TFLOP/s",
            "fraction": f"{value:.0%} of the {'bandwidth' if name == 'memory_fraction' else 'tensor rate'}"}[kind]
    return f"{_WORDS.get(name, name.replace('_', ' '))} {text}"


def _difference(plan: MemoryPlan, other: MemoryPlan) -> str:
    """What one plan sets otherwise than another."""
    return ", ".join(f"{name} {value}" for name, value in difference(other, plan).items()) or "the same"
