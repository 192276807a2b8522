"""After running out of memory: the next cheaper plan, and how to ask for it.

Importable without torch. Each step saves device memory and costs some time; they come in the order of what they
cost. A step that would change nothing, or that contradicts the plan, is passed over.
"""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from memory.plan import MemoryPlan, varied


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One step down."""

    plan: MemoryPlan
    """The cheaper plan."""
    change: dict[str, object]
    """The fields that differ, with their new values."""
    why: str
    """What it does, in words."""
    needed_bytes: int
    """Predicted need of the new plan, context included; of one that `pins` less, pinned memory of the host alone."""
    pins: bool = False

    def command(self, command: Sequence[str]) -> str:
        """`command` (a program and its arguments) with the changed settings appended or replaced, ready to paste."""
        arguments = list(command)
        for name, value in self.change.items():
            for flag in (flag_of(name), "--" + name):  # both spellings are understood
                while flag in arguments:
                    at = arguments.index(flag)
                    del arguments[at : at + (1 if isinstance(value, bool) else 2)]
                arguments = [argument for argument in arguments if not argument.startswith(f"{flag}=")]
            arguments += words_of(name, value)
        return shlex.join(arguments)


def flag_of(name: str) -> str:
    """The option that sets a field of the plan."""
    return f"--{name.replace('_', '-')}"


def words_of(name: str, value: object) -> list[str]:
    """The words that set a field to a value."""
    if isinstance(value, bool):
        return [flag_of(name if value else f"no_{name}")]
    return [flag_of(name), *map(str, value if isinstance(value, tuple) else (value,))]


def next_cheaper(
    plan: MemoryPlan,
    num_blocks: int,
    *,
    needed_bytes: Callable[[MemoryPlan], int],
    limit_bytes: int | None = None,
    fixed: Collection[str] = (),
) -> Advice | None:
    """The least costly step that needs less of the device than `plan`, or None when there is no step left.

    `needed_bytes` predicts what a plan needs; with `limit_bytes` steps are taken until the prediction is within it (or
    none is left). Fields of the plan named in `fixed` stay as they are.
    """
    before = needed_bytes(plan)
    best: Advice | None = None
    current, why = plan, {}  # why: by the fields changed, so that of the same step taken twice the last counts
    while True:
        for cheaper, reason in _steps(current, num_blocks, fixed):
            needed = needed_bytes(cheaper)
            if needed < before:
                break
        else:
            return best
        why[frozenset(difference(current, cheaper))] = reason
        current, before = cheaper, needed
        best = Advice(plan=current, change=difference(plan, current), why="; ".join(why.values()), needed_bytes=needed)
        if limit_bytes is None or needed <= limit_bytes:
            return best


def difference(old: MemoryPlan, new: MemoryPlan) -> dict[str, object]:
    """The fields in which `new` differs, with its values."""
    values = dataclasses.asdict(new)
    return {name: value for name, value in values.items() if value != getattr(old, name)}


def _steps(plan: MemoryPlan, num_blocks: int, fixed: Collection[str]) -> Iterator[tuple[MemoryPlan, str]]:
    """Valid plans one step below `plan`, the one that costs least time first."""
    for change, why in _changes(plan, num_blocks):
        if any(name in fixed and value != getattr(plan, name) for name, value in change.items()):
            continue
        cheaper = varied(plan, num_blocks, **change)
        if cheaper not in (None, plan):
            yield cheaper, why


def _changes(plan: MemoryPlan, num_blocks: int) -> Iterator[tuple[dict, str]]:
    if plan.backbone_copies == 2:
        yield {"backbone_copies": 1}, "one backbone serves as teacher and student"
    if plan.text_encoder_resident:
        yield {"text_encoder_resident": False}, "prompts are encoded before training, and the encoder leaves"
    if plan.guidance == "batched":
        yield {"guidance": "sequential"}, "conditional and unconditional passes run one after the other"
    if plan.passes == "lockstep":
        yield {"passes": "sequential"}, "the passes of a step walk over the blocks one after the other"
    if plan.checkpoint != "all":
        yield {"checkpoint": "all", "kept": "device"}, "every block is recomputed in backward"
    if plan.num_keep_everything:
        fewer = plan.num_keep_everything // 2
        kept = plan.num_keep_attention + plan.num_keep_everything - fewer
        yield (
            {"num_keep_everything": fewer, "num_keep_attention": kept, "kept": "device"},
            f"{plan.num_keep_everything - fewer} blocks more are recomputed, all but their attention",
        )
    resident = num_blocks if plan.resident_blocks is None else plan.resident_blocks
    if plan.offload_buffers > 2 and resident < num_blocks:
        yield {"offload_buffers": 2}, "streamed blocks pass through two buffers"
    if resident > 0:
        yield {"resident_blocks": resident // 2}, f"{num_blocks - resident // 2} of {num_blocks} blocks stream from host memory"
    if plan.boundaries == "device":
        yield {"boundaries": "host"}, "the inputs of blocks wait in host memory between forward and backward"
    if plan.num_keep_attention:
        fewer = plan.num_keep_attention // 2
        yield {"num_keep_attention": fewer, "kept": "device"}, "fewer blocks keep their attention output"
    if plan.kept == "host":  # fewer blocks that keep something may need more: what they keep would be on the device
        yield {"num_keep_everything": 0, "num_keep_attention": 0, "kept": "device"}, "blocks keep their inputs only"
    if plan.feed_forward_chunks < 8:
        chunks = max(4, plan.feed_forward_chunks * 2)
        yield {"feed_forward_chunks": chunks}, f"feed-forwards run in {chunks} chunks of tokens"
    if plan.optimizer == "adamw":
        yield {"optimizer": "adamw8bit"}, "optimizer state in 8 bit: a changed optimizer, and little saved"
