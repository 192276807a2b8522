"""Available host memory: what the machine has left, within the limits of containers, jobs and services (control groups).

Importable without torch.
"""

import os
import platform
from pathlib import Path

_PROCESS = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_V2 = ("memory.max", "memory.current", "")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")  # limit, usage, prefix of what descendants hold, too
_WINDOWS_CARD = Path("/dev/dxg")


def under_wsl() -> bool:
    """Whether this is Linux inside of Windows, through whose driver a card is reached."""
    return "microsoft" in platform.release().lower() or _WINDOWS_CARD.exists()


def machine_bytes() -> int:
    """All of the machine's memory, free or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def host_bytes() -> tuple[int, int]:
    """(total, available without swapping) host memory, within the limits of the control groups that this process is in."""
    total = available = machine_bytes()
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else total
    limits = _limits()
    return min([total, *(limit for limit, _ in limits)]), max(0, min([available, *(left for _, left in limits)]))


def available_host_bytes() -> int:
    """Host memory that is available without swapping, within the same limits."""
    return host_bytes()[1]


def host_limit_bytes() -> int | None:
    """The tightest limit of a control group; None where none is below the machine's memory."""
    return min((limit for limit, _ in _limits()), default=None)


def _limits() -> list[tuple[int, int]]:
    """(limit, what it leaves) of the group of this process and of those around it."""
    limits = []
    for line in filter(None, _PROCESS.read_text().splitlines() if _PROCESS.exists() else ()):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, files = _GROUPS, _V2
        elif "memory" in controllers.split(","):
            mount, files = _GROUPS / "memory", _V1
        else:
            continue
        # A container may see its path on the host, but only its own group, as the mount's root: what is not there, is no limit.
        group = mount / path.strip("/")
        limits += [found for folder in (group, *group.parents) if (found := _limit(folder, *files))]
    return limits


def _limit(group: Path, limit: str, usage: str, prefix: str) -> tuple[int, int] | None:
    """None: no such group, one that says nothing, or one without a limit, which version 1 writes as a huge number."""
    try:
        allowed = (group / limit).read_text().strip()
        if allowed == "max" or int(allowed) >= machine_bytes():
            return None
        used = int((group / usage).read_text())
    except (OSError, ValueError):
        return None
    stat = group / "memory.stat"
    held = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines() if " " in line) if stat.exists() else {}
    # Usage counts the page cache of whatever was read, such as weights. The kernel takes that back before it refuses memory, of
    # files read twice (active) too, as MemAvailable has it. `file` would count shared memory, which only swap could take.
    cached = sum(int(held.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
    return int(allowed), int(allowed) - used + cached
