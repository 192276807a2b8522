"""CogVideoX's attention as diffusers has it, to rounding, with fewer and smaller copies.

Queries and keys are normed before they are transposed: a norm makes a contiguous copy of what is not, forward and backward, and the
output of attention would be laid out so that it must be copied once more. What norms them rotates them too (5b and 1.5), and goes
without the float32 copies of whole queries and keys that diffusers makes, a dozen of them.
Legend: B batch, A heads, S all tokens, L text tokens, N video tokens, D width, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None,
            positions: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, A, S, d) of video (B, N, D) and text (B, L, D), text first, normed and rotated.

    Raises ValueError for an attention mask: what attends with them heeds none.
    """
    if attention_mask is not None:
        raise ValueError(f"an attention_mask of shape {tuple(attention_mask.shape)}: here every token attends to all; leave it out")
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, S, D)
    q, k, v = (proj(x).unflatten(-1, (attn.heads, -1)) for proj in (attn.to_q, attn.to_k, attn.to_v))  # (B, S, A, d)
    length = encoder_hidden_states.shape[1]
    q = attn.norm_q(q, positions, length)
    k = attn.norm_k(k, positions, length)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def project_out(attn: nn.Module, out: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Video (B, N, D) and text (B, L, D) from the attention's output (B, A, S, d)."""
    out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))  # (B, S, D)
    text, video = parted(out, length)
    return video, text


def parted(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Text (B, L, D) and video (B, N, D) of x (B, S, D). Backward joins two gradients; of two slices it would add two padded ones."""
    return x.split([length, x.shape[1] - length], dim=1)


class LeanProcessor:
    """In place of diffusers' CogVideoXAttnProcessor2_0."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask: Tensor | None = None,
                 image_rotary_emb: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = project(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        out = F.scaled_dot_product_attention(q, k, v)
        return project_out(attn, out, encoder_hidden_states.shape[1])
