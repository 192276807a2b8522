"""CogVideoX's blocks as diffusers has them, to rounding, with fewer passes over the tokens.

What diffusers does to a norm's output, to scale and shift it, is done to the norm's weight and bias, which are (D) where the output
is (B, N, D); a gate and the sum after it are one kernel. In 16 bits what is left out is rounding, too. Names of parameters and modules stay, and
every module is called, with whatever hooks it has.
Legend: B batch, L text tokens, N video tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memory.compiling import as_is
from memory.saving import keep
from trainer.backbones.attention import LeanProcessor, parted
from trainer.backbones.norm_rotate import RotatingNorm


MANY_SAMPLES = 16
"""Of more, one more pass over the tokens costs less than a kernel for each sample."""


class _ScaledNorm(nn.LayerNorm):
    """A norm of several sequences, of which each sample is scaled and shifted in its own way."""

    def forward(self, sequences: tuple[Tensor, ...], scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        """Of sequences (B, S, D), each normed, scaled and shifted by its part of `scale` and `shift` (B, sequences, D)."""
        bias = shift if self.bias is None else torch.addcmul(shift, self.bias, scale)
        weight = scale if self.weight is None else self.weight * scale
        return tuple(map(self._normed, sequences, weight.unbind(1), bias.unbind(1)))

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (B, S, D) with a weight and a bias (B, D) for each sample."""
        if len(x) == 1:
            return F.layer_norm(x, self.normalized_shape, weight[0], bias[0], self.eps)
        if len(x) > MANY_SAMPLES:
            return torch.addcmul(bias.unsqueeze(1), F.layer_norm(x, self.normalized_shape, eps=self.eps), weight.unsqueeze(1))
        return torch.cat([F.layer_norm(sample, self.normalized_shape, w, b, self.eps) for sample, w, b in zip(x.split(1), weight, bias)])


class LeanNorm(CogVideoXLayerNormZero):
    """A norm of video and text, each scaled and shifted by what the timestep says."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video (B, N, D), text (B, L, D) and the gates of both (B, 1, D)."""
        shift, scale, gate = self.linear(self.silu(temb)).unflatten(1, (2, 3, -1)).unbind(2)  # (B, 2, D): of video and text
        video, text = self.norm((hidden_states, encoder_hidden_states), 1 + scale, shift)
        return video, text, gate[:, :1], gate[:, 1:]


class LeanAttention(Attention):
    """Attention that does not look up for every call which arguments its processor takes."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None,
                image_rotary_emb: tuple[Tensor, Tensor] | None = None, **more: Any) -> tuple[Tensor, Tensor]:
        """What the processor makes of video (B, N, D) and text (B, L, D); of arguments of others, as diffusers has it."""
        if more:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=image_rotary_emb, **more)
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class LeanBlock(CogVideoXBlock):
    """A block whose gates are added as they multiply."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
                image_rotary_emb: tuple[Tensor, Tensor] | None = None, attention_kwargs: dict[str, Any] | None = None
                ) -> tuple[Tensor, Tensor]:
        """Video (B, N, D) and text (B, L, D) after attention and feed-forward."""
        video, text, gate, text_gate = self.norm1(hidden_states, encoder_hidden_states, temb)
        video, text = self.attn1(hidden_states=video, encoder_hidden_states=text, image_rotary_emb=image_rotary_emb,
                                 **(attention_kwargs or {}))
        hidden_states = torch.addcmul(hidden_states, gate, video)
        encoder_hidden_states = torch.addcmul(encoder_hidden_states, text_gate, text)
        video, text, gate, text_gate = self.norm2(hidden_states, encoder_hidden_states, temb)
        end = (hidden_states, encoder_hidden_states, gate, text_gate, torch.cat([text, video], dim=1))
        return as_is(LeanBlock._end, self, *end) if torch.compiler.is_compiling() else self._end(*end)

    def _end(self, video: Tensor, text: Tensor, gate: Tensor, text_gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Video and text after the feed-forward of x (B, L + N, D). Compiled, it would be saved after its last product."""
        if not x.requires_grad or gate.requires_grad:
            return _gated(video, text, gate, text_gate, self.ff(x))
        x, kept = keep(x, gate, text_gate)
        video, text = _Gated.apply(video, text, kept, gate, text_gate, self.ff(x))
        # Of one function's two outputs, hooks on either are called when the other has a gradient; of two views, each for its own.
        return video.view_as(video), text.view_as(text)


def _gated(video: Tensor, text: Tensor, gate: Tensor, text_gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Video (B, N, D) and text (B, L, D) with their parts of x (B, L + N, D), text first, times their gates (B, 1, D)."""
    more_text, more_video = parted(x, text.shape[1])
    return torch.addcmul(video, gate, more_video), torch.addcmul(text, text_gate, more_text)


class _Gated(torch.autograd.Function):
    """What a block ends with. All that its backward needs is kept before the feed-forward, and what the feed-forward needs is saved
    before its last product: a checkpointed block is recomputed up to there, and goes without a third of its matrix products.
    """

    @staticmethod
    def forward(ctx: Any, video: Tensor, text: Tensor, kept: Any, gate: Tensor, text_gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kept = kept
        return _gated(video, text, gate, text_gate, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, video: Tensor, text: Tensor) -> tuple[Tensor | None, ...]:
        gate, text_gate = ctx.kept.saved_tensors
        x = video.new_empty(len(video), text.shape[1] + video.shape[1], video.shape[2])
        for part, gradient, factor in zip(parted(x, text.shape[1]), (text, video), (text_gate, gate)):
            torch.mul(gradient, factor, out=part)
        return video, text, None, None, None, x


def make_lean(blocks: Sequence[CogVideoXBlock]) -> None:
    """Have diffusers' blocks compute so from now on."""
    for block in blocks:
        block.__class__, block.attn1.__class__, block.attn1.processor = LeanBlock, LeanAttention, LeanProcessor()
        for norm in (block.norm1, block.norm2):
            norm.__class__, norm.norm.__class__ = LeanNorm, _ScaledNorm
    rotate_in_norms(blocks)


def rotate_in_norms(blocks: Sequence[CogVideoXBlock]) -> None:
    """Let norms of queries and keys rotate them, where they are given positions: what `attention.project` asks of them."""
    for block in blocks:
        block.attn1.norm_q.__class__ = block.attn1.norm_k.__class__ = RotatingNorm
