"""A clock for the emulated card: when it would be done with what the program gives it.

Operators take what the planner's roofline gives them (`memory.timing`), copies what the host link takes, and the host a constant time
for whatever it gives away. What comes out is the schedule that streams, events and waits of the program itself leave, with no paper
model between: what is hidden behind what, and who waits for whom. Predicted, as rates are. Values and the host's own
arithmetic take no time.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.card.gauge import covered, overlap
from memory.cards import Card
from memory.timing import LAUNCH_S, load_of
from memory.work import work_of

_ENGINES = ("compute", "to device", "to host")


class Clock(TorchDispatchMode):
    """Inside, operators on the emulated card take the time that they are predicted to take on `card`. CUDA events show it."""

    def __init__(self, card: Card):
        super().__init__()
        self.card = card
        self._library = ctypes.CDLL(None)

    def __enter__(self):
        self._set(self.card.host_link_bandwidth, LAUNCH_S)
        return super().__enter__()

    def __exit__(self, *error):
        self._set(0.0, 0.0)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        work = work_of(func, args, outputs)
        if work is not None and _on_card(args) and _on_card(outputs):  # else it is the host's, or a copy, which the library sees
            self._library.emulated_card_work(ctypes.c_double(load_of([work], self.card).computing))
        return outputs

    def activity(self, run: Callable[[], object]) -> dict[str, float]:
        """As `Gauge.activity`, which the profiler does not help here."""
        self._busy()
        run()
        torch.cuda.synchronize()
        spans = self._busy()
        found = {"compute_seconds": covered(spans["compute"])}
        for kind in _ENGINES[1:]:
            found[f"{kind} seconds"] = covered(spans[kind])
            found[f"{kind} hidden seconds"] = overlap(spans[kind], spans["compute"])
        return found

    def _busy(self) -> dict[str, list[tuple[float, float]]]:
        """When what was busy since this was last asked."""
        ask = self._library.emulated_card_busy
        ask.restype = ctypes.c_size_t
        count = ask(None, ctypes.c_size_t(0))
        found = (ctypes.c_double * (3 * count))()
        ask(found, ctypes.c_size_t(count))
        spans: dict[str, list[tuple[float, float]]] = {name: [] for name in _ENGINES}
        for engine, start, stop in zip(found[::3], found[1::3], found[2::3]):
            spans[_ENGINES[int(engine)]].append((start, stop))
        return spans

    def _set(self, link: float, launch: float) -> None:
        self._library.emulated_card_clock(ctypes.c_double(link), ctypes.c_double(launch))


def _on_card(values: Any) -> bool:
    """Whether all tensors among `values` are, numbers (of no dimension) excepted."""
    if isinstance(values, torch.Tensor):
        return values.is_cuda or not values.dim()
    if isinstance(values, (tuple, list)):
        return all(map(_on_card, values))
    return True
