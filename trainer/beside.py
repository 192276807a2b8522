"""Calls shared with a fork of this process on a second core: traces, which are seconds of Python on tensors without data.

A thread would gain nothing. Where there is no second core, no fork, or a card in use already (which a fork must not share), all is
done here.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


class Beside:
    """`function(call)` by call, remembered. Of calls that were announced, each process takes the next that neither has taken."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self._process = self._pipe = None
        self._announced: list[Hashable] = []
        self._results: dict[Hashable, Any] = {}

    def announce(self, calls: Sequence[Hashable]) -> None:
        """Calls that will be made, the first of them at once; they take the place of those announced before. None: no more."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._pipe.close()
        self._process, self._announced = None, []
        wanted = [call for call in calls if call not in self._results]
        if len(wanted) < 2 or not _may_fork():
            return
        context = multiprocessing.get_context("fork")
        try:
            self._taken = context.Array("b", len(wanted))
        except OSError:  # no shared memory here
            return
        self._announced = wanted
        self._pipe, their_end = context.Pipe(duplex=False)
        self._process = context.Process(target=self._work, args=(their_end,), daemon=True)
        self._process.start()
        their_end.close()  # so that its death is the end of the pipe

    def __call__(self, call: Hashable) -> Any:
        while call not in self._results:
            if call not in self._announced or self._take(self._announced.index(call)):
                self._results[call] = self._function(call)
                break
            # The other process is at it: do what comes next meanwhile.
            while not self._pipe.poll() and (another := next(self._untaken(), None)) is not None:
                self._results[another] = self._function(another)
            try:
                index, result = self._pipe.recv()
            except EOFError:  # it raised or was killed: whatever it is will show here
                self.announce(())
            else:
                self._results[self._announced[index]] = result
        return self._results[call]

    def _untaken(self) -> Iterator[Hashable]:
        """Announced calls, each taken as it is given out."""
        return (call for index, call in enumerate(self._announced) if self._take(index))

    def _take(self, index: int) -> bool:
        with self._taken.get_lock():
            taken, self._taken[index] = self._taken[index], True
        return not taken

    def _work(self, pipe: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what is to be said
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Sent from a thread: the first process may be busy, and a result is more than a pipe holds.
        with contextlib.suppress(Exception), ThreadPoolExecutor(1) as sender:  # what is raised, the first raises again
            for index, call in enumerate(self._announced):
                if index and self._take(index):
                    sender.submit(pipe.send, (index, self._function(call)))


def _may_fork() -> bool:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return num_cores > 1 and "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
