"""In what dtype the frozen backbone is stored and computes. What is trained stays in float32.

There is no autocast: it would keep 16-bit copies of weights for a whole pass and decide casts where no one reads them.
The backbone runs in its storage dtype, and an adapter casts at its own two ends.
"""

import torch
from torch import nn


class Cast:
    """Handle of `cast_frozen`."""

    def __init__(self, casts: list[tuple[torch.Tensor, torch.dtype]], originals: list[torch.Tensor] | None):
        self._casts, self._originals = casts, originals

    def undo(self) -> None:
        """Back to the former dtypes: to the bit with `keep_originals` or after a widening, else without the lost bits."""
        for position, (tensor, dtype) in enumerate(self._casts):
            if self._originals is not None:
                tensor.data = self._originals[position].to(tensor.device)
            else:
                tensor.data = tensor.data.to(dtype)
        self._casts, self._originals = [], None


def cast_frozen(model: nn.Module, dtype: torch.dtype, *, keep_originals: bool = False) -> Cast:
    """Cast frozen floating-point parameters and all floating-point buffers of `model` to `dtype`, in place.

    Parameter objects stay the same; trainable parameters are not touched. One tensor is cast at a time, so the
    peak is the model plus one tensor. `keep_originals` holds the former data (a second model) for an exact undo.
    An exception on the way, such as out of memory, leaves the model as `undo` would.
    Raises ValueError if `model` has no frozen floating-point parameter, or if a trainable one is not float32.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    if not frozen:
        raise ValueError("the cast matched nothing: the model has no frozen floating-point parameter")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"{name} is trainable in {parameter.dtype}; trainable parameters must be float32")
    casts, originals = [], [] if keep_originals else None
    handle = Cast(casts, originals)
    try:
        for tensor in [*frozen, *(buffer for buffer in model.buffers() if buffer.is_floating_point())]:
            if tensor.dtype != dtype:
                casts.append((tensor, tensor.dtype))
                if keep_originals:
                    originals.append(tensor.data)
                tensor.data = tensor.data.to(dtype)
    except BaseException:
        handle.undo()
        raise
    return handle


def make_scaler(dtype: torch.dtype, device: torch.device | str) -> torch.amp.GradScaler:
    """The loss scaler for a backbone in `dtype`: dynamic for float16, disabled (every call passes through) otherwise.

    The gradient at a velocity prediction is about 2e-6 of the error, under float16's smallest normal number, so a
    float16 backbone would return zeros. bfloat16 has float32's range. torch's GradScaler serves: it scales the loss,
    not the float32 adapters, and together with fused AdamW a skipped step is decided on the device, without a wait.
    Order in a step: scale(loss).backward(), unscale_(optimizer), clip, step(optimizer), update().
    """
    return torch.amp.GradScaler(torch.device(device).type, enabled=dtype == torch.float16)
