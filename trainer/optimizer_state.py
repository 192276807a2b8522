"""An optimizer's state as tensors and JSON, and back, bit for bit.

`Optimizer.load_state_dict` casts what it loads to the parameter's dtype and makes new tensors, moving paged state out of its pages.
Here every tensor is copied, unconverted, into one that the optimizer itself, or its rule, allocated. Hyper-parameters are not part of it:
they come from the configuration.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.errors import CheckpointError


def export_optimizer(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every parameter: tensors named PARAMETER.KEY, not copied, and a JSON object with the rest.

    `parameters` names the parameters, all those of the optimizer among them. A parameter that never had a gradient has no state.
    The object: {"class": str, "parameters": [names in the optimizer's order], "scalars": {name of each that has a state: {key: number}}}.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    order = _named(optimizer, parameters)
    for name, (parameter, _, _) in order.items():
        if state := optimizer.state.get(parameter):
            tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
            scalars[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    return tensors, {"class": kind, "parameters": list(order), "scalars": scalars}


@torch.no_grad()
def import_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Give `optimizer`, fresh or used, the state that `export_optimizer` took, wherever its parameters now live.

    The order of the parameters may differ; their names may not. Raises CheckpointError naming the first tensor that is missing, superfluous
    or of another shape or dtype.
    """
    order = _named(optimizer, parameters)
    scalars, saved_order = description.get("scalars"), description.get("parameters")
    if not isinstance(scalars, dict) or not isinstance(saved_order, list):
        raise CheckpointError("the checkpoint does not describe its optimizer state (no `scalars` or no `parameters`)")
    if different := sorted(set(saved_order) ^ set(order)):
        side = "in the checkpoint" if different[0] in saved_order else "in this run"
        raise CheckpointError(f"the optimizer's parameters differ: {different[0]} is only {side}")
    saved: dict[str, dict[str, Tensor]] = {name: {} for name in scalars}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in saved:
            raise CheckpointError(f"the optimizer tensor {full_name} belongs to no parameter that has a state")
        saved[name][key] = tensor
    for name, (parameter, group, position) in order.items():
        if name not in saved:
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state[parameter]
        if not state:
            _allocate(optimizer, parameter, group, position, saved[name])
        _copy(name, state, saved[name], scalars[name])


def _named(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[nn.Parameter, int, int]]:
    """name -> (parameter, index of its group, index in the group), in the optimizer's order."""
    names = {parameter: name for name, parameter in parameters.items()}
    order = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise ValueError(f"parameter {position} of optimizer group {group_index} has no name; was it replaced after construction?")
            order[names[parameter]] = (parameter, group_index, position)
    return order


def _allocate(optimizer: Optimizer, parameter: nn.Parameter, group_index: int, position: int, saved: Mapping[str, Tensor]) -> None:
    group = optimizer.param_groups[group_index]
    if hasattr(optimizer, "init_state"):  # bitsandbytes: only it knows which buffers are paged
        optimizer.init_state(group, parameter, group_index, position)
        return
    for key, tensor in saved.items():
        if key != "step" and tensor.shape != parameter.shape:
            raise CheckpointError(f"the saved {key} has shape {tuple(tensor.shape)}, its parameter {tuple(parameter.shape)}")
        # torch keeps `step` on the host unless a kernel reads it
        on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
        optimizer.state[parameter][key] = torch.empty_like(tensor, device="cpu" if on_host else parameter.device)


def _copy(name: str, state: dict[str, Any], tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    if set(state) != set(tensors) | set(scalars):
        key = sorted(set(state) ^ (set(tensors) | set(scalars)))[0]
        side = "missing from the checkpoint" if key in state else "not part of this optimizer's state"
        raise CheckpointError(f"the optimizer state of {name} differs: {key} is {side}; was it saved by another kind of optimizer?")
    for key, tensor in tensors.items():
        target = state[key]
        if not isinstance(target, Tensor) or (target.shape, target.dtype) != (tensor.shape, tensor.dtype):
            here = f"{tuple(target.shape)} {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
            saved = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"the optimizer state {name}.{key} is {saved} in the checkpoint and {here} here")
        target.copy_(tensor)
    state |= scalars
