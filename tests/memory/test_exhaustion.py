"""Messages as torch and the libraries word them."""

import subprocess
import sys

import pytest
import torch

from memory.exhaustion import card_lost, exhausted, requested_bytes
from memory.streams import pinning


@pytest.mark.parametrize("error, whose, num_bytes", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB"), "device",
     2_684_354_560),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "device", 20 << 20),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "device", None),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device", None),
    (RuntimeError("CUDA driver error: out of memory"), "device", None),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "device", None),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "device", None),
    (RuntimeError("unable to mmap 4096 bytes from file <model.safetensors>: Cannot allocate memory (12)"), "host", None),
    (MemoryError(), "host", None),
    (RuntimeError("shape mismatch"), None, None),
    (OSError(12, "Cannot allocate memory"), None, None),
])
def test_whose_memory_ran_out(error, whose, num_bytes):
    assert exhausted(error) == whose and requested_bytes(error) == num_bytes


@pytest.mark.parametrize("message, lost", [
    ("CUDA error: unknown error\nCUDA kernel errors might be", True),
    ("CUDA error: unspecified launch failure", True),
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
    ("CUDA error: uncorrectable ECC error encountered", True),
    ("CUDA error: system not yet initialized", True),
    ("CUDA error: the launch timed out and was terminated", True),
    ("GPU is lost", True),
    ("GPU has fallen off the bus", True),
    ("CUDA error: out of memory", False),
    ("CUDA error: an illegal memory access was encountered", False),
    ("shapes differ", False)])
def test_a_lost_card_is_told_from_a_bug(message, lost):
    assert card_lost(RuntimeError(message)) == lost and not card_lost(ValueError(message))


@pytest.mark.parametrize("error, whose", [
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "host"),  # from cudaHostAlloc
    (torch.OutOfMemoryError("CUDA out of memory."), "device"), (RuntimeError("shape mismatch"), None)])
def test_where_host_memory_is_pinned_it_is_the_hosts_that_ran_out(error, whose):
    with pytest.raises((RuntimeError, MemoryError)) as raised, pinning():
        raise error
    assert exhausted(raised.value) == whose


def test_what_the_cpu_really_says():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert exhausted(raised.value) == "host" and requested_bytes(raised.value) == 1 << 60


def test_importable_without_torch():
    program = "import sys, memory.exhaustion as e; e.exhausted(ValueError()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
