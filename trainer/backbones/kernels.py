"""Triton kernels of `trainer.backbones.norm_rotate`: a program takes some rows, one of a token's head each, and keeps them in registers.

Legend: B batch, S all tokens, A heads, N video tokens, d head width, a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, NUM_WARPS = 32, 4
"""Of a program."""


@triton.jit
def _turned(y, cos, sin, row, num_heads, num_tokens, length, sign, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Rows y (ROWS, WIDTH) rotated, by the negative angle where `sign` is -1. Text, the first `length` tokens, stays."""
    token = row // num_heads % num_tokens - length
    at, video = token[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (token >= 0)[:, None]
    c, _ = tl.split(tl.reshape(tl.load(cos + at, mask=video, other=1.0).to(tl.float32), (ROWS, WIDTH // 2, 2)))  # both of a pair are equal
    s, _ = tl.split(tl.reshape(tl.load(sin + at, mask=video, other=0.0).to(tl.float32), (ROWS, WIDTH // 2, 2)))
    a, b = tl.split(tl.reshape(y, (ROWS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(a * c - sign * b * s, b * c + sign * a * s), (ROWS, WIDTH))


@triton.jit
def _normed(x, at, inside, eps, WIDTH: tl.constexpr):
    """Rows less their mean over their deviation, and one over the latter."""
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v -= (tl.sum(v, 1) / WIDTH)[:, None]
    inverse = tl.rsqrt(tl.sum(v * v, 1) / WIDTH + eps)
    return v * inverse[:, None], inverse


@triton.jit
def _forward(x, weight, bias, cos, sin, out, num_rows, num_heads, num_tokens, length, eps,
             ROTATED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside, at = (row < num_rows)[:, None], row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    y, _ = _normed(x, at, inside, eps, WIDTH)
    y = y * tl.load(weight + column).to(tl.float32)[None, :] + tl.load(bias + column).to(tl.float32)[None, :]
    if ROTATED:
        y = _turned(y, cos, sin, row, num_heads, num_tokens, length, 1.0, WIDTH, ROWS)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, x, weight, cos, sin, out, num_rows, num_heads, num_tokens, length, eps, stride_b, stride_s, stride_a,
              ROTATED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside, at = (row < num_rows)[:, None], row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    token = row // num_heads
    start = (token // num_tokens).to(tl.int64) * stride_b + (token % num_tokens).to(tl.int64) * stride_s + row % num_heads * stride_a
    g = tl.load(grad + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        g = _turned(g, cos, sin, row, num_heads, num_tokens, length, -1.0, WIDTH, ROWS)
    g *= tl.load(weight + column).to(tl.float32)[None, :]
    y, inverse = _normed(x, at, inside, eps, WIDTH)
    g = (g - (tl.sum(g, 1) / WIDTH)[:, None] - y * (tl.sum(g * y, 1) / WIDTH)[:, None]) * inverse[:, None]
    tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)


def norm_rotate(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None, length: int, eps: float) -> Tensor:
    """x (B, S, A, d), contiguous, normed with weight and bias (d), and tokens after `length` rotated by cos and sin (N, d)."""
    out, sizes = torch.empty_like(x), _sizes(x)
    with torch.cuda.device_of(x):
        _forward[_grid(sizes)](x, weight, bias, *_positions(cos, sin, weight), out, *sizes, length, eps, ROTATED=cos is not None,
                               WIDTH=x.shape[3], ROWS=ROWS, num_warps=NUM_WARPS)
    return out


def norm_rotate_backward(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, length: int, eps: float) -> Tensor:
    """The gradient of x, from that of the result (B, S, A, d), however it lies."""
    out, sizes = torch.empty_like(x), _sizes(x)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    with torch.cuda.device_of(x):
        _backward[_grid(sizes)](grad, x, weight, *_positions(cos, sin, weight), out, *sizes, length, eps, *grad.stride()[:3],
                                ROTATED=cos is not None, WIDTH=x.shape[3], ROWS=ROWS, num_warps=NUM_WARPS)
    return out


def _positions(cos: Tensor | None, sin: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (unused, unused) if cos is None else (cos.contiguous(), sin.contiguous())


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows, heads and tokens."""
    num_samples, num_tokens, num_heads, _ = x.shape
    return num_samples * num_tokens * num_heads, num_heads, num_tokens


def _grid(sizes: tuple[int, int, int]) -> tuple[int]:
    return (-(-sizes[0] // ROWS),)  # triton.cdiv takes the host as long as a fifth of the launch
