"""Divide the frozen weights of blocks among processes; each block is gathered from all of them when it runs (FSDP2).

A process keeps 1 / W of every frozen parameter of a block, as a DTensor of the parameter's own shape under its own name. The
block is gathered before its forward and once more before its backward, and freed after each. Trainable parameters stay whole:
their gradients are the caller's to reduce. Frozen weights get no gradient, so nothing else is communicated.

FSDP2 has no way back of its own: `undo` gathers the weights into the Parameter objects of before and removes what
`fully_shard` left on the modules. It reaches into torch's private names for that; tests/memory/test_sharding.py says when they move.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from memory.handle import Handle
from memory.patching import require_modules
from memory.plan import PlanError
from memory.streams import resolve_device


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded parameter gathered from all processes, which must all call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def can_shard() -> bool:
    """Whether torch's FSDP2 recovers from an exception in the middle of a pass, which it does from 2.13 on."""
    return hasattr(FSDPModule, "reset_iter_state")


def shard_blocks(model: nn.Module, blocks: Sequence[nn.Module], *, num_shards: int, device: torch.device | str) -> Handle:
    """Divide the frozen parameters of `blocks`, all part of `model`, among all `num_shards` processes; one part is on `device`.

    Every process must call this with the same weights, run the same passes in the same order, and undo it together.
    Raises PlanError unless `num_shards` processes run; ValueError for no blocks or blocks without frozen
    parameters; RuntimeError if applied already.
    """
    blocks = require_modules(blocks, "sharding")
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    if num_processes != num_shards:
        raise PlanError(f"num_shards is {num_shards}, but the number of processes {num_processes}: start with "
                        f"torchrun --nproc-per-node={num_shards}, or use resident_blocks to stream blocks from the host")
    if not can_shard():
        raise PlanError(f"num_shards is {num_shards}, which torch {torch.__version__} cannot: FSDP2 there does not recover from an "
                        "exception; install torch 2.13, or use resident_blocks to stream blocks from the host")
    if any(isinstance(module, FSDPModule) for module in (model, *blocks)):
        raise RuntimeError("sharding is applied to this model already; undo() it first")
    for index, block in enumerate(blocks):
        if all(p.requires_grad for p in block.parameters()):
            raise ValueError(f"block {index} has no frozen parameters to shard; freeze it with requires_grad_(False)")
    # FSDP warns of outputs that are views, lest somebody change one in place: our callers never change a prediction.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = init_device_mesh(resolve_device(device).type, (num_shards,))
    trainable = {p for block in blocks for p in block.parameters() if p.requires_grad}
    handle = Handle()
    # Not undone after an exception: that would gather, and this process may be the only one that failed.
    for block in blocks:
        handle._undos.append(_shard(block, mesh, trainable))
    # The root holds nothing itself: it gives all blocks the same streams, and an order to gather ahead in.
    handle._undos.append(_shard(model, mesh, set(model.parameters())))
    fresh_start = model.register_forward_pre_hook(_fresh_start, prepend=True)
    handle._undos.append(fresh_start.remove)
    return handle


def _fresh_start(model: nn.Module, args: tuple) -> None:
    """A pass that an exception ended leaves blocks gathered and FSDP in the middle of it: the next pass begins anew."""
    states = [fully_shard.state(module) for module in model.modules() if isinstance(module, FSDPModule)]
    if states[0]._is_root and any(state._training_state.name != "IDLE" for state in states):
        model.reset_iter_state()


def _shard(module: nn.Module, mesh, ignored: set[nn.Parameter]):
    """Apply `fully_shard` to one module; returns the undo function."""
    kind = type(module)
    attributes = {inner: set(inner.__dict__) for inner in module.modules()}
    places = [(inner, name, p) for inner in module.modules() for name, p in inner._parameters.items()
              if p is not None and p not in ignored and not isinstance(p, DTensor)]
    homes = [p.device for _, _, p in places]
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    for _, _, parameter in places:
        parameter.data = parameter.data.new_empty(0)  # the whole weight is freed here; the object waits for `undo`

    def undo() -> None:
        state = fully_shard.state(module)
        groups = state._fsdp_param_groups
        if groups:
            module.reshard()
        for (inner, name, parameter), home in zip(places, homes):
            parameter.data = inner._parameters[name].full_tensor().to(home)
            inner._parameters[name] = parameter
        handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
        for group in groups:
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
            handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
        for hook in handles:
            hook.remove()
        module.__class__ = kind
        del _composable_state._module_state_mapping[module]
        for inner, before in attributes.items():
            for name in set(inner.__dict__) - before:
                delattr(inner, name)

    return undo
