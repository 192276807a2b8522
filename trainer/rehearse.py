"""The trainer's own step, on fake tensors: what the planner predicts from.

Nothing is imitated. The transformer, the erasers, the memory plan, the teacher, the losses and the optimizer are the very
objects of a run; only their tensors have no data, so a 5b step takes seconds and no memory.
Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memory.optimizers import make_optimizer
from memory.plan import MemoryPlan, apply_plan, resolve_keeps
from memory.simulate import BACKWARD, FORWARD, OPTIMIZER, Trace, recording
from trainer.assemble import resolve_dtype, video_size
from trainer.backbones import Predict
from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.weights import randomise
from trainer.config import TrainConfig
from trainer.erasers import Erasers
from trainer.latents import make_latents
from trainer.losses import Teacher, student_backward
from trainer.prompts import Embeddings, PromptSet

_PROMPTS = PromptSet("concept", ("concept",), ("safe",), ("preserved",))


def rehearse(backbone: CogVideoX, config: TrainConfig, plan: MemoryPlan, *, num_blocks: int | None = None,
             num_steps: int = 2) -> tuple[Trace, tuple[str, ...]]:
    """The trace of one training step under `plan`, and what each block keeps.

    `num_blocks`: rehearse with fewer blocks (blocks are alike). The last of `num_steps` is recorded: gradients, optimizer
    state and host buffers then exist, as in every later step.
    """
    device = torch.device("cpu")
    dtype = resolve_dtype(backbone, plan, insist=True)
    shape = (config.data.batch_size, *backbone.latent_shape(*video_size(backbone, config.model)))
    config = replace(config, memory=plan)
    schedulers = [backbone.scheduler(), backbone.scheduler()]
    latents = make_latents(config, schedulers[0], shape, "target", device)
    preserved = make_latents(config, schedulers[1], shape, "preserved", device) if config.loss.beta > 0 else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        transformer = backbone.fake_transformer(dtype=dtype, num_blocks=num_blocks)
        blocks = backbone.blocks(transformer)
        erasers = Erasers(blocks, config.optim.rank)
        applied = apply_plan(transformer, blocks, plan, device=device, feed_forwards=[b.ff for b in blocks],
                             boundary_names=("hidden_states", "encoder_hidden_states"))
        predict = backbone.predictor(transformer, shape[1:])
        names = [*_PROMPTS.prompts, *_PROMPTS.safe, *_PROMPTS.preserved, ""]
        embeddings = Embeddings(torch.empty(len(names), backbone.text_length, backbone.text_width, dtype=dtype), names)
        columns = {"concept": torch.zeros(1, dtype=torch.int64)} if config.loss.alpha > 0 else None
        masked = [blocks[i] for i in config.loss.mask_blocks] if config.loss.mask_blocks and not num_blocks else list(blocks)
        teacher = Teacher(predict, erasers, masked, loss=config.loss, prompts=_PROMPTS, embeddings=embeddings,
                          columns=columns, latents=latents, preserved_latents=preserved, seed=0,
                          guidance=plan.guidance, trajectory_guidance=config.data.trajectory_guidance)
        optimizer = make_optimizer(erasers.parameters(), kind="adamw", lr=config.optim.lr)
        for step in range(num_steps - 1):
            _step(teacher, predict, erasers, optimizer, config, step, lambda name: None)
        with recording() as recorder, ExitStack() as stack:
            recorder.adopt_model(transformer, blocks, applied)
            recorder.adopt([embeddings.table], "other")
            recorder.adopt([t for state in optimizer.state.values() for t in state.values()], "optimizer")
            recorder.watch(blocks)

            def phase(name: str) -> None:
                stack.close()
                stack.enter_context(recorder.phase(name))

            _step(teacher, predict, erasers, optimizer, config, num_steps - 1, phase)
        trace = recorder.trace()
        applied.undo()
    return trace, resolve_keeps(plan, len(blocks))


def _step(teacher: Teacher, predict: Predict, erasers: Erasers, optimizer: torch.optim.Optimizer, config: TrainConfig,
          step: int, phase: Callable[[str], None]) -> None:
    """One optimizer step as in `trainer.loop`; `phase(name)` is called where a phase begins."""
    def student(*args: torch.Tensor) -> torch.Tensor:
        phase(FORWARD)
        velocity = predict(*args)
        phase(BACKWARD)
        return velocity

    phase("teacher")
    sample = teacher.sample(step)
    student_backward(student, erasers, sample, config.loss)
    phase(OPTIMIZER)
    norm = torch.nn.utils.get_total_norm([p.grad for p in erasers.parameters()])
    torch.nn.utils.clip_grads_with_norm_(erasers.parameters(), 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
