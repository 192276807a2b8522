"""From settings to a model that runs: the frozen transformer in place, a memory plan applied, ready to predict.

Nothing here decides; it only keeps the order: text encoder first and gone, then the transformer.
"""

import logging
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory.applied import AppliedPlan
from memory.nvml import CardUnreadable, driver_cuda, read_nvml
from memory.plan import MemoryPlan
from trainer.backbones import Predict
from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.location import require_there
from trainer.config import LossConfig, ModelConfig, TrainConfig
from trainer.eraser_files import apply_eraser
from trainer.erasers import Erasers
from trainer.errors import UsageError
from trainer.masks import prompt_columns
from trainer.prompts import Embeddings, PromptSet, collect, embed, require_concept, warn_of_contradiction

_OLDEST_CUDA = 12  # that torch is built for since 2.11
_warn_once = lru_cache(logging.getLogger(__name__).warning)  # of several steps on the way to a run each asks for the device


def open_backbone(model: ModelConfig) -> CogVideoX:
    """Read the model's configuration; no weights yet."""
    return CogVideoX(model.model, weights=model.weights)


def video_size(backbone: CogVideoX, model: ModelConfig) -> tuple[int, int, int]:
    """(frames, height, width) in pixels: as asked for, or the model's own."""
    asked = (model.frames, model.height, model.width)
    return tuple(own if value is None else value for value, own in zip(asked, backbone.default_size()))


def latent_shape(backbone: CogVideoX, model: ModelConfig) -> tuple[int, int, int, int]:
    """(F, C, H, W) of the latents of a video of the size that is asked for. Raises UsageError for a size that the model does not make."""
    return backbone.latent_shape(*video_size(backbone, model))


def require_guidance(config: TrainConfig) -> None:
    """Raises UsageError where a step would lack the anchor."""
    if config.memory.guidance == "none":
        raise UsageError("--guidance none: training needs the anchor's prediction beside the prompt's; "
                         "use batched or sequential")


def only_planned(plan: MemoryPlan) -> bool:
    """Whether nothing can run the plan: it is for planning and benchmarks."""
    return plan.backbone_copies != 1 or plan.text_encoder_resident


def require_real(plan: MemoryPlan) -> None:
    """Raises UsageError for a plan that nothing can run."""
    if only_planned(plan):
        raise UsageError("--backbone-copies 2 and --text-encoder-resident exist for planning and benchmarks only")


def collect_prompts(config: TrainConfig) -> PromptSet:
    """What a run is planned for. Raises UsageError."""
    prompts = collect(config.data, bundled=config.model.model == "shapes")
    if config.loss.alpha > 0:
        require_concept(prompts)
    return prompts


def trainable_prompts(config: TrainConfig) -> PromptSet:
    """What a run trains on. Raises UsageError; also for a plan that nothing can run, and for a model that is not there."""
    require_guidance(config)
    require_real(config.memory)
    if config.model.weights == "stored":
        require_there(config.model.model)
    prompts = collect_prompts(config)
    if config.loss.beta > 0 and not prompts.preserved:
        raise UsageError("--beta is above 0, but there is nothing to preserve; name --preserve WORD …, or --beta 0")
    return prompts


def open_training(config: TrainConfig) -> tuple[CogVideoX, PromptSet, dict[str, Tensor] | None]:
    """(model, prompts, the concept's columns in each): what is asked for, checked as far as it can be before anything is loaded."""
    prompts = trainable_prompts(config)
    warn_of_contradiction(prompts)
    backbone = open_backbone(config.model)
    latent_shape(backbone, config.model)
    masking_blocks(backbone, config.loss)
    columns = prompt_columns(backbone, prompts, localised=config.loss.alpha > 0)
    backbone.fetch()
    return backbone, prompts, columns if config.loss.alpha > 0 else None


def masking_blocks(backbone: CogVideoX, loss: LossConfig) -> Sequence[int]:
    """The blocks whose attention makes the mask. Raises UsageError for one that the model does not have."""
    for block in loss.mask_blocks:
        if block >= backbone.num_blocks:
            raise UsageError(f"--mask-blocks {block}: {backbone.name} has blocks 0 to {backbone.num_blocks - 1}")
    return tuple(dict.fromkeys(loss.mask_blocks)) or range(backbone.num_blocks)


def chosen_device(name: str) -> torch.device:
    """The device that `--device` means; a card by number is made the current one. Raises UsageError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (unused := unused_card()):
            _warn_once("%s", unused)
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UsageError(f"--device {name}: not a device; auto, cpu or cuda would work") from e
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: auto, cpu or cuda would work")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: {unused_card() or 'there is no CUDA card here'}; use --device cpu")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} cards here, counted from 0")
        torch.cuda.set_device(device)  # events are recorded on the current card's stream, and a counter asked for does not start CUDA
    if device.type == "cuda":
        _require_kernels(device.index or 0)
    return device


def unused_card() -> str:
    """That torch cannot use a card that the driver knows, why, and what would do; empty where there is none."""
    with suppress(CardUnreadable):
        if card := read_nvml(0):
            return f"torch cannot use the {card.label} here: {why_unused()}"
    return ""


def why_unused() -> str:
    """Why torch cannot use a card that is there, and what would do."""
    built, newest = torch.version.cuda, driver_cuda()
    if built is None:
        return "it is built without CUDA; install one that is built with it"
    major = int(newest.split(".")[0]) if newest else math.inf
    if major < int(built.split(".")[0]):  # within a major version any driver of it will do
        other = f", or install a torch built for CUDA {major}" if major >= _OLDEST_CUDA else ""
        return f"it is built for CUDA {built} and the driver is for {newest}; update the driver{other}"
    return f"it is built for CUDA {built}; look at CUDA_VISIBLE_DEVICES, and whether nvidia-smi shows the card"


@lru_cache
def _require_kernels(index: int) -> None:
    """Raises UsageError for a card that this torch has no kernels for: its first one may run after a download of gigabytes."""
    with suppress(CardUnreadable):
        card = read_nvml(index)  # without a context, which a planner's fork must not share
        if card and not has_kernels(card.capability):
            raise UsageError(f"{card.label} is there, but {kernels_text(card.capability)}; or use --device cpu")


def has_kernels(capability: tuple[int, int]) -> bool:
    """Whether this torch was built for cards of that compute capability, or one that they are compatible with."""
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    return not built or any((kind == "compute" or int(major) == capability[0]) and (int(major), int(minor)) <= capability
                            for kind, major, minor in built)


def kernels_text(capability: tuple[int, int]) -> str:
    """That this torch has no kernels for such a card, and what would do."""
    return (f"torch {torch.__version__} has no kernels for compute capability {'.'.join(map(str, capability))}, only for "
            f"{' '.join(torch.cuda.get_arch_list())}; install one that has them: for cards before Turing one built for CUDA 12.6")


def is_bundled(model: ModelConfig) -> bool:
    """Whether it is the bundled model, a copy of it, or one of its configuration that was trained anew."""
    return model.model == "shapes" or len({open_backbone(m).identity()["config_hash"] for m in (model, ModelConfig())}) == 1


def resolve_dtype(backbone: CogVideoX, plan: MemoryPlan, *, insist: bool) -> torch.dtype:
    """The backbone's dtype. Raises UsageError, unless `insist`, for fp16 on a bf16-native model: its activations exceed 65504 and the output is NaN."""
    dtype = backbone.native_dtype if plan.dtype == "native" else getattr(torch, plan.dtype)
    if dtype == torch.float16 and backbone.native_dtype == torch.bfloat16 and not insist:
        raise UsageError(f"--dtype float16: {backbone.name} is bf16-native, in fp16 its activations overflow to NaN; "
                         "use --dtype bfloat16 (on a card without it float32), or --force-dtype to insist")
    return dtype


def embed_prompts(backbone: CogVideoX, model: ModelConfig, plan: MemoryPlan, prompts: Sequence[str]) -> Embeddings:
    """Embeddings on the host; the text encoder is gone when this returns."""
    dtype, device = resolve_dtype(backbone, plan, insist=model.force_dtype), chosen_device(model.device)
    backbone.fetch()
    return embed(backbone.text_encoder, prompts, dtype=dtype, device=device)


def named_scheduler(backbone: CogVideoX, name: str) -> Any:
    """The model's own scheduler, or DDIM or DPM with its configuration."""
    import diffusers

    own = backbone.scheduler()
    kinds = {"model": type(own), "ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
    return kinds[name].from_config(own.config)


@dataclass
class Assembly:
    """A transformer in place. As a context manager it undoes the memory plan at the end, and takes the erasers out."""

    transformer: nn.Module
    blocks: nn.ModuleList
    predict: Predict
    applied: AppliedPlan
    erasers: Erasers | None
    device: torch.device
    dtype: torch.dtype
    latent_shape: tuple[int, int, int, int]

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Sharded weights come together only if every process gathers them; one that fails may be alone.
        if kind is None or self.applied.plan.num_shards == 1:
            self.applied.undo()
            if self.erasers is not None:  # they and the attentions they are in refer to each other: nothing would free those
                self.erasers.undo()


def assemble(backbone: CogVideoX, model: ModelConfig, plan: MemoryPlan, *, rank: int | None = None, eraser: Path | None = None,
             seed: int = 0) -> Assembly:
    """Load the transformer, put erasers into it, those of the file `eraser` or new ones of `rank` (None: none), then apply the plan.

    Erasers come before the plan: what trains must be known before anything frozen is moved, and goes where the blocks compute.
    """
    device = chosen_device(model.device)
    dtype = resolve_dtype(backbone, plan, insist=model.force_dtype)
    shape = latent_shape(backbone, model)
    whole = plan.resident_blocks is None and plan.num_shards == 1
    transformer = backbone.load_transformer(dtype=dtype, device=device if whole else "cpu", latent_shape=shape)
    blocks = backbone.blocks(transformer)
    if eraser is not None:
        erasers = apply_eraser(transformer, eraser, base_model=backbone.identity())
    else:
        erasers = None if rank is None else Erasers(blocks, rank, seed=seed)
    applied = backbone.apply(plan, transformer, device)
    return Assembly(transformer, blocks, backbone.predictor(transformer, shape), applied, erasers, device, dtype, shape)
