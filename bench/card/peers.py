"""Other ways to keep weights or activations off the card, under the trainer's own step: same adapters, losses, checkpointing.

A peer takes the place of the memory plan (`Rig(peer=...)`). It sees the frozen weights only: erasers are taken out of the
module tree, as offload hooks would move what trains and lose it. Checkpointing goes around the peer's hooks, so that a
recomputation fetches weights again, and recomputes to the end of a block, or a peer's hook would never see it leave.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from memory.checkpointing import checkpoint_blocks
from trainer.erasers import in_backward


def _checkpointed(blocks: nn.ModuleList) -> None:
    checkpoint_blocks(blocks, ["inputs"] * len(blocks))


def _hide_erasers(blocks: nn.ModuleList) -> None:
    """Take erasers out of the module tree. They stay on the device, and the attention's hook finds them all the same."""
    for block in blocks:
        adapter = block.attn1.adapter
        del block.attn1.adapter
        object.__setattr__(block.attn1, "adapter", adapter)  # past the module's own, which would put it back into the tree


def group_offload(transformer: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """diffusers' group offload, a block a group, with streams and `record_stream`: its fastest setting.

    Of accelerate it uses one function, which is put in its place where accelerate is not installed.
    """
    from diffusers.hooks import apply_group_offloading, group_offloading

    if not hasattr(group_offloading, "send_to_device"):
        group_offloading.send_to_device = _send_to_device
    streamed = {"use_stream": True, "record_stream": True} if device.type == "cuda" else {}
    _hide_erasers(blocks)
    apply_group_offloading(transformer, onload_device=device, offload_device=torch.device("cpu"),
                           offload_type="block_level", num_blocks_per_group=1, **streamed)
    for module in transformer.modules():
        _lend(module, lambda parameter: parameter.data)

    def first_forward_is_over(*_: Any) -> None:
        # Until here diffusers notes the order of blocks, and when it has, resets every block's forward.
        noting.remove()
        for block in blocks:
            _prefetch_in_forward_only(block)
        _checkpointed(blocks)

    noting = transformer.register_forward_hook(first_forward_is_over)


def _lend(module: nn.Module, lend: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """While `module` runs, it holds other Parameters over what `lend` gives for its own: what autograd saves must not follow a
    parameter whose data hooks take back to the host."""
    own = dict(module.named_parameters(recurse=False))
    if own:
        module.register_forward_pre_hook(lambda *_: module._parameters.update(
            {name: nn.Parameter(lend(parameter), requires_grad=False) for name, parameter in own.items()}))
        module.register_forward_hook(lambda *_: module._parameters.update(own), always_call=True)


def _prefetch_in_forward_only(block: nn.Module) -> None:
    """diffusers loads ahead in forward's order: in a recomputation that is a block already done, which would stay on the card."""
    hook, inner = block._diffusers_hook.get_hook("group_offloading"), block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not in_backward():
            return inner(*args, **kwargs)
        ahead, hook.next_group = hook.next_group, None
        try:
            return inner(*args, **kwargs)
        finally:
            hook.next_group = ahead

    block.forward = forward


def _send_to_device(values: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """All tensors in nested containers on `device`."""
    return tree_map(lambda v: v.to(device, non_blocking=non_blocking) if isinstance(v, torch.Tensor) else v, values)


def leaf_offload(transformer: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """Layer by layer, when needed, from pageable host memory, nothing copied back: what accelerate's sequential offload does,
    which diffusers calls. It stands for it, so that accelerate is not needed."""
    _hide_erasers(blocks)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.cpu()
    for module in transformer.modules():
        _lend(module, lambda parameter: parameter.data.to(device))
    _checkpointed(blocks)


@contextmanager
def whole_recomputation() -> Iterator[None]:
    """For peers: a recomputation runs to the end of its block, where their hooks take the weights away again."""
    from torch.utils.checkpoint import set_checkpoint_early_stop

    with set_checkpoint_early_stop(False):
        yield


def save_on_host(device: torch.device) -> Callable:
    """torch's own way to keep boundaries on the host: `save_on_cpu` around the student's forward pass."""
    return lambda: torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
