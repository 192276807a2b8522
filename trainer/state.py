"""What a run is at one moment: what a checkpoint holds, and what may change between two halves of a run."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.checkpoint import Checkpoint, compatible
from trainer.config import TrainConfig, as_json
from trainer.erasers import Erasers
from trainer.errors import CheckpointError
from trainer.latents import Latents
from trainer.optimizer_state import export_optimizer, import_optimizer

PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "safetensors")
# A resumed run may differ in memory plan, model location and output, and, with a constant learning rate, be longer.
_COMPARED = ("data", "loss", "optim")


@dataclass
class TrainState:
    """The moving parts of a run. `step` counts finished optimizer steps."""

    config: TrainConfig
    origins: Mapping[str, str]
    base_model: Mapping[str, str]
    erasers: Erasers
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    latents: list[Latents]
    step: int = 0

    def __post_init__(self):
        data = self.config.data
        self._prompt_files = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in
                              (("prompts", data.prompts), ("preserve_file", data.preserve_file)) if path}

    def export(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """(tensors by file, JSON state) for `checkpoint.save_checkpoint`."""
        moments, description = export_optimizer(self.optimizer, dict(self.erasers.named_parameters()))
        latents = {name: t for stream in self.latents for name, t in stream.state_dict().items()}
        tensors = {"adapter": self.erasers.state_dict(), "optimizer": moments, "latents": latents,
                   "rng": {"cpu": torch.get_rng_state()}}
        return tensors, self._described() | {
            "optimizer_state": description, "step": self.step, "scaler": self.scaler.state_dict(),
            "position": {"student_passes": self.step * self.config.optim.accumulation},
            "origins": dict(self.origins), "versions": {p: version(p) for p in PACKAGES}}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what the checkpoint holds. Raises CheckpointError naming the first setting that differs."""
        self.check(checkpoint)
        self.erasers.load_state_dict(checkpoint.tensors("adapter"))
        import_optimizer(self.optimizer, dict(self.erasers.named_parameters()), checkpoint.tensors("optimizer"),
                         checkpoint.state["optimizer_state"])
        saved_latents = checkpoint.tensors("latents")
        if saved_latents:
            for stream in self.latents:
                stream.load_state_dict(saved_latents)
        torch.set_rng_state(checkpoint.tensors("rng")["cpu"])
        if checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step = checkpoint.state["step"]

    def check(self, checkpoint: Checkpoint) -> None:
        """Whether this run may go on from the checkpoint."""
        compatible(checkpoint.state, self._described())
        ours, saved = as_json(self.config), checkpoint.state["config"]
        for section in _COMPARED:
            for name, value in ours[section].items():
                if name == "steps" and self.config.optim.schedule == "constant":
                    continue
                if saved[section].get(name) != value:
                    raise CheckpointError(f"cannot resume: {section}.{name} is {saved[section].get(name)!r} in the "
                                          f"checkpoint and {value!r} now; a resumed run keeps what it trains on")
        for name, digest in self._prompt_files.items():
            if checkpoint.state.get("prompt_files", {}).get(name, digest) != digest:
                raise CheckpointError(f"cannot resume: what data.{name} names, {ours['data'][name]}, was changed since; "
                                      "a resumed run keeps what it trains on")

    def _described(self) -> dict[str, Any]:
        return {
            "base_model": {"config_hash": self.base_model["config_hash"]},
            "adapter": {"type": "adapter", "rank": self.erasers.rank, "width": self.erasers.width,
                        "num_blocks": len(self.erasers.adapters)},
            "optimizer": self.config.memory.optimizer,
            "config": as_json(self.config), "prompt_files": self._prompt_files,
        }


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0): linear warm-up, then constant or a cosine to zero after the last step."""
    import math

    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.schedule == "constant":
        return o.lr
    done = (step - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
