"""One constructor for the optimizers, and what their state weighs."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import torch

from memory.plan import OptimizerKind, PlanError

_MIN_8BIT_NUMEL = 4096  # bitsandbytes keeps smaller tensors in float32
_BLOCK_NUMEL_8BIT = 256  # elements that share one float32 maximum
MAP_BYTES_8BIT = 2 * 256 * 4  # the signed and the unsigned code book, one each an optimizer


def make_optimizer(
    params: Iterable[torch.nn.Parameter],
    *,
    kind: OptimizerKind,
    lr: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW over `params` (Loshchilov and Hutter, arXiv:1711.05101) with state as `kind` says.

    "adamw": float32 state; fused, because the foreach form makes temporaries as large as all parameters.
    "adamw8bit": block-wise 8-bit state (Dettmers et al., arXiv:2110.02861). "paged-adamw8bit": the same in memory
    that the driver pages to the host; on the CPU, where there is nothing to page, the same as "adamw8bit".
    Raises ValueError for an unknown kind, no parameters, or trainable parameters that are not float32; PlanError as `require_usable`.
    """
    params = list(params)
    if not params:
        raise ValueError("no parameters to optimize: inject the adapters before making the optimizer")
    for param in params:
        if param.dtype != torch.float32:
            raise ValueError(
                f"a trainable parameter of shape {tuple(param.shape)} is {param.dtype}. In float16 Adam's eps of 1e-08 "
                "is 0, so a zero gradient gives 0/0 = NaN in the first step; in bfloat16 most updates are rounded away. Keep adapters in float32"
            )
    require_usable(kind, params[0].device)
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)

    import bitsandbytes

    paged = kind == "paged-adamw8bit" and params[0].device.type == "cuda"
    optimizer = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return optimizer(params, lr=lr, weight_decay=weight_decay)


def require_usable(kind: OptimizerKind, device: torch.device) -> None:
    """Raises PlanError where bitsandbytes has no library for this card's CUDA, or it does not load, and ValueError for an unknown kind.

    bitsandbytes itself is silent until the first step. It asks CUDA for the card, so that this process must not fork afterwards.
    """
    _require_known(kind)
    if kind == "adamw":
        return
    from bitsandbytes.cextension import lib

    if device.type == "cuda" and not getattr(lib, "compiled_with_cuda", True):
        why = getattr(lib, "error_msg", "it is built for the CPU alone").strip().partition("\n")[0]
        forced = [name for name in ("BNB_CUDA_VERSION", "BNB_ROCM_VERSION") if name in os.environ]
        raise PlanError(f"optimizer is {kind!r}; bitsandbytes has no library that works on this card ({why}): "
                        f"{f'unset {forced[0]}' if forced else 'install one that has'}, or take 'adamw', which needs none")


def _require_known(kind: str) -> None:
    if kind not in get_args(OptimizerKind):
        raise ValueError(f"optimizer is {kind!r}; one of {', '.join(get_args(OptimizerKind))}")


@torch.no_grad()
def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that a first step would make, all zero, before it: steps of rate 0 with gradients of 0, which change no weight.

    One parameter at a time: a gradient for each would leave a gap between the parameters and the state, as large as all of them.
    """
    for group in optimizer.param_groups:
        rate, group["lr"] = group["lr"], 0.0
        try:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
                parameter.grad = None
        finally:
            group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
    reset_state(optimizer)


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Set all that the optimizer has counted and summed up to zero, where it lies."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # paged state is written by the host
    for state in optimizer.state.values():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                state[key] = 0
            elif not key.startswith("qmap"):  # bitsandbytes' code books stay
                value.zero_()


@torch.no_grad()
def update_norms(parameters: Sequence[torch.Tensor], update: Callable[[], object]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Norms of what `update()` changes in each parameter, and of the parameters after it. Holds a copy of all of them meanwhile."""
    before = torch._foreach_mul(parameters, 1)  # a copy; torch 2.11 has no _foreach_clone
    update()
    torch._foreach_sub_(before, parameters)
    return torch._foreach_norm(before), torch._foreach_norm(parameters)


def predict_state_bytes(numels: Iterable[int], kind: OptimizerKind) -> int:
    """Bytes of optimizer state for float32 parameters of these sizes, exactly.

    adamw: two float32 moments and a float32 step count each. 8-bit: two moments of `moment_bytes_8bit`, and the code books.
    """
    _require_known(kind)
    numels = list(numels)
    if kind == "adamw":
        return sum(8 * numel + 4 for numel in numels)
    books = MAP_BYTES_8BIT if any(numel >= _MIN_8BIT_NUMEL for numel in numels) else 0
    return 2 * sum(map(moment_bytes_8bit, numels)) + books


def moment_bytes_8bit(numel: int) -> int:
    """Of one of Adam's two moments: a byte an element and a float32 maximum every 256; float32 under 4,096 elements."""
    return numel + 4 * -(-numel // _BLOCK_NUMEL_8BIT) if numel >= _MIN_8BIT_NUMEL else 4 * numel
