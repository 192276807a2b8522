"""The three losses, on one backbone that is teacher (erasers off) and student (erasers on) in turn.

    v_neg     = v(x_t, a) - η (v(x_t, c) - v(x_t, a))        teacher; a: safe or empty prompt, c: prompt with the concept
    L_unlearn = mean (v_neg - v'(x_t, c))²
    L_loc     = mean over blocks of mean (o_l (1 - M))²       o_l: eraser output of block l, M: where the concept is
    L_pre     = mean (v'(x_t, p) - v(x_t, p))²                p: a prompt to preserve
    L         = L_unlearn + α L_loc + β L_pre

Means instead of sums keep the weights' meaning at every size. Source: T2VUnlearning, equations of section 3.
Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width, N video tokens.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory.guidance import predict_pair
from trainer.backbones import Predict
from trainer.config import LossConfig
from trainer.erasers import Erasers
from trainer.latents import Latents
from trainer.masks import captured_maps, concept_mask
from trainer.prompts import Embeddings, PromptSet
from trainer.seeding import order


@dataclass(frozen=True)
class Sample:
    """What the student trains on at one step. The teacher's part is constant. None: that term is not trained."""

    latents: Tensor  # (B, F, C, H, W) fp32; of several processes, B is the rows of this one
    timestep: Tensor  # (B,)
    text: Tensor  # (B, L, D)
    target: Tensor  # (B, F, C, H, W) fp32: v_neg
    mask: Tensor | None  # (B, N)
    preserved_latents: Tensor | None
    preserved_timestep: Tensor | None
    preserved_text: Tensor | None
    preserved_target: Tensor | None

    def parked(self) -> "Sample":
        """In host memory. From a card it goes to pinned memory and the host does not wait: read it by `to` that card only."""
        def park(value: Tensor) -> Tensor:
            if value.device.type == "cpu":
                return value
            return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)

        return self._moved(park)

    def to(self, device: torch.device | str) -> "Sample":
        """On a device, in the order of its stream."""
        return self._moved(lambda value: value.to(device, non_blocking=True))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Sample":
        return replace(self, **{f.name: move(value) for f in fields(self) if (value := getattr(self, f.name)) is not None})


class Teacher:
    """Makes the samples of every step; `step` counts student passes from 0 and comes in order."""

    def __init__(self, predict: Predict, erasers: Erasers, blocks: list[nn.Module], *, loss: LossConfig,
                 prompts: PromptSet, embeddings: Embeddings, columns: dict[str, Tensor] | None, latents: Latents,
                 preserved_latents: Latents | None, seed: int, guidance: str, trajectory_guidance: float = 1.0):
        """`columns`: the concept's token positions (K,) int64 by prompt; None where α is 0.
        `blocks`: those whose attention makes the mask. `guidance`: how two passes share the card (memory.guidance).
        `trajectory_guidance`: guidance scale by which trajectories advance."""
        self.predict, self.erasers, self.blocks, self.loss = predict, erasers, blocks, loss
        self.prompts, self.embeddings = prompts, embeddings
        self.columns = columns and {p: c.to(embeddings.table.device) for p, c in columns.items()}
        self.latents, self.preserved_latents = latents, preserved_latents
        self.seed, self.guidance, self.trajectory_guidance = seed, guidance, trajectory_guidance

    @torch.no_grad()
    def sample(self, step: int) -> Sample:
        """The sample of one step; trajectories are advanced past it."""
        with self.erasers.switched(False):
            x, t = self.latents.at(step)
            picked = self._order(len(self.prompts.prompts), "prompts", self.latents, step)
            texts = [self.prompts.prompts[i] for i in picked]
            anchors = [self.prompts.safe[i] if self.loss.anchor == "safe" else "" for i in picked]
            text = self.embeddings(texts)
            with self._maps(texts) as maps:
                v, v_anchor = predict_pair(self.predict, x, t, text, self.embeddings(anchors), mode=self.guidance)
            v, v_anchor = v.float(), v_anchor.float()
            target = v_anchor - self.loss.eta * (v - v_anchor)
            mask = concept_mask([m.map for m in maps], threshold=self.loss.mask_threshold) if maps else None
            self._advance(self.latents, step, x, t, v)
            return Sample(x, t, text, target, mask, *self._preserved(step))

    def _preserved(self, step: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if self.preserved_latents is None:
            return None, None, None, None
        x, t = self.preserved_latents.at(step)
        picked = self._order(len(self.prompts.preserved), "preserved", self.preserved_latents, step)
        text = self.embeddings([self.prompts.preserved[i] for i in picked])
        v = self.predict(x, t, text).float()
        self._advance(self.preserved_latents, step, x, t, v)
        return x, t, text, v

    def _order(self, count: int, purpose: str, latents: Latents, step: int) -> list[int]:
        return order(count, latents.shape[0], self.seed, purpose, latents.prompt_index(step))[latents.rows]

    def _advance(self, latents: Latents, step: int, x: Tensor, t: Tensor, v: Tensor) -> None:
        if self.trajectory_guidance != 1.0:
            empty = self.predict(x, t, self.embeddings([""] * len(x))).float()
            v = empty + self.trajectory_guidance * (v - empty)
        latents.advance(step, v)

    def _maps(self, texts: list[str]):
        if self.columns is None:
            return nullcontext([])
        return captured_maps(self.blocks, [self.columns[p] for p in texts])


class Samples:
    """The teacher's samples by step; with a pool, those of the first `pool` steps again and again.

    Pooled samples wait on the host, so the teacher is paid once. They are a function of (seed, step): a resumed run,
    whose pool is empty, makes the same ones again.
    """

    def __init__(self, teacher: Teacher, pool: int, device: torch.device):
        self.teacher, self.pool, self.device = teacher, pool, device
        self._kept: dict[int, Sample] = {}

    def __call__(self, step: int) -> Sample:
        if not self.pool:
            return self.teacher.sample(step)
        index = step % self.pool
        if index not in self._kept:
            for i in range(self.teacher.latents.first_needed(index), index + 1):
                self._kept[i] = self.teacher.sample(i).parked()
        return self._kept[index].to(self.device)


def student_backward(predict: Predict, erasers: Erasers, sample: Sample, loss: LossConfig, *,
                     scale: float | Tensor = 1.0) -> dict[str, Tensor]:
    """Add the gradient of `scale * L` to the erasers; returns the unweighted terms and L, detached scalars.

    `scale`: 1 / accumulation, times a loss scaler's scale; a number or a scalar tensor.

    The two student passes are back-propagated one after the other: only one graph lives at a time, and the sum of
    their gradients is that of the joint loss.
    """
    terms = {}
    localised = sample.mask is not None and loss.alpha > 0
    with erasers.switched(True):
        with erasers.localised(sample.mask, loss.alpha * scale) if localised else nullcontext():
            v = predict(sample.latents, sample.timestep, sample.text)
            unlearn = F.mse_loss(v.float(), sample.target)
            del v
            (scale * unlearn).backward()
        terms["unlearn"] = unlearn.detach()
        if localised:
            terms["loc"] = torch.stack(list(erasers.localisation_terms.values())).mean()
        if sample.preserved_target is not None:
            v = predict(sample.preserved_latents, sample.preserved_timestep, sample.preserved_text)
            preserve = F.mse_loss(v.float(), sample.preserved_target)
            del v
            (scale * loss.beta * preserve).backward()
            terms["pre"] = preserve.detach()
    terms["loss"] = terms["unlearn"] + loss.alpha * terms.get("loc", 0.0) + loss.beta * terms.get("pre", 0.0)
    return terms
