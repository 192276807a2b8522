"""Messages as torch and the libraries word them."""

import subprocess
import sys

import pytest
import torch

from memory import streams
from memory.exhaustion import card_lost, driver_failed, exhausted, requested_bytes
from memory.streams import PinningRefused, pinning


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


@pytest.mark.parametrize("wsl, hint", [(False, "1.50 GiB that are"), (True, "1.50 GiB that are; WSL limits it, and its setting memory= may raise that")])
def test_a_host_that_pins_no_more_says_how_much_it_has_pinned(wsl, hint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": 3 << 29})
    monkeypatch.setattr(streams, "under_wsl", lambda: wsl)
    with pytest.raises(PinningRefused, match=f"no more of the host's memory can be pinned than the {hint}$") as raised, pinning():
        raise RuntimeError("CUDA error: out of memory")
    assert raised.value.pinned_bytes == 3 << 29


@pytest.mark.parametrize("message, failed", [
    ("CUDA driver error: operation not supported", True), ("CUDA driver error: device not ready", True), ("CUDA driver error: unknown error", True),
    ("CUDA driver error: out of memory", False), ("CUDA error: operation not supported", False)])
def test_a_driver_that_fails_is_told_from_a_card_that_is_full(message, failed):
    assert driver_failed(RuntimeError(message)) == failed and not driver_failed(ValueError(message))


def test_what_the_cpu_really_says():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert exhausted(raised.value) == "host" and requested_bytes(raised.value) == 1 << 60


def test_importable_without_torch():
    program = "import sys, memory.exhaustion as e; e.exhausted(ValueError()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
