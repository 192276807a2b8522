"""In what dtype the frozen backbone is stored and computes. What is trained stays in float32.

There is no autocast: it would keep 16-bit copies of weights for a whole pass and decide casts where no one reads them.
The backbone runs in its storage dtype, and an adapter casts at its own two ends.
"""

import functools

import torch
from torch import nn

from memory.handle import Handle


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> Handle:
    """Cast frozen floating-point parameters and all floating-point buffers of `model` to `dtype`, in place.

    Parameter objects stay the same; trainable parameters are not touched. One tensor is cast at a time, so the
    peak is the model plus one tensor. `undo` goes back to the former dtypes: to the bit after a widening, else without
    the lost bits. An exception on the way, such as out of memory, leaves the model as `undo` would.
    Raises ValueError if `model` has no frozen floating-point parameter, or if a trainable one is not float32.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    if not frozen:
        raise ValueError("the cast matched nothing: the model has no frozen floating-point parameter")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"{name} is trainable in {parameter.dtype}; trainable parameters must be float32")
    handle = Handle()
    try:
        for tensor in [*frozen, *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
            if tensor.dtype != dtype:
                handle._undos.append(functools.partial(_retype, tensor, tensor.dtype))
                _retype(tensor, dtype)
    except BaseException:
        handle.undo()
        raise
    return handle


def _retype(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    tensor.data = tensor.data.to(dtype)


def make_scaler(dtype: torch.dtype, device: torch.device | str) -> torch.amp.GradScaler:
    """The loss scaler for a backbone in `dtype`: dynamic for float16, disabled (every call passes through) otherwise.

    The gradient at a velocity prediction is about 2e-6 of the error, under float16's smallest normal number, so a
    float16 backbone would return zeros. bfloat16 has float32's range. torch's GradScaler serves: it scales the loss,
    not the float32 adapters, and together with fused AdamW a skipped step is decided on the device, without a wait.
    Order in a step: scale(loss).backward(), unscale_(optimizer), clip, step(optimizer), update().
    """
    return torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)
