"""Which errors mean that memory ran out, that the card is lost or its driver at a loss: torch, CUDA's libraries and the host each word them differently.

Importable without torch.
"""

import os
import re
import sys
from typing import Literal

from memory.environment import FIXED_SEGMENTS, expandable_segments

_DEVICE = re.compile(r"(CUDA( driver)? error|Triton Error \[CUDA\]): out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED")
_HOST = re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory|cudaHostAlloc|hipHostMalloc")
_REQUESTED = re.compile(r"tried to allocate (\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB)", re.IGNORECASE)
_LOST = re.compile(
    r"CUDA error: (no CUDA-capable device|.*unknown error|uncorrectable ECC|unspecified launch failure|.*device.* (unavailable|lost)"
    r"|system not yet initialized|the launch timed out)|GPU is lost|fallen off the bus",
    re.IGNORECASE,
)
_DRIVER = re.compile(r"CUDA driver error: (?!out of memory)")
_OTHER_ATTENTION = "TORCH_CUDNN_SDPA_DEPRIORITIZED"  # FlashAttention-2 then, where torch would prefer cuDNN's (sdp_utils.cpp)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def first_line(error: BaseException) -> str:
    """What an error says first, or its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exhausted(error: BaseException) -> Literal["device", "host"] | None:
    """Whose memory ran out, if that is what `error` says; None for any other error."""
    if isinstance(error, MemoryError):
        return "host"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, RuntimeError):  # the CPU's allocator, pinned memory and the libraries of the card
        return "host" if _HOST.search(str(error)) else "device" if _DEVICE.search(str(error)) else None
    return None


def requested_bytes(error: BaseException) -> int | None:
    """What the failed request asked for, where the message says it."""
    found = _REQUESTED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None


def card_lost(error: BaseException) -> bool:
    """Whether `error` says that the card does not answer any more. From the driver's own messages; no card has been lost here."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def driver_failed(error: BaseException) -> bool:
    """Whether the card's driver failed in what torch asks of it directly, which is memory that grows: those of virtual cards do not have it."""
    return isinstance(error, RuntimeError) and bool(_DRIVER.search(str(error)))


def workaround(error: BaseException) -> tuple[str, str] | None:
    """What `error` says that the card's libraries do not do, and the setting of the environment that does without; None where there is none."""
    if driver_failed(error) and expandable_segments():
        return "the card's driver fails where memory grows, as some do", FIXED_SEGMENTS
    if isinstance(error, RuntimeError) and "cuDNN Frontend error" in str(error) and _OTHER_ATTENTION not in os.environ:
        return "cuDNN has no attention for this card", f"{_OTHER_ATTENTION}=1"
    return None
