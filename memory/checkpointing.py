"""Recompute blocks in backward in place of keeping what they computed.

What a block keeps for backward is a choice per block:
- "inputs": its inputs only; backward recomputes the block;
- "attention": also the output and log-sum-exp of its attention, so that recomputation skips attention
  (selective checkpointing): one more unit of memory, 14-17 % fewer operations at 49 frames (predicted);
- "everything": not checkpointed.

Non-reentrant: recomputation starts when backward asks for the first saved tensor of the block and stops after the last.
It does not look at `module.training`, and where no gradient is recorded it costs nothing.
"""

import functools
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from memory.handle import Handle
from memory.patching import replace_forward, require_modules
from memory.plan import Keep, is_checkpointed
from memory.saving import checkpoint_region, pack, unpack

# The fused kernels behind scaled_dot_product_attention. The unfused fallback is several operators and is not kept.
ATTENTION_OPS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)


class Checkpointing(Handle):
    """Handle of `checkpoint_blocks`: counts per block, undo."""

    def __init__(self, num_blocks: int):
        super().__init__()
        self.num_recomputes = [0] * num_blocks
        """Recomputations of each block."""


def checkpoint_blocks(blocks: Sequence[nn.Module], keeps: Sequence[Keep]) -> Checkpointing:
    """Checkpoint `blocks`, each keeping what `keeps` says.

    Raises ValueError for no blocks, a wrong number of `keeps` or none that checkpoints; RuntimeError if applied already.
    """
    blocks = require_modules(blocks, "checkpointing")
    if len(keeps) != len(blocks):
        raise ValueError(f"{len(keeps)} choices for {len(blocks)} blocks")
    for keep in keeps:
        if keep not in get_args(Keep):
            raise ValueError(f"a block keeps one of {', '.join(get_args(Keep))}, not {keep!r}")
    if not is_checkpointed(keeps):
        raise ValueError("checkpointing matched nothing: every block keeps everything")
    handle = Checkpointing(len(blocks))
    for index, (block, keep) in enumerate(zip(blocks, keeps, strict=True)):
        if keep != "everything":
            wrap = functools.partial(_checkpointed_forward, handle, index, block, keep)
            handle._undos.append(replace_forward(block, "checkpointing", wrap))
    return handle


def _checkpointed_forward(handle: Checkpointing, index: int, block: nn.Module, keep: Keep, inner):
    droppers = _droppers(block)  # looked for once: most of a block's many modules are none

    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        # Only positional arguments become saved tensors, which a strategy around this one may move to the host.
        leaves, structure = tree_flatten((args, kwargs))
        calls, notes, failed = iter(("forward",)), {}, []

        def run(*leaves):
            region = next(calls, "recompute")
            if region == "recompute":
                handle.num_recomputes[index] += 1
            args, kwargs = tree_unflatten(leaves, structure)
            try:
                with checkpoint_region(region, notes):
                    return inner(*args, **kwargs)
            except BaseException as e:
                if region == "recompute":
                    raise
                failed.append(e)  # before torch 2.13 `checkpoint` leaves its hooks in force while what it raises is held

        kept: list = []
        modes = {"context_fn": lambda: (_KeepAttention(kept), _ReuseAttention(kept))} if keep == "attention" else {}
        outputs = checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=_is_random(block, droppers), **modes)
        if failed:
            raise failed.pop()
        if keep == "attention" and not kept:
            raise RuntimeError(
                f"block {index} is to keep its attention output, but no fused attention ran in it. Select a fused "
                "backend (torch.nn.attention.sdpa_kernel) or keep inputs only"
            )
        return outputs

    return forward


def _droppers(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of `block` that have a dropout probability, even of 0, and its attribute's name: `dropout` in nn.MultiheadAttention."""
    named = [(module, "p" if isinstance(module, _DropoutNd) else "dropout") for module in block.modules()]
    return [(module, name) for module, name in named if isinstance(getattr(module, name, None), float | int)]


def _is_random(block: nn.Module, droppers: list[tuple[nn.Module, str]]) -> bool:
    """Whether recomputation must restore the random state. Saving that costs time, so in a block in eval mode, as a frozen one is, only
    dropout is looked for; anything else that draws random numbers in eval mode draws new ones."""
    return block.training or any(module.training and getattr(module, name) > 0 for module, name in droppers)


class _Kept:
    """A tensor kept over the checkpoint, with the version it had."""

    def __init__(self, tensor: torch.Tensor):
        # A plain detach() inside a dispatch mode would not share the version counter, and a later change in place
        # would go unseen.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self._alias = tensor.detach()
        self._version = self._alias._version
        self._packed: Any = pack(self._alias)
        if self._packed is not self._alias:
            self._alias = None

    def get(self) -> torch.Tensor:
        if self._alias is not None and self._alias._version != self._version:
            raise RuntimeError("an attention output kept for backward was changed in place after attention")
        return unpack(self._packed)


class _AttentionMode(TorchDispatchMode):
    def __init__(self, kept: list):
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code has no attention in it (memory.compiling)


class _KeepAttention(_AttentionMode):
    """Forward: remember what fused attention returned."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func in ATTENTION_OPS:
            self.kept.append(tree_map_only(torch.Tensor, _Kept, outputs))
        return outputs


class _ReuseAttention(_AttentionMode):
    """Recomputation: return what was remembered, in the same order, in place of running attention again."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in ATTENTION_OPS:
            return func(*args, **(kwargs or {}))
        if not self.kept:
            raise RuntimeError(
                "recomputation ran attention more often than forward did, or backward ran twice over one block: "
                "what a block keeps of its attention serves one backward only"
            )
        return tree_map_only(_Kept, _Kept.get, self.kept.pop(0))  # popped: free it as soon as backward is through
