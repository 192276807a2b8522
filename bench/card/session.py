"""What all parts share: the gauge, the models and sizes, budgets of time, and goals."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from bench.card.forecasts import Forecaster, plans_of
from bench.card.gauge import Attempt, Gauge
from bench.card.rig import Cell, backbone_of, measured
from bench.naive import Recipe
from memory.assess import Assessment
from memory.cards import GIB, Card
from memory.plan import MemoryPlan
from memory.streams import release_pinned
from trainer.assemble import resolve_dtype
from trainer.backbones import norm_rotate

PATIENCE = 30.0
"""Seconds after the call's time in which a forecast is still waited for."""
_PUBLISHED = {"2b": "cogvideox-2b", "5b": "cogvideox-5b", "1.5": "cogvideox1.5-5b"}
_TOY = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
            text_embed_dim=16, max_text_seq_length=6, sample_width=4, sample_height=4, sample_frames=9)
_TOYS = {"2b": {}, "5b": dict(use_rotary_positional_embeddings=True),
         "1.5": dict(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False)}


def register_toys(num_blocks: int = 3) -> None:
    """Toy configurations of the three published kinds, under the names toy-2b, toy-5b and toy-1.5."""
    from trainer.backbones import published

    for kind, changes in _TOYS.items():
        name, model = f"toy-{kind}", _PUBLISHED[kind]
        published.TRANSFORMERS[name] = _TOY | {"num_layers": num_blocks} | changes
        published.SIZES[name] = (9, 32, 32)
        published.NATIVE_DTYPES[name] = "float32"  # in 16 bit a prompt is lost in the rounding of so small a model
        published.VAES[name], published.SCHEDULERS[name] = published.VAES[model], published.SCHEDULERS[model]


@dataclass
class Session:
    """One run of the suite on one device."""

    gauge: Gauge
    card: Card
    forecaster: Forecaster
    dry: bool = False
    workspace_bytes: int = 0
    """What the first matrix products, forward and backward, took from the caching allocator, measured."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Terms of this card that no simulator knows, measured once a process."""
    deadline: float = float("inf")
    """When the call's time is used up, by time.monotonic(): no cell starts after it."""

    def calibrate(self) -> None:
        """Measure what a context and cuBLAS cost on this card. Call it before anything else multiplies matrices."""
        gauge = self.gauge
        if not gauge.is_card:
            self.fixed = {"context_bytes": 0, "cublas_workspace_bytes": 0}
            return
        x = torch.ones(64, 64, device=gauge.device, dtype=torch.bfloat16, requires_grad=True)
        before = torch.cuda.memory_allocated()
        y = x @ x
        forward = torch.cuda.memory_allocated() - before - y.nbytes
        y.sum().backward()  # in a thread of its own, which has another workspace
        self.workspace_bytes = torch.cuda.memory_allocated() - before - y.nbytes - x.grad.nbytes
        # A product with a bias goes another way (cuBLASLt), whose workspace may be one more.
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            z = torch.nn.functional.linear(x, x, x[0])
        more = torch.cuda.max_memory_allocated() - held - z.nbytes
        gauge.synchronize()
        self.fixed = {
            "workspace_of_forward_bytes": forward, "more_workspace_with_bias_bytes": more,
            "context_bytes": gauge.context_bytes(), "cublas_workspace_bytes": self.workspace_bytes,
            "total_bytes": gauge.total_bytes(), "assumed_context_bytes": self.card.context_bytes,
            "assumed_cublas_workspace_bytes": self.card.cublas_workspace_bytes,
            "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
            "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            "has_triton_kernels": norm_rotate.working_kernels(gauge.device) is not None,  # torch's operators hold more, and are slower
            "note": "context: all that is used and not reserved by this process, before its first kernels of size"}

    def cell(self, kind: str, frames: int, *, rank: int = 128, student_only: bool = False, **plan: Any) -> Cell:
        """A cell of a published model; in a dry run of the toy of that kind, with everything in its scale."""
        if not self.dry:
            return Cell(model=_PUBLISHED[kind], frames=frames, rank=rank, student_only=student_only, plan=MemoryPlan(**plan))
        scaled = {name: min(value, 3) if name in _COUNTS and value is not None else value for name, value in plan.items()}
        scaled["num_keep_attention"] = min(scaled.get("num_keep_attention", 0), 3 - scaled.get("num_keep_everything", 0))
        if scaled.get("checkpoint", "").startswith("first:"):
            scaled["checkpoint"] = "first:3"
        return Cell(model=f"toy-{kind}", frames=9, rank=4, student_only=student_only, plan=MemoryPlan(**scaled))

    def recipe(self) -> Recipe:
        """What the naive recipe leaves on the device; next to nothing in a dry run."""
        return Recipe(text_encoder_numel=1000, vae_numel=1000) if self.dry else Recipe()

    def few(self, cells: Sequence[Any], count: int) -> list[Any]:
        """All cells; in a dry run `count` of them, spread evenly, the first among them."""
        return list(cells) if not self.dry else [cells[i * len(cells) // count] for i in range(min(count, len(cells)))]

    def sizes(self, sizes: Sequence[float]) -> list[float]:
        """Those of `sizes` (of cards, in GiB) that this card can stand for: it lacks at most a fifth of their memory."""
        total = self.gauge.total_bytes()
        return [gib for gib in sizes if total is None or gib * GIB <= 1.25 * total]

    def within_budget(self, cells: Sequence[Any], skipped: list[str], *, name: Callable[[Any], str] = str) -> Iterator[Any]:
        """The cells until the call's time is used up or the device is lost; the names of the rest go to `skipped`."""
        for cell in cells:
            if time.monotonic() > self.deadline or self.gauge.lost:
                skipped.append(name(cell))
            else:
                yield cell

    def measure(self, cell: Cell, *, num_steps: int, **more: Any) -> dict[str, Any]:
        """Set up, run and take down one cell: what it is, and what was measured or why nothing was."""
        dtype, beside = str(resolve_dtype(backbone_of(cell), cell.plan, insist=True)).removeprefix("torch."), self.forecaster.num_under_way()
        if self.card.supports(dtype):
            if more.keys() & {"peer", "around_student"}:  # peers pin memory in sizes of their own, and must find what ours had
                release_pinned()
            attempt = self.gauge.attempt(lambda: measured(cell, self.gauge, num_steps=num_steps, **more))
        else:  # torch would emulate it, with an attention that holds its matrix
            attempt = Attempt(failed=f"{self.card.label} has no {dtype}")
        return {"settings": cell.name(), "num_forecasts_beside": beside, **attempt.as_json()}

    def forecast(self, function: Callable[..., Any], *args: Any) -> Attempt:
        """What the forecaster says. One that fails costs no measurement, nor does one that does not end: what was measured has to be written."""
        return self.gauge.attempt(lambda: self.forecaster.answer(function, *args, until=lambda: self.deadline + PATIENCE))

    def plans(self, cell: Cell, cards: tuple[Card, ...], *free: tuple[str, ...]) -> list[tuple[Assessment | None, str]]:
        """For each card the fastest plan (`plans_of`), or None and why there is none."""
        told = self.forecast(plans_of, cell, cards, *free)
        if not told.worked:
            why = f"the planner failed: {told.out_of_memory or told.failed}"
            print(f"{cell.name()}: {why}", file=sys.stderr)
            return [(None, why)] * len(cards)
        return [(best, "" if best else f"the planner says it does not fit: {smallest.reason}") for best, smallest in told.value]


_COUNTS = ("resident_blocks", "num_keep_attention", "num_keep_everything")


def goal(text: str, value: float | None, wanted: float, *, at_least: bool = False, unit: Literal["", "%"] = "") -> dict[str, Any]:
    """A goal beside what was measured. None: not measured, so neither reached nor missed. `unit`: how both are shown; "%" of fractions."""
    reached = None if value is None else (value >= wanted if at_least else value <= wanted)
    return {"goal": text, "measured": value, "unit": unit, "wanted": ("at least " if at_least else "at most ") + _figure(wanted, unit), "reached": reached}


def goal_row(part: str, g: dict[str, Any]) -> list[str]:
    """A goal of a part for a table: what, measured, wanted, whether reached."""
    measured = "not measured" if g["measured"] is None else _figure(g["measured"], g["unit"])
    return [f"{part}: {g['goal']}", measured, g["wanted"], {True: "reached", False: "MISSED", None: "-"}[g["reached"]]]


def _figure(value: float, unit: str) -> str:
    return f"{100 * value:.3g}%" if unit == "%" else f"{value:.4g}"


def failures(failed: Sequence[bool], *, complete: bool) -> int | None:
    """How many failed. None where none has but not all were asked."""
    return sum(failed) if any(failed) or (complete and failed) else None


def print_table(title: str, rows: list[list[str]]) -> None:
    """A title and rows of cells on stdout, the first column flush left, the others right."""
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]))


def rows(attempts: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Name, seconds a step, allocated and reserved GiB of measured cells, for the table on the terminal."""
    found = []
    for name, cell in attempts.items():
        if "step_seconds" in cell:
            found.append([name, f"{cell['step_seconds']:.3f} s", f"{cell['allocated_bytes'] / GIB:.3f}",
                          f"{cell['reserved_bytes'] / GIB:.3f} GiB"])
        else:
            found.append([name, "out of memory" if cell.get("out_of_memory") else f"failed: {cell['failed']}"[:60], "", ""])
    return found
