"""The frozen encoders, as the method sees them: something to run, and the linear layer that comes last in it.

CLIP (modeling_clip.py): `text_projection` (D → E, no bias) takes `final_layer_norm` at the end-of-text token;
`visual_projection` takes `post_layernorm` at the class token. Qwen3-VL: see projection_qwen.py.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memory.exhaustion import first_line
from trainer.backbones.location import fingerprint
from trainer.backbones.weights import open_shard, shards
from trainer.config import expanded
from trainer.errors import CheckpointError, NonFinite, UsageError
from trainer.hub import fetch_description, fetch_weights, is_hub_id
from trainer.lora import Layer
from trainer.projection_examples import open_picture
from trainer.projection_qwen import DEEPSTACK_MERGER, MAIN_MERGER

logger = logging.getLogger(__name__)
BUNDLED = Path(__file__).parent / "shapes" / "encoders"
_TYPES = {"clip": ("clip", "clip_text_model"), "qwen3-vl": ("qwen3_vl",)}


class Tower(Protocol):
    """A part of a model that turns contents into the inputs of linear layers."""

    directory: Path
    layer_names: tuple[str, ...]
    """Names in the model's files; the first is the main one."""

    def load(self) -> nn.Module:
        """The part, frozen, on the host, in its stored dtype."""

    def blocks(self, part: nn.Module) -> Sequence[nn.Module]:
        """Its transformer blocks, in order."""

    def run(self, part: nn.Module, contents: Sequence[Any], device: torch.device) -> list[int]:
        """One forward pass; how many rows of the layers' inputs belong to each of the contents."""


def layer_of(part: nn.Module, name: str) -> nn.Module:
    """One of a tower's linear layers, by its name in the model's files."""
    return part.get_submodule(name.removeprefix("model.visual."))


def locate(encoder: str, model: str, *, flag: str = "--model", whole: bool = False) -> Path:
    """The directory of an encoder, its type checked; a model of the hub is downloaded. `flag`: what names it. `whole`: a part alone, as
    CLIP's text tower, will not do. Raises UsageError."""
    from_hub, named, types = is_hub_id(model), f"{flag} {model}", _TYPES[encoder][:1 if whole else None]
    directory = BUNDLED / encoder if model == "shapes" else fetch_description(model, named=named) if from_hub else expanded(model)
    try:
        found = json.loads((directory / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f"it names no {e.args[0]}" if isinstance(e, KeyError) else e
        raise UsageError(f"{named}: no model in transformers' layout there (config.json: {why}); name its directory, a hub id, or shapes") from e
    if found not in types:
        fitting = next((e for e, its in _TYPES.items() if found in its), None)
        part = "; a text tower alone sees no pictures" if found in _TYPES[encoder] else ""
        advice = f"; use --encoder {fitting}" if fitting and not whole else part
        raise UsageError(f"{named}: a model of type {found!r}; {' or '.join(types)} is needed{advice}")
    if from_hub:
        fetch_weights(model, directory, named=named)
    return directory


@dataclass(frozen=True)
class ClipText:
    """CLIP's text tower; contents are texts."""

    directory: Path
    layer_names: tuple[str, ...] = ("text_projection",)

    def load(self) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        return load_part(CLIPTextModelWithProjection, self.directory)

    def blocks(self, part: nn.Module) -> Sequence[nn.Module]:
        return part.text_model.encoder.layers

    def run(self, part: nn.Module, contents: Sequence[str], device: torch.device) -> list[int]:
        tokenizer, most = load_tokenizer(self.directory), part.config.max_position_embeddings
        if longer := [text for text, ids in zip(contents, tokenizer(list(contents), verbose=False).input_ids) if len(ids) > most]:
            logger.warning("%d of %d texts are longer than what CLIP reads, %d tokens, and end there, as %r", len(longer), len(contents), most,
                           longer[0][:60])
        tokens = tokenizer(list(contents), padding=True, truncation=True, max_length=most, return_tensors="pt")
        part(input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))
        return [1] * len(contents)


@dataclass(frozen=True)
class ClipVision:
    """CLIP's image tower, for measuring; contents are pictures."""

    directory: Path
    layer_names: tuple[str, ...] = ("visual_projection",)

    def load(self) -> nn.Module:
        from transformers import CLIPVisionModelWithProjection

        return load_part(CLIPVisionModelWithProjection, self.directory)

    def blocks(self, part: nn.Module) -> Sequence[nn.Module]:
        return part.vision_model.encoder.layers

    def run(self, part: nn.Module, contents: Sequence[Any], device: torch.device) -> list[int]:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        processor = _processor(CLIPImageProcessorPil, self.directory)
        pixels = processor(images=[open_picture(c) for c in contents], return_tensors="pt").pixel_values
        part(pixel_values=pixels.to(device, part.dtype))
        return [1] * len(contents)


@dataclass(frozen=True)
class QwenVision:
    """Qwen3-VL's vision tower with its mergers; contents are pictures. A picture has one row for each merged token."""

    directory: Path
    layer_names: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, mergers: str) -> "QwenVision":
        """`mergers`: "main" or "all"."""
        vision = json.loads((directory / "config.json").read_text())["vision_config"]
        count = len(vision["deepstack_visual_indexes"]) if mergers == "all" else 0
        return cls(directory, (MAIN_MERGER, *(DEEPSTACK_MERGER.format(i) for i in range(count))))

    def load(self) -> nn.Module:
        from transformers import AutoConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        return load_part(Qwen3VLVisionModel, self.directory, config=AutoConfig.from_pretrained(self.directory).vision_config,
                         key_mapping={r"^model\.visual\.": ""})

    def blocks(self, part: nn.Module) -> Sequence[nn.Module]:
        return part.blocks

    def run(self, part: nn.Module, contents: Sequence[Any], device: torch.device) -> list[int]:
        inputs = self.preprocess(contents)
        part(inputs["pixel_values"].to(device, part.dtype), grid_thw=inputs["image_grid_thw"].to(device))
        return [int(n) // part.spatial_merge_unit for n in inputs["image_grid_thw"].prod(-1)]

    def preprocess(self, contents: Sequence[Any]) -> dict[str, torch.Tensor]:
        """`pixel_values` (patches of all pictures, values of a patch) and `image_grid_thw` (B, 3)."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        processor = _processor(Qwen2VLImageProcessorPil, self.directory)
        parts = []
        for content in contents:
            try:
                parts.append(processor(images=[open_picture(content)], return_tensors="pt"))
            except ValueError as e:  # as of a picture that is hundreds of times as wide as it is high
                raise UsageError(f"the encoder does not take the picture {content} ({e}); leave it out") from e
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@functools.cache
def load_tokenizer(directory: Path) -> Callable[..., Any]:
    """The tokenizer of a model. Raises CheckpointError where its files are missing or damaged."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # transformers would make up an empty one
        raise CheckpointError(f"{directory}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt); copy the model again")
    return _read(AutoTokenizer, directory, "tokenizer")


@functools.cache
def _processor(kind: type, directory: Path) -> Callable[..., Any]:
    return _read(kind, directory, "preprocessor_config.json")


def _read(kind: type, directory: Path, what: str) -> Callable[..., Any]:
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except Exception as e:  # of a damaged file, tokenizers raises Exception itself
        raise CheckpointError(f"{directory}: its {what} cannot be loaded ({first_line(e)}); copy the model again") from e


def load_part(kind: type, directory: Path, **how: Any) -> nn.Module:
    """A model's part from the directory of the whole, frozen. Raises CheckpointError where a weight is missing or damaged."""
    from safetensors import SafetensorError

    try:
        with _quiet():
            part, report = kind.from_pretrained(directory, dtype="auto", local_files_only=True, output_loading_info=True, **how)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise CheckpointError(f"{directory}: {kind.__name__} cannot be loaded ({first_line(e)}); copy the model again") from e
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            raise CheckpointError(f"{directory}: {what.replace('_', ' ')} for {kind.__name__}: {sorted(report[what])[0]}; "
                                  "copy the model again")
    return part.requires_grad_(False).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its table of weights that belong to the model's other parts."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def read_layer(directory: Path, name: str) -> tuple[Layer, torch.dtype]:
    """A linear layer straight from the files, in float32, and the dtype that it is stored in."""
    where = shards(directory)
    if f"{name}.weight" not in where:
        raise CheckpointError(f"{directory} has no {name}.weight; is it the whole model?")
    tensors = {}
    for leaf in ("weight", "bias"):
        if f"{name}.{leaf}" in where:
            with open_shard(where[f"{name}.{leaf}"]) as f:
                tensors[leaf] = f.get_tensor(f"{name}.{leaf}")
    bias = tensors.get("bias")
    return Layer(name, tensors["weight"].float(), None if bias is None else bias.float()), tensors["weight"].dtype


def require_language_model(directory: Path) -> None:
    """Raises CheckpointError where there are weights of Qwen3-VL's vision tower alone."""
    if not any(name.startswith("model.language_model.") for name in shards(directory)):
        raise CheckpointError(f"{directory}: has no weights of the language model, which is asked about pictures after training; "
                              "copy the whole model, or --num-answers 0 does not ask it")


def embedded(tower: Tower, inputs: Tensor) -> Tensor:
    """CLIP's embeddings (N, E), normalised, from what a tower's one layer is given (N, D). Raises NonFinite."""
    (name,) = tower.layer_names
    found = nn.functional.normalize(read_layer(tower.directory, name)[0](inputs), dim=1)
    if not found.isfinite().all():
        raise NonFinite(f"{name} of {tower.directory} makes NaN or infinity of what it is given; copy the model again")
    return found


def encoder_fingerprint(directory: Path) -> str:
    """Identifies an encoder's files by content."""
    return fingerprint(sorted(f for f in directory.iterdir() if f.suffix in (".json", ".safetensors", ".txt")))
