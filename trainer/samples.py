"""Samples during training: fixed prompts and seeds, so that pictures of different steps can be compared."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from memory.exhaustion import exhausted
from memory.meter import Meter
from trainer.assemble import Assembly, video_size
from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.weights import shards
from trainer.config import TrainConfig
from trainer.diffusion import Sampler
from trainer.distributed import agreed, attended
from trainer.errors import CheckpointError, InputOutputError, NonFinite
from trainer.generate import generate_latents
from trainer.prompts import Embeddings, PromptSet
from trainer.signals import StopFlag
from trainer.video import contact_sheet, spread

logger = logging.getLogger(__name__)
_FAILED = (InputOutputError, NonFinite, CheckpointError)


def picture(run_dir: Path, step: int) -> Path:
    """Where the sheet of a step is."""
    return run_dir / "samples" / f"step-{step:06d}.png"


class _Stopped(Exception):
    """A signal came while sampling."""


class Sampling:
    """Writes RUN/samples/step-NNNNNN.png. A failing sample is a warning: training goes on."""

    def __init__(self, backbone: CogVideoX, config: TrainConfig, prompts: PromptSet, meter: Meter):
        self.backbone, self.config, self.meter = backbone, config, meter
        own = (*prompts.prompts[::max(1, len(prompts.prompts) // 2)][:2],
               *prompts.preserved[::max(1, len(prompts.preserved) // 2)][:2])
        self.prompts = config.output.sample_prompts or own
        Sampler(backbone.scheduler(), config.output.sample_steps)  # what cannot be sampled is refused now, not after training
        if backbone.directory is not None:
            shards(backbone.directory / "vae")

    def due(self, step: int) -> bool:
        """Whether pictures belong to that step; those of the last one come after training."""
        every = self.config.output.sample_every
        return bool(every) and step % every == 0 and step < self.config.optim.steps

    def run(self, run_dir: Path, step: int, assembly: Assembly, embeddings: Embeddings, stop: StopFlag) -> None:
        """Sample every prompt with the erasers on and write the sheet; stops early, without one, on a signal.

        Of several processes the first does it, the others wait; unless each has but a part of the weights.
        """
        torch.cuda.empty_cache()  # what a sample allocates is not what a step does: neither is to find the gaps of the other
        try:
            self._run(run_dir, step, assembly, embeddings, stop)
        finally:
            torch.cuda.empty_cache()

    def _run(self, run_dir: Path, step: int, assembly: Assembly, embeddings: Embeddings, stop: StopFlag) -> None:
        together = assembly.applied.plan.num_shards > 1  # each has but a part of the weights
        output, latents = self.config.output, None

        def sampled(stopped: Callable[[], bool]) -> Tensor:
            def check(index: int) -> None:
                if stopped():
                    raise _Stopped

            with assembly.erasers.switched(True), self.meter.phase("sample"):
                return generate_latents(
                    assembly.predict, self.backbone.scheduler(), embeddings, self.prompts,
                    list(range(len(self.prompts))), assembly.latent_shape, num_steps=output.sample_steps, batch_size=1,
                    guidance_scale=output.guidance_scale, guidance=self.config.memory.guidance, check=check)

        try:
            if together:
                latents = sampled(lambda: agreed(stop))
            with attended() as tell:
                if tell is None:
                    return
                if latents is None:
                    latents = sampled(lambda: bool(tell() or stop))
                decode = self.backbone.decoder(video_size(self.backbone, self.config.model)[0], dtype=assembly.dtype,
                                               device=assembly.device)
                rows = []
                with self.meter.phase("decode"):
                    for prompt, one in zip(self.prompts, latents):
                        rows.append((prompt, spread(decode(one[None])[0])))
                        tell()
                contact_sheet(picture(run_dir, step), rows)
        except _Stopped:
            return
        except (RuntimeError, MemoryError, *_FAILED) as e:
            alone = not together or latents is not None  # else the others wait for this one
            if not (isinstance(e, _FAILED) or exhausted(e) and alone):
                raise
            logger.warning("sampling at step %d failed, training is not affected: %s", step, e or type(e).__name__)
