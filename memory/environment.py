"""What torch's allocator, cuBLAS and MKL read from the environment when they start, and what the planner reckons with.

Importable without torch, and to be called before torch is imported.
"""

import os
import re

_CUBLAS = ":4096:2:16:8"  # pairs of KiB and how many: torch's default before Hopper


def prepare() -> None:
    """Set what was not set: segments that grow waste least, cuBLAS' workspaces are as large as planned, and MKL's products on
    the CPU do not depend on where their operands lie, which every plan does in its own way."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS)
    os.environ.setdefault("TORCH_CUBLASLT_UNIFIED_WORKSPACE", "1")  # else products with a bias keep a MiB a thread besides
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # some processors' kernels differ by alignment without it


def cublas_workspace_bytes() -> int:
    """What cuBLAS takes from the caching allocator in a process that trains, and keeps.

    There is a workspace for each thread that multiplies matrices: the one that runs forward, and autograd's. Recordings of
    training steps from cards hold two as well (`python -m bench.recordings`).
    """
    pattern = r":(\d+):(\d+)"  # torch's; what has no such pairs is ignored, with a warning
    pairs = re.findall(pattern, os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")) or re.findall(pattern, _CUBLAS)
    return 2 * sum(int(kib) * int(count) for kib, count in pairs) * 1024
