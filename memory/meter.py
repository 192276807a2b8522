"""Measured readings: what the allocator, the driver and the host say, and peaks by phase.

Everything here is *measured*, and works without a card: then the device figures are None.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One moment, in bytes. None: not available here."""

    allocated_bytes: int | None
    """Held by tensors on the device."""
    reserved_bytes: int | None
    """Held by torch's allocator from the driver."""
    device_used_bytes: int | None
    """Of the whole card, by all processes and with their contexts, as the driver says."""
    device_total_bytes: int | None
    host_bytes: int
    """Resident memory of this process."""


@dataclass(frozen=True, kw_only=True)
class PhasePeak:
    """Largest values seen in one phase, in bytes."""

    allocated_bytes: int | None
    reserved_bytes: int | None
    host_bytes: int
    """Resident memory of this process at the end of the phase: the kernel keeps no peak that could be reset."""
    num_visits: int


class Meter:
    """Reads one device. `phase(name)` may nest: the outer phase's peak includes the inner's.

    Nothing here makes the host wait for the device: the allocator's counters are kept on the host.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._has_card = self.device.type == "cuda"
        self._open: list[list[int]] = []  # of each open phase: largest (allocated, reserved) so far
        self._turn: tuple[str, list[int]] | None = None
        self.peaks: dict[str, PhasePeak] = {}
        """By phase, in order of first end."""

    def read(self) -> Reading:
        """What is held now."""
        used, total = self._driver() if self._has_card else (None, None)
        allocated, reserved = self._counters("current") if self._has_card else (None, None)
        return Reading(
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            device_used_bytes=used,
            device_total_bytes=total,
            host_bytes=resident_bytes(),
        )

    def held(self) -> dict[str, int]:
        """What the allocator says now, without asking the driver: takes microseconds. Empty without a card."""
        return dict(zip(("allocated_bytes", "reserved_bytes"), self._counters("current"))) if self._has_card else {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak of what runs within, under `name`; also when it raises."""
        self._harvest()
        peak = self._begin()
        try:
            yield
        finally:
            self._harvest()
            self._end(name, peak)

    def turn_to(self, name: str | None) -> None:
        """From here to the next turn, peaks are `name`'s: for phases that follow each other. None: nobody's."""
        self._harvest()
        if self._turn is not None:
            self._end(*self._turn)
        self._turn = None if name is None else (name, self._begin())

    def highest(self) -> dict[str, int]:
        """Largest allocated bytes by phase so far; without a card, largest resident bytes of the process."""
        return {
            name: peak.host_bytes if peak.allocated_bytes is None else peak.allocated_bytes
            for name, peak in self.peaks.items()
        }

    def _begin(self) -> list[int]:
        self._open.append([0, 0])
        return self._open[-1]

    def _end(self, name: str, peak: list[int]) -> None:
        self._open = [other for other in self._open if other is not peak]
        allocated, reserved = peak
        before = self.peaks.get(name, PhasePeak(allocated_bytes=0, reserved_bytes=0, host_bytes=0, num_visits=0))
        self.peaks[name] = PhasePeak(
            allocated_bytes=max(allocated, before.allocated_bytes) if self._has_card else None,
            reserved_bytes=max(reserved, before.reserved_bytes) if self._has_card else None,
            host_bytes=max(resident_bytes(), before.host_bytes),
            num_visits=before.num_visits + 1,
        )

    def _harvest(self) -> None:
        """Credit the allocator's peak since the last harvest to every open phase, and start a new one."""
        if not self._has_card:
            return
        allocated, reserved = self._counters("peak")
        for peak in self._open:
            peak[0], peak[1] = max(peak[0], allocated), max(peak[1], reserved)
        torch.cuda.reset_peak_memory_stats(self.device)

    def _counters(self, which: str) -> tuple[int, int]:
        """(allocated, reserved) by the allocator, which keeps its counters on the host."""
        # As a nested dict: flattening all of the allocator's figures takes longer than reading them.
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)
        if not stats:  # not a byte was asked of the card yet
            return 0, 0
        return stats["allocated_bytes"]["all"][which], stats["reserved_bytes"]["all"][which]

    def _driver(self) -> tuple[int | None, int | None]:
        """(used, total) of the card as the driver says; (None, None) once it does not answer, which must not end a run."""
        try:
            free, total = torch.cuda.mem_get_info(self.device)
        except RuntimeError:  # the card fell off the bus, or the driver was reset
            return None, None
        return total - free, total


def sensors(device: torch.device | str) -> dict[str, float]:
    """Temperature (°C) and power (W) of a card by NVML, as far as it answers: a sensor is not worth a run."""
    found: dict[str, float] = {}
    device = torch.device(device)
    readers = {"temperature_celsius": torch.cuda.temperature, "power_watts": lambda d: torch.cuda.power_draw(d) / 1000}
    for name, read in readers.items() if device.type == "cuda" else ():
        try:
            found[name] = read(device)
        except Exception:  # no NVML, another version than the driver's, a card without this sensor, or one that is gone
            continue
    return found


def resident_bytes() -> int:
    """Resident memory of this process."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # Elsewhere only the largest so far is known: bytes on macOS, KiB on the other systems.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
