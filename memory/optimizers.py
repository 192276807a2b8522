"""One constructor for the optimizers, and what their state weighs."""

from collections.abc import Callable, Iterable, Sequence

import torch

from memory.plan import OptimizerKind

MIN_8BIT_NUMEL = 4096  # bitsandbytes keeps smaller tensors in float32
BLOCK_NUMEL_8BIT = 256  # elements that share one float32 maximum
MAP_BYTES_8BIT = 2 * 256 * 4  # the signed and the unsigned code book, one each an optimizer


def make_optimizer(
    params: Iterable[torch.nn.Parameter],
    *,
    kind: OptimizerKind,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW over `params` (Loshchilov and Hutter, arXiv:1711.05101) with state as `kind` says.

    "adamw": float32 state; fused, because the foreach form makes temporaries as large as all parameters.
    "adamw8bit": block-wise 8-bit state (Dettmers et al., arXiv:2110.02861). "paged-adamw8bit": the same in memory
    that the driver pages to the host; on the CPU, where there is nothing to page, the same as "adamw8bit".
    Raises ValueError for an unknown kind, no parameters, or trainable parameters that are not float32.
    """
    params = list(params)
    if not params:
        raise ValueError("no parameters to optimize: inject the adapters before making the optimizer")
    for param in params:
        if param.dtype != torch.float32:
            raise ValueError(
                f"a trainable parameter of shape {tuple(param.shape)} is {param.dtype}. Adam's eps of {eps:g} is 0 in "
                "half precision, so a zero gradient gives 0/0 = NaN in the first step. Keep adapters in float32"
            )
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if kind == "adamw":
        return torch.optim.AdamW(params, fused=True, **settings)
    if kind not in ("adamw8bit", "paged-adamw8bit"):
        raise ValueError(f"optimizer is {kind!r}; one of adamw, adamw8bit, paged-adamw8bit")

    import bitsandbytes

    paged = kind == "paged-adamw8bit" and params[0].device.type == "cuda"
    optimizer = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return optimizer(params, **settings)


@torch.no_grad()
def update_norms(parameters: Sequence[torch.Tensor], update: Callable[[], object]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Norms of what `update()` changes in each parameter, and of the parameters after it. Holds a copy of all of them meanwhile."""
    before = torch._foreach_mul([p.detach() for p in parameters], 1)  # a copy; torch 2.11 has no _foreach_clone
    update()
    torch._foreach_sub_(before, [p.detach() for p in parameters])
    return torch._foreach_norm(before), torch._foreach_norm([p.detach() for p in parameters])


def predict_state_bytes(numels: Iterable[int], kind: OptimizerKind) -> int:
    """Bytes of optimizer state for float32 parameters of these sizes, exactly.

    adamw: two float32 moments and a float32 step count each. 8-bit: two bytes an element and two float32 maxima every 256
    elements, or two float32 moments under 4,096 elements.
    """
    numels = list(numels)
    if kind == "adamw":
        return sum(8 * numel + 4 for numel in numels)
    if kind not in ("adamw8bit", "paged-adamw8bit"):
        raise ValueError(f"optimizer is {kind!r}; one of adamw, adamw8bit, paged-adamw8bit")
    total = 0
    for numel in numels:
        if numel < MIN_8BIT_NUMEL:
            total += 8 * numel
        else:
            total += 2 * numel + 2 * 4 * -(-numel // BLOCK_NUMEL_8BIT)
    return total + (MAP_BYTES_8BIT if any(numel >= MIN_8BIT_NUMEL for numel in numels) else 0)


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the state of `optimizer` holds now; tensors that parameters share count once."""
    tensors = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                tensors[value.untyped_storage()._cdata] = value.nbytes
    return sum(tensors.values())
