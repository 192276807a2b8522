"""CogVideoX's attention, bitwise that of diffusers but for a rounding in its rotary positions, with fewer and smaller copies.

Queries and keys are normed before they are transposed: a norm makes a contiguous copy of what is not, forward and backward, and the
output of attention would be laid out so that it must be copied once more.

Rotary positions (5b and 1.5) go without the float32 copies of whole queries and keys that diffusers makes, a dozen of them: a third
of what element-wise kernels moved in a step, and the peak of a forward pass where feed-forwards run in chunks (predicted,
bench.lean). Here pairs are multiplied as complex numbers in place, a few heads at a time so that a cache may hold them, and backward
rotates the gradient back.
The products and sums are those of `apply_rotary_emb`, of which a kernel may round two together; gradients in 16 bits are
rounded once where autograd rounds three times.
Legend: B batch, A heads, S all tokens, L text tokens, N video tokens, D width, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20
"""Of the float32 copy of some heads: what is written is read from the cache of most cards, not from their memory."""


def rotate(x: Tensor, positions: tuple[Tensor, Tensor], length: int) -> Tensor:
    """Queries or keys x (B, A, S, d) with all tokens after the first `length` rotated by their cos and sin (N, d)."""
    return _Rotate.apply(x, *(p.to(x.device) for p in positions), length)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.length = length
        return _rotated(x, cos, sin, length, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _rotated(grad, *ctx.saved_tensors, ctx.length, back=True), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, length: int, *, back: bool) -> Tensor:
    result = torch.empty_like(x)
    result[:, :, :length] = x[:, :, :length]
    turn = torch.complex(cos[:, ::2], -sin[:, ::2] if back else sin[:, ::2])  # (N, d/2): both of a pair turn by one angle
    step = max(1, CHUNK_BYTES // (4 * x.shape[0] * cos.numel()))  # heads at a time
    for heads in (slice(a, a + step) for a in range(0, x.shape[1], step)):
        # (B, step, N, d): pairs of a real and an imaginary part, side by side however x lies
        part = x[:, heads, length:].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        torch.view_as_complex(part.unflatten(-1, (-1, 2))).mul_(turn)
        result[:, heads, length:] = part
    return result


def project(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, positions: tuple[Tensor, Tensor] | None
            ) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, A, S, d) of video (B, N, D) and text (B, L, D), text first, normed and rotated."""
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # (B, S, D)
    q, k, v = (proj(x).unflatten(-1, (attn.heads, -1)) for proj in (attn.to_q, attn.to_k, attn.to_v))  # (B, S, A, d)
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, A, S, d)
    if positions is not None:
        length = encoder_hidden_states.shape[1]
        q, k = rotate(q, positions, length), rotate(k, positions, length)
    return q, k, v


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
        q, k, v = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = F.scaled_dot_product_attention(q, k, v)
        return project_out(attn, out, encoder_hidden_states.shape[1])
