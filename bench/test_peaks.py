"""Measured peaks and step times of real steps: rank, frames, each strategy and the sensible combinations, guidance.

    python run.py bench peaks                   # small models on the CPU; the published ones where there is a card
    python -m pytest bench/test_peaks.py        # the same steps once each, without timing

On the CPU peaks are the allocator's events as the profiler sees them, beyond what stands before the step; on a card they are the
caching allocator's own counters, and what stands is in them. They lie in `extra_info`, beside what was predicted for the step.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench.card.gauge import Gauge, predicted_peak, profiled_peak
from bench.card.rig import Cell, backbone_of, rigged
from bench.card.session import register_toys
from memory.plan import MemoryPlan
from trainer.rehearse import rehearse

ON_CARD = torch.cuda.is_available()
MODELS = ("cogvideox-2b", "cogvideox-5b") if ON_CARD else ("toy-2b", "toy-5b")
FRAMES = (17, 49) if ON_CARD else (9, 17)
STREAMED = {"resident_blocks": 0}
PLANS: dict[str, dict[str, Any]] = {
    "nothing": {"checkpoint": "none"}, "checkpoint all": {}, "checkpoint every 2nd": {"checkpoint": "every:2"},
    "keep attention": {"num_keep_attention": 1}, "stream": STREAMED, "boundaries on host": {"boundaries": "host"},
    "stream, boundaries on host": STREAMED | {"boundaries": "host"}, "chunks": {"feed_forward_chunks": 4},
    "stream, boundaries on host, chunks": STREAMED | {"boundaries": "host", "feed_forward_chunks": 4},
    "keep all on host": {"checkpoint": "none", "kept": "host"}, "8-bit AdamW": {"optimizer": "adamw8bit"},
    "lockstep": {"passes": "lockstep"}, "stream, lockstep": STREAMED | {"passes": "lockstep"},
    "stream, lockstep, boundaries on host": STREAMED | {"passes": "lockstep", "boundaries": "host"},
    "compiled": {"compile": True}, "stream, compiled": STREAMED | {"compile": True},  # predicted as if they were not
    "guidance batched": {"guidance": "batched"}, "guidance sequential": {"guidance": "sequential"},
}


def measure(benchmark: Any, cell: Cell) -> dict[str, Any]:
    """Time a cell's steps and put its peak into `extra_info`."""
    gauge = Gauge(torch.device("cuda" if ON_CARD else "cpu"))
    if not ON_CARD:
        register_toys()
    trace = rehearse(backbone_of(cell), cell.config(), cell.plan)
    with rigged(cell, gauge) as rig:
        rig.step()  # makes what stands: optimizer state, host slabs
        if ON_CARD:
            gauge.begin()
            rig.step()
            measured = max(p["allocated_bytes"] for p in gauge.end().values())
        else:
            measured = profiled_peak(rig.step)
        benchmark.pedantic(rig.step, rounds=3)
    predicted = predicted_peak(trace, on_card=ON_CARD)
    benchmark.extra_info.update(cell=cell.name(), peak_bytes=measured, predicted_bytes=predicted,
                                basis="allocated" if ON_CARD else "beyond what stands, no card")
    assert ON_CARD or measured == pytest.approx(predicted, rel=0.01)  # a card's are judged by part peaks of its suite
    return benchmark.extra_info


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", PLANS)
def test_strategies(benchmark, model, name):
    measure(benchmark, Cell(model=model, frames=FRAMES[0], rank=128 if ON_CARD else 4, plan=MemoryPlan(**PLANS[name])))


@pytest.mark.parametrize("rank", [64, 96, 128, 256, 512])
def test_rank(benchmark, rank):
    measure(benchmark, Cell(model=MODELS[0], frames=FRAMES[0], rank=rank))


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("model", MODELS)
def test_frames(benchmark, model, frames):
    measure(benchmark, Cell(model=model, frames=frames, rank=128 if ON_CARD else 4))


@pytest.mark.parametrize("mode", ["batched", "sequential", "none"])
def test_guidance_of_sampling(benchmark, mode):
    """One denoising step of the predictor: a pair in one batch, one after the other, or alone."""
    from memory.guidance import predict_pair

    if not ON_CARD:
        register_toys()
    cell, gauge = Cell(model=MODELS[1], frames=FRAMES[0], rank=4), Gauge(torch.device("cuda" if ON_CARD else "cpu"))
    with rigged(cell, gauge) as rig, torch.no_grad():
        sample = rig.samples(0)
        other = None if mode == "none" else torch.zeros_like(sample.text)

        def step() -> Sequence[torch.Tensor | None]:
            return predict_pair(rig.predict, sample.latents, sample.timestep, sample.text, other, mode=mode)

        if not ON_CARD:
            benchmark.extra_info["peak_bytes"] = profiled_peak(step)
        else:
            gauge.begin()
            gauge.phase("sample")
            step()
            benchmark.extra_info["peak_bytes"] = gauge.end()["sample"]["allocated_bytes"]
        benchmark.pedantic(step, rounds=3)
