"""Faults put into a training step on purpose."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file, save_file

from bench import injected
from bench.watched import NUM_BLOCKS, Inject, Outcome, settings, watch
from trainer.cache import cache_directory
from trainer.config import TrainConfig
from trainer.diagnose import prepare

# Damage to files, before anything is loaded: a function of the settings.

def damaged_weight_file(config: TrainConfig) -> None:
    file = next((Path(config.model.model) / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["transformer_blocks.1.ff.net.2.weight"][0, 3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def damaged_cache(config: TrainConfig) -> None:
    prepare(config).assembly.applied.undo()
    for file in cache_directory("embeddings").glob("*.safetensors"):
        row = load_file(file)["embedding"]
        row[0, 0] = float("nan")
        save_file({"embedding": row}, file)


def same_prompts(config: TrainConfig) -> None:
    config.data.prompts.write_text("prompt,safe\na red circle,a red circle\n")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: what is done, and what must be named."""

    name: str
    code: str
    block: int | None = None
    inject: Inject | None = None
    damage: Callable[[TrainConfig], None] | None = None
    pipeline: str = "2b"
    settings: dict[str, Any] = field(default_factory=dict)
    at: tuple[int, ...] = (0,)
    """Before which steps it may strike."""


def run_fault(fault: Fault, at: int, pipeline: Path) -> Outcome:
    """Train with one fault on a pipeline that it may damage, in a cache of its own."""
    config = settings(pipeline, **fault.settings)
    with patch.dict(os.environ, XDG_CACHE_HOME=str(pipeline / "cache")):
        if fault.damage:
            fault.damage(config)
        return watch(config, inject=fault.inject, at=at, num_steps=at + 2)


HALF = dict(memory__dtype="float16", model__force_dtype=True)
DELTA = dict(loss__alpha=0.0, loss__beta=0.0)


def _each(name: str, code: str, make: Callable[[int], Inject], blocks: Iterable[int] = range(NUM_BLOCKS),
          **more: Any) -> Iterator[Fault]:
    return (Fault(name=f"{name}, block {k}", code=code, block=k, inject=make(k), **more) for k in blocks)


FAULTS: tuple[Fault, ...] = (
    *_each("to_empty() on wrapped attention", "wiped-attention", injected.wipe_attention),
    *_each("feed-forward never loaded", "wiped-weights", injected.wipe_feed_forward),
    Fault(name="positions wiped", code="wiped-weights", inject=injected.wipe_positions),
    Fault(name="fp16 adapters under Adam", code="half-precision-adapters", block=0, inject=injected.half_adapters),
    *_each("fp16 on a bf16-native model", "non-native-dtype", injected.overflow, pipeline="bf16", settings=HALF, at=(0, 2)),
    *_each("overflow of an fp16-native model", "half-precision-overflow", injected.overflow, pipeline="fp16", at=(0, 2)),
    *_each("outlier of an fp16-native model", "near-overflow", injected.outlier, pipeline="fp16"),
    Fault(name="learning rate x 1000 (1e-4)", code="learning-rate-too-high", settings={"optim__lr": 0.1}),
    Fault(name="learning rate x 1000 (1e-3)", code="learning-rate-too-high", settings={"optim__lr": 1.0}),
    Fault(name="eta absurd", code="eta-too-large", settings={"loss__eta": 5000.0}),
    Fault(name="eta beyond float32", code="non-finite-target", settings={"loss__eta": 3e38}),
    Fault(name="adapters left out of the optimizer", code="not-in-optimizer", block=0, inject=injected.left_out(0, 1, 2)),
    *_each("one adapter left out of the optimizer", "not-in-optimizer", injected.left_out),
    *_each("adapter detached", "detached-eraser", injected.detach, at=(0, 2)),
    Fault(name="all adapters detached", code="detached-eraser", block=0, inject=injected.detach_all, at=(0, 2)),
    Fault(name="prediction detached", code="detached-eraser", block=0, inject=injected.detach_prediction, at=(0, 2)),
    Fault(name="student under no_grad", code="no-grad-student", inject=injected.student_under_no_grad, at=(0, 2)),
    Fault(name="loop under inference_mode", code="no-grad-student", inject=injected.loop_under_inference_mode, at=(0, 2)),
    *_each("parameters replaced by an offload hook", "replaced-parameters", injected.replace_parameters, at=(0, 2)),
    Fault(name="switched off before recompute", code="switched-before-recompute", block=2, inject=injected.switch_before_recompute),
    Fault(name="student with erasers off", code="student-without-erasers", block=0, inject=injected.never_switched(False), at=(0, 2)),
    Fault(name="teacher with erasers on", code="teacher-with-erasers", block=0, inject=injected.never_switched(True)),
    Fault(name="reentrant checkpointing", code="reentrant-checkpointing", block=0, inject=injected.reentrant,
          settings={"memory__checkpoint": "none"}),
    *_each("checkpointing silently off", "checkpointing-off", injected.checkpointing_off),
    Fault(name="trajectory not advanced", code="trajectory-not-advanced", inject=injected.stuck_trajectory),
    Fault(name="sampler gives infinity", code="non-finite-latents", inject=injected.diverging_sampler, at=(2,)),
    Fault(name="NaN in the embedding cache", code="non-finite-embedding", damage=damaged_cache),
    Fault(name="NaN in the embeddings", code="non-finite-embedding", inject=injected.nan_in_embedding, at=(0, 2)),
    Fault(name="NaN in one weight file", code="non-finite-weight", block=1, damage=damaged_weight_file),
    *_each("NaN in one weight", "non-finite-weight", injected.nan_in_weight, at=(0, 2)),
    *_each("NaN in one gradient", "non-finite-gradient", injected.nan_in_gradient, at=(0, 2)),
    *_each("NaN in one gradient, fp16 with a scaler", "non-finite-gradient", injected.nan_in_gradient, pipeline="fp16"),
    *_each("infinite flow back out of attention", "non-finite-gradient", injected.infinite_flow, (1, 2), at=(0, 2)),  # beyond block 0 there is no eraser
    *_each("NaN in the student alone", "non-finite-activation", injected.nan_in_student, at=(0, 2)),
    *_each("loss swallowed to 0", "swallowed-loss", injected.swallow, at=(0, 2)),
    *_each("dead GELU", "dead-gelu", injected.dead_gelu, at=(0, 2)),
    Fault(name="gradients underflow in fp16", code="gradient-underflow", inject=injected.underflow, pipeline="fp16", settings=DELTA),
    Fault(name="gradients underflow in an autocast to fp16", code="gradient-underflow", inject=injected.underflow_in_autocast, settings=DELTA),
    Fault(name="gradients overflow at any loss scale", code="loss-scale-collapse", inject=injected.infinite_flow(1), pipeline="fp16"),
    *_each("eraser diverged", "eraser-diverged", injected.run_away, at=(2,)),
    *_each("eraser diverged, all finite", "eraser-diverged", partial(injected.run_away, weight=1e4), at=(2,)),
    Fault(name="optimizer step skipped", code="weights-never-move", inject=injected.no_optimizer_step, at=(0, 2)),
    Fault(name="gradients never zeroed", code="gradients-not-zeroed", inject=injected.no_zero_grad, at=(0, 2)),
    *_each("untrained eraser acts", "untrained-eraser-acts", injected.always_acts),
    Fault(name="eraser without effect", code="no-op-adapter", inject=injected.never_acts),
    *_each("gate of 0 after the eraser", "zero-gradient", injected.closed_gate, at=(0, 2)),
    *_each("frozen eraser", "frozen-eraser", injected.freeze, at=(0, 2)),
    Fault(name="all erasers frozen", code="frozen-eraser", block=0, inject=injected.freeze_all, at=(0, 2)),
    Fault(name="prompt and safe prompt the same", code="nothing-to-learn", damage=same_prompts,
          settings={"loss__beta": 0.0}),
)
