"""Low-rank updates of a frozen linear layer (Hu et al., arXiv:2106.09685), and their files in PEFT's layout.

Legend: N rows, D input width, E output width, r rank.
"""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from trainer.checkpoint import read_tensors
from trainer.errors import CheckpointError, InputOutputError
from trainer.run_files import read_bytes, write_json, write_tensors
from trainer.seeding import noise

CONFIG, WEIGHTS, MERGED = "adapter_config.json", "adapter_model.safetensors", "merged.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapper around the model, which its keys name


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model: its name there, weight (E, D) and bias (E,) or None, in float32."""

    name: str
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, update: Tensor | None = None) -> Tensor:
        """(N, E) of inputs (N, D), with an update (E, D) of the weight or without."""
        return F.linear(x, self.weight if update is None else self.weight + update, self.bias)

    def to(self, device: torch.device | str) -> "Layer":
        return Layer(self.name, self.weight.to(device), None if self.bias is None else self.bias.to(device))


class Lora(nn.Module):
    """update = alpha / r * B A, with A (r, D) uniform as in a new linear layer and B (E, r) zero: no update at first."""

    def __init__(self, layer: Layer, *, rank: int, alpha: float, seed: int, index: int = 0):
        super().__init__()
        (out_width, width), device = layer.weight.shape, layer.weight.device
        if rank > min(out_width, width):
            raise ValueError(f"rank {rank} is more than {layer.name}'s {min(out_width, width)}; a full update has that rank")
        self.scale = alpha / rank
        # uniform in ±1/sqrt(D) from normal noise by its distribution function: a function of the seed on every device
        uniform = torch.special.ndtr(noise((rank, width), seed, f"lora/{layer.name}", index)) * 2 - 1
        self.A = nn.Parameter((uniform / math.sqrt(width)).to(device))
        self.B = nn.Parameter(torch.zeros(out_width, rank, device=device))

    def update(self) -> Tensor:
        """(E, D), the scale included."""
        return self.scale * (self.B @ self.A)


def save_lora(directory: Path, updates: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float, base_model: str) -> None:
    """Write (A, B) by layer name as PEFT does: `PeftModel.from_pretrained(model, directory)` loads them.

    Names and fields: peft's `LoraConfig` and `get_peft_model_state_dict`. Raises InputOutputError.
    """
    rank = next(iter(updates.values()))[0].shape[0]
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "r": rank, "lora_alpha": alpha,
        "target_modules": list(updates), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "use_rslora": False, "use_dora": False, "modules_to_save": None,
    }
    tensors = {f"{_PREFIX}{name}.lora_{letter}.weight": t.detach().cpu().contiguous()
               for name, pair in updates.items() for letter, t in zip("AB", pair)}
    _write(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, config, advice=_later(directory))


def load_updates(directory: Path) -> dict[str, Tensor]:
    """The updates (E, D) by layer name of a file in PEFT's layout. Raises CheckpointError."""
    tensors = read_tensors(directory / WEIGHTS)
    try:
        config = json.loads(read_bytes(directory / CONFIG))
        scale = config["lora_alpha"] / config["r"]
        ends = ".lora_A.weight", ".lora_B.weight"
        names = [key.removeprefix(_PREFIX).removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
        return {n: scale * (tensors[f"{_PREFIX}{n}{ends[1]}"] @ tensors[f"{_PREFIX}{n}{ends[0]}"]) for n in names}
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as e:
        raise CheckpointError(f"{directory}: not a LoRA in PEFT's layout ({e!r})") from e


def save_merged(directory: Path, layers: Mapping[str, Layer], updates: Mapping[str, Tensor], dtype: torch.dtype) -> Path:
    """Write the edited layers themselves, under their names in the model and in its dtype; returns the path."""
    tensors = {}
    for name, update in updates.items():
        tensors[f"{name}.weight"] = (layers[name].weight.cpu() + update.cpu()).to(dtype)
        if layers[name].bias is not None:
            tensors[f"{name}.bias"] = layers[name].bias.cpu().to(dtype)
    _write(directory / MERGED, tensors)
    return directory / MERGED


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        write_tensors(path, tensors)
    except (OSError, SafetensorError) as e:  # the latter when the disk is full
        raise InputOutputError(f"{path} cannot be written ({e}){_later(path.parent)}") from e


def _later(run_dir: Path) -> str:
    return f"; what was trained is saved: once there is room, python run.py forget --resume {shlex.quote(str(run_dir))} writes it"
