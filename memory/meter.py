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
    """One moment, in bytes. None: not to be had here."""

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
    """Reads one device. `phase(name)` may nest: the outer phase's peak includes the inner's."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._has_card = self.device.type == "cuda"
        self._open: list[list[int]] = []  # of each open phase: largest (allocated, reserved) so far
        self.peaks: dict[str, PhasePeak] = {}
        """By phase, in order of first end."""

    def read(self) -> Reading:
        """What is held now."""
        used, total = self._driver() if self._has_card else (None, None)
        return Reading(
            allocated_bytes=torch.cuda.memory_allocated(self.device) if self._has_card else None,
            reserved_bytes=torch.cuda.memory_reserved(self.device) if self._has_card else None,
            device_used_bytes=used,
            device_total_bytes=total,
            host_bytes=resident_bytes(),
        )

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak of what runs within, under `name`; also when it raises."""
        self._harvest()
        self._open.append([0, 0])
        try:
            yield
        finally:
            self._harvest()
            allocated, reserved = self._open.pop()
            before = self.peaks.get(name)
            visits = before.num_visits if before else 0
            self.peaks[name] = PhasePeak(
                allocated_bytes=max(allocated, before.allocated_bytes if before else 0) if self._has_card else None,
                reserved_bytes=max(reserved, before.reserved_bytes if before else 0) if self._has_card else None,
                host_bytes=max(resident_bytes(), before.host_bytes if before else 0),
                num_visits=visits + 1,
            )

    def _harvest(self) -> None:
        """Credit the allocator's peak since the last harvest to every open phase, and start a new one."""
        if not self._has_card:
            return
        allocated = torch.cuda.max_memory_allocated(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        for peak in self._open:
            peak[0], peak[1] = max(peak[0], allocated), max(peak[1], reserved)
        torch.cuda.reset_peak_memory_stats(self.device)

    def _driver(self) -> tuple[int | None, int | None]:
        """(used, total) of the card as the driver says; (None, None) once it does not answer, which must not end a run."""
        try:
            free, total = torch.cuda.mem_get_info(self.device)
        except RuntimeError:  # the card fell off the bus, or the driver was reset
            return None, None
        return total - free, total


def resident_bytes() -> int:
    """Resident memory of this process."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # Elsewhere only the largest so far is known: bytes on macOS, KiB on the other systems.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_resident_bytes() -> int:
    """The most that was resident at any time since the process began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
