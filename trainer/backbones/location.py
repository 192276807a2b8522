"""Where a model is, and what its files say before any weight is read."""

import difflib
import hashlib
import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer.backbones import published
from trainer.backbones.weights import open_shard, shards
from trainer.config import expanded
from trainer.errors import CheckpointError, TrainerError, UsageError
from trainer.hub import fetch_description, fetch_weights, has_weights, is_hub_id, read_header

BUNDLED = Path(__file__).parent.parent / "shapes" / "pipeline"
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_WEIGHTED = ("transformer/", "vae/", "text_encoder/")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}
_CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
_ARGUMENTS = frozenset("""
    activation_fn attention_bias attention_head_dim dropout flip_sin_to_cos freq_shift in_channels max_text_seq_length norm_elementwise_affine
    norm_eps num_attention_heads num_layers ofs_embed_dim out_channels patch_bias patch_size patch_size_t sample_frames sample_height
    sample_width spatial_interpolation_scale temporal_compression_ratio temporal_interpolation_scale text_embed_dim time_embed_dim
    timestep_activation_fn use_learned_positional_embeddings use_rotary_positional_embeddings""".split())


def locate(model: str) -> Path:
    """The local directory of a model; of a model of the hub, all but its weights. Raises UsageError."""
    if model == "shapes":
        return BUNDLED
    hub_id = _hub_id(model)
    directory = fetch_description(hub_id, named=f"--model {model}") if hub_id else expanded(model)
    missing = [c for c in COMPONENTS if not (directory / c).is_dir()]
    if not (directory / "model_index.json").is_file() or missing:
        what = "is not there"
        if directory.is_dir():
            what = f"lacks {missing[0]}/" if missing else "lacks model_index.json"
        elif directory.exists():
            what = "is not a directory"
        near = difflib.get_close_matches(model, [*published.TRANSFORMERS, "shapes"], n=1)
        if near:
            what += f"; did you mean {near[0]}? Or"
        raise UsageError(f"--model {model}: {what}{'' if near else ';'} name a directory in diffusers' layout "
                         f"({', '.join(COMPONENTS)}), a hub id, or shapes")
    kind = str(_read_object(directory / "model_index.json").get("_class_name", "CogVideoXPipeline"))
    if not kind.startswith("CogVideoX"):  # its pipelines for other uses have the same parts
        raise UsageError(f"--model {model}: the pipeline is a {kind}; CogVideoXPipeline is needed")
    return directory


def of_hub(model: str) -> bool:
    """Whether its weights may have to be downloaded."""
    return _hub_id(model) is not None


def require_there(model: str) -> None:
    """What `locate` raises, as far as it can be told without asking the hub."""
    if not of_hub(model):
        locate(model)


def complete(model: str, directory: Path) -> None:
    """Fetch the weights of what `locate` found, if it is the hub's. Raises UsageError."""
    if hub_id := _hub_id(model):
        fetch_weights(hub_id, directory, named=f"--model {model}", parts=_WEIGHTED)


def _hub_id(model: str) -> str | None:
    """What the hub calls it, if it is not here."""
    if expanded(model).exists():
        return None
    model = model.rstrip("/")
    return published.HUB_IDS.get(model, model if is_hub_id(model) else None)


def read_config(directory: Path, component: str) -> dict[str, Any]:
    """A component's settings, without the entries that diffusers keeps for itself. Raises UsageError, also for another class."""
    config = _read_object(directory / component / "config.json")
    wanted = _CLASSES.get(component)
    if wanted and config.get("_class_name", wanted) != wanted:
        raise UsageError(f"--model {directory}: {component} is a {config['_class_name']}; {wanted} is needed")
    if config.get("quantization_config"):
        raise UsageError(f"--model {directory}: {component} is quantised; name the model as it was before that")
    return {k: v for k, v in config.items() if not k.startswith("_")}


def config_hash(config: Mapping[str, Any]) -> str:
    """Identifies a transformer by its configuration: by all arguments that diffusers 0.42 knows, and of those that a later version has by the
    ones that are not as usual there. The entries that diffusers keeps for itself do not count."""
    from diffusers import CogVideoXTransformer3DModel

    known = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    added = {name: argument.default for name, argument in known.items() if name not in _ARGUMENTS}
    text = json.dumps({k: v for k, v in sorted(config.items()) if not k.startswith("_") and (k not in added or v != added[k])}, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{file} cannot be read ({e}); copy the model again") from e
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a configuration; copy the model again")
    return content


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Around a library that reads a part of a model, and raises about anything where it is damaged. Raises CheckpointError."""
    try:
        yield
    except TrainerError:
        raise
    except Exception as e:
        raise CheckpointError(f"{place} cannot be read ({e}); copy the model again") from e


def stored_dtype(model: str, directory: Path, component: str) -> torch.dtype:
    """The dtype that a component's weights are stored in, a few small ones perhaps excepted: its native one. Of weights that are still on
    the hub, their header says it, where the hub gives that. Raises UsageError, also for other than 16 and 32 bits, and CheckpointError."""
    header, part = None, f"{component}/"
    if (hub_id := _hub_id(model)) and not has_weights(directory, part):
        header = read_header(hub_id, directory, part)
        if header is None:
            complete(model, directory)
    if header is None:
        with open_shard(next(iter(shards(directory / component).values()))) as f:
            tensors = {name: f.get_slice(name) for name in f.keys()}
            header = {name: (tensor.get_shape(), tensor.get_dtype()) for name, tensor in tensors.items()}
    _, stored = max(header.values(), key=lambda tensor: math.prod(tensor[0]))
    if stored not in _DTYPES:
        raise UsageError(f"--model {model}: the weights of {component} are stored in {stored}; name the model as it was in 16 or 32 bits")
    return _DTYPES[stored]


def fingerprint(files: Iterable[Path]) -> str:
    """Identifies files by name, size and content, of which 64 samples: gigabytes of weights are told apart without reading them all."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\0".encode())
        with file.open("rb") as f:
            count = min(64, -(-size // 65536))
            for i in range(count):
                f.seek(max(0, size - 65536) * i // max(1, count - 1))
                digest.update(f.read(65536))
    return digest.hexdigest()
