"""Erasers on disk: our own layout (eraser.safetensors + eraser.json), and the released one, both ways.

Released layout: `eraser_weights.pt`, a dict `transformer_blocks.{i}.attn1.adapter` -> state dict, and
`eraser_config.json` with `eraser_type` and `eraser_rank`. It is a pickle: read with `weights_only=True` and nothing else.
"""

import errno
import io
import json
import logging
import os
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from memory.exhaustion import first_line
from trainer.backbones.location import config_hash
from trainer.config import ModelConfig
from trainer.erasers import LEAVES, Erasers, width_of
from trainer.errors import CheckpointError, InputOutputError, UsageError
from trainer.lock import refuse_unbegun
from trainer.run_directory import is_run, resuming
from trainer.run_files import CONFIG, nested, part_of, read_bytes, read_object, write_tensors, write_whole

logger = logging.getLogger(__name__)

WEIGHTS, DESCRIPTION = "eraser.safetensors", "eraser.json"
RELEASED_WEIGHTS, RELEASED_CONFIG = "eraser_weights.pt", "eraser_config.json"


@dataclass(frozen=True)
class EraserFile:
    """Weights named `{block}.down.weight` …, fp32 on the host, and what is known about them."""

    state: dict[str, Tensor]
    rank: int
    width: int
    num_blocks: int
    base_model: dict[str, str] | None
    """Name and configuration hash of the model it was trained on; the released layout does not say."""
    training: dict[str, Any] | None
    path: Path

    def model(self, asked: ModelConfig) -> ModelConfig:
        """`asked`, or, where that names the default, the model that the eraser was trained on."""
        return replace(asked, model=self.base_model["name"]) if self.base_model and asked.model == ModelConfig().model else asked

    def require_fit(self, num_blocks: int, width: int, base_model: Mapping[str, str] | None) -> None:
        """Raises CheckpointError for a transformer that it was not made for, and for weights that are not finite.
        `base_model`: the identity of the transformer, where it is known."""
        if (self.num_blocks, self.width) != (num_blocks, width):
            raise CheckpointError(f"{self.path}: made for {self.num_blocks} blocks of width {self.width}, "
                                  f"this transformer has {num_blocks} of width {width}")
        if base_model and self.base_model and self.base_model["config_hash"] != base_model["config_hash"]:
            raise CheckpointError(f"{self.path}: made for {self.base_model['name']}, not for {base_model['name']}")
        self.require_finite()

    def require_finite(self) -> None:
        """Raises CheckpointError for weights that would make every video black."""
        if spoiled := next((name for name, tensor in self.state.items() if not tensor.isfinite().all()), None):
            raise CheckpointError(f"{self.path}: {spoiled} holds NaN or infinity, and so would every video; copy it again, or let "
                                  f"`python run.py diagnose {shlex.quote(str(self.path))}` look at it")


def save_eraser(directory: Path, erasers: Erasers, *, base_model: Mapping[str, str],
                training: Mapping[str, Any]) -> Path:
    """Write both files into `directory`, each complete or not at all. Returns the weights' path."""
    description = dict(format=1, eraser_type="adapter", rank=erasers.rank, width=erasers.width,
                       num_blocks=len(erasers.adapters), base_model=dict(base_model), training=dict(training))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / WEIGHTS, erasers.state_dict())
        write_whole(directory / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    except (OSError, SafetensorError) as e:  # the latter when the disk is full
        raise InputOutputError(f"the eraser cannot be written into {directory} ({e}); what was trained is saved: once there is room, "
                               f"{resuming(directory)} writes it") from e
    return directory / WEIGHTS


def save_released(directory: Path, state: Mapping[str, Tensor], rank: int) -> None:
    """Write the released layout from weights named `{block}.down.weight` …"""
    blocks = sorted({int(name.split(".")[0]) for name in state})
    weights = {f"transformer_blocks.{i}.attn1.adapter": {leaf: state[f"{i}.{leaf}"] for leaf in LEAVES} for i in blocks}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with part_of(directory / RELEASED_WEIGHTS) as part:
            torch.save(weights, content := io.BytesIO())  # of a disk that is full torch's own writer says nothing that is understood
            part.write_bytes(content.getbuffer())
            write_whole(directory / RELEASED_CONFIG, json.dumps({"eraser_type": "adapter", "eraser_rank": rank}) + "\n")
    except OSError as e:
        raise InputOutputError(f"--out {directory}: cannot be written ({e.strerror}); choose another directory") from e


def load_eraser(path: Path | str) -> EraserFile:
    """Read an eraser from a run directory, a directory of either layout, or one of its weight files.

    Raises CheckpointError with what is wrong: absent, truncated, not an eraser, rank or blocks that disagree; InputOutputError for a file
    that may not be read.
    """
    path = Path(path)
    if path.suffix == Path(DESCRIPTION).suffix:
        beside = path.with_name(RELEASED_WEIGHTS) if path.name == RELEASED_CONFIG else path.with_suffix(Path(WEIGHTS).suffix)
        if beside.is_file():
            raise CheckpointError(f"{path}: is the description; name the weights beside it, {beside}, or the directory")
    candidates = [path] if path.is_file() else [path / WEIGHTS, path / RELEASED_WEIGHTS]
    file = next((c for c in candidates if c.is_file()), None)
    refuse_forgetting(path.parent if path.is_file() else path)
    if file is None:
        if is_run(path):  # one that was killed
            raise CheckpointError(f"{path}: no eraser there yet; a run writes it at its end, or when it is stopped: go on with {resuming(path)}")
        refuse_unbegun(path)
        raise CheckpointError(f"{path}: no eraser there; name a run directory, or a directory with {WEIGHTS} "
                              f"or {RELEASED_WEIGHTS}")
    if not os.access(file, os.R_OK):  # safetensors says of such a file that it is not there
        raise InputOutputError(f"{file}: cannot be read ({os.strerror(errno.EACCES)})")
    if file.suffix == ".pt":
        state, described, name = _read_released(file), file.with_name(RELEASED_CONFIG), "eraser_rank"
    else:
        state, described, name = _read_safetensors(file), file.with_suffix(Path(DESCRIPTION).suffix), "rank"  # its own, of several in a directory
    num_blocks, rank, width = _geometry(state, file)  # before a description is looked for, which other weights have not
    description = _read_json(described)
    if description.get(name) != rank:
        raise CheckpointError(f"{file}: the weights have rank {rank}, the description beside it says {description.get(name)}")
    return EraserFile({n: t.float() for n, t in state.items()}, rank, width, num_blocks,
                      description.get("base_model"), description.get("training"), file)


def refuse_forgetting(path: Path) -> None:
    """Raises CheckpointError for a run of `forget` where an eraser is needed."""
    if nested(read_object(path / CONFIG), "command") == "forget":
        raise CheckpointError(f"{path} is a run of forget: it holds a LoRA, which peft loads, and no eraser; "
                              f"`python run.py diagnose {shlex.quote(str(path))}` looks at it")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file}: damaged or not safetensors ({e}); copy it again") from e


def _read_released(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles that are not torch's: they are refused below
            weights = torch.load(file, map_location="cpu", weights_only=True)
        prefix, suffix = "transformer_blocks.", ".attn1.adapter"
        return {f"{name.removeprefix(prefix).removesuffix(suffix)}.{leaf}": tensor
                for name, adapter in weights.items() for leaf, tensor in adapter.items()}
    except Exception as e:  # a damaged pickle makes the reader raise about anything, and all of it means this
        raise CheckpointError(f"{file}: not a released eraser (damaged, or holds more than tensors): {first_line(e)}") from e


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_bytes(file))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: the description that belongs to the weights cannot be read ({e})") from e
    known = isinstance(value, dict)
    if known and (base := value.get("base_model")) is not None:
        known = isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("name", "config_hash"))
    if known and (training := value.get("training")) is not None:
        known = (isinstance(training, dict) and isinstance(training.get("data", {}), dict)
                 and isinstance(nested(training, "data", "concept"), str | None))
    if not known:
        raise CheckpointError(f"{file}: not an eraser's description; copy it again")
    return value


def _geometry(state: Mapping[str, Tensor], file: Path) -> tuple[int, int, int]:
    """(blocks, rank, width) of weights whose names and shapes are all consistent."""
    first = state.get("0.down.weight")
    if not all(isinstance(tensor, Tensor) for tensor in state.values()) or first is None or first.ndim != 2:
        raise CheckpointError(f"{file}: holds no eraser (no 0.down.weight); is it another model's file?")
    if whole := next((name for name, tensor in state.items() if not tensor.is_floating_point()), None):  # a quantizer's, whose scale is elsewhere
        raise CheckpointError(f"{file}: {whole} is stored in {str(state[whole].dtype).removeprefix('torch.')}; name the eraser as it was before that")
    rank, width = first.shape
    num_blocks = len(state) // len(LEAVES)
    shapes = {"down.weight": (rank, width), "down.bias": (rank,), "up.weight": (width, rank), "up.bias": (width,)}
    expected = {f"{i}.{leaf}": shapes[leaf] for i in range(num_blocks) for leaf in LEAVES}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        raise CheckpointError(f"{file}: not {num_blocks} erasers of rank {rank} and width {width}; is it complete?")
    return num_blocks, rank, width


def _joins_video_and_text(block: nn.Module) -> bool:
    """Whether a block's attention takes video and text, and returns both: CogVideoX's do, those of its descendants and of copies of its code.
    Of other models some have as many blocks of that width, and attentions of the same name."""
    return hasattr(block, "attn1") and any(kind.__name__ == "CogVideoXLayerNormZero" for kind in type(getattr(block, "norm1", None)).__mro__)


def _streamed_by_diffusers(block: nn.Module) -> bool:
    """Whether diffusers' group offload, block by block, holds copies of the block's weights, and of none that come later."""
    registry = getattr(block, "_diffusers_hook", None)
    hook = registry.get_hook("group_offloading") if registry else None
    return hook is not None and hook.group.stream is not None and not hook.group.offload_to_disk_path


def apply_eraser(transformer: nn.Module, path: Path | str, *, base_model: Mapping[str, str] | None = None) -> Erasers:
    """Put a saved eraser into a CogVideoX transformer, e.g. a stock pipeline's; `.undo()` takes it out again.

    `path`: what `load_eraser` reads. `base_model`: the identity of the transformer, where it is known; an eraser of another model is then
    refused. Otherwise one of another configuration is a warning: it may be a relative of the model, such as one for image to video.
    Raises CheckpointError for what is no eraser of a transformer of that size, UsageError for a transformer that is none of CogVideoX, has
    an eraser already, or whose blocks are offloaded with a stream.
    """
    file = load_eraser(path)
    blocks = getattr(transformer, "transformer_blocks", ())
    if not len(blocks) or not _joins_video_and_text(blocks[0]):
        raise UsageError(f"{type(transformer).__name__} is no CogVideoX transformer; with a pipeline say "
                         f"apply_eraser(pipe.transformer, {str(path)!r})")
    if any(map(_streamed_by_diffusers, blocks)):
        raise UsageError("this transformer's blocks are offloaded with a stream, which knows their weights by now; apply the eraser first, "
                         "then enable_group_offload()")
    file.require_fit(len(blocks), width_of(blocks[0].attn1), base_model)
    config = {k: v for k, v in getattr(transformer, "config", {}).items() if k != "quantization_config"}
    if not base_model and file.base_model and config and config_hash(config) != file.base_model["config_hash"]:
        logger.warning("%s: made for %s, and this transformer is configured in another way; look whether it erases here", file.path,
                       file.base_model["name"])
    if not any(tensor.any() for name, tensor in file.state.items() if ".up." in name):
        logger.warning("%s: was never trained: it changes nothing", file.path)
    erasers = Erasers(blocks, file.rank)
    erasers.load_state_dict(file.state)
    return erasers
