"""Queries and keys normed and given their rotary positions by one operator, `eraser::norm_rotate`, and its backward.

A norm of rows as short as a head (64) is a kernel that starts as many blocks of threads as there are rows, and rotating takes five
passes over float32 copies: together a seventh of the student's pass of a 5b at 49 frames on an H100, and a fifth at 17 (measured,
bench/results). Here it is one pass over what is read and written, by Triton kernels (trainer.backbones.kernels) on cards where
Triton works, else by torch's own operators, which a CPU has too. To a memory trace it is one operator either way.

Results are those of `LayerNorm` and diffusers' `apply_rotary_emb` to rounding: the kernels round once, at the end. The mean and the
deviation of a row are computed again in backward and not kept.
Legend: B batch, S all tokens, L text tokens, N video tokens, A heads, d head width.
"""

import functools
import math
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memory.exhaustion import first_line
from memory.work import register_scratch

CHUNK_BYTES = 32 * 2**20
"""Of the float32 copy of some heads, by torch's operators: what is written is read from the cache of most cards, not from their memory."""

_library = torch.library.Library("eraser", "DEF")
_library.define("norm_rotate(Tensor x, Tensor weight, Tensor bias, Tensor? cos, Tensor? sin, int length, float eps) -> Tensor",
                tags=torch.Tag.pt2_compliant_tag)
_library.define("norm_rotate_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? cos, Tensor? sin, int length, float eps)"
                " -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_ops = torch.ops.eraser


class RotatingNorm(nn.LayerNorm):
    """The norm of a head's queries or keys, which rotates them too."""

    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor] | None = None, length: int = 0) -> Tensor:
        """x (B, S, A, d) normed; where there are `positions`, cos and sin (N, d), all tokens after the first `length` rotated by them.

        Raises RuntimeError where the norm itself is to be trained, for which there is no backward; ValueError for positions of
        another number of tokens or another width.
        """
        weight, bias, cos, sin = self.weight, self.bias, None, None
        if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
            raise RuntimeError("the norms of queries and keys require a gradient, and have no backward here: freeze the model, transformer.requires_grad_(False)")
        if positions:
            cos, sin = (p.to(x.device) for p in positions)
            wanted = (x.shape[1] - length, x.shape[-1])
            if not tuple(cos.shape) == tuple(sin.shape) == wanted:  # a kernel would read what lies beside them
                raise ValueError(f"positions are {tuple(cos.shape)} and {tuple(sin.shape)}, for {wanted[0]} video tokens of width {wanted[1]}")
        normed = _NormRotate.apply if torch.is_grad_enabled() else _ops.norm_rotate  # the former takes the host longer
        return normed(x, weight, bias, cos, sin, length, self.eps)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None, length: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias, cos, sin)
        ctx.length, ctx.eps = length, eps
        return _ops.norm_rotate(x, weight, bias, cos, sin, length, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.norm_rotate_backward(grad, *ctx.saved_tensors, ctx.length, ctx.eps), *[None] * 6


def _forward(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None, length: int, eps: float) -> Tensor:
    if (kernels := _kernels_for(x)) is not None:
        return kernels.norm_rotate(x.contiguous(), weight, bias, cos, sin, length, eps)
    out = F.layer_norm(x, weight.shape, weight, bias, eps)
    if cos is not None:
        _rotate_(out, cos, sin, length)
    return out


def _backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor | None, sin: Tensor | None, length: int,
              eps: float) -> Tensor:
    if (kernels := _kernels_for(x)) is not None:
        return kernels.norm_rotate_backward(grad, x.contiguous(), weight, cos, sin, length, eps)
    buffer, mean, deviation = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    buffer.copy_(grad)
    if cos is not None:
        _rotate_(buffer, cos, -sin, length)
    return torch.ops.aten.native_layer_norm_backward(buffer, x, weight.shape, mean, deviation, weight, bias, [True, False, False])[0]


for _device in ("CPU", "CUDA"):
    _library.impl("norm_rotate", _forward, _device)
    _library.impl("norm_rotate_backward", _backward, _device)


@torch.library.register_fake("eraser::norm_rotate")
def _(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("eraser::norm_rotate_backward")
def _(grad, x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, length: int) -> None:
    """Rotate video tokens of x (B, S, A, d) in place, as complex numbers, a few heads at a time."""
    turn = torch.complex(cos[:, ::2], sin[:, ::2]).unsqueeze(1)  # (N, 1, d/2): both of a pair turn by one angle
    step = _heads_at_once(x.shape, length)
    for heads in (slice(a, a + step) for a in range(0, x.shape[2], step)):
        part = x[:, length:, heads].to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # (B, N, step, d)
        torch.view_as_complex(part.unflatten(-1, (-1, 2))).mul_(turn)
        x[:, length:, heads] = part
        del part  # it would stand beside the next


def _heads_at_once(shape: torch.Size, length: int) -> int:
    return max(1, CHUNK_BYTES // (4 * shape[0] * (shape[1] - length) * shape[3]))


def _scratch(args: tuple) -> tuple[int, int]:
    """Bytes of (float32 heads and angles while they are rotated, statistics of rows) by torch's operators."""
    x, _, _, cos, _, length, _ = args[-7:]
    rows, statistics = math.prod(x.shape[:-1]), 4 if x.dtype == torch.float32 else x.element_size()
    if cos is None:
        return 0, 2 * statistics * rows
    tokens = x.shape[1] - length
    heads = min(_heads_at_once(x.shape, length), x.shape[2])
    return 4 * tokens * x.shape[3] + 4 * x.shape[0] * tokens * heads * x.shape[3], 2 * statistics * rows


def _forward_scratch(args: tuple, device: str) -> tuple[int, ...]:
    return (max(_scratch(args)),) if device == "cpu" else ()  # Triton's kernels take none


def _backward_scratch(args: tuple, device: str) -> tuple[int, ...]:
    if device != "cpu":
        return ()
    rotating, statistics = _scratch(args)
    angles = 0 if args[4] is None else args[4].nbytes  # the negative sine
    return args[1].nbytes, statistics, max(0, rotating + angles - args[1].nbytes)  # what is returned is made after that


register_scratch(_ops.norm_rotate.default, _forward_scratch)
register_scratch(_ops.norm_rotate_backward.default, _backward_scratch)


def _kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels, if they can take x and work here."""
    width = x.shape[-1]
    return working_kernels(x.device) if x.is_cuda and width & (width - 1) == 0 and 16 <= width <= 256 else None


@functools.cache
def working_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels, once seen to compute on `device` what torch does; else None, and a warning where they should have worked.

    Triton builds its launchers with the C compiler of the machine, which may not be there.
    """
    from torch.utils._triton import has_triton

    if not has_triton():
        return None
    try:
        from trainer.backbones import kernels

        off = _difference(kernels, device)
    except torch.OutOfMemoryError:  # no fault of theirs, and gone once the run takes less
        raise
    except Exception as e:  # whatever a compiler that is not whole raises
        warnings.warn(f"Triton's kernels do not work here, so torch's operators norm and rotate queries and keys, which takes longer: "
                      f"{type(e).__name__}: {first_line(e)}", stacklevel=2)
        return None
    if not off < 1e-3:
        warnings.warn(f"Triton's kernels are off by {off:.2g} here, so torch's operators norm and rotate queries and keys, which takes "
                      "longer", stacklevel=2)
        return None
    return kernels


def _difference(kernels: ModuleType, device: torch.device) -> float:
    """Of the kernels from torch's operators in float64 on the host: relative, at most, of outputs and gradients."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, 64, generator=dice)  # rows of several programs
    grad = torch.randn(2, 7, 5, 64, generator=dice).transpose(1, 2)  # as attention gives it
    weight, bias = torch.randn(2, 64, generator=dice)
    turns = torch.randn(2, 4, 32, generator=dice).repeat_interleave(2, -1)
    off = []
    for cos, sin in (turns, (None, None)):
        here = [None if t is None else t.to(device) for t in (grad, x, weight, bias, cos, sin)]
        found = kernels.norm_rotate(*here[1:], 1, 1e-5), kernels.norm_rotate_backward(*here[:3], *here[4:], 1, 1e-5)
        true = [t.double() for t in (grad, x, weight, bias)] + [cos, sin]
        expected = _forward(*true[1:], 1, 1e-5), _backward(*true, 1, 1e-5)
        off += [float((ours.cpu() - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected)]
    return max(off)
