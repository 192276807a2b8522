"""What torch's allocator, cuBLAS, Triton and MKL read from the environment when they start, and what the planner reckons with.

Importable without torch, and to be called before torch is imported.
"""

import os
import re

from memory.host import under_wsl

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the first that is set holds
_CUBLAS_KIB = 2 * 4096 + 8 * 16
FIXED_SEGMENTS = "PYTORCH_ALLOC_CONF=expandable_segments:False"
"""For drivers that fail where segments grow."""


def prepare() -> None:
    """Set what was not set: segments that grow waste least, cuBLAS' workspaces are those that are planned, Triton's kernels round alike,
    cards are counted as NVML and nvidia-smi count them, and MKL's products on the CPU do not depend on where their operands lie, which every plan
    does in its own way.

    Under WSL segments do not grow: drivers there fail in what that asks of them, at once or under load (pytorch/pytorch#192330 and others).

    CUBLAS_WORKSPACE_CONFIG is not for us to set: torch 2.11 parses it for every product, which takes the host longer than
    all else that a product does (`python -m bench.emulated`).
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = _segments_here()
    os.environ.setdefault("TORCH_CUBLAS_WORKSPACE_CACHE", "1")  # else torch takes them anew for every product, from 2.15 on
    os.environ.setdefault("TORCH_CUBLASLT_UNIFIED_WORKSPACE", "1")  # else products with a bias keep a MiB a thread besides
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as up to Triton 3.9, which warns that 3.10 rounds otherwise
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # else the fastest is torch's first, and the plan is for another
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # some processors' kernels differ by alignment without it


def expandable_segments() -> bool:
    """Whether the caching allocator's segments grow: as `prepare` has them, unless whoever runs this says otherwise."""
    text = next((os.environ[name] for name in _ALLOCATOR if name in os.environ), _segments_here())
    return re.findall(r"expandable_segments\s*:\s*(\w+)", text)[-1:] == ["True"]


def _segments_here() -> str:
    return f"expandable_segments:{not under_wsl()}"


def cublas_workspace_bytes(default_kib: int = _CUBLAS_KIB) -> int:
    """What cuBLAS takes from the caching allocator in a process that trains, and keeps.

    `default_kib`: of one workspace, where nothing is set; torch's depends on the card (CublasHandlePool.cpp).

    There is a workspace for each thread that multiplies matrices: the one that runs forward, and autograd's. Recordings of
    training steps from cards hold two as well (`python -m bench.recordings`).
    """
    # Pairs of KiB and how many; what has none is ignored, with a warning.
    pairs = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    return 2 * 1024 * (sum(int(kib) * int(count) for kib, count in pairs) if pairs else default_kib)
