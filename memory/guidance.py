"""Classifier-free guidance: how the conditional and the unconditional pass are run.

Shapes: B batch, F latent frames, C channels, H W latent size, N tokens, D width.
"""

from collections.abc import Callable

import torch

from memory.plan import GuidanceMode

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""predict(latents (B, F, C, H, W), timestep (B,), embeds (B, N, D)) -> prediction (B, F, C, H, W)"""


def predict_pair(
    predict: Predict,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditional: torch.Tensor,
    unconditional: torch.Tensor | None,
    *,
    mode: GuidanceMode,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The conditional and the unconditional prediction.

    "batched" runs one batch of two: twice the activations, one pass over the weights. "sequential" runs one after
    the other: the same numbers up to rounding. "none" runs the conditional pass alone and returns None for the other.
    Raises ValueError for an unknown mode, or without an unconditional embedding where one is needed.
    """
    if mode == "none":
        return predict(latents, timestep, conditional), None
    if mode not in ("batched", "sequential"):
        raise ValueError(f"guidance is {mode!r}; one of batched, sequential, none")
    if unconditional is None:
        raise ValueError(f"guidance {mode} needs the embedding of the empty prompt; give it, or use guidance none")
    if mode == "sequential":
        return predict(latents, timestep, conditional), predict(latents, timestep, unconditional)
    return predict(
        torch.cat([latents, latents]),  # (2B, F, C, H, W)
        torch.cat([timestep, timestep]),  # (2B,)
        torch.cat([conditional, unconditional]),  # (2B, N, D)
    ).chunk(2)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor | None, scale: float) -> torch.Tensor:
    """unconditional + scale * (conditional - unconditional) (Ho and Salimans, arXiv:2207.12598, in the usual form).

    Without an unconditional prediction (guidance none) the conditional one is returned: scale 1.
    """
    if unconditional is None:
        return conditional
    return unconditional + scale * (conditional - unconditional)
