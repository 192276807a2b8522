"""The three losses, on one backbone that is teacher (erasers off) and student (erasers on) in turn.

    v_neg     = v(x_t, a) - η (v(x_t, c) - v(x_t, a))        teacher; a: safe or empty prompt, c: prompt with the concept
    L_unlearn = mean (v_neg - v'(x_t, c))²
    L_loc     = mean over blocks of mean (o_l (1 - M))²       o_l: eraser output of block l, M: where the concept is
    L_pre     = mean (v'(x_t, p) - v(x_t, p))²                p: a prompt to preserve
    L         = L_unlearn + α L_loc + β L_pre

Means instead of sums keep the weights' meaning at every size. Source: T2VUnlearning, equations of section 3.
Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width, N video tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory.guidance import guide, predict_pair
from memory.lockstep import Pass
from memory.streams import pinning
from trainer.backbones import Predict
from trainer.config import LossConfig
from trainer.erasers import Erasers, Localisation
from trainer.latents import Latents
from trainer.masks import ConceptMaps
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
        """A copy in host memory. From a card it goes to pinned memory and the host does not wait: read it by `to` that card only."""
        def park(value: Tensor) -> Tensor:
            if value.device.type == "cpu":
                return value.clone()
            with pinning():
                host = torch.empty_like(value, device="cpu", pin_memory=True)
            return host.copy_(value, non_blocking=True)

        return self._moved(park)

    def to(self, device: torch.device | str) -> "Sample":
        """On a device, in the order of its stream."""
        return self._moved(lambda value: value.to(device, non_blocking=True))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Sample":
        return replace(self, **{f.name: move(value) for f in fields(self) if (value := getattr(self, f.name)) is not None})


@dataclass(frozen=True)
class Draw:
    """What a step begins with, before the teacher has said anything. Shapes as in `Sample`."""

    step: int
    latents: Tensor
    timestep: Tensor
    text: Tensor
    anchor_text: Tensor
    maps: ConceptMaps | None
    preserved_latents: Tensor | None = None
    preserved_timestep: Tensor | None = None
    preserved_text: Tensor | None = None


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
        self.columns = columns and {p: c.to(embeddings.device) for p, c in columns.items()}
        self.latents, self.preserved_latents = latents, preserved_latents
        self.seed, self.guidance, self.trajectory_guidance = seed, guidance, trajectory_guidance

    def sample(self, step: int) -> Sample:
        """The sample of one step, good until the next is made; trajectories are advanced past it."""
        draw = self.draw(step)
        return self.answered(draw, {name: each() for name, each in self.passes(draw).items()})

    @torch.no_grad()
    def draw(self, step: int) -> Draw:
        """Latents and prompts of one step."""
        x, t = self.latents.at(step)
        picked = self._order(len(self.prompts.prompts), "prompts", self.latents, step)
        texts = [self.prompts.prompts[i] for i in picked]
        anchors = [self.prompts.safe[i] if self.loss.anchor == "safe" else "" for i in picked]
        maps = None if self.columns is None else ConceptMaps(self.blocks, [self.columns[p] for p in texts])
        drawn = Draw(step, x, t, self.embeddings(texts), self.embeddings(anchors), maps)
        if self.preserved_latents is None:
            return drawn
        x, t = self.preserved_latents.at(step)
        picked = self._order(len(self.prompts.preserved), "preserved", self.preserved_latents, step)
        return replace(drawn, preserved_latents=x, preserved_timestep=t,
                       preserved_text=self.embeddings([self.prompts.preserved[i] for i in picked]))

    def passes(self, draw: Draw) -> dict[str, Pass]:
        """What the teacher has to be asked, in this order or together; for `answered`."""
        def ask(latents: Tensor, timestep: Tensor, text: Tensor, maps: ConceptMaps | None = None) -> Pass:
            return Pass(partial(self.predict, latents, timestep, text), partial(self._switched_off, maps))

        target, preserved = (draw.latents, draw.timestep), (draw.preserved_latents, draw.preserved_timestep)
        if self.guidance == "batched":
            pair = partial(predict_pair, self.predict, *target, draw.text, draw.anchor_text, mode="batched")
            asked = {"pair": Pass(pair, partial(self._switched_off, draw.maps))}
        else:  # with maps, both of them: by the same attention kernel
            asked = {"concept": ask(*target, draw.text, draw.maps), "anchor": ask(*target, draw.anchor_text, draw.maps)}
        if draw.preserved_latents is not None:
            asked["preserved"] = ask(*preserved, draw.preserved_text)
        if self._guided:
            empty = self.embeddings([""] * len(draw.latents))
            if self.loss.anchor != "empty":
                asked["empty"] = ask(*target, empty)
            if draw.preserved_latents is not None:
                asked["preserved empty"] = ask(*preserved, empty)
        return asked

    @torch.no_grad()
    def answered(self, draw: Draw, answers: Mapping[str, Any]) -> Sample:
        """The sample, from what every pass returned; trajectories are advanced past it."""
        v, v_anchor = (each.float() for each in answers.get("pair") or (answers["concept"], answers["anchor"]))
        target = v_anchor - self.loss.eta * (v - v_anchor)
        mask = draw.maps and draw.maps.mask(threshold=self.loss.mask_threshold)
        self._advance(self.latents, draw.step, v, v_anchor if self.loss.anchor == "empty" else answers.get("empty"))
        v = None
        if draw.preserved_latents is not None:
            v = answers["preserved"].float()
            self._advance(self.preserved_latents, draw.step, v, answers.get("preserved empty"))
        return Sample(draw.latents, draw.timestep, draw.text, target, mask, draw.preserved_latents, draw.preserved_timestep,
                      draw.preserved_text, v)

    @contextmanager
    def _switched_off(self, maps: ConceptMaps | None) -> Iterator[None]:
        with torch.no_grad(), self.erasers.switched(False), maps.captured() if maps else nullcontext():
            yield

    def _order(self, count: int, purpose: str, latents: Latents, step: int) -> list[int]:
        return order(count, latents.shape[0], self.seed, purpose, latents.prompt_index(step))[latents.rows]

    @property
    def _guided(self) -> bool:
        """Whether trajectories advance with guidance, for which the teacher is asked about the empty prompt too."""
        return self.trajectory_guidance != 1.0 and self.latents.advances

    def _advance(self, latents: Latents, step: int, v: Tensor, empty: Tensor | None) -> None:
        if self._guided:
            v = guide(v, empty.float(), self.trajectory_guidance)
        latents.advance(step, v)


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

    def drawn(self, step: int) -> Draw | Sample:
        """What `lockstep_backward` begins with: with a pool a sample."""
        return self(step) if self.pool else self.teacher.draw(step)


def student_backward(predict: Predict, erasers: Erasers, sample: Sample, loss: LossConfig, *,
                     scale: float | Tensor = 1.0) -> dict[str, Tensor]:
    """Add the gradient of `scale * L` to the erasers; returns the unweighted terms and L, detached scalars.

    `scale`: 1 / accumulation, times a loss scaler's scale; a number or a scalar tensor.

    The two student passes are back-propagated one after the other: only one graph lives at a time, and the sum of
    their gradients is that of the joint loss.
    """
    terms = {}
    loc = Localisation(sample.mask, loss.alpha * scale) if sample.mask is not None else None
    with erasers.switched(True):
        with erasers.localised(loc) if loc else nullcontext():
            v = predict(sample.latents, sample.timestep, sample.text)
            unlearn = mean_squared_error(v, sample.target)
            del v
            (scale * unlearn).backward()
        terms["unlearn"] = unlearn.detach()
        if sample.preserved_target is not None:
            v = predict(sample.preserved_latents, sample.preserved_timestep, sample.preserved_text)
            preserve = mean_squared_error(v, sample.preserved_target)
            del v
            (scale * loss.beta * preserve).backward()
            terms["pre"] = preserve.detach()
    return _with_total(terms, loc, loss)


def lockstep_backward(together: Callable[[Sequence[Pass]], list[Any]], predict: Predict, erasers: Erasers, teacher: Teacher,
                      drawn: Draw | Sample, loss: LossConfig, *, scale: float | Tensor = 1.0) -> dict[str, Tensor]:
    """As `student_backward`, with all passes of a step together, block by block, as `together` runs them (memory.lockstep).

    `drawn`: a draw, for which the teacher's passes are among them, or a sample, for which they were made before. The gradients of both student
    passes are added up before they are added to what is there: the same to the last bit, if nothing is.
    """
    asked = teacher.passes(drawn) if isinstance(drawn, Draw) else {}
    # The mask is made of what this very pass shows, and wanted in backward only.
    loc = Localisation(lambda: sample.mask, loss.alpha * scale) if teacher.columns is not None else None

    @contextmanager
    def student(loc: Localisation | None = None) -> Iterator[None]:
        with erasers.switched(True), erasers.localised(loc) if loc else nullcontext():
            yield

    own = {"unlearn": Pass(partial(predict, drawn.latents, drawn.timestep, drawn.text), partial(student, loc))}
    if drawn.preserved_latents is not None:
        preserved = partial(predict, drawn.preserved_latents, drawn.preserved_timestep, drawn.preserved_text)
        own["pre"] = Pass(preserved, student)
    results = dict(zip([*asked, *own], together([*asked.values(), *own.values()])))
    sample = teacher.answered(drawn, results) if isinstance(drawn, Draw) else drawn
    targets = {"unlearn": sample.target, "pre": sample.preserved_target}
    terms = {name: mean_squared_error(results.pop(name), targets[name]) for name in own}
    weights = {"unlearn": scale, "pre": scale * loss.beta}
    sum(weights[name] * term for name, term in terms.items()).backward()
    return _with_total({name: term.detach() for name, term in terms.items()}, loc, loss)


def mean_squared_error(v: Tensor, target: Tensor) -> Tensor:
    """mean (v − target)² in float32, a scalar that holds nothing else.

    What `mse_loss` reduces itself it returns in a buffer as large as v: torch makes the output for the squares and resizes it.
    """
    return F.mse_loss(v.float(), target, reduction="none").mean()


def _with_total(terms: dict[str, Tensor], loc: Localisation | None, loss: LossConfig) -> dict[str, Tensor]:
    found = {"unlearn": terms["unlearn"], **({"loc": loc.mean()} if loc else {}), **terms}
    found["loss"] = found["unlearn"] + loss.alpha * found.get("loc", 0.0) + loss.beta * found.get("pre", 0.0)
    return found
