"""Models that are trained on: what the trainer asks of one is what `trainer.backbones.cogvideox.CogVideoX` answers.

Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width, T video frames.
"""

from typing import Protocol

from torch import Tensor


class Predict(Protocol):
    """(x_t (B,F,C,H,W), t (B,), text (B,L,D)) -> velocity (B,F,C,H,W) in the transformer's dtype."""

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor: ...


class Decode(Protocol):
    """Latents (B,F,C,H,W) -> videos (B,3,T,H*s,W*s) float32 in [0,1] on the host."""

    def __call__(self, latents: Tensor) -> Tensor: ...
