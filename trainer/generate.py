"""Generate videos with or without erasers: the same computation as diffusers' CogVideoXPipeline.

Legend: B videos, F latent frames, C latent channels, H W latent size, L text tokens, D text width, T video frames.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory.cards import Card
from memory.plan import MemoryPlan, PlanError
from trainer.assemble import (assemble, chosen_device, embed_prompts, latent_shape, named_scheduler, open_backbone, require_real,
                              resolve_dtype, video_size)
from trainer.backbones import Predict
from trainer.backbones.cogvideox import CogVideoX
from trainer.config import ModelConfig, OptimConfig, OutputConfig, TrainConfig, leaves, replaced
from trainer.config_file import from_json
from trainer.diffusion import sample
from trainer.eraser_files import EraserFile, load_eraser, refuse_forgetting
from trainer.errors import CheckpointError, InputOutputError, NonFinite, UsageError
from trainer.phases import decodes_beside, fit_to_generate
from trainer.planning import require_sense
from trainer.prompts import Embeddings
from trainer.run_directory import is_run, probe, read_config
from trainer.video import contact_sheet, spread, write_mp4
from trainer.video_config import EvaluateConfig, GenerateConfig


def generate_latents(predict: Predict, scheduler: Any, embeddings: Embeddings, prompts: Sequence[str],
                     seeds: Sequence[int], shape: tuple[int, int, int, int], *, num_steps: int, guidance_scale: float,
                     guidance: str = "batched", batch_size: int = 32,
                     check: Callable[[int], None] = lambda index: None) -> Tensor:
    """Latents (B,F,C,H,W) for prompts and seeds, on the host, in batches.

    Every video has a generator of its own, which also serves a stochastic scheduler: the result does not depend on
    the batch size, and is what the pipeline makes from that seed (which takes a guidance scale below 1 for 1). Raises NonFinite.
    """
    parts = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        text = embeddings(prompts[chunk])
        empty = embeddings([""] * len(text)) if guidance_scale != 1.0 else None
        dice = [torch.Generator().manual_seed(s) for s in seeds[chunk]]
        noise = torch.cat([torch.randn((1, *shape), generator=g, dtype=embeddings.table.dtype) for g in dice])
        parts.append(sample(predict, scheduler, noise.to(embeddings.device), text, empty, num_steps=num_steps,
                            guidance_scale=guidance_scale, guidance=guidance, generator=dice, check=check).cpu())
    latents = torch.cat(parts)
    if not latents.isfinite().all():
        raise NonFinite("the generated latents hold NaN or infinity; `python run.py diagnose ERASER` looks at the eraser, "
                        "generate --no-eraser leaves it out, and a lower --guidance-scale or --dtype float32 may help")
    return latents


def as_trained(config: GenerateConfig | EvaluateConfig, eraser: Path | None, given: Collection[str], *,
               of_its_size: bool = True) -> GenerateConfig | EvaluateConfig:
    """`config` with the memory plan of the run that `eraser` comes from, and with its model and size unless not `of_its_size`. What was
    `given` by flag stays, and all does where the eraser names no run, or one of another version."""
    run = None if eraser is None else trained_config(eraser)
    if run is None:
        return config
    sections = ("model.", "memory.") if of_its_size else ("memory.",)
    own = {"device", "guidance", "num_shards", *given} | ({"weights", "force_dtype"} if "model" in given else set())
    return replaced(config, {path: value for path, value in leaves(run).items()
                             if path.startswith(sections) and path.split(".")[1] not in own})


def trained_config(eraser: Path) -> TrainConfig | None:
    """The settings of the run that an eraser comes from, if it says."""
    if is_run(eraser):
        refuse_forgetting(eraser)
        return read_config(eraser)[0]
    try:
        return from_json(load_eraser(eraser).training)
    except (CheckpointError, UsageError, PlanError, TypeError, AttributeError, ValueError):
        return None


def opened(model: ModelConfig, plan: MemoryPlan, card: Card | None, *, eraser: EraserFile | None, guidance_scale: float,
           does: str = "generates", beside: bool = False) -> tuple[CogVideoX, MemoryPlan]:
    """The model to generate with, and the plan with as many resident blocks as `card` holds; None: as configured. Refuses what it can
    before a download. `does`: what the command does, as a verb. `beside`: the transformer is still there when a video is decoded."""
    if model.model != "shapes":
        require_sense(TrainConfig(model=model), what=does)
    backbone = open_backbone(model)
    latent_shape(backbone, model)
    if eraser:
        eraser.require_fit(backbone.num_blocks, backbone.width, backbone.identity())
    if card:
        plan = fit_to_generate(backbone, _workload(model, plan, eraser, guidance_scale), card, beside=beside)
    return backbone, plan


def _workload(model: ModelConfig, plan: MemoryPlan, eraser: EraserFile | None, guidance_scale: float) -> TrainConfig:
    """What sampling takes, as settings of training."""
    return TrainConfig(model=model, memory=plan, optim=OptimConfig(rank=eraser.rank if eraser else 1), output=OutputConfig(guidance_scale=guidance_scale))


def generate(config: GenerateConfig, card: Card | None = None, *, fill: bool = True,
             written: Callable[[Path], None] = lambda path: None) -> list[Path]:
    """Write one video a prompt, and with `compare` a before/after sheet; returns the paths. `written` hears of each as soon as it is there.

    `fill`: with as many resident blocks as `card` holds; otherwise, or without a card, as configured. Each video is written as soon as it
    is made, or when all are made: where `card` is predicted not to hold decoder and transformer at once, as they are configured.
    """
    require_real(config.memory)
    if config.out.is_dir():
        raise InputOutputError(f"--out {config.out}: is a directory; name a file in it, as {config.out / 'x.mp4'}")
    eraser = None if config.no_eraser else load_eraser(config.eraser)
    model = eraser.model(config.model) if eraser else config.model
    several = len(config.prompt) > 1
    backbone, plan = opened(model, config.memory, card if fill else None, eraser=eraser, guidance_scale=config.guidance_scale, beside=several)
    at_once = several and (fill or not card or decodes_beside(backbone, _workload(model, plan, eraser, config.guidance_scale), card))
    try:
        probe(config.out.parent)  # makes it: after what can be refused, before minutes of sampling
    except OSError as e:
        raise InputOutputError(f"--out {config.out}: cannot be written ({e.strerror}); choose another --out") from e
    embeddings = embed_prompts(backbone, model, plan, [*config.prompt, ""])
    made = _latents(config, backbone, model, plan, embeddings)
    with closing(made):
        return _write(config, backbone, model, plan, made if at_once else list(made), written)


def _latents(config: GenerateConfig, backbone: CogVideoX, model: ModelConfig, plan: MemoryPlan, embeddings: Embeddings
             ) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Latents (1,F,C,H,W) of each prompt with the eraser, if there is one, and with `compare` without. After the last the transformer goes."""
    assembly = assemble(backbone, model, plan, eraser=None if config.no_eraser else config.eraser)
    scheduler = named_scheduler(backbone, config.scheduler)
    embeddings = embeddings.to(assembly.device)

    with assembly, _progress(len(config.prompt) * config.num_steps * (1 + config.compare)) as step:
        def run(index: int, on: bool) -> Tensor:
            with assembly.erasers.switched(on) if assembly.erasers else nullcontext():
                return generate_latents(assembly.predict, scheduler, embeddings, [config.prompt[index]], [config.seed + index],
                                        assembly.latent_shape, num_steps=config.num_steps, batch_size=1,
                                        guidance_scale=config.guidance_scale, guidance=plan.guidance, check=step)

        for index in range(len(config.prompt)):
            yield run(index, True), run(index, False) if config.compare else None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal, and what moves it: the videos of a published model take minutes each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns, console = (TextColumn("denoising steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()), Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal,
                  redirect_stdout=sys.stdout.isatty()) as progress:  # paths go to stdout, above the bar only where it is the same terminal
        task = progress.add_task("", total=total)
        yield lambda index: progress.advance(task)


def _write(config: GenerateConfig, backbone: CogVideoX, model: ModelConfig, plan: MemoryPlan,
           made: Iterable[tuple[Tensor, Tensor | None]], written: Callable[[Path], None]) -> list[Path]:
    """Write the videos of latents (1,F,C,H,W) as they are made. The decoder comes and goes: what a video takes is not what sampling does."""
    paths: list[Path] = []
    rows, sheet = [], config.out.with_name(f"{config.out.stem}-compare.png")

    def there(path: Path) -> None:
        if path not in paths:  # the sheet is written anew with every prompt
            paths.append(path)
            written(path)

    for i, (prompt, (after, before)) in enumerate(zip(config.prompt, made)):
        path = config.out if len(config.prompt) == 1 else config.out.with_stem(f"{config.out.stem}-{i}")
        torch.cuda.empty_cache()
        decode = backbone.decoder(video_size(backbone, model)[0], dtype=resolve_dtype(backbone, plan, insist=True), device=chosen_device(model.device))
        video = decode(after)[0]
        if path.suffix == ".mp4":
            write_mp4(path, video, fps=config.fps)
        else:
            contact_sheet(path, [(prompt, video)])
        there(path)
        if before is not None:
            rows += [(f"before: {prompt}", spread(decode(before)[0])), (f"after: {prompt}", spread(video))]
            contact_sheet(sheet, rows)
            there(sheet)
        del decode, video
        torch.cuda.empty_cache()
    return paths
