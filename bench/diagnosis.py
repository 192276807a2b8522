"""Which cause is named for which fault: the confusion matrix over faults put in on purpose and sound settings.

    python -m bench.diagnosis    all faults at all blocks and steps, and 120 sound settings: bench/results/diagnosis.json
"""

import logging
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from bench.faults import FAULTS, run_fault
from bench.provenance import RESULTS, settings_of, write_result
from bench.watched import PIPELINES, Outcome, healthy_settings, settings, tiny_pipeline, watch
from trainer.config import at_least


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Count what is named for what was put in."""

    num_healthy: int = 120
    """Sound settings."""
    num_steps: int = 3
    """Steps of each sound run."""
    out: Path = RESULTS
    """Directory of the result."""

    def __post_init__(self):
        at_least(self, 0, "num_healthy")
        at_least(self, 1, "num_steps")


def _case(name: str, code: str, block: int | None, at: int, outcome: Outcome) -> dict[str, Any]:
    named, where = outcome.named
    return {"fault": name, "at_step": at, "code": code, "block": block, "named": named, "named_block": where,
            "stopped_at_step": outcome.stopped, "right": (named, where) == (code, block)}


def measure(config: Diagnosis, directory: Path) -> list[dict[str, Any]]:
    """One record a run; pipelines are built in `directory`."""
    pipelines = {name: tiny_pipeline(directory / name, **kind) for name, kind in PIPELINES.items()}
    cases = []
    for fault in FAULTS:
        for at in fault.at:
            copy = directory / f"case-{len(cases)}"
            shutil.copytree(pipelines[fault.pipeline], copy)
            cases.append(_case(fault.name, fault.code, fault.block, at, run_fault(fault, at, copy)))
            shutil.rmtree(copy)
            print(f"{len(cases)}: {cases[-1]['fault']}, step {at}: {cases[-1]['named']}", file=sys.stderr)
    for pipeline, changes in healthy_settings(config.num_healthy):
        outcome = watch(settings(pipelines[pipeline], **changes), num_steps=config.num_steps)
        description = ", ".join([pipeline, *(f"{name.split('__')[1]}={value}" for name, value in changes.items())])
        cases.append(_case(description, "healthy", None, 0, outcome))
        print(f"{len(cases)}: {description}: {cases[-1]['named']}", file=sys.stderr)
    return cases


def confusion(cases: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts by code put in, then by code named."""
    counts: dict[str, Counter[str]] = {}
    for case in cases:
        counts.setdefault(case["code"], Counter())[case["named"]] += 1
    return {code: dict(named) for code, named in counts.items()}


def main(config: Diagnosis) -> None:
    logging.disable(logging.WARNING)  # every finding is said aloud, and all of this is on purpose
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        cases = measure(config, Path(directory))
    matrix = confusion(cases)
    table = Table(Column("put in", no_wrap=True), "runs", "named as such", "block right", "named otherwise")
    for code, named in matrix.items():
        others = ", ".join(f"{other}: {count}" for other, count in named.items() if other != code)
        right = sum(case["right"] for case in cases if case["code"] == code)
        table.add_row(code, str(sum(named.values())), str(named.get(code, 0)), str(right), others)
    Console().print(table)
    path = write_result("diagnosis", {
        "num_faulty": sum(case["code"] != "healthy" for case in cases),
        "num_healthy": sum(case["code"] == "healthy" for case in cases),
        "num_right": sum(case["right"] for case in cases),
        "num_false_alarms": sum(case["code"] == "healthy" != case["named"] for case in cases),
        "confusion": matrix, "cases": cases}, config.out)
    print(path.name)


if __name__ == "__main__":
    main(settings_of(Diagnosis))
