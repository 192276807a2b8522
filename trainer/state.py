"""What a run is at one moment: what a checkpoint holds, and what may change between two halves of a run."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memory.advice import flag_of
from trainer.checkpoint import Checkpoint, compatible
from trainer.config import TrainConfig
from trainer.config_file import as_json
from trainer.diffusion import scheduler_hash
from trainer.distributed import everyones, num_ranks
from trainer.erasers import Erasers
from trainer.errors import CheckpointError, UsageError
from trainer.latents import Latents
from trainer.optimizer_state import export_optimizer, import_optimizer
from trainer.prompts import PromptSet, collect
from trainer.run_directory import read_config, require_none_due
from trainer.run_files import nested

PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "safetensors")
# A resumed run may differ in memory plan, model location and output, and, with a constant learning rate, be longer.
_COMPARED = {"data": (), "loss": (), "optim": (), "model": ("frames", "height", "width"), "memory": ("dtype",)}  # (): all


@dataclass
class TrainState:
    """The moving parts of a run. `step` counts finished optimizer steps."""

    config: TrainConfig
    origins: Mapping[str, str]
    base_model: Mapping[str, str]
    prompts: PromptSet
    erasers: Erasers
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    latents: list[Latents]
    native_dtype: torch.dtype
    """What `--dtype native` stands for."""
    encoded: Sequence[float] = ()
    """What the text encoder makes of the prompts (`Embeddings.signature`)."""
    step: int = 0
    frozen: str | None = None
    """Identifies the frozen weights, once they have been looked at."""

    def __post_init__(self):
        self._before: tuple[int, list[dict[str, Tensor]]] = (0, [])  # a step, and the latents that it began with
        self._moving: int | None = None  # the step whose update the optimizer has begun
        self.optimizer.register_step_pre_hook(self._begin_update)
        self._prompts = _digest(self.prompts)

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
        return tensors, self.described() | {
            "config": as_json(self.config), "optimizer_state": description, "step": self.step, "scaler": self.scaler.state_dict(),
            "position": {"student_passes": self.step * self.config.optim.accumulation},
            "origins": dict(self.origins), "versions": {p: version(p) for p in PACKAGES}}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what the checkpoint holds."""
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

    def check(self, saved: Mapping[str, Any]) -> None:
        """Whether this run may go on from the state of a checkpoint, or of `unsaved`. Raises CheckpointError naming the first difference."""
        ours = self.described()
        compatible({**saved, "base_model": {"config_hash": nested(saved, "base_model", "config_hash")}}, ours)
        _check_settings(saved, self.config, self.native_dtype)
        if saved.get("step", 0) > self.config.optim.steps:
            raise CheckpointError(f"cannot resume: --steps {self.config.optim.steps}, and {saved['step']} are done; name as many or more")
        _check_content(saved, ours, self.config)

    def described(self) -> dict[str, Any]:
        """What must be the same for a run to go on, besides its settings."""
        return {
            "base_model": {"config_hash": self.base_model["config_hash"]},  # wherever it is now
            "adapter": {"type": "adapter", "rank": self.erasers.rank, "width": self.erasers.width,
                        "num_blocks": len(self.erasers.adapters)},
            "optimizer": self.config.memory.optimizer,
            "prompts": self._prompts, "encoded": list(self.encoded), "scheduler": scheduler_hash(self.latents[0].scheduler), "frozen": self.frozen,
        }

    def require_same(self) -> None:
        """Of several processes, whether each is part of the same run. Raises UsageError in all where their files differ."""
        first, *others = everyones(self.described())
        for number, other in enumerate(others, 1):
            for name, what in (("prompts", "prompts"), ("base_model", "a model"), ("scheduler", "a scheduler"), ("frozen", "weights")):
                if other[name] != first[name]:
                    raise UsageError(f"process {number} has read {what} other than those of process 0; all processes must see the same files")


def unsaved(run_dir: Path) -> dict[str, Any]:
    """What a run that has no checkpoint yet said that it is, for `TrainState.check`. Raises CheckpointError where it should have one."""
    config, content = read_config(run_dir)
    require_none_due(run_dir, save_every=config.output.save_every)
    return content


def require_kept(run_dir: Path, config: TrainConfig) -> None:
    """Raises CheckpointError where settings or prompts are not the run's, before anything is loaded; all else `TrainState.check` compares."""
    before, content = read_config(run_dir)
    _check_settings(content | {"config": as_json(before)}, config)
    _check_content(content, {"prompts": _digest_now(config)}, config)


def prompts_kept(run_dir: Path) -> bool:
    """Whether the files that a run's prompts are in say what they said when it was trained, as far as the run knows."""
    config, content = read_config(run_dir)
    return content.get("prompts") in (None, _digest_now(config))


def _check_settings(saved: Mapping[str, Any], config: TrainConfig, native_dtype: torch.dtype | None = None) -> None:
    """`native_dtype`: what `--dtype native` stands for; None where the model was not looked at yet."""
    before, ours, defaults = saved["config"], as_json(config), as_json(TrainConfig())
    for section, names in _COMPARED.items():
        for name in names or ours[section]:
            if name == "steps" and "constant" in (before["optim"].get("schedule"), ours["optim"]["schedule"]):  # if not both are, that differs
                continue
            then, now = before[section].get(name, defaults[section][name]), ours[section][name]  # an older run lacks the newest ones
            native = native_dtype and str(native_dtype).removeprefix("torch.")
            if name == "dtype" and "native" in (then, now) and native in (None, then, now):  # two names of one
                continue
            if "prompts" in saved and name in ("prompts", "preserve_file") and then and now:  # by their content, wherever they are now
                continue
            if then != now:
                why = "a resumed run keeps what it trains on"
                if name == "steps":
                    why = f"its cosine schedule ends at step {then}, and only a run with --schedule constant goes further"
                raise CheckpointError(f"cannot resume: {flag_of(name)} was {then!r} and is {now!r} now; {why}")


def _check_content(saved: Mapping[str, Any], ours: Mapping[str, Any], config: TrainConfig) -> None:
    """Prompts and weights, as far as both sides know them."""
    data, model = config.data, config.model.model
    files = [f"{flag} {path}" for flag, path in (("--prompts", data.prompts), ("--preserve-file", data.preserve_file)) if path]
    sources = ", ".join(files) or f"as they are made for --model {model}"
    for name, what in (("prompts", f"the prompts ({sources})"), ("frozen", f"the weights of --model {model}"),
                       ("scheduler", f"class and settings of the scheduler of --model {model}"),
                       ("encoded", f"the text encoder's embeddings of the prompts, by --model {model},")):
        if saved.get(name) and ours.get(name) and not _same(saved[name], ours[name]):
            raise CheckpointError(f"cannot resume: {what} are not those that it was trained on so far; a resumed run keeps what it trains on")


def _same(then: Any, now: Any) -> bool:
    """Of figures, whether they are alike: another dtype or device has moved them by a percent at the most (assumed)."""
    if isinstance(now, list) and len(then) == len(now):
        return math.dist(then, now) <= 0.1 * math.hypot(*now)
    return then == now


def _digest_now(config: TrainConfig) -> str:
    """Of the prompts that the settings ask for, as their files are."""
    return _digest(collect(config.data, bundled=config.model.model == "shapes"))


def _digest(prompts: PromptSet) -> str:
    return hashlib.sha256(json.dumps([prompts.prompts, prompts.safe, prompts.preserved]).encode()).hexdigest()[:16]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0, below --steps): linear warm-up, then constant or a cosine to zero after the last step."""
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.schedule == "constant":
        return o.lr
    done = (step - o.warmup) / (o.steps - o.warmup)
    return o.lr * 0.5 * (1 + math.cos(math.pi * done))
