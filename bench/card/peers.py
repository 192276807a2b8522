"""Other ways to keep weights or activations off the card, under the trainer's own step: same adapters, losses, checkpointing.

A peer takes the place of the memory plan (`Rig(apply=...)`). It sees the frozen weights only: erasers are taken out of the
module tree, as offload hooks would move what trains and lose it. Checkpointing goes around the peer's hooks, so that a
recomputation fetches weights again, and recomputes to the end of a block, or a peer's hook would never see it leave.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from memory.checkpointing import checkpoint_blocks
from memory.plan import MemoryPlan

PEER_ERRORS = (RuntimeError, ValueError, KeyError, ImportError)
"""What a peer may fail with; it is written down, and the part goes on."""


def _checkpointed(blocks: nn.ModuleList) -> None:
    checkpoint_blocks(blocks, ["inputs"] * len(blocks))


def _hide_erasers(blocks: nn.ModuleList) -> None:
    """Take erasers out of the module tree. They stay on the device, and the attention's hook calls them all the same."""
    for block in blocks:
        del block.attn1.adapter


def group_offload(transformer: nn.Module, blocks: nn.ModuleList, plan: MemoryPlan, device: torch.device) -> None:
    """diffusers' group offload, a block a group, with streams and `record_stream`: its fastest setting."""
    from diffusers.hooks import apply_group_offloading

    streamed = {"use_stream": True, "record_stream": True} if device.type == "cuda" else {}
    _hide_erasers(blocks)
    apply_group_offloading(transformer, onload_device=device, offload_device=torch.device("cpu"),
                           offload_type="block_level", num_blocks_per_group=1, **streamed)
    _checkpointed(blocks)


def sequential_offload(transformer: nn.Module, blocks: nn.ModuleList, plan: MemoryPlan, device: torch.device) -> None:
    """Layer by layer, when needed: accelerate's `cpu_offload`, which is what diffusers' sequential offload calls."""
    from accelerate import cpu_offload

    _hide_erasers(blocks)
    cpu_offload(transformer.to("cpu"), execution_device=device)
    _checkpointed(blocks)


def leaf_offload(transformer: nn.Module, blocks: nn.ModuleList, plan: MemoryPlan, device: torch.device) -> None:
    """diffusers' group offload by leaf, without streams: stands for sequential offload where accelerate is not installed.

    Unlike accelerate it copies weights back, so it is slower.
    """
    from diffusers.hooks import apply_group_offloading

    _hide_erasers(blocks)
    apply_group_offloading(transformer, onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level")
    _checkpointed(blocks)


@contextmanager
def whole_recomputation() -> Iterator[None]:
    """For peers: a recomputation runs to the end of its block, where their hooks take the weights away again.

    What the student saves outside of checkpoints is saved as an alias: hooks swap the data of a parameter, and backward
    would find the weights on the host.
    """
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.checkpoint import set_checkpoint_early_stop

    with set_checkpoint_early_stop(False), saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        yield


def save_on_host(device: torch.device) -> Callable:
    """torch's own way to keep boundaries on the host: `save_on_cpu` around the student's forward pass."""
    return lambda: torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
