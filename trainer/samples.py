"""Samples during training: fixed prompts and seeds, so that pictures of different steps can be compared."""

import logging
from pathlib import Path

import torch

from trainer.assemble import Assembly
from trainer.backbones.cogvideox import CogVideoX
from trainer.config import TrainConfig
from trainer.assemble import video_size
from trainer.errors import InputOutputError
from trainer.generate import generate_latents
from trainer.prompts import Embeddings, PromptSet
from trainer.signals import StopFlag
from trainer.video import contact_sheet

logger = logging.getLogger(__name__)


class _Stopped(Exception):
    """A signal came while sampling."""


class Sampling:
    """Writes RUN/samples/step-NNNNNN.png. A failing sample is a warning: training goes on."""

    def __init__(self, backbone: CogVideoX, config: TrainConfig, prompts: PromptSet):
        self.backbone, self.config = backbone, config
        own = (*prompts.prompts[::max(1, len(prompts.prompts) // 2)][:2],
               *prompts.preserved[::max(1, len(prompts.preserved) // 2)][:2])
        self.prompts = config.output.sample_prompts or own

    def run(self, run_dir: Path, step: int, assembly: Assembly, embeddings: Embeddings, stop: StopFlag) -> None:
        """Sample every prompt with the erasers on and write the sheet; stops early, without one, on a signal."""
        def check(index: int) -> None:
            if stop:
                raise _Stopped

        output = self.config.output
        try:
            with assembly.erasers.switched(True):
                latents = generate_latents(
                    assembly.predict, self.backbone.scheduler(), embeddings, self.prompts,
                    list(range(len(self.prompts))), assembly.latent_shape, num_steps=output.sample_steps, batch_size=1,
                    guidance_scale=output.guidance_scale, guidance=self.config.memory.guidance, check=check)
            decode = self.backbone.decoder(video_size(self.backbone, self.config.model)[0], dtype=assembly.dtype,
                                           device=assembly.device)
            videos = [decode(one[None])[0] for one in latents]
            contact_sheet(run_dir / "samples" / f"step-{step:06d}.png", list(zip(self.prompts, videos)))
        except _Stopped:
            return
        except (torch.OutOfMemoryError, InputOutputError) as e:
            logger.warning("sampling at step %d failed, training is not affected: %s", step, e)
