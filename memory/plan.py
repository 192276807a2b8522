"""What is done to make a model fit: the plan, and the one order in which it is applied.

This file imports no torch at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from memory.applied import AppliedPlan

if TYPE_CHECKING:
    import torch
    from torch import nn

Dtype = Literal["native", "float32", "bfloat16", "float16"]
Where = Literal["device", "host"]
OptimizerKind = Literal["adamw", "adamw8bit", "paged-adamw8bit"]
GuidanceMode = Literal["batched", "sequential", "none"]
Passes = Literal["sequential", "lockstep"]
Keep = Literal["inputs", "attention", "everything"]


SHARDING_BUFFERS = 3
"""Whole blocks on a device at a time under sharding: the one that runs, the buffer it was gathered in, the next one ahead."""

MAX_CHUNKS = 64
"""Of a feed-forward, whose hidden layer is then a sixteenth of its input."""


class PlanError(Exception):
    """A plan that contradicts itself or the model. The message names the field and what would work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Every setting that trades memory for time. The default is the plain run with all blocks checkpointed."""

    dtype: Dtype = "native"
    """Storage and computation of the frozen backbone. native: as published (2b float16, 5b bfloat16).
    Adapters, their gradients and their optimizer state are float32 always."""
    resident_blocks: int | None = None
    """Blocks that stay on the device, spread evenly; the others stream from host memory. None: all stay (no offload)."""
    num_shards: int = 1
    """Processes, one a card, among which the frozen weights of every block are divided; each gathers a block when it runs.
    All of the run's, or 1: every process holds whole blocks. In place of offload."""
    offload_buffers: int = 2
    """Device buffers of one block each that streamed blocks pass through. At least 2: one loads while one computes."""
    passes: Passes = "sequential"
    """How the passes of a step take turns. sequential: each over all blocks. lockstep: block by block for all of them.
    In lockstep streamed blocks cross the link twice a step, and more is held at once. It pays where the link is what limits."""
    checkpoint: str = "all"
    """Which blocks are recomputed in backward: all, none, every:N (every N-th, from the first), first:K."""
    num_keep_attention: int = 0
    """Checkpointed blocks that keep their attention output too, which is then not recomputed."""
    num_keep_everything: int = 0
    """Of the blocks that `checkpoint` names, how many keep everything after all and are not recomputed: the last ones.
    Where kept is host they are spread evenly, so that the link is asked for no more at one time than at another."""
    boundaries: Where = "device"
    """Where the inputs of blocks wait between forward and backward."""
    kept: Where = "device"
    """Where all else that blocks keep (attention outputs, everything) waits between forward and backward."""
    feed_forward_chunks: int = 1
    """Token chunks of a feed-forward: more chunks, smaller working set."""
    compile: bool = False
    """Whether blocks are compiled (torch.compile), which fuses their element-wise work.
    Takes a minute once; results differ by rounding. Memory and time are predicted for blocks that are not."""
    optimizer: OptimizerKind = "adamw"
    """adamw: float32 state, 8 bytes a parameter. adamw8bit: 2.03 bytes. paged-adamw8bit: those pageable to the host."""
    guidance: GuidanceMode = "sequential"
    """Conditional and unconditional pass of the teacher and of sampling. batched: one batch of two. sequential: one after the other.
    none: no unconditional pass, for sampling at a guidance scale of 1 only."""
    backbone_copies: int = 1
    """1: one backbone is teacher and student. 2, for planning only: a copy each, which costs a whole model and gains nothing."""
    text_encoder_resident: bool = False
    """For planning only: whether the text encoder stays on the device during training, though prompts are encoded before it."""

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise PlanError(f"{field} is {getattr(self, field)!r}; one of {', '.join(map(str, choices))}")
        for field, least in _AT_LEAST.items():
            value = getattr(self, field)
            if field == "resident_blocks" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise PlanError(f"{field} is {value!r}; an integer, at least {least}, that fits 64 bits")
        if self.feed_forward_chunks > MAX_CHUNKS:
            raise PlanError(f"feed_forward_chunks is {self.feed_forward_chunks}; at most {MAX_CHUNKS}: smaller chunks save nothing more, "
                            "and each is a few kernels")
        if self.num_shards > 1 and self.resident_blocks is not None:
            raise PlanError(f"num_shards is {self.num_shards} and resident_blocks {self.resident_blocks}: a block's weights are "
                            "either divided among processes or streamed from the host; leave one out")
        if self.num_shards > 1 and self.passes == "lockstep":
            raise PlanError(f"num_shards is {self.num_shards} and passes = lockstep: divided blocks are gathered for one pass at a time; "
                            "use passes = sequential")
        pattern = parse_checkpoint(self.checkpoint)
        if pattern == ("first", 0) or (pattern == ("every", 1) and not self.num_keep_attention + self.num_keep_everything):
            resolve_keeps(self, 1)  # all blocks are alike: what is wrong for one is wrong for any number


_CHOICES = {
    "dtype": get_args(Dtype),
    "boundaries": get_args(Where),
    "kept": get_args(Where),
    "optimizer": get_args(OptimizerKind),
    "guidance": get_args(GuidanceMode),
    "passes": get_args(Passes),
    "compile": (False, True),
    "backbone_copies": (1, 2),
    "text_encoder_resident": (False, True),
}
_AT_LEAST = {
    "resident_blocks": 0,
    "num_shards": 1,
    "offload_buffers": 2,
    "num_keep_attention": 0,
    "num_keep_everything": 0,
    "feed_forward_chunks": 1,
}


def parse_checkpoint(text: str) -> tuple[str, int]:
    """("all", 1), ("none", 0), ("every", N) or ("first", K). Raises PlanError for anything else."""
    if text == "all":
        return "every", 1
    if text == "none":
        return "first", 0
    match = re.fullmatch(r"(every|first):(\d+)", text) if isinstance(text, str) else None
    if match is None or (match[1] == "every" and int(match[2]) == 0):
        raise PlanError(f"checkpoint is {text!r}; one of all, none, every:N (N at least 1), first:K (K at least 0)")
    return match[1], int(match[2])


def resolve_keeps(plan: MemoryPlan, num_blocks: int) -> tuple[Keep, ...]:
    """What each of `num_blocks` blocks keeps for backward, in forward order.

    Blocks that keep more on the device come last: backward reaches them first, and what they kept is gone before
    the first recomputation needs its working set. What is kept on the host has to cross the link while others compute, so
    blocks that keep everything there are spread evenly. Raises PlanError if the counts exceed the model.
    """
    pattern, count = parse_checkpoint(plan.checkpoint)
    if pattern == "first" and count > num_blocks:
        raise PlanError(f"checkpoint is first:{count}, but the model has {num_blocks} blocks; first:{num_blocks} is all")
    named = range(0, num_blocks, count) if pattern == "every" else range(count)
    if plan.num_keep_everything + plan.num_keep_attention > len(named):
        raise PlanError(
            f"num_keep_everything {plan.num_keep_everything} + num_keep_attention {plan.num_keep_attention} "
            f"exceed the {len(named)} blocks that checkpoint = {plan.checkpoint} names"
        )
    if plan.kept == "host":
        spread = _spread(len(named), plan.num_keep_everything)
        checkpointed = [index for position, index in enumerate(named) if position not in spread]
    else:
        checkpointed = list(named)[: len(named) - plan.num_keep_everything]
    keeps: list[Keep] = ["everything"] * num_blocks
    for index in checkpointed:
        keeps[index] = "inputs"
    for index in checkpointed[len(checkpointed) - plan.num_keep_attention :]:
        keeps[index] = "attention"
    if plan.boundaries == "host" and not is_checkpointed(keeps):
        raise PlanError(
            "boundaries is host, but no block is checkpointed, and such a block keeps more than its inputs. "
            "Use checkpoint = all and a lower num_keep_everything, or boundaries = device with kept = host"
        )
    if plan.kept == "host" and all(keep == "inputs" for keep in keeps):
        raise PlanError(
            "kept is host, but every block keeps its inputs only, which boundaries = host moves. "
            "Set num_keep_attention or num_keep_everything, or kept = device"
        )
    return tuple(keeps)


def varied(plan: MemoryPlan, num_blocks: int, **changes: object) -> MemoryPlan | None:
    """The plan with some fields changed; None where they contradict the others."""
    try:
        changed = dataclasses.replace(plan, **changes)
        resolve_keeps(changed, num_blocks)
    except PlanError:
        return None
    return changed


def resident_indices(num_blocks: int, num_resident: int | None) -> frozenset[int]:
    """Which blocks stay on the device: spread evenly, the last one (where forward turns into backward) among them.

    None means all. Raises PlanError if more are asked for than there are.
    """
    if num_resident is None:
        return frozenset(range(num_blocks))
    if not 0 <= num_resident <= num_blocks:
        raise PlanError(f"resident_blocks is {num_resident}, but the model has {num_blocks} blocks (0 to {num_blocks})")
    return _spread(num_blocks, num_resident)


def streamed_indices(num_blocks: int, num_resident: int | None) -> frozenset[int]:
    """Which blocks do not stay on the device. Raises PlanError as `resident_indices` does."""
    return frozenset(range(num_blocks)) - resident_indices(num_blocks, num_resident)


def _spread(num_blocks: int, count: int) -> frozenset[int]:
    """`count` of so many blocks at distances that differ by one at most, the last block among them."""
    return frozenset(num_blocks - 1 - position * num_blocks // count for position in range(count))


def is_checkpointed(keeps: Sequence[Keep]) -> bool:
    """Whether any of the blocks is recomputed."""
    return any(keep != "everything" for keep in keeps)


def apply_plan(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    plan: MemoryPlan,
    *,
    device: torch.device | str,
    boundary_names: Sequence[str] = (),
    feed_forwards: Sequence[nn.Module] = (),
) -> AppliedPlan:
    """Apply `plan` to `model`, whose `blocks` run in the order given, and place it on `device`.

    Trainable parameters must be in place already: they move to the device and stay there. `boundary_names` are the
    arguments of a block's forward that the block before it computed; `feed_forwards` the modules to run in token chunks.
    The optimizer, guidance, the number of copies and the text encoder are for the caller.
    Raises PlanError where plan and model do not go together; RuntimeError if a plan is applied already.
    After an exception here the model is as it was; one that was to be divided among processes is of no use any more, since
    its weights come together only if all of them gather them, and one that fails may be alone.
    """
    import torch

    from memory.patching import applied_strategies, require_modules

    blocks = require_modules(blocks, "the memory plan")
    for module in model.modules():
        if applied_strategies(module):
            raise RuntimeError(f"{applied_strategies(module)[0]} is applied to this model already; undo() it first")
        if getattr(module, "gradient_checkpointing", False):
            raise PlanError(f"{type(module).__name__}.gradient_checkpointing is on; the plan does the checkpointing. "
                            "Call disable_gradient_checkpointing() first")
    applied = AppliedPlan(plan, resolve_keeps(plan, len(blocks)))
    try:
        with torch.inference_mode(False):  # what is made here serves passes that record a graph
            _apply(applied, model, blocks, device, boundary_names, feed_forwards)
    except BaseException:
        if plan.num_shards == 1:
            applied.undo()
        raise
    return applied


def _apply(applied: AppliedPlan, model, blocks, device, boundary_names, feed_forwards) -> None:
    """The order. Each later step wraps the earlier ones."""
    import torch

    from memory.activations import offload_activations
    from memory.checkpointing import checkpoint_blocks
    from memory.chunking import chunk_feed_forwards
    from memory.compiling import compile_blocks
    from memory.lockstep import Lockstep
    from memory.offload import offload_blocks, place
    from memory.patching import held_outside
    from memory.precision import cast_frozen
    from memory.sharding import shard_blocks
    from memory.streams import resolve_device

    plan, keeps = applied.plan, applied.keeps
    device = resolve_device(device)

    # 1. Precision, while the weights are still where they were loaded: the masters that streaming builds, and
    #    what moves to the device, then have their final size.
    if plan.dtype != "native":
        applied._undos.append(cast_frozen(model, getattr(torch, plan.dtype)).undo)

    # 2. Feed-forward chunks change what a block computes inside, so everything that runs a block must come around it.
    if plan.feed_forward_chunks > 1:
        applied._undos.append(chunk_feed_forwards(feed_forwards, plan.feed_forward_chunks).undo)

    # 3. Compilation inside of all that is put around a block.
    if plan.compile:
        applied._undos.append(compile_blocks(blocks, device=device).undo)

    # 4. Blocks divided among processes, or streamed from the host. Sharding gathers a block in module hooks, which run
    #    around whatever replaces a forward, in backward too, so that the block is there when it is recomputed.
    #    Block offload before anything else moves to the device, so that a model larger than the device never has to
    #    be on it; and inside checkpointing, so that a recomputation fetches its weights again.
    streamed = []
    if plan.num_shards > 1:
        applied._undos.append(shard_blocks(model, blocks, num_shards=plan.num_shards, device=device).undo)
    if streamed_indices(len(blocks), plan.resident_blocks):
        applied.offload = offload_blocks(blocks, device=device, num_resident=plan.resident_blocks, num_buffers=plan.offload_buffers)
        applied._undos.append(applied.offload.undo)
        streamed = [p for index in applied.offload.streamed for p in blocks[index].parameters() if not p.requires_grad]
        if tied := held_outside(model, blocks, streamed):
            raise PlanError(f"resident_blocks: {tied} is a weight of a block as well, and would stay on the host where that streams; "
                            "untie it, or leave resident_blocks out")
    applied._undos.append(place(model, device, skip=streamed))

    # 5. Checkpointing around the weights' streaming.
    if is_checkpointed(keeps):
        applied.checkpointing = checkpoint_blocks(blocks, keeps)
        applied._undos.append(applied.checkpointing.undo)

    # 6. Activations to the host outermost: they see what checkpointing saves, and nothing of its inside.
    if "host" in (plan.boundaries, plan.kept):
        applied.activations = offload_activations(blocks, device=device, boundary_names=boundary_names,
                                                  boundaries=plan.boundaries == "host", kept=plan.kept == "host")
        applied._undos.append(applied.activations.undo)

    # 7. Lockstep changes nothing: it runs blocks, whatever is around them.
    if plan.passes == "lockstep":
        applied.lockstep = Lockstep(model, blocks, boundary_names)
