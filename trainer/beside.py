"""Calls shared with a fork of this process on a second core: traces, which are seconds of Python on tensors without data.

A thread would gain nothing. Where there is no second core, no fork, or a card in use already (which a fork must not share), all is
done here.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

_MOST = 64  # calls of an announcement that are shared


class Beside:
    """`function(call)` by call, remembered. Of calls that were announced, each process takes the next that neither has taken.

    One fork serves all announcements until there are no more: once autograd ran on a machine with a card it has threads, and a
    process that is forked after that cannot run it.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self._process = self._pipe = None
        self._announced: list[list[Hashable]] = [[]]
        """To the process that there is now; the last ones hold."""
        self._theirs: set[Hashable] = set()
        """What the other process is at, of earlier announcements."""
        self._results: dict[Hashable, Any] = {}

    def announce(self, calls: Sequence[Hashable]) -> None:
        """Calls that will be made, the first of them at once; they take the place of those announced before. Empty: no more."""
        if self._process is not None:
            self._theirs |= {call for index, call in enumerate(self._announced[-1]) if not self._take(index)}
            while self._process is not None and self._pipe.poll():
                self._receive()
            self._theirs -= self._results.keys()
        if not calls:
            self._end()
            return
        wanted = [call for call in calls if call not in self._results and call not in self._theirs][:_MOST]
        if self._process is None and (len(wanted) < 2 or not self._start()):
            return
        try:
            self._pipe.send(wanted)
        except OSError:  # it was killed
            self._end()
        else:
            self._announced.append(wanted)

    def __call__(self, call: Hashable) -> Any:
        while call not in self._results:
            calls = self._announced[-1]
            if call not in self._theirs and (call not in calls or self._take(calls.index(call))):
                self._results[call] = self._function(call)
                break
            # The other process is at it: do what comes next meanwhile.
            while not self._pipe.poll() and (another := next(self._untaken(), None)) is not None:
                self._results[another] = self._function(another)
            self._receive()
        return self._results[call]

    def _start(self) -> bool:
        """Whether there is another process now."""
        if not _may_fork():
            return False
        context = multiprocessing.get_context("fork")
        try:
            self._taken = context.Array("i", _MOST)
            self._pipe, their_end = context.Pipe()
            process = context.Process(target=self._work, args=(their_end,), daemon=True)
            process.start()
        except OSError:  # no shared memory here, or no room for one more process
            return False
        their_end.close()  # so that its death is the end of the pipe
        self._process = process
        return True

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._pipe.close()
        self._process, self._announced, self._theirs = None, [[]], set()

    def _receive(self) -> None:
        """Wait for a result, or for the end of the other process."""
        try:
            number, index, result = self._pipe.recv()
        except (EOFError, OSError):  # it raised or was killed: whatever it is will show here
            self._end()
        else:
            call = self._announced[number][index]
            self._theirs.discard(call)
            self._results[call] = result

    def _untaken(self) -> Iterator[Hashable]:
        """Announced calls that are still to be made, each taken as it is given out."""
        return (call for index, call in enumerate(self._announced[-1]) if call not in self._results and self._take(index))

    def _take(self, index: int, number: int | None = None) -> bool:
        """Whether a call is this process' to make, of the last announcement or, in the other process, of one by number."""
        mine = 2 * (len(self._announced) - 1) if number is None else 2 * number + 1
        with self._taken.get_lock():
            if self._taken[index] < mine & ~1:
                self._taken[index] = mine
            return self._taken[index] == mine

    def _work(self, pipe: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what is to be said
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._pipe.close()  # so that the first process' death is the end of it here
        number, calls = 0, iter(())
        # Sent from a thread: the first process may be busy, and a result is more than a pipe holds.
        with contextlib.suppress(Exception), ThreadPoolExecutor(1) as sender:  # what is raised, the first raises again
            while True:
                index, call = next(calls, (0, None))
                if not index or pipe.poll():  # nothing left, or no longer wanted
                    calls = itertools.islice(enumerate(pipe.recv()), 1, None)  # the first one is for the first process
                    number += 1
                elif self._take(index, number):
                    sender.submit(pipe.send_bytes, ForkingPickler.dumps((number, index, self._function(call))))


def _may_fork() -> bool:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return num_cores > 1 and "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
