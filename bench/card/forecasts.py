"""What the simulator and the planner say of cells, in worker processes beside the card where there are cores for it."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any
from unittest.mock import patch

from bench.card.rig import Cell, backbone_of
from memory import environment
from memory.assess import Assessment, Workload, assess
from memory.cards import Card, detect, lookup
from memory.plan import MemoryPlan
from memory.ranking import SEARCHED
from memory.search import search
from memory.timeline import Prediction, Trace
from trainer.rehearse import rehearse, teacher_share


def card_here(*, dry: bool) -> Card:
    """The card of this machine as the planner knows it; a dry run plans for a small one."""
    return lookup("8gb") if dry else detect()


def shrunk(card: Card, gib: float, *, with_host: bool = False) -> Card:
    """A card with the rates of `card` and the memory of one of `gib` GiB.

    `with_host`: what blocks keep may go to the host, tens of GiB that take a while to pin.
    """
    small = lookup(f"{gib:g}gb")
    return dataclasses.replace(card, name=f"{card.name}-{gib:g}gb" + "-host" * with_host, capacity_bytes=small.capacity_bytes,
                               usable_bytes=small.usable_bytes, used_by_others_bytes=0,
                               host_bytes=card.host_bytes if with_host else None)


def peaks_of(cell: Cell, workspace_bytes: int) -> tuple[Prediction, float]:
    """The simulator's word on a step of `cell`, and the matrix and attention FLOPs of that step."""
    trace = _trace(cell, cell.plan, backbone_of(cell).num_blocks)
    return trace.prediction(workspace_bytes=workspace_bytes, expandable_segments=environment.expandable_segments()), sum(work.flops for work in trace.work)


def seconds_of(cell: Cell, card: Card) -> float:
    """The planner's word on how long a step of `cell` takes on `card`."""
    return assess(_workload(cell), cell.plan, card).time.seconds


def _workload(cell: Cell) -> Workload:
    return Workload(num_blocks=backbone_of(cell).num_blocks, trace=partial(_trace, cell),
                    teacher_share=teacher_share(cell.config()))


@lru_cache(maxsize=64)
def _trace(cell: Cell, plan: MemoryPlan, num_blocks: int) -> Trace:
    return rehearse(backbone_of(cell), cell.config(), plan, num_blocks=num_blocks)


def plans_of(cell: Cell, cards: tuple[Card, ...], free: tuple[str, ...] = SEARCHED) -> list[tuple[Assessment | None, Assessment]]:
    """For each card (the fastest plan of the step that fits or None, the one that needs least).

    `free`: the settings that the planner may choose; the others stay as the cell has them. The step alone: encoding prompts,
    sampling and decoding are not part of a cell. Traces are shared by the cards.
    """
    fixed = frozenset(SEARCHED) - frozenset(free)
    found = [search(_workload(cell), card, base=cell.plan, fixed=fixed) for card in cards]
    # Without the traces: reading megabytes of them would hold up the thread that gives the card its kernels.
    return [tuple(a and dataclasses.replace(a, trace=None) for a in (result.best, result.smallest)) for result in found]


def _step_back() -> None:
    """Leave the cores to the process that measures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of the terminal's processes, and is for that one
    os.nice(19)


def _require_time(until: Callable[[], float]) -> None:
    if time.monotonic() > until():
        raise TimeoutError("the forecast did not come in time")


class Forecaster:
    """Runs forecasts ahead of need: `ask` starts one, `answer` waits for it. With no workers, when it is needed."""

    def __init__(self, num_workers: int):
        context = SpawnContext()  # a process forked after the card was touched cannot be used
        context.Process = self._worker
        self._workers: list[SpawnProcess] = []
        self._pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_step_back) if num_workers else None
        self._futures: dict[tuple, Future] = {}

    def _worker(self, **how: Any) -> SpawnProcess:
        self._workers.append(SpawnProcess(**how))
        return self._workers[-1]

    def ask(self, function: Callable[..., Any], *args: Any) -> None:
        """Start `function(*args)` unless it was asked for before. Arguments must be hashable."""
        if self._pool is not None and (function, args) not in self._futures:
            # A process that this starts sees no card: autograd would make a context, half a GiB of it, in every one that runs a backward. It has
            # to begin so, since what it imports before its first line of ours asks for cards.
            with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
                try:
                    self._futures[function, args] = self._pool.submit(function, *args)
                except BrokenProcessPool:  # a worker was killed, as for want of memory
                    self._pool = None

    def num_under_way(self) -> int:
        """Forecasts that were asked for and have not come: with them a host gives the card its kernels more slowly."""
        return sum(not future.done() for future in self._futures.values())

    def answer(self, function: Callable[..., Any], *args: Any, until: Callable[[], float] = lambda: math.inf) -> Any:
        """What `function(*args)` returns. Raises TimeoutError once time.monotonic() is past `until()`, which may change meanwhile."""
        self.ask(function, *args)
        if (future := self._futures.get((function, args))) is not None:
            while not wait([future], timeout=1).done:
                _require_time(until)
            try:
                return future.result()  # what came before a worker was killed is still there
            except BrokenProcessPool:
                self._pool = None
        _require_time(until)
        return function(*args)

    def close(self) -> None:
        """End the workers, in the middle of a forecast too: nobody waits for it, and a card may be there for minutes only."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                if worker.is_alive():
                    worker.terminate()
