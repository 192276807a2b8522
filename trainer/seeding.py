"""Randomness as a function of (seed, purpose, index): no generator is shared, so nothing can shift a run."""

import hashlib
import random

import torch
from torch import Tensor

from memory.streams import pinning


def generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{'/'.join(map(str, index))}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def noise(shape: tuple[int, ...], seed: int, purpose: str, *index: int) -> Tensor:
    """Standard normal values of the given shape, on the host, the same for every device and memory plan."""
    return torch.randn(shape, generator=generator(seed, purpose, *index))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device` without waiting for the device: through pinned memory on a card."""
    if device.type != "cuda":
        return tensor.to(device)
    with pinning():
        pinned = tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def order(count: int, batch_size: int, seed: int, purpose: str, index: int) -> list[int]:
    """The `index`-th batch of positions 0..count-1; every epoch is a new permutation."""
    first = index * batch_size
    positions = []
    for position in range(first, first + batch_size):
        epoch, offset = divmod(position, count)
        permutation = list(range(count))
        random.Random(f"{seed}/{purpose}/{epoch}").shuffle(permutation)
        positions.append(permutation[offset])
    return positions
