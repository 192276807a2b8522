"""The recipe that people begin with, from the trainer's own parts and diffusers' blocks: what all the saving is measured against.

Two copies of the backbone in float32 (a teacher and a student), the text encoder and the autoencoder left on the device, the
teacher's two guidance passes as one batch, both student passes in one joint graph, no checkpointing, AdamW that
makes temporaries as large as its parameters. Runs on a card, on the CPU, and on fake tensors.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trainer.assemble import latent_shape, open_backbone, resolve_dtype
from trainer.backbones import lean
from trainer.config import TrainConfig
from trainer.erasers import Erasers, Localisation
from trainer.latents import make_latents
from trainer.losses import Teacher
from trainer.prompts import Embeddings
from trainer.rehearse import PROMPTS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What stays on the device beside the step. Tensors of the right size stand for the two models."""

    num_copies: int = 2
    """Backbones: one for the teacher and one for the student, or one for both."""
    text_encoder_numel: int = 4_762_310_656
    """Parameters of T5 v1.1-XXL's encoder."""
    vae_numel: int = 215_583_907
    """Parameters of CogVideoX's autoencoder."""


class Naive:
    """The naive recipe, set up. `note(stage)` is called where each stage begins, so that one knows where it broke."""

    def __init__(self, config: TrainConfig, device: torch.device, recipe: Recipe, note: Callable[[str], object], *,
                 fake: bool = False):
        """`config`: model, size, rank and losses; its memory plan says the dtype (float32 is what people begin with).
        `fake`: for use under FakeTensorMode(allow_non_fake_inputs=True)."""
        self.config, self.note, backbone = config, note, open_backbone(config.model)
        dtype = resolve_dtype(backbone, config.memory, insist=True)
        shape = (config.data.batch_size, *latent_shape(backbone, config.model))

        def load() -> nn.Module:
            with patch.object(lean, "make_lean"):
                return backbone.fake_transformer(dtype=dtype) if fake else backbone.load_transformer(dtype=dtype, device=device)

        note("loading the student")
        student = load()
        note("loading the teacher")
        teacher = load() if recipe.num_copies == 2 else student
        note("loading the text encoder and the autoencoder")
        lean.rotate_in_norms(backbone.blocks(teacher))  # of which the mask is made
        self.residents = [torch.empty(numel, dtype=dtype, device=device) for numel in (recipe.text_encoder_numel, recipe.vae_numel)]
        self.models = (student, teacher)
        self.erasers = Erasers(backbone.blocks(student), config.optim.rank)
        self.predict = backbone.predictor(student, shape[1:])
        names = PROMPTS.texts
        table = torch.randn(len(names), backbone.text_length, backbone.text_width).to(dtype)
        with unset_fake_temporarily():  # a schedule's values are read
            latents, preserved = (make_latents(config, backbone.scheduler(), shape, stream, device) for stream in ("target", "preserved"))
        self.teacher = Teacher(backbone.predictor(teacher, shape[1:]), self.erasers, list(backbone.blocks(teacher)), loss=config.loss,
                               prompts=PROMPTS, embeddings=Embeddings(table, names).to(device), columns={"concept": torch.zeros(1, dtype=torch.int64)},
                               latents=latents, preserved_latents=preserved, seed=0, guidance="batched")
        self.optimizer = torch.optim.AdamW(self.erasers.parameters(), lr=config.optim.lr, foreach=True)
        self.num_steps, self.recomputed = 0, False

    def step(self) -> None:
        """One optimizer step with all three losses in one graph."""
        loss = self.config.loss
        self.note("teacher")
        sample = self.teacher.sample(self.num_steps)
        self.note("student forward")
        with self.erasers.switched(True), ExitStack() as localised:
            localised.enter_context(self.erasers.localised(Localisation(sample.mask, loss.alpha)))
            v = self.predict(sample.latents, sample.timestep, sample.text)
            if not self.recomputed:  # in one joint graph, a recomputation cannot tell the passes apart: both are localised
                localised.close()
            kept = self.predict(sample.preserved_latents, sample.preserved_timestep, sample.preserved_text)
            total = F.mse_loss(v.float(), sample.target) + loss.beta * F.mse_loss(kept.float(), sample.preserved_target)
            self.note("student backward")
            total.backward()
        self.note("optimizer")
        torch.nn.utils.clip_grad_norm_(self.erasers.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1
