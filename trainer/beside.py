"""Traces made in a fork of this process, on a second core, while this one makes others.

A trace is seconds of Python on tensors without data, so a thread would gain nothing. Where there is no second core, no fork, or a
card in use already (which a fork must not share), all is done here.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch


class Beside:
    """`function(call)` by call: some results come from a second process, all others are computed when asked for."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self._process = self._pipe = None
        self._awaited: list[Hashable] = []

    def start(self, calls: Sequence[Hashable]) -> None:
        """Let the second process compute every other one of `calls`, which will be asked for in this order. None: no more."""
        self.stop()
        theirs = list(calls)[1::2]
        if not theirs or not _may_fork():
            return
        context = multiprocessing.get_context("fork")
        self._pipe, their_end = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(self._function, theirs, their_end), daemon=True)
        self._process.start()
        their_end.close()  # so that its death is the end of the pipe
        self._awaited = theirs

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._pipe.close()
        self._process, self._pipe, self._awaited = None, None, []

    def __call__(self, call: Hashable) -> Any:
        while call in self._awaited:  # calls that were not asked for after all are passed over
            try:
                done, result = self._pipe.recv()
            except EOFError:  # it raised or was killed: whatever it is will show here
                self.stop()
                break
            self._awaited.remove(done)
            if done == call:
                return result
        return self._function(call)


def _may_fork() -> bool:
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return num_cores > 1 and "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()


def _work(function: Callable[[Any], Any], calls: Sequence[Hashable], pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says what is to be said
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for call in calls:
            pipe.send((call, function(call)))
    except Exception:
        return  # the first process does it again, and raises it
