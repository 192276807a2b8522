"""Where the time of a step goes: teacher, student, backward, optimizer, waiting for transfers.

The host never waits for the clock. On a card every change of phase is an event on the compute stream, and a step's
events are read once the last of them has passed, which is a step or so later.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WAITING = "waiting for transfers"


class PhaseClock:
    """Call `phase(name)` where a phase begins and `end_step()` where the step ends; `read()` has the seconds."""

    def __init__(self, device: torch.device, *, on_phase: Callable[[str | None], object] = lambda name: None):
        """`on_phase` is called where a phase begins, with None where a step ends: who measures by phase listens there."""
        self._cuda, self._on_phase = device.type == "cuda", on_phase
        self._marks: list[tuple[str, Any]] = []  # (phase that begins, when) of the step under way
        self._ended: deque[list[tuple[str, Any]]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._latest: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """From here on, time is `name`'s."""
        self._mark(name)
        self._on_phase(name)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the compute stream waits for a copy. The time is taken from the phase around it."""
        around = self._marks[-1][0] if self._marks else None
        if around is None:  # between two steps: nobody's time
            yield
            return
        self._mark(WAITING)
        try:
            yield
        finally:
            self._mark(around)

    def around(self, function: Callable, *, during: str, after: str) -> Callable:
        """`function`, in phase `during` while it runs and in phase `after` from its return."""
        def timed(*args, **kwargs):
            self.phase(during)
            result = function(*args, **kwargs)
            self.phase(after)
            return result

        return timed

    def end_step(self) -> None:
        """The step is over. What comes until the next phase (saving, sampling) is not counted."""
        if self._marks:
            self._mark("")
            self._ended.append(self._marks)
            self._marks = []
            self._on_phase(None)

    def read(self) -> dict[str, Any]:
        """"phase_seconds", by phase, and their sum, "seconds", of the newest step whose end the device has passed, which on a
        card is an earlier one than the newest; empty before there is one. The host's own clock would show how long it took to
        queue a step.
        """
        while self._ended and (not self._cuda or self._ended[0][-1][1].query()):
            marks, self._latest = self._ended.popleft(), {}
            for (name, start), (_, stop) in zip(marks, marks[1:]):
                seconds = start.elapsed_time(stop) / 1000 if self._cuda else stop - start
                self._latest[name] = self._latest.get(name, 0.0) + seconds
            if self._cuda:
                self._spare.extend(event for _, event in marks)
        return {"seconds": sum(self._latest.values()), "phase_seconds": self._latest} if self._latest else {}

    def _mark(self, name: str) -> None:
        self._marks.append((name, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
