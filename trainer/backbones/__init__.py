"""What the trainer needs to know of a text-to-video model: blocks, shapes, schedule, encode, decode.

Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width, T video frames.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Backbone(Protocol):
    """A family of frozen transformers. Opening one reads configuration only; weights are loaded by the methods."""

    name: str
    """Where it comes from: a directory, a hub id or a published configuration's name."""
    native_dtype: torch.dtype
    """The 16- or 32-bit type that its weights were published in."""
    num_blocks: int
    width: int
    text_length: int
    text_width: int

    def identity(self) -> dict[str, str]:
        """Name and configuration hash: what an eraser or a checkpoint belongs to."""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents. Raises UsageError for sizes that the VAE cannot make."""

    def default_size(self) -> tuple[int, int, int]:
        """(frames, height, width) in pixels that the model was trained at."""

    def load_transformer(self, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """The frozen transformer, in eval mode."""

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Its transformer blocks in order of execution."""

    def predictor(self, transformer: nn.Module, latent_shape: tuple[int, int, int, int]) -> "Predict":
        """A function (x_t (B,F,C,H,W), t (B,), text (B,L,D)) -> velocity (B,F,C,H,W) in the transformer's dtype."""

    def scheduler(self) -> Any:
        """A fresh diffusers scheduler."""

    def tokenizer(self) -> Any:
        """The tokenizer, or None for random weights."""

    def encode_prompts(self, prompts: list[str], *, dtype: torch.dtype, device: torch.device | str,
                       batch_size: int = 16) -> Tensor:
        """Text embeddings (B, L, D) on the host; the text encoder is loaded for this call and gone after it."""

    def text_encoder_fingerprint(self) -> str | None:
        """Identifies the text encoder by content, as a key for cached embeddings; None: do not cache."""

    def decoder(self, num_frames: int, *, dtype: torch.dtype, device: torch.device | str) -> "Decode":
        """A function latents (B,F,C,H,W) -> videos (B,3,T,H*s,W*s) float32 in [0,1] on the host."""


class Predict(Protocol):
    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor: ...


class Decode(Protocol):
    def __call__(self, latents: Tensor) -> Tensor: ...
