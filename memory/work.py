"""What operators compute and move: a table of our own, filled in the pass that records memory.

torch's FlopCounterMode is not used: it keeps recomputed graphs alive, which quadruples the peak being recorded, and
it counts nothing for the CPU's flash attention. Time follows by roofline: `memory.timing`.
"""

import functools
import math
from typing import NamedTuple

import torch

aten = torch.ops.aten


class Work(NamedTuple):
    """One operator. Kinds: "matmul", "attention", "attention backward" (16 bit; "matmul32" and so on: float32), "convolution", "memory",
    and over the host link "to host", "to device" (activations) and "weights"."""

    kind: str
    flops: float
    num_bytes: int
    """Read and written."""


def _product(left, right) -> float:
    """Of two matrices, or two batches of them."""
    return 2.0 * left.numel() * right.shape[-1]


def _convolution(args, outputs) -> float:
    return 2.0 * outputs.numel() * args[1][0].numel()


def _convolution_backward(args, outputs) -> float:
    grad, weight = args[0], args[2]
    once = 2.0 * grad.numel() * weight[0].numel()
    return once * sum(output is not None for output in outputs[:2])


def _attention(args, outputs) -> float:
    """4 S_q S_k D a head: q k^T and p v."""
    query, key = args[0], args[1]
    return 4.0 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3]


def _attention_backward(args, outputs) -> float:
    """10 S_q S_k D a head: q k^T again, and four products."""
    return 2.5 * _attention(args[1:], outputs)


_FLOPS = {
    aten.mm.default: ("matmul", lambda args, outputs: _product(args[0], args[1])),
    aten.addmm.default: ("matmul", lambda args, outputs: _product(args[1], args[2])),
    aten.bmm.default: ("matmul", lambda args, outputs: _product(args[0], args[1])),
    aten.baddbmm.default: ("matmul", lambda args, outputs: _product(args[1], args[2])),
    aten.linear.default: ("matmul", lambda args, outputs: 2.0 * args[0].numel() * args[1].shape[0]),
    aten.convolution.default: ("convolution", _convolution),
    aten.convolution_backward.default: ("convolution", _convolution_backward),
}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    _FLOPS[getattr(aten, f"_scaled_dot_product_{_name}").default] = ("attention", _attention)
    _FLOPS[getattr(aten, f"_scaled_dot_product_{_name}_backward").default] = ("attention backward", _attention_backward)

_FLASH_BACKWARD = (
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)

# Operators that only make an uninitialised tensor or an alias (whose schema may not say so).
_IDLE = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default,
         aten.detach.default, aten._unsafe_view.default}
# Operators that do not read their first argument: they overwrite it, or take its dtype or shape.
_UNREAD = {aten.copy_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.new_zeros.default, aten.new_ones.default,
           aten.new_full.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}


def work_of(func, args, outputs) -> Work | None:
    """The work of one operator, or None if it does none (views, empty tensors)."""
    entry = _FLOPS.get(func)
    if entry is None:
        if func in _IDLE or _moves_nothing(func):
            return None
        read = args[1:] if func in _UNREAD else args
        return Work("memory", 0.0, _bytes(read) + _bytes(outputs))
    kind, count = entry
    if args[0].dtype == torch.float32 and kind != "convolution":
        kind += "32"
    return Work(kind, count(args, outputs), _bytes(args) + _bytes(outputs))


@functools.cache
def _moves_nothing(func) -> bool:
    """Whether an operator only makes a view or answers a question about a tensor, by its schema."""
    returns = [r for r in func._schema.returns if "Tensor" in str(r.type)]
    return not func._schema.is_mutable and all(r.alias_info is not None for r in returns)


def _bytes(values) -> int:
    if isinstance(values, torch.Tensor):
        return values.nbytes
    if isinstance(values, (tuple, list)):
        return sum(_bytes(value) for value in values)
    return 0


_scratch_of_others: dict = {}


def register_scratch(func, count) -> None:
    """Say what an operator that is not torch's takes inside: `count(args, device)` gives its buffers, as `scratch_bytes` does."""
    _scratch_of_others[func] = count


def scratch_bytes(func, args, outputs, device: str) -> tuple[int, ...]:
    """Bytes of the buffers that a kernel takes inside, freed before it returns: no tracer sees them. `device`: "cuda" or "cpu".

    cuDNN's 16-bit convolutions over frames, height and width have their tensors channels last, and copy what is not:
    input, output and weight. Inferred from published peaks of decoding (bench/published.toml).
    """
    if func in _scratch_of_others:
        return _scratch_of_others[func](args, device)
    if device == "cuda":
        if func in _FLASH_BACKWARD:
            take = flash_backward_scratch_bytes if args[1].dtype in (torch.float16, torch.bfloat16) else efficient_backward_scratch_bytes
            return take(args[1].shape)
        if func is aten.sum.dim_IntList and args[1] and args[0].dim() > 1:
            shape, dims = args[0].shape, {dim % args[0].dim() for dim in args[1]}
            if dims == set(range(len(shape) - 1)):
                partial = column_sum_scratch_bytes(math.prod(shape[:-1]), shape[-1])
                return (partial,) if partial else ()
        if func is aten.convolution.default and args[0].dim() == 5 and args[0].dtype in (torch.float16, torch.bfloat16):
            return args[0].nbytes, outputs.nbytes, args[1].nbytes
        return ()
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return (_cpu_flash_scratch_bytes(args[0], args[1], backward=False),)
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return (_cpu_flash_scratch_bytes(args[1], args[2], backward=True),)
    return ()


_CONTIGUOUS = {aten.native_layer_norm.default: (0,), aten.native_layer_norm_backward.default: (0, 1)}


def copied_bytes(func, args) -> tuple[int, ...]:
    """Bytes of the contiguous copies that a kernel makes of some of its inputs before its outputs, and holds until it returns."""
    return tuple(args[i].nbytes for i in _CONTIGUOUS.get(func, ()) if not args[i].is_contiguous())


def flash_backward_scratch_bytes(query_shape) -> tuple[int, int]:
    """What FlashAttention-2's backward takes inside: one float32 a row (softmax_d), and dQ in float32.

    `query_shape` is (B, H, S, D). Rows round up to 128, D to 32; cuDNN's backward takes the same without rounding. The
    deterministic mode takes several times as much and is not meant here. Source: `mha_bwd` in flash_attn's flash_api.cpp,
    `CompositeSDPABackwardNode` in cudnn-frontend.
    """
    batch, heads, rows, width = query_shape
    rows, width = -(-rows // 128) * 128, -(-width // 32) * 32
    return batch * heads * rows * 4, batch * heads * rows * width * 4


def efficient_backward_scratch_bytes(query_shape) -> tuple[int, int, int]:
    """What memory-efficient attention's backward takes inside in float32, where no other kernel is: outputs times their gradients,
    their sums along rows, and a contiguous copy of these.

    In 16 bit, where it is the kernel of cards before Ampere, it takes what FlashAttention-2's does, within 0.4 %. Source:
    `_efficient_attention_backward` in torch's attention_backward.cu.
    """
    batch, heads, rows, width = query_shape
    return batch * heads * rows * width * 4, batch * heads * rows * 4, batch * heads * rows * 4


_MOST_THREADS = 148 * 2048
"""That run at once on any card of cards.toml (a B200)."""


def column_sum_scratch_bytes(rows: int, columns: int, num_threads: int = _MOST_THREADS) -> int:
    """What a sum over the rows, such as the gradient of a bias, takes inside: partial sums in float32.

    Rows are divided among as many blocks of threads as run at once on a card of `num_threads`. Sums along rows take next to
    nothing. Source: `setReduceConfig` in torch's ATen/native/cuda/Reduce.cuh.
    """
    if not rows or not columns:
        return 0
    vector = math.gcd(columns, 4)
    width = min(_power_of_two(columns // vector), 32)  # of a block of at most 512 / vector threads
    height = min(_power_of_two(rows), 512 // vector // width)
    width = min(_power_of_two(columns // vector), 512 // vector // height)
    rows_of_thread = -(-rows // height)
    blocks, most_blocks = -(-(columns // vector) // width), num_threads // (width * height)
    if rows < min(16 * height, 256) or rows_of_thread < 256 or blocks > most_blocks:
        return 0
    splits = max(min(-(-most_blocks // blocks), -(-rows_of_thread // 16)), -(-rows_of_thread // 256))
    return 4 * columns * splits * width * vector if splits > 1 else 0


def _power_of_two(number: int) -> int:
    """The largest that is no larger."""
    return 1 << (number.bit_length() - 1)


def _cpu_flash_scratch_bytes(query: torch.Tensor, key: torch.Tensor, *, backward: bool) -> int:
    """Tiles of the CPU's flash attention in float32, one set a thread. Source: ATen/native/cpu/FlashAttentionKernel.cpp."""
    rows, width = query.shape[2], query.shape[3]
    tile_rows = min(rows, 256 if rows >= 768 else 64 if rows >= 192 else 32)
    tile = tile_rows * min(key.shape[2], 512)
    per_thread = 2 * tile if backward else tile + tile_rows * (2 + width)
    return 4 * per_thread * torch.get_num_threads()
