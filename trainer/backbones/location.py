"""Where a model is, and what its files say before any weight is read."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer.backbones import published
from trainer.backbones.weights import open_shard, shards
from trainer.errors import CheckpointError, TrainerError, UsageError

BUNDLED = Path(__file__).parent.parent / "shapes" / "pipeline"
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
_CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}


def locate(model: str) -> Path:
    """The local directory of a model; hub ids are downloaded (safetensors and configurations only). Raises UsageError."""
    if model == "shapes":
        return BUNDLED
    directory, hub_id = Path(model).expanduser(), published.HUB_IDS.get(model, model)
    if not directory.exists() and hub_id.count("/") == 1 and not hub_id.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.model"]))
        except Exception as e:  # a connection that breaks off raises what the HTTP library has for it, and that is not always the same one
            what = "no such directory, and the hub did not give it" if hub_id == model else f"the hub did not give {hub_id}"
            raise UsageError(f"--model {model}: {what} ({_refusal(e)}); name a local directory in diffusers' layout, or shapes") from e
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


def _refusal(error: Exception) -> str:
    """Why the hub did not give a model."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):  # also where it may not be read
        return "it has none of that name for you; a private or gated one needs HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the cache, and " + ("HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub cannot be reached")
    reason = str(error).strip().split("\n")[0]
    if isinstance(error, HFValidationError):
        return reason
    return ": ".join(filter(None, (type(error).__name__, reason))) + "; files that have come are kept, and the same command goes on with the rest"


def read_config(directory: Path, component: str) -> dict[str, Any]:
    """A component's settings, without the entries that diffusers keeps for itself. Raises UsageError, also for another class."""
    config = _read_object(directory / component / "config.json")
    wanted = _CLASSES.get(component)
    if wanted and config.get("_class_name", wanted) != wanted:
        raise UsageError(f"--model {directory}: {component} is a {config['_class_name']}; {wanted} is needed")
    return {k: v for k, v in config.items() if not k.startswith("_")}


def config_hash(config: Mapping[str, Any]) -> str:
    """Identifies a transformer by its whole configuration, without the entries that diffusers keeps for itself."""
    text = json.dumps({k: v for k, v in sorted(config.items()) if not k.startswith("_")}, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{file} cannot be read: {e}") from e
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


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that the weights are stored in: the model's native one."""
    name, file = next(iter(shards(directory).items()))
    with open_shard(file) as f:
        stored = f.get_slice(name).get_dtype()
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored, torch.float32)


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
