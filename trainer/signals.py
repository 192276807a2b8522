"""Stop at a good moment when asked once, at once when asked twice."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_STROKE = 0.2
"""Seconds within which all signals are one: `timeout` and shells send theirs to the process and to its group."""


class StopFlag:
    """Context manager under which SIGINT, SIGTERM and SIGHUP (the terminal or connection is gone) set a flag that the loop tests once a
    step. What was ignored before stays ignored: SIGHUP under `nohup`, SIGINT in a job that a script started in the background (`&`), whose
    Ctrl-C is meant for the script.

    Truthy once a signal came; `signal_number` says which. A second signal of any kind, no sooner than ONE_STROKE after the first, ends
    the process within a second with status 128 + its number and without clean-up: the checkpoint protocol leaves nothing half-written at
    any moment. On exit the former handlers are back. Signals are the main thread's: entered in another one the flag leaves them to it,
    and stays unset.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._watcher: threading.Thread | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python runs a handler between two bytecodes of the main thread, and merges equal signals that arrive before that: inside one long
        # kernel or synchronisation the second would be lost. The number written to the wake-up descriptor is neither late nor merged.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._former_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS
                                 if signal.getsignal(number) != signal.SIG_IGN}
        self._watcher = threading.Thread(target=self._leave_on_second, name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watcher is None:
            return
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wakeup)
        os.close(self._write)  # ends the watcher
        self._watcher.join()
        os.close(self._read)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number = number

    def _leave_on_second(self) -> None:
        first = None
        while received := os.read(self._read, 64):
            for number in received:
                if number not in SIGNALS:
                    continue  # others with a Python handler are written here too
                if first is None:
                    first = time.monotonic()
                elif time.monotonic() - first > ONE_STROKE:
                    with contextlib.suppress(OSError):
                        os.write(2, b"second signal: leaving at once, without saving\n")
                    os._exit(128 + number)
