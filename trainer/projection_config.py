"""Settings of `run.py forget`. Imports no torch, so that `--help` answers at once."""

import math
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from memory.advice import flag_of
from memory.plan import MemoryPlan, PlanError
from trainer.config import at_least, expand, require_seed, require_several
from trainer.config_file import from_json, typed
from trainer.errors import CheckpointError, UsageError
from trainer.lock import refuse_unbegun
from trainer.run_directory import read_content, resuming
from trainer.run_files import CONFIG

WOULD_HELP = ("Where the loss still fell at the end, more --steps or a higher --lr would help, elsewhere a higher --lambda-forget, "
              "and a --rank that is too small can be raised.")
"""What to do where no attempt was accepted."""
_OBEYED = ("dtype", "resident_blocks", "offload_buffers", "compile", "optimizer")  # of the memory plan


@dataclass(frozen=True, kw_only=True)
class ForgetConfig:
    """Forget a class in the linear layer that follows a frozen encoder: CLIP's text_projection, Qwen3-VL's merger."""

    encoder: Literal["clip", "qwen3-vl"] = "clip"
    """clip: the text side, from names. qwen3-vl: the image side, from pictures."""
    model: str = "shapes"
    """The frozen encoder: shapes (bundled), a directory in transformers' layout, or a hub id."""
    forget: str | None = None
    """The class to forget. The bundled encoders know a colour and a shape: red circle, by default."""
    preserve: tuple[str, ...] = ()
    """Classes to keep, by name (clip). The bundled encoder keeps all others by default."""
    preserve_file: Path | None = None
    """The same from a text file, one a line (clip)."""
    images: Path | None = None
    """Pictures to measure zero-shot accuracy on, one folder a class (clip)."""
    forget_images: Path | None = None
    """A folder of pictures of the class to forget (qwen3-vl)."""
    preserve_images: Path | None = None
    """Pictures to keep, one folder a class (qwen3-vl)."""
    question: str = "What is this?"
    """What the language model is asked about each picture when its answers are measured (qwen3-vl)."""
    num_answers: int = 32
    """Pictures a class that the language model is asked about; 0 asks about none (qwen3-vl)."""
    num_images: int = 64
    """Pictures a class, of the bundled world, for training and as many others for measuring."""
    target: Literal["auto", "empty", "random", "mean"] = "auto"
    """Where the class goes. auto: empty for clip, random for qwen3-vl.
    empty: the normalised embedding of the empty string (clip only). random: one direction at the scale of real outputs.
    mean: the mean of what is kept."""
    mergers: Literal["main", "all"] = "all"
    """Which mergers are edited: the main one, or those of DeepStack too (qwen3-vl)."""
    rank: int = 5
    """Rank of the LoRA."""
    alpha: float = 5.0
    """LoRA scale times rank: the update is alpha / rank * B A."""
    steps: int = 2000
    """Full-batch steps of an attempt."""
    lr: float = 0.01
    """Adam's learning rate."""
    lambda_forget: float = 1.3
    """λ_f: weight of the distance between the class and its target, in the first attempt."""
    lambda_preserve: float = 0.4
    """λ_p: weight of the distance between old and new outputs of what is kept."""
    lambda_weight: float = 1.0
    """λ_w: weight of the update's size."""
    acceptance: float = 0.7
    """The share by which the distance of the forgotten class to its target must fall.
    Otherwise λ_f rises by 0.05 and training starts anew."""
    max_attempts: int = 10
    """Attempts; when none is accepted the last one is kept and said to be short."""
    seed: int = 0
    """Seed of the LoRA's weights, the random target and the bundled world's pictures."""
    merge: bool = False
    """Also write the edited layers themselves, merged.safetensors."""
    batch_size: int = 32
    """Texts or pictures an encoder pass."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …, as nvidia-smi counts cards; auto takes the card if there is one."""
    out: Path | None = None
    """Run directory; runs/<class>-<number> by default."""
    save_every: int = 500
    """Steps between checkpoints."""
    monitor: Literal["auto", "plain", "off"] = "auto"
    """auto: a live view on a terminal, plain lines elsewhere. plain: lines. off: nothing. All on stderr."""
    memory: MemoryPlan = field(default_factory=MemoryPlan)
    """An encoder obeys dtype, resident-blocks, offload-buffers and compile, its LoRA optimizer; the others are refused."""

    def __post_init__(self):
        expand(self, "out", "images", "forget_images", "preserve_images", "preserve_file")
        require_several(self, "preserve")
        at_least(self, 1, "rank", "steps", "max_attempts", "num_images", "batch_size", "save_every")
        at_least(self, 0, "num_answers", "lambda_forget", "lambda_preserve", "lambda_weight")
        for name in ("lr", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name} {getattr(self, name)}: must be above 0, and finite")
        if not 0 <= self.acceptance < 1:
            raise UsageError(f"--acceptance {self.acceptance}: from 0 to below 1")
        if self.forget is not None and not self.forget.strip():
            raise UsageError("--forget is empty; name the class to forget, e.g. --forget 'red circle'")
        for f in fields(MemoryPlan):
            if f.name not in _OBEYED and getattr(self.memory, f.name) != f.default:
                raise UsageError(f"{flag_of(f.name)} is for training erasers; the encoder runs forward only, and obeys "
                                 f"{', '.join(map(flag_of, _OBEYED))}")
        require_seed(self)
        self._check_side()

    @property
    def draws_pictures(self) -> bool:
        """Whether pictures are of the bundled world, and not from folders, or none at all."""
        return self.model == "shapes" and not (self.images or self.forget_images or self.preserve_images)

    def _check_side(self) -> None:
        foreign = {"clip": ("forget_images", "preserve_images", "question", "num_answers", "mergers"),
                   "qwen3-vl": ("preserve", "preserve_file", "images")}
        for f in fields(self):
            if f.name in foreign[self.encoder] and getattr(self, f.name) != f.default:
                raise UsageError(f"{flag_of(f.name)} is not for --encoder {self.encoder}")
        if self.encoder == "qwen3-vl" and self.target == "empty":
            raise UsageError("--target empty: an image has no empty string; random and mean would work")


@dataclass(frozen=True, kw_only=True)
class ForgetCommand:
    """Forget a class in the linear layer after a frozen encoder: CLIP's text_projection, or Qwen3-VL's merger."""

    resume: Path | None = None
    """Go on with the run in this directory, with its settings."""
    settings: ForgetConfig = field(default_factory=ForgetConfig)

    def __post_init__(self):
        expand(self, "resume")


def read_forget_config(run_dir: Path) -> ForgetConfig:
    """The settings of a run of this command. Raises CheckpointError if it is none."""
    refuse_unbegun(run_dir)
    content = read_content(run_dir)
    if content.get("command") != "forget":
        raise CheckpointError(f"{run_dir} is a training run; go on with it by `{resuming(run_dir)}`")
    try:
        values, hints = content["config"], typing.get_type_hints(ForgetConfig)
        memory = from_json({"memory": values["memory"]}).memory
        return ForgetConfig(memory=memory, **{name: typed(values[name], hints[name], name) for name in hints if name != "memory"})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, PlanError, UsageError) as e:
        raise CheckpointError(f"{run_dir}: not a run of `forget` ({CONFIG}: {e!r})") from e
