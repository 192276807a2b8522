"""The reproduction log replayed on fake tensors: what overflowed on 24 and 96 GB, and which one change fits. Predicted.

    python -m bench.story

CogVideoX-2b at 17 frames in float32. "With CFG": every pass, the student's too, has a batch of two.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from bench.naive import Naive, Recipe
from bench.provenance import take_no_arguments, write_result
from memory.cards import GIB, lookup
from memory.checkpointing import checkpoint_blocks
from memory.fake import FakeMode
from memory.optimizers import make_optimizer
from memory.plan import MemoryPlan
from memory.simulate import recording
from memory.timeline import Trace
from trainer.assemble import open_backbone
from trainer.config import TrainConfig, replaced
from trainer.rehearse import rehearse

CARDS = ("24gb", "96gb")
LOG = replaced(TrainConfig(), {"model.model": "cogvideox-2b", "model.weights": "random", "model.frames": 17})


def rehearse_naive(config: TrainConfig, recipe: Recipe, *, checkpointed: bool = False) -> Trace:
    """The trace of one step of the naive recipe; both guidance passes of the teacher one after the other."""
    with FakeMode(allow_non_fake_inputs=True):
        naive = Naive(config, torch.device("cpu"), recipe, lambda stage: None, fake=True)
        naive.teacher.guidance = "sequential"
        # The foreach form reads its step counts, which fake tensors do not have. Its temporaries, four times the
        # erasers' 59 MB at most, are therefore left out.
        naive.optimizer = make_optimizer(naive.erasers.parameters(), kind="adamw", lr=config.optim.lr)
        blocks = naive.models[0].transformer_blocks
        if checkpointed:
            naive.recomputed = True
            checkpoint_blocks(blocks, ["inputs"] * len(blocks))
        with recording() as recorder, ExitStack() as stack:
            recorder.adopt_model(naive.models[0], blocks)
            recorder.adopt([p for p in naive.models[1].parameters() if naive.models[1] is not naive.models[0]], "weights")
            recorder.adopt(naive.residents, "weights")
            recorder.watch(blocks)

            def note(stage: str) -> None:
                stack.close()
                stack.enter_context(recorder.phase(stage))

            naive.note = note
            naive.step()
        return recorder.trace()


def overflow(trace: Trace, capacity_bytes: int) -> str | None:
    """The first phase whose live bytes exceed `capacity_bytes`; None if none does."""
    return next((phase for phase, total, _ in trace.timeline() if total > capacity_bytes), None)


def described(trace: Trace) -> dict[str, Any]:
    """Peak, categories, and where each card breaks."""
    found: dict[str, Any] = {"cards": {}}
    for name in CARDS:
        card = lookup(name)
        p = trace.prediction(workspace_bytes=card.cublas_workspace_bytes)
        found |= {"peak_bytes": p.peak_bytes, "reserved_bytes": p.reserved_bytes, "by_category": p.by_category,
                  "by_phase": p.by_phase}
        found["cards"][name] = {"fits": p.reserved_bytes <= card.available_bytes, "breaks_in": overflow(trace, card.available_bytes)}
    return found


def variants() -> dict[str, Any]:
    """Name -> a function that makes the trace."""
    base = MemoryPlan(dtype="float32", checkpoint="none", backbone_copies=2, text_encoder_resident=True)
    log = replaced(LOG, {"memory.dtype": "float32"})
    cfg, half = replaced(log, {"data.batch_size": 2}), replaced(log, {"memory.dtype": "float16"})
    alone = Recipe(text_encoder_numel=0, vae_numel=0)
    return {
        "as in the log, without CFG": lambda: rehearse_naive(log, Recipe()),
        "as in the log, with CFG": lambda: rehearse_naive(cfg, Recipe()),
        "one backbone": lambda: rehearse_naive(log, Recipe(num_copies=1)),
        "text encoder and VAE freed": lambda: rehearse_naive(log, alone),
        "one graph at a time": lambda: rehearse(open_backbone(log.model), log, base),
        "backbone in float16": lambda: rehearse_naive(half, Recipe()),
        "checkpointing": lambda: rehearse_naive(log, Recipe(), checkpointed=True),
        "with CFG, checkpointing": lambda: rehearse_naive(cfg, Recipe(), checkpointed=True),
        "all but checkpointing": lambda: rehearse(open_backbone(log.model), half, replace(
            base, dtype="float16", backbone_copies=1, text_encoder_resident=False)),
    }


def main() -> None:
    found: dict[str, Any] = {}
    for name, trace in variants().items():
        found[name] = described(trace())
        print(name, f"{found[name]['peak_bytes'] / GIB:.2f} GiB", found[name]["cards"], flush=True)
    write_result("story", {"basis": "predicted", "model": "cogvideox-2b", "frames": 17, "variants": found})


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
