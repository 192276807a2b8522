"""A student's pass over two blocks of real width with their erasers: its peak against the prediction, and what compiling changes.

    python -m bench.blocks      into bench/results/blocks.json
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from bench.card.gauge import predicted_peak, profiled_peak
from bench.provenance import take_no_arguments, write_result
from memory.applied import AppliedPlan
from memory.fake import FakeMode
from memory.plan import MemoryPlan, apply_plan
from memory.simulate import recording
from trainer.backbones.cogvideox import BOUNDARY_NAMES
from trainer.backbones.lean import make_lean
from trainer.erasers import Erasers

ON_CARD = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_CARD else ("cpu", torch.float32)
NUM_TEXT_TOKENS = 226
NUM_TOKENS = NUM_TEXT_TOKENS + 2 * 30 * 45
"""Of five frames of 480x720, and the text's."""
RANK, HEAD_WIDTH = 128, 64
WIDTHS = {"2b": 1920, "5b": 3072}
"""Of the published models; the 5b has rotary positions."""
PLANS: dict[str, dict[str, Any]] = {"everything": {"checkpoint": "none"}, "inputs": {}}
ROUNDS = 3


class _Stack(nn.Module):
    def __init__(self, kind: str, device: str):
        super().__init__()
        width = WIDTHS[kind]
        self.blocks = nn.ModuleList(CogVideoXBlock(dim=width, num_attention_heads=width // HEAD_WIDTH, attention_head_dim=HEAD_WIDTH,
                                                   time_embed_dim=512) for _ in range(2))
        self.to(device, DTYPE).requires_grad_(False)
        make_lean(self.blocks)
        self.text, self.embedding = (torch.randn(1, *size, device=device, dtype=DTYPE) for size in ((NUM_TEXT_TOKENS, width), (512,)))
        angles = torch.rand(NUM_TOKENS - NUM_TEXT_TOKENS, HEAD_WIDTH // 2, device=device).repeat_interleave(2, -1)
        self.positions = (angles.cos(), angles.sin()) if kind == "5b" else None
        self.video = torch.randn(1, NUM_TOKENS - NUM_TEXT_TOKENS, width, device=device, dtype=DTYPE)

    def forward(self) -> Tensor:
        video, text = self.video, self.text
        for block in self.blocks:
            video, text = block(hidden_states=video, encoder_hidden_states=text, temb=self.embedding, image_rotary_emb=self.positions)
        return video


def _prepared(kind: str, plan: MemoryPlan, device: str) -> tuple[AppliedPlan, _Stack, Callable[[], None]]:
    """The plan on two blocks with erasers, and a pass that leaves nothing behind."""
    torch.manual_seed(0)
    stack = _Stack(kind, device)
    erasers = Erasers(stack.blocks, RANK)
    applied = apply_plan(stack, stack.blocks, plan, device=device, boundary_names=BOUNDARY_NAMES)

    def step() -> None:
        stack().square().mean().backward()
        erasers.zero_grad()

    return applied, stack, step


def measure(kind: str, plan: MemoryPlan) -> dict[str, float]:
    """Seconds of the fastest of some passes, of the first one, and the peak in bytes, of which on the CPU what stands is no part."""
    applied, _, step = _prepared(kind, plan, DEVICE)

    def timed() -> float:
        started = time.perf_counter()
        step()
        if ON_CARD:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first, seconds = timed(), min(timed() for _ in range(ROUNDS))
    if ON_CARD:
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = profiled_peak(step)
    applied.undo()
    return {"seconds": seconds, "first_seconds": first, "peak_bytes": peak}


def predict(kind: str, plan: MemoryPlan) -> int:
    """The peak that `measure` should find, in bytes, of blocks that are not compiled."""
    with FakeMode():
        applied, stack, step = _prepared(kind, plan, "cpu")
        with recording(device=DEVICE) as recorder:
            recorder.adopt_model(stack, stack.blocks, applied)
            recorder.adopt([stack.text, stack.embedding, stack.video, *(stack.positions or ())], "other")
            step()
    return predicted_peak(recorder.trace(), on_card=ON_CARD)


def main() -> None:
    cells: dict[str, Any] = {}
    for kind in WIDTHS:
        for name, fields in PLANS.items():
            plan = MemoryPlan(**fields)
            cell = cells[f"{kind}, {name}"] = {"predicted_bytes": predict(kind, plan), "as it is": measure(kind, plan)}
            with fresh_cache():  # what an earlier run compiled does not count
                cell["compiled"] = measure(kind, replace(plan, compile=True))
            print(kind, name, cell, flush=True)
    write_result("blocks", {"num_tokens": NUM_TOKENS, "cells": cells})


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
