"""What a run leaves in numbers: metrics.jsonl always, and progress for whoever is watching (on stderr)."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from trainer.errors import InputOutputError

METRICS = "metrics.jsonl"


class MetricsLog:
    """Append-only JSON lines; floats keep their full precision. A resumed run continues the same file."""

    def __init__(self, run_dir: Path, *, first_step: int = 0):
        self.path = run_dir / METRICS
        try:
            kept = [line for line in _lines(self.path) if json.loads(line).get("step", -1) < first_step]
            self._file: TextIO = self.path.open("w")
            self._file.writelines(line + "\n" for line in kept)
        except OSError as e:
            raise InputOutputError(f"{self.path} cannot be written ({e}); choose another --out") from e

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the operating system."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    """Complete lines of a metrics file; the last one may have been cut short by a crash."""
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in order."""
    return [json.loads(line) for line in _lines(run_dir / METRICS)]


class Progress:
    """One refreshed bar with an ETA on a terminal; elsewhere at most one plain line an interval."""

    def __init__(self, num_steps: int, first_step: int = 0, *, stream: TextIO = sys.stderr, interval: float = 10.0):
        self.num_steps, self.stream, self.interval = num_steps, stream, interval
        self._started, self._first, self._said = time.monotonic(), first_step, float("-inf")
        self._bar = None
        if stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            TextColumn("{task.fields[terms]}"), console=Console(file=stream))
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step, terms="")
            self._bar.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show the record of one finished step."""
        done = record["step"] + 1
        terms = "  ".join(f"{k} {record[k]:.4g}" for k in ("loss", "unlearn", "loc", "pre") if k in record)
        if self._bar:
            self._bar.update(self._task, completed=done, terms=terms)
            return
        now = time.monotonic()
        if now - self._said >= self.interval or done == self.num_steps:
            self._said = now
            rate = (now - self._started) / max(1, done - self._first)
            print(f"step {done}/{self.num_steps}  {terms}  {rate:.2f} s/step  "
                  f"ETA {rate * (self.num_steps - done):.0f} s", file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
