"""What the watcher's reductions cost beside one block of CogVideoX-2b at real size.

    python -m bench.health_cost      at 4,276 tokens (9 frames of 480x720), into bench/results/health-cost.json
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

from bench.provenance import take_no_arguments, write_result
from memory.optimizers import update_norms
from trainer.erasers import Erasers

WIDTH, NUM_TEXT_TOKENS, RANK = 1920, 226, 128
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def measure(*, num_tokens: int = 4276) -> dict[str, Any]:
    """Seconds of forward and backward of one block with its eraser, of all reductions for it, and their share.

    `num_tokens` counts text and video. Reductions: norms of gradient, weight and update with the copy that the update
    needs, and norms of the eraser's output and the residual stream.
    """
    torch.manual_seed(0)
    block = CogVideoXBlock(dim=WIDTH, num_attention_heads=30, attention_head_dim=64, time_embed_dim=512).to(DEVICE, DTYPE)
    block.requires_grad_(False)
    erasers = Erasers([block], RANK)
    parameters = erasers.parameters()
    text = torch.randn(1, NUM_TEXT_TOKENS, WIDTH, device=DEVICE, dtype=DTYPE)
    video = torch.randn(1, num_tokens - NUM_TEXT_TOKENS, WIDTH, device=DEVICE, dtype=DTYPE)
    embedding = torch.randn(1, 512, device=DEVICE, dtype=DTYPE)

    def step() -> None:
        h, _ = block(video, text, embedding)
        h.square().mean().backward()

    def reductions() -> None:
        torch._foreach_norm([p.grad for p in parameters])
        update_norms(parameters, lambda: None)
        for activation in (video, video):  # the eraser's output has the shape of the residual stream
            torch.linalg.vector_norm(activation, dtype=torch.float32)

    seconds, cost = _best(step, 3), _best(reductions, 10)
    return {"num_tokens": num_tokens, "device": DEVICE, "dtype": str(DTYPE), "block_seconds": seconds,
            "reduction_seconds": cost, "share": cost / seconds}


def _best(work: Callable[[], None], repeats: int) -> float:
    """Seconds of the fastest of some calls; on the CPU those of this process, whatever else the machine does."""
    clock, best = (time.perf_counter if DEVICE == "cuda" else time.process_time), float("inf")
    for _ in range(repeats + 1):
        started = clock()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return best


if __name__ == "__main__":
    take_no_arguments(__doc__)
    result = measure()
    print(f"{result['reduction_seconds'] * 1e3:.1f} ms beside {result['block_seconds']:.2f} s: {result['share']:.3%}")
    print(write_result("health-cost", result).name)
