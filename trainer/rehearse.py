"""The trainer's own step, on fake tensors: what the planner predicts from.

Nothing is imitated. The transformer, the erasers, the memory plan, the teacher, the losses and the optimizer are the very
objects of a run; only their tensors have no data, so a 5b step takes seconds and no memory.
Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from memory.fake import FakeMode
from memory.lockstep import Lockstep
from memory.optimizers import make_optimizer, moment_bytes_8bit, update_norms
from memory.plan import SHARDING_BUFFERS, MemoryPlan
from memory.simulate import recording
from memory.timeline import BACKWARD, FORWARD, OPTIMIZER, TEACHER, Storage, Trace
from trainer.assemble import latent_shape, resolve_dtype
from trainer.backbones import Predict
from trainer.backbones.cogvideox import CogVideoX
from trainer.config import TrainConfig
from trainer.distributed import average
from trainer.erasers import Erasers
from trainer.latents import make_latents
from trainer.losses import Teacher, lockstep_backward, student_backward
from trainer.prompts import Embeddings, PromptSet

PROMPTS = PromptSet("concept", ("concept",), ("safe",), (("preserved", ("preserved",)),))
"""For embeddings that are made up."""


def rehearse(backbone: CogVideoX, config: TrainConfig, plan: MemoryPlan, num_blocks: int | None = None,
             num_cards: int = 1) -> Trace:
    """The trace of one training step under `plan`, with `num_rehearsed(config)` passes. `num_blocks`: with fewer blocks; all are alike.

    `num_cards`: what one of several sees, with its rows of the batch and a reduction of gradients. Sharded blocks, which
    need processes, are rehearsed as streamed ones: they too pass through a few buffers, and their masters are divided.

    State that the optimizer makes in a first step, and buffers that activations are parked in, count as standing: they
    are there in every later step. 8-bit optimizers need real tensors: their state is that of AdamW with its size set right.
    """
    device = torch.device("cpu")
    dtype = resolve_dtype(backbone, plan, insist=True)
    shape = (config.data.batch_size, *latent_shape(backbone, config.model))
    latents, preserved = (make_latents(config, backbone.scheduler(), shape, stream, device).apart(slice(shape[0] // num_cards))
                          for stream in ("target", "preserved"))
    applicable = replace(plan, compile=False)  # no trace sees into compiled code
    if plan.num_shards > 1:
        applicable = replace(applicable, num_shards=1, resident_blocks=0, offload_buffers=SHARDING_BUFFERS)
    with FakeMode(allow_non_fake_inputs=True):
        transformer = backbone.fake_transformer(dtype=dtype, num_blocks=num_blocks)
        blocks = backbone.blocks(transformer)
        erasers = Erasers(blocks, config.optim.rank)
        applied = backbone.apply(applicable, transformer, device)
        predict = backbone.predictor(transformer, shape[1:])
        table = torch.empty(len(PROMPTS.texts), backbone.text_length, backbone.text_width, dtype=dtype)
        embeddings = Embeddings(table, PROMPTS.texts)
        columns = {"concept": torch.zeros(1, dtype=torch.int64)} if config.loss.alpha > 0 else None
        # Whichever blocks make the mask: were it only some, blocks would not be alike. A map is (B, N), and its time is small.
        teacher = Teacher(predict, erasers, list(blocks), loss=config.loss, prompts=PROMPTS, embeddings=embeddings,
                          columns=columns, latents=latents, preserved_latents=preserved if config.loss.beta > 0 else None, seed=0,
                          guidance=plan.guidance, trajectory_guidance=config.data.trajectory_guidance)
        optimizer = make_optimizer(erasers.parameters(), kind="adamw", lr=config.optim.lr)
        extra = [backbone.fake_transformer(dtype=dtype) for _ in range(plan.backbone_copies - 1)]
        extra += [backbone.text_encoder.fake(dtype=dtype) for _ in range(plan.text_encoder_resident)]
        with recording() as recorder, ExitStack() as stack:
            recorder.adopt_model(transformer, blocks, applied)
            recorder.adopt([embeddings.table], "other", place="pinned")
            recorder.adopt([p for model in extra for p in model.parameters()], "weights")
            recorder.watch(blocks, together=applied.lockstep is not None)

            def phase(name: str) -> None:
                stack.close()
                stack.enter_context(recorder.phase(name))

            _step(teacher, predict, applied.lockstep, erasers, optimizer, config, phase, num_cards)
            if applied.activations:  # the slabs that this step made; masters are known
                recorder.adopt(applied.activations.host_buffers, "saved activations", place="pinned")
        trace = recorder.trace()
        applied.undo()
    if plan.num_shards > 1:
        trace = trace.sharded(plan.num_shards)
    return trace if plan.optimizer == "adamw" else with_8bit_state(trace)


def num_rehearsed(config: TrainConfig) -> int:
    """Accumulated passes that a trace shows: the first, and one of those that find its gradients there and add to them."""
    return min(config.optim.accumulation, 2)


def teacher_share(config: TrainConfig) -> float:
    """How often a pass has the teacher in it: with a pool, as often as the pool is filled in the whole run."""
    num_passes = config.optim.steps * config.optim.accumulation
    return min(1.0, config.data.pool / num_passes) if config.data.pool and num_passes else 1.0


def peak_beyond(adopt: list[torch.nn.Module], run: Callable[[], object]) -> int:
    """Device bytes that `run` needs at its peak, the parameters of `adopt` excepted. Call it under FakeTensorMode."""
    with recording() as recorder:
        recorder.adopt([t for model in adopt for t in (*model.parameters(), *model.buffers())], "weights")
        run()
    peaks = recorder.trace().peaks()
    return max(peaks.values()) - peaks["load"]


def with_8bit_state(trace: Trace) -> Trace:
    """AdamW's moments as bitsandbytes holds them."""
    def smaller(storage: Storage) -> Storage:
        return replace(storage, num_bytes=moment_bytes_8bit(storage.num_bytes // 4)) if storage.category == "optimizer" else storage

    return replace(trace, storages=tuple(map(smaller, trace.storages)))


def _step(teacher: Teacher, predict: Predict, lockstep: Lockstep | None, erasers: Erasers, optimizer: torch.optim.Optimizer,
          config: TrainConfig, phase: Callable[[str], None], num_cards: int) -> None:
    """One optimizer step as in `trainer.loop`, one that fills the pool if there is one; `phase(name)` is called where a phase begins."""
    def student(run: Callable) -> Callable:
        def phased(*args: Any) -> Any:
            phase(FORWARD)
            result = run(*args)
            phase(BACKWARD)
            return result

        return phased

    together = lockstep and not config.data.pool  # samples of a pool are made by themselves
    for k in range(num_rehearsed(config)):
        phase(TEACHER)
        drawn = teacher.draw(k) if together else teacher.sample(k)
        if lockstep:
            lockstep_backward(student(lockstep), predict, erasers, teacher, drawn, config.loss)
        else:
            student_backward(student(predict), erasers, drawn, config.loss)
        del drawn
    phase(OPTIMIZER)
    if num_cards > 1:
        average([p.grad for p in erasers.parameters()], reduce=lambda flat: None)
    norm = torch.nn.utils.get_total_norm([p.grad for p in erasers.parameters()])
    torch.nn.utils.clip_grads_with_norm_(erasers.parameters(), 1.0, norm)
    update_norms(erasers.parameters(), optimizer.step)
    optimizer.zero_grad(set_to_none=True)
