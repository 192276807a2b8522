"""What cells are measured with: one interface to a card, and to the CPU on which a dry run walks through the same code.

On a card, peaks are the caching allocator's own counters, reset where a phase begins, and times are CUDA events. On the CPU
there is no such counter: the resident bytes of the process stand in for it, so that the same code runs, and a dry
run's figures mean nothing.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from memory.exhaustion import exhausted, first_line
from memory.meter import resident_bytes
from memory.timeline import Trace


@dataclass(frozen=True)
class Attempt:
    """What came of a cell: a value, or the first line of why not."""

    value: Any = None
    out_of_memory: str | None = None
    failed: str | None = None

    @property
    def worked(self) -> bool:
        return self.out_of_memory is None and self.failed is None

    def as_json(self) -> dict[str, Any]:
        if self.worked:
            return self.value
        return {"out_of_memory": self.out_of_memory} if self.out_of_memory else {"failed": self.failed}


class Gauge:
    """Measures on one device. Peaks by phase are between `begin()` and `end()`."""

    def __init__(self, device: torch.device):
        self.device, self.is_card = device, device.type == "cuda"
        self.lost: str | None = None
        """Why nothing more can be measured: the device does not answer any more. Some errors leave no way on in a process."""
        self._phase: str | None = None
        self._peaks: dict[str, dict[str, int]] = {}

    # ---- peaks ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget earlier peaks. What is allocated now belongs to the first phase."""
        self._peaks, self._phase = {}, None
        if self.is_card:
            torch.cuda.reset_peak_memory_stats(self.device)

    def phase(self, name: str | None) -> None:
        """From here on, peaks are `name`'s. The host does not wait: the allocator's counters live on the host."""
        allocated, reserved = self._read_peak()
        if self._phase is not None:
            peak = self._peaks.setdefault(self._phase, {"allocated_bytes": 0, "reserved_bytes": 0})
            peak["allocated_bytes"] = max(peak["allocated_bytes"], allocated)
            peak["reserved_bytes"] = max(peak["reserved_bytes"], reserved)
        self._phase = name

    def end(self) -> dict[str, dict[str, int]]:
        """Largest allocated and reserved bytes by phase."""
        self.phase(None)
        peaks, self._peaks = self._peaks, {}  # later phases are somebody else's
        return peaks

    def _read_peak(self) -> tuple[int, int]:
        if not self.is_card:
            return resident_bytes(), resident_bytes()
        peak = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def counters(self) -> dict[str, int]:
        """Running counts of the allocator: retries, and requests that went to the driver."""
        stats = torch.cuda.memory_stats(self.device) if self.is_card else {}
        return {"num_retries": stats.get("num_alloc_retries", 0), "num_driver_allocations": stats.get("num_device_alloc", 0),
                "reserved_bytes": stats.get("reserved_bytes.all.current", 0)}

    # ---- order ---------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        if self.is_card:
            torch.cuda.synchronize(self.device)

    def context_bytes(self) -> int:
        """All that is used of the card and not reserved by this process' allocator. It grows as kernels are loaded."""
        if not self.is_card:
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    def total_bytes(self) -> int | None:
        """Memory of the card; None on the CPU."""
        return torch.cuda.mem_get_info(self.device)[1] if self.is_card else None

    def release(self) -> None:
        """Give back what nothing refers to any more, cuBLAS' workspaces, and the allocator's cache: as in a new process. A device that does
        not answer is `lost`."""
        gc.collect()
        if self.is_card:
            try:
                torch.cuda.synchronize(self.device)
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()
            except RuntimeError as e:
                self.lost = first_line(e)

    def attempt(self, run: Callable[[], Any]) -> Attempt:
        """Run a cell. Being out of memory is an answer, and so is any other error: it is shown and written down, and the cells after it
        run, since the card may be there for minutes only.

        Memory is given back outside of the except block: inside, the traceback still holds the cell's tensors.
        """
        try:
            result = Attempt(run())
        except Exception as e:
            said = first_line(e)
            result = Attempt(out_of_memory=said) if exhausted(e) else Attempt(failed=f"{type(e).__name__}: {said}")
        self.release()
        return result

    @contextmanager
    def capped(self, num_bytes: int | None) -> Iterator[None]:
        """Inside, the allocator reserves at most `num_bytes`, as on a smaller card. The context is not in it."""
        if not self.is_card or num_bytes is None:
            yield
            return
        total = torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / total), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Inside, an operator that makes the host wait raises RuntimeError."""
        if not self.is_card:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def reproducible(self) -> Iterator[None]:
        """Inside, the same work gives the same bits. Otherwise attention's backward adds up as its blocks finish.

        cuDNN's attention has no such mode, so that torch takes its own. With `warn_only` that would add up in any order, too.
        """
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel more for every buffer could hide a race
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True

    # ---- time ----------------------------------------------------------------------------------------------------

    def seconds(self, run: Callable[[], object], *, repeats: int) -> float:
        """Median seconds of `run`, one warm-up excluded."""
        run()
        if not self.is_card:
            taken = []
            for _ in range(repeats):
                started = time.perf_counter()
                run()
                taken.append(time.perf_counter() - started)
            return statistics.median(taken)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        self.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:])) / 1000

    def activity(self, run: Callable[[], object]) -> dict[str, float]:
        """Seconds of copies from and to the host during `run`, and of those the part beside computation.

        By the card's own record (torch.profiler); empty on the CPU.
        """
        if not self.is_card:
            run()
            return {}
        events = self._record(run)
        kinds = {"to device": "Memcpy HtoD", "to host": "Memcpy DtoH"}
        spans = {kind: [(e.time_range.start, e.time_range.end) for e in events if e.name.startswith(prefix)]
                 for kind, prefix in kinds.items()}
        computing = [(e.time_range.start, e.time_range.end) for e in events if not e.name.startswith(("Memcpy", "Memset"))]
        found = {"compute_seconds": covered(computing) / 1e6}
        for kind, copies in spans.items():
            found[f"{kind} seconds"] = covered(copies) / 1e6
            found[f"{kind} hidden seconds"] = overlap(copies, computing) / 1e6
        return found

    def kernels(self, run: Callable[[], object]) -> list[dict[str, Any]]:
        """The 30 kernels that took most of `run`: name, count and seconds by the card's own record; empty on the CPU."""
        if not self.is_card:
            run()
            return []
        found: dict[str, list[float]] = {}
        for event in self._record(run):
            found.setdefault(event.name[:120], []).append((event.time_range.end - event.time_range.start) / 1e6)
        longest = sorted(found.items(), key=lambda entry: -sum(entry[1]))[:30]
        return [{"name": name, "count": len(seconds), "seconds": sum(seconds)} for name, seconds in longest]

    def _record(self, run: Callable[[], object]) -> list[Any]:
        """What the card did during `run`, by torch.profiler."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            run()
            self.synchronize()
        # Spans that only bear a label, such as the optimizer's, are no work.
        return [e for e in record.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]


def covered(spans: list[tuple[float, float]]) -> float:
    """Time that at least one interval covers."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def overlap(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    """Time that both sets of intervals cover."""
    return covered(left) + covered(right) - covered([*left, *right])


def predicted_peak(trace: Trace, *, on_card: bool) -> int:
    """What `Gauge` should find of a step on a card, in bytes; without one, what `profiled_peak` should."""
    levels = [total for _, total, _ in trace.timeline(rounded=on_card)]  # what stands first
    return max(levels) - (0 if on_card else levels[0])


def profiled_peak(run: Callable[[], object]) -> int:
    """Peak bytes over the start, as the CPU's allocator reports them to the profiler: not by hooks of our own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        run()
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for _, num_bytes in sorted(events, key=lambda pair: pair[0]):
        total += num_bytes
        peak = max(peak, total)
    return peak
