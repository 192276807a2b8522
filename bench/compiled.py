"""What compiling blocks changes: time and peak of a student's pass over two blocks of real width, with their erasers.

    python -m bench.compiled      into bench/results/compiled.json
"""

import time
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from bench.card.gauge import profiled_peak
from bench.provenance import write_result
from memory.plan import MemoryPlan, apply_plan
from trainer.backbones.attention import LeanProcessor
from trainer.backbones.cogvideox import BOUNDARY_NAMES
from trainer.erasers import Erasers

RANK, NUM_TEXT_TOKENS, HEAD_WIDTH = 128, 226, 64
WIDTHS = {"2b": 1920, "5b": 3072}
"""Of the published models; the 5b has rotary positions."""
PLANS: dict[str, dict[str, Any]] = {"nothing": {"checkpoint": "none"}, "checkpoint all": {}, "keep attention": {"num_keep_attention": 2}}


class _Stack(nn.Module):
    def __init__(self, kind: str, num_tokens: int, device: str, dtype: torch.dtype):
        super().__init__()
        width = WIDTHS[kind]
        self.blocks = nn.ModuleList(CogVideoXBlock(dim=width, num_attention_heads=width // HEAD_WIDTH, attention_head_dim=HEAD_WIDTH,
                                                   time_embed_dim=512) for _ in range(2))
        self.to(device, dtype).requires_grad_(False)
        for block in self.blocks:
            block.attn1.processor = LeanProcessor()
        self.text, self.embedding = (torch.randn(1, *size, device=device, dtype=dtype) for size in ((NUM_TEXT_TOKENS, width), (512,)))
        angles = torch.rand(num_tokens - NUM_TEXT_TOKENS, HEAD_WIDTH // 2, device=device).repeat_interleave(2, -1)
        self.positions = (angles.cos(), angles.sin()) if kind == "5b" else None
        self.video = torch.randn(1, num_tokens - NUM_TEXT_TOKENS, width, device=device, dtype=dtype)

    def forward(self) -> Tensor:
        video, text = self.video, self.text
        for block in self.blocks:
            video, text = block(hidden_states=video, encoder_hidden_states=text, temb=self.embedding, image_rotary_emb=self.positions)
        return video


def measure(kind: str, plan: MemoryPlan, *, num_tokens: int = 2926, rounds: int = 3,
            device: str = "cuda" if torch.cuda.is_available() else "cpu") -> dict[str, float]:
    """Seconds of the fastest of some passes, of the first one, and the peak in bytes, of which on the CPU what stands is no part."""
    torch.manual_seed(0)
    stack = _Stack(kind, num_tokens, device, torch.bfloat16 if device == "cuda" else torch.float32)
    erasers = Erasers(stack.blocks, RANK)
    applied = apply_plan(stack, stack.blocks, plan, device=device, boundary_names=BOUNDARY_NAMES)

    def step() -> None:
        stack().square().mean().backward()
        for parameter in erasers.parameters():
            parameter.grad = None

    def timed() -> float:
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first, seconds = timed(), min(timed() for _ in range(rounds))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = profiled_peak(step)
    applied.undo()
    return {"seconds": seconds, "first_seconds": first, "peak_bytes": peak}


def main() -> None:
    cells: dict[str, Any] = {}
    for kind in WIDTHS:
        for name, fields in PLANS.items():
            cell = cells[f"{kind}, {name}"] = {"as it is": measure(kind, MemoryPlan(**fields))}
            with fresh_cache():  # what an earlier run compiled does not count
                cell["compiled"] = measure(kind, MemoryPlan(compile=True, **fields))
            print(kind, name, cell, flush=True)
            write_result("compiled", {"num_tokens": 2926, "cells": cells})


if __name__ == "__main__":
    main()
