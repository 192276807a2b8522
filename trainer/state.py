"""What a run is at one moment: what a checkpoint holds, and what may change between two halves of a run."""

import hashlib
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.checkpoint import Checkpoint, compatible
from trainer.config import TrainConfig
from trainer.config_file import as_json
from trainer.distributed import num_ranks
from trainer.erasers import Erasers
from trainer.errors import CheckpointError
from trainer.latents import Latents
from trainer.metrics import read_metrics
from trainer.optimizer_state import export_optimizer, import_optimizer
from trainer.run_directory import CONFIG, read_config

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "safetensors")
# A resumed run may differ in memory plan, model location and output, and, with a constant learning rate, be longer.
_COMPARED = {"data": (), "loss": (), "optim": (), "model": ("frames", "height", "width"), "memory": ("dtype",)}  # (): all


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
        self._before: tuple[int, list[dict[str, Tensor]]] = (0, [])  # a step, and the latents that it began with
        self._moving: int | None = None  # the step whose update the optimizer has begun
        self.optimizer.register_step_pre_hook(self._begin_update)
        self._prompt_files = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in
                              (("prompts", data.prompts), ("preserve_file", data.preserve_file)) if path}

    def begin_step(self) -> None:
        """Remember what the teacher moves in a step, so that `rewind` can take it back. Nothing is copied where a step makes one sample."""
        if num_ranks() > 1:  # of several processes none can go on alone
            return
        states = [stream.state_dict() for stream in self.latents]
        if self.config.optim.accumulation > 1 or self.config.data.pool:  # the sample after next is made where this one was
            states = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
        self._before = self.step, states

    def _begin_update(self, *_: Any) -> None:
        self._moving = self.step

    def rewind(self) -> bool:
        """After an error in mid-step: be the last finished step again. False if the optimizer had begun to move weights,
        or if other processes take part in the step."""
        if self._moving == self.step or num_ranks() > 1:
            return False
        step, states = self._before
        for stream, saved in zip(self.latents, states) if step == self.step else ():
            if saved:
                stream.load_state_dict(saved)
        return True

    def export(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """(tensors by file, JSON state) for `checkpoint.save_checkpoint`. Of several processes, all must call it."""
        moments, description = export_optimizer(self.optimizer, dict(self.erasers.named_parameters()))
        latents = {name: t for stream in self.latents for name, t in stream.state_dict().items()}
        tensors = {"adapter": self.erasers.state_dict(), "optimizer": moments, "latents": latents,
                   "rng": {"cpu": torch.get_rng_state()}}
        return tensors, self._described() | {
            "optimizer_state": description, "step": self.step, "scaler": self.scaler.state_dict(),
            "position": {"student_passes": self.step * self.config.optim.accumulation},
            "origins": dict(self.origins), "versions": {p: version(p) for p in PACKAGES}}

    def begin_anew(self, run_dir: Path) -> None:
        """Whether a run without any checkpoint may start over: only if it ended before its first one was due.

        Raises CheckpointError otherwise, or naming the first setting that differs from the run's own.
        """
        if not (run_dir / CONFIG).exists() or len(read_metrics(run_dir)) > read_config(run_dir)[0].output.save_every:
            raise CheckpointError(f"--resume {run_dir}: there is no checkpoint; start again with another --out")
        self._check_settings(read_config(run_dir)[1]["config"])
        logger.warning("%s ended before its first checkpoint: it begins anew, and arrives at the same", run_dir)

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
        digests = checkpoint.state.get("prompt_files", {})
        self._check_settings(checkpoint.state["config"], digests)
        for name, digest in self._prompt_files.items():
            if digests.get(name, digest) != digest:
                raise CheckpointError(f"cannot resume: --{name.replace('_', '-')} {getattr(self.config.data, name)}: the file was changed since; "
                                      "a resumed run keeps what it trains on")

    def _check_settings(self, saved: Mapping[str, Any], digests: Collection[str] = ()) -> None:
        """`digests`: files that are compared by content, wherever they are now."""
        ours = as_json(self.config)
        for section, names in _COMPARED.items():
            for name in names or ours[section]:
                if name == "steps" and self.config.optim.schedule == "constant":
                    continue
                then, now = saved[section].get(name), ours[section][name]
                if name in digests and then and now:
                    continue
                if then != now:
                    raise CheckpointError(f"cannot resume: --{name.replace('_', '-')} is {then!r} in the checkpoint and {now!r} now; "
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
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.schedule == "constant":
        return o.lr
    done = (step - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
