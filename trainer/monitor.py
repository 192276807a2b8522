"""Progress for whoever watches: a live view on a terminal, plain lines elsewhere. On stderr.

The loop hands over plain dicts and goes on. All reading of what is shown, drawing and writing is done by a thread of the
monitor's own, so neither a slow terminal nor a bug in here can hold up or stop a training run. What the loop itself reads of
memory, for its records, are `Readings`.
"""

import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Literal, TextIO

from memory.host import host_bytes
from memory.meter import Meter, resident_bytes, sensors
from trainer.config import TrainConfig
from trainer.distributed import rank
from trainer.signals import StopFlag

Mode = Literal["auto", "plain", "off"]
NUM_WARM_UP = 3  # first steps of a process, which allocate and choose kernels: no part of the ETA
_NUM_KEPT = 600  # records that the view can look back on
logger = logging.getLogger(__name__)


class Monitor:
    """Context manager around the loop; `step(record)` after every step. Trouble in here is a warning."""

    def __init__(self, num_steps: int, *, mode: Mode = "auto", title: str = "train", run_dir: Path | None = None,
                 facts: Mapping[str, float | None] | None = None, stopping: Callable[[], bool] = bool,
                 read_memory: Callable[[], Mapping[str, Any]] | None = None, stream: TextIO | None = None,
                 interval: float = 10.0, refresh: float = 1.0):
        """`run_dir`: said first, so that it is known however the run ends. `facts`: `budget_bytes`, `predicted_peak_bytes` and
        `trajectory_steps`, where known. `stopping`: whether a signal came.
        `read_memory`: measured values of now, see `read_process`. `interval`: seconds between plain lines, at least;
        `refresh`: between pictures of the live view."""
        self.num_steps, self.title, self.facts, self.stopping = num_steps, title, dict(facts or {}), stopping
        self.run_dir, self.stream, self.interval, self.refresh = run_dir, stream or sys.stderr, interval, refresh
        self._read_memory = read_memory or read_process
        self._records: deque[Mapping[str, Any]] = deque(maxlen=_NUM_KEPT)
        self.done = 0  # finished steps, those before a resumption included
        self.findings: Callable[[], list[dict[str, Any]] | None] = lambda: None  # as `Finding.as_json` has them
        self._num_seen, self._started, self._warm, self._latest = 0, time.monotonic(), None, None
        self._said_step, self._said = None, float("-inf")
        self._ended = threading.Event()
        self._ways = [] if mode == "off" or self.stream is None else [self._plain]  # None: stderr was closed
        if self._ways and mode == "auto" and self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self._ways.insert(0, self._live)
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> "Monitor":
        self._started = time.monotonic()
        self._thread.start()
        return self

    def step(self, record: Mapping[str, Any]) -> None:
        """Show the record of one finished step: plain numbers, lists and dicts of them."""
        self._records.append(dict(record))
        self.done = record["step"] + 1
        self._latest, self._num_seen = time.monotonic(), self._num_seen + 1
        if self._num_seen == NUM_WARM_UP:
            self._warm = self._latest

    def close(self) -> None:
        """Show the last state and stop. A terminal that does not answer is given up on after two seconds."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """All that a picture is made of."""
        records = list(self._records)
        counted = self._num_seen - NUM_WARM_UP
        # Between the ends of two steps lie saving and sampling too: wall time is what is left to wait for.
        pace = (self._latest - self._warm) / counted if counted > 0 else None
        seconds = [r["seconds"] for r in records[-20:] if "seconds" in r]
        left = self.num_steps - self.done
        return {"title": self.title, "num_steps": self.num_steps, "done": self.done, "records": records,
                "elapsed": time.monotonic() - self._started, "seconds_per_step": mean(seconds) if seconds else None,
                "eta": pace * left if pace is not None else None if left else 0.0,
                "stopping": bool(self.stopping()), "memory": dict(self._read_memory()), "facts": self.facts,
                "findings": self.findings()}

    def _run(self) -> None:
        for way in self._ways:
            try:
                if self.run_dir and way is self._ways[0]:
                    print(f"run: {self.run_dir}", file=self.stream, flush=True)
                way()
                return
            except Exception as e:  # whatever it is, it is not worth a training run
                logger.warning("the monitor failed, training goes on (%s: %s)", type(e).__name__, e)

    def _live(self) -> None:
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.live import Live

        from trainer.live_view import view

        console = Console(file=self.stream)
        # What is printed or logged meanwhile goes above the view instead of through it.
        with Live(console=console, auto_refresh=False, redirect_stdout=sys.stdout.isatty()) as live:
            console.show_cursor(True)  # a killed process cannot bring it back
            handlers = [h for h in logging.getLogger().handlers
                        if isinstance(h, logging.StreamHandler) and h.stream is self.stream]
            for handler in handlers:
                handler.setStream(FileProxy(console, self.stream))
            try:
                ended, width = False, console.width
                while not ended:
                    ended = self._ended.wait(self.refresh)
                    if console.width < width:  # the terminal has broken the last picture's lines in two, and rich would leave some
                        console.clear()
                    width = console.width
                    live.update(view(self.state(), max(24, width - 2)), refresh=True)  # a ^C that the terminal shows has room in the last line
            finally:
                for handler in handlers:
                    handler.setStream(self.stream)

    def _plain(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(min(0.2, self.interval))
            new = bool(self._records) and self._records[-1]["step"] != self._said_step
            if new and (ended or time.monotonic() - self._said >= self.interval):
                self._said = time.monotonic()
                state = self.state()
                self._said_step = state["done"] - 1
                print(plain_line(state), file=self.stream, flush=True)


def watch(config: TrainConfig, run_dir: Path, stop: StopFlag, meter: Meter) -> Monitor:
    """The monitor of a training run. Sensors are asked by the monitor's own thread."""
    data, passes = config.data, config.optim.accumulation
    facts = {"trajectory_steps": data.trajectory_steps // math.gcd(data.trajectory_steps, passes)} if data.latents == "trajectory" else {}
    return Monitor(config.optim.steps, mode="off" if rank() else config.output.monitor, title=data.concept, run_dir=run_dir,
                   facts=facts, stopping=stop.__bool__, read_memory=lambda: read_memory(meter) | sensors(meter.device))


def plain_line(state: Mapping[str, Any]) -> str:
    """The state in one line."""
    from trainer.live_view import TERMS, duration, gib, pace, trouble

    record, memory = state["records"][-1], state["memory"]
    parts = [f"step {state['done']}/{state['num_steps']}", *(f"{k} {record[k]:.4g}" for k in TERMS if k in record)]
    if state["seconds_per_step"] is not None:
        parts.append(pace(state["seconds_per_step"]))
    if state["eta"] is not None:
        parts.append(f"ETA {duration(state['eta'])}")
    for key, label in (("reserved_bytes", "reserved"), ("process_bytes", "process")):
        if memory.get(key):
            parts.append(f"{label} {gib(memory[key])} GiB")
    parts += [f"[{f['severity']}: {name}]" for f, name in trouble(state["findings"] or ())]
    return "  ".join(parts + ["stopping"] * state["stopping"])


class Readings:
    """`read_memory` at little cost, for every step: what the allocator and this process hold is of now, what the driver, the machine
    and its control groups say is a second old at most."""

    def __init__(self, meter: Meter):
        self._meter, self._latest, self._due = meter, {}, -math.inf

    def __call__(self) -> dict[str, float]:
        now = time.monotonic()
        if now >= self._due:
            self._latest, self._due = read_memory(self._meter), now + 1
        return self._latest | self._meter.held() | {"process_bytes": resident_bytes()}


def read_memory(meter: Meter) -> dict[str, float]:
    """What is held now: on a card allocated, reserved and by all processes, and the memory of this process and its host."""
    on_card = {name: value for name, value in asdict(meter.read()).items() if name != "host_bytes" and value is not None}
    return on_card | read_process()


def read_process() -> dict[str, float]:
    """Memory of this process and its host (or container) in bytes."""
    total, available = host_bytes()
    return {"process_bytes": resident_bytes(), "host_total_bytes": total, "host_available_bytes": available}
