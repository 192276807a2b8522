"""Settings of what makes videos by an eraser: `generate` and `evaluate`. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from memory.plan import MemoryPlan
from trainer.config import ModelConfig, at_least, expand, require_seed, require_several
from trainer.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate videos, with an eraser or without."""

    prompt: tuple[str, ...]
    """What to show; several prompts make several videos."""
    out: Path = Path("out.mp4")
    """An .mp4 (or .png for a contact sheet); several prompts are numbered."""
    eraser: Path | None = None
    """A run directory or an eraser file. Needed, or --no-eraser in its place.
    Its base model is used, unless --model names another than shapes.
    A run's videos are as large as those it was trained on and follow its memory plan, but for resident-blocks and guidance, unless flags say otherwise."""
    no_eraser: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave the eraser out: the frozen model alone."""
    compare: bool = False
    """Also write a before/after contact sheet beside OUT."""
    seed: int = 0
    """Seed of the noise; prompt i uses seed + i."""
    num_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 6.0
    """Guidance scale; 1 is without guidance."""
    scheduler: Literal["model", "ddim", "dpm"] = "model"
    """The model's own sampler, or one by name."""
    fps: int = 8
    """Frames a second of the written video."""
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    """How the model is made to fit. On a card as many blocks are resident as it holds, unless resident-blocks is given.
    What only training needs changes nothing here: checkpoint, num-keep-…, boundaries, kept, passes, optimizer."""

    def __post_init__(self):
        expand(self, "out", "eraser")
        require_several(self, "prompt")
        if not self.prompt:
            raise UsageError("--prompt is missing; say what to generate, e.g. --prompt 'a red circle moving left'")
        if self.out.suffix not in (".mp4", ".png"):
            raise UsageError(f"--out {self.out}: must end in .mp4 or .png")
        at_least(self, 1, "num_steps")
        if not 1 <= self.fps <= 1000:
            raise UsageError(f"--fps {self.fps}: from 1 to 1000")
        require_seed(self)
        if self.eraser is None and not self.no_eraser:
            raise UsageError("--eraser is missing; name a run directory, or say --no-eraser")
        if self.no_eraser and self.compare:
            raise UsageError("--compare shows what an eraser changes; leave out --no-eraser, or --compare")
        _require_guidance(self)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure an erasure: is the concept gone, and is the rest still there?

    Of the bundled model's videos a rule says what they show; of others a CLIP model does (--rater), by prompts with the concept and of
    what the run preserved.
    """

    run: Path
    """A run directory or an eraser file; `evaluate RUN` says the same.
    A run is measured by the memory plan that it was trained by, unless flags say otherwise."""
    concept: str | None = None
    """What was erased; a run knows, an export does not."""
    rater: str | None = None
    """A CLIP model that says what videos show: a hub id such as openai/clip-vit-large-patch14, a directory, or shapes (bundled).
    It takes each video for one of: the concept, what stands in its place, and all that is preserved."""
    prompts: Path | None = None
    """With a rater: other prompts that show the concept than those the run has; a file, as for training."""
    preserve: tuple[str, ...] = ()
    """With a rater: other things that must still be there than those that the run preserved."""
    num_videos: int | None = None
    """Videos of the concept, at least. 64 on the bundled model and 8 on others by default: a video of a published model takes minutes.
    As many show its synonyms and each thing of its kind (by a rule), or all that is preserved together (with a rater)."""
    num_steps: int | None = None
    """Denoising steps; 16 on the bundled model and 50 on others by default."""
    guidance_scale: float | None = None
    """Guidance scale; 1 is without guidance, which is the bundled model's default; of others it is 6."""
    seed: int = 1000
    """First seed; every video has its own, the same before and after."""
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    """How the model is made to fit.
    What only training needs changes nothing here: checkpoint, num-keep-…, boundaries, kept, passes, optimizer."""

    def __post_init__(self):
        expand(self, "run", "prompts")
        require_several(self, "preserve")
        if self.rater is None and (self.prompts or self.preserve):
            raise UsageError(f"--{'prompts' if self.prompts else 'preserve'}: the rule that measures has prompts of its own; a --rater takes others")
        if self.rater == "":
            raise UsageError("--rater: an empty value; name a CLIP model, or leave the flag out")
        at_least(self, 1, "num_videos", "num_steps")
        require_seed(self)
        _require_guidance(self)


def _require_guidance(config: GenerateConfig | EvaluateConfig) -> None:
    at_least(config, 0, "guidance_scale")
    if config.memory.guidance == "none" and config.guidance_scale not in (None, 1.0):
        raise UsageError(f"--guidance none leaves --guidance-scale {config.guidance_scale} without effect; use --guidance sequential, "
                         "or --guidance-scale 1")
