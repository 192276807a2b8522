"""The training run's settings: defaults < plan < TOML file < flags, with the origin of each value.

Imports no torch, so that `--help` answers at once.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from memory.advice import flag_of
from memory.plan import MemoryPlan
from trainer.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str = "shapes"
    """The frozen model: shapes (bundled), cogvideox-2b, cogvideox-5b, cogvideox1.5-5b, another hub id, or a directory in diffusers' layout."""
    weights: Literal["stored", "random"] = "stored"
    """random: the published configuration without any download, for planning and benchmarks."""
    frames: int | None = None
    """Video frames; the model's own by default."""
    height: int | None = None
    """Video height in pixels; the model's own by default."""
    width: int | None = None
    """Video width in pixels; the model's own by default."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …, as nvidia-smi counts cards; auto takes the card if there is one."""
    force_dtype: bool = False
    """Insist on a dtype that the model is known not to survive."""

    def __post_init__(self):
        _require_fit(self, 32, "frames", "height", "width")  # what else they must be the model says


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    concept: str = "red"
    """The concept to erase: one or more words, as they stand in the prompts."""
    synonyms: tuple[str, ...] = ()
    """Other words for the concept, one of which a prompt may hold instead (--concept nudity --synonyms nude naked).
    On the bundled model, with --prompts only."""
    prompts: Path | None = None
    """Prompts that show the concept: a text file, one a line; or a CSV or TSV with a column prompt and, if you can, a column safe.
    A safe prompt is the same one without the concept.
    Left out: captions of the concept on the bundled model, five short sentences about it on others."""
    instead: str = ""
    """What safe prompts name in the concept's place (--concept circle --instead square), where the file has none.
    Left out: captions without the concept on the bundled model, the empty prompt on others."""
    preserve: tuple[str, ...] = ()
    """Related concepts to keep, as prompts or words. Needed unless --beta 0; on the bundled model, all others by default."""
    preserve_file: Path | None = None
    """The same from a text file, one a line."""
    latents: Literal["trajectory", "noise"] = "trajectory"
    """Where x_t comes from: the teacher's sampling trajectory, or random noise at a random timestep."""
    trajectory_steps: int = 20
    """Denoising steps of one trajectory."""
    trajectory_guidance: float = 1.0
    """Guidance scale with which trajectories advance; 1 is without guidance."""
    batch_size: int = 1
    """Samples of a student pass, of all processes together."""
    pool: int = 0
    """Cache the teacher's outputs of this many student passes on the host and cycle through them; 0: off.
    A step has --accumulation passes."""

    def __post_init__(self):
        require_several(self, "synonyms", "preserve")
        for name in ("concept", "synonyms", "instead", "preserve"):  # prompts are looked through for them
            words = getattr(self, name)
            object.__setattr__(self, name, composed(words) if isinstance(words, str) else tuple(map(composed, words)))
        expand(self, "prompts", "preserve_file")
        if not self.concept:
            raise UsageError("--concept is empty; name what to erase, e.g. --concept red")
        if not all(self.synonyms):
            raise UsageError("--synonyms: an empty word names nothing; leave it out")
        at_least(self, 1, "trajectory_steps")
        at_least(self, 1, "batch_size", num_bits=32)
        at_least(self, 0, "pool", "trajectory_guidance")
        if self.latents == "trajectory" and self.pool % self.trajectory_steps:
            raise UsageError(f"--pool {self.pool}: with trajectory latents, a multiple of --trajectory-steps "
                             f"({self.trajectory_steps})")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    eta: float = 5.0
    """η: how far the target is pushed past the anchor, away from the concept."""
    anchor: Literal["safe", "empty"] = "safe"
    """The prediction that η pushes from: that of the safe prompt (where there is one), or of the empty prompt."""
    alpha: float = 1.0
    """α: weight of the localisation loss; 0 trains without."""
    beta: float = 1.0
    """β: weight of the preservation loss; 0 trains without."""
    mask_threshold: float = 0.5
    """Where the concept is: attention maps, normalised over the clip, from this value on."""
    mask_blocks: tuple[int, ...] = ()
    """Blocks whose attention makes the mask; empty takes all."""

    def __post_init__(self):
        at_least(self, 0, "eta", "alpha", "beta", "mask_blocks")
        if not 0 < self.mask_threshold <= 1:
            raise UsageError(f"--mask-threshold {self.mask_threshold}: above 0 and at most 1; --alpha 0 trains without localisation")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    rank: int = 128
    """Inner width of each eraser."""
    steps: int = 1000
    """Optimizer steps."""
    accumulation: int = 1
    """Student passes an optimizer step."""
    lr: float = 1e-4
    """Learning rate after warm-up."""
    warmup: int = 10
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or a cosine that would be zero after the last step."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest gradient norm; 0 is without."""
    seed: int = 0
    """Seed of weights, noise, timesteps and prompt order."""

    def __post_init__(self):
        at_least(self, 1, "rank", num_bits=32)
        at_least(self, 1, "steps", "accumulation")
        at_least(self, 0, "warmup", "clip", "weight_decay")
        require_seed(self)
        if not 0 < self.lr < math.inf:
            raise UsageError(f"--lr {self.lr}: must be above 0, and finite; 1e-4 is the published choice")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    out: Path | None = None
    """Run directory; runs/<concept>-<number> by default."""
    save_every: int = 100
    """Steps between checkpoints."""
    sample_every: int = 0
    """Steps between samples of fixed prompts; 0 samples at the end only."""
    sample_prompts: tuple[str, ...] = ()
    """What to sample; by default two prompts with the concept and two preserved ones."""
    sample_steps: int = 20
    """Denoising steps of a sample."""
    guidance_scale: float = 1.0
    """Guidance scale of samples; 1 is without guidance."""
    evaluate: bool = True
    """On the bundled model, measure the erasure when training is done."""
    monitor: Literal["auto", "plain", "off"] = "auto"
    """auto: a live view on a terminal, plain lines elsewhere. plain: lines. off: nothing. All on stderr."""
    tensorboard: bool = False
    """Also write event files for TensorBoard, to RUN/tensorboard; needs the package tensorboard."""

    def __post_init__(self):
        expand(self, "out")
        require_several(self, "sample_prompts")
        at_least(self, 1, "save_every", "sample_steps")
        at_least(self, 0, "sample_every", "guidance_scale")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train concept erasers on a frozen text-to-video transformer."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    memory: MemoryPlan = field(default_factory=MemoryPlan)


def composed(text: str) -> str:
    """Stripped, and an é as one letter, whoever wrote it: words are looked for among others."""
    return unicodedata.normalize("NFC", text.strip())


def expanded(path: Path | str) -> Path:
    """A path whose ~ is the user's home, wherever it is written. Raises UsageError for a home that nobody has."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UsageError(f"{path}: whose home that is, is not known here; write it out") from e


def expand(config: Any, *names: str) -> None:
    """Replace settings that are paths by what they are `expanded`; None stays."""
    for name in names:
        if (path := getattr(config, name)) is not None:
            object.__setattr__(config, name, expanded(path))


def require_several(config: Any, *names: str) -> None:
    """Raises UsageError for a text where a tuple of texts is meant, as a script may give it: its letters would be taken one by one."""
    for name in names:
        if isinstance(value := getattr(config, name), str):
            raise UsageError(f"{flag_of(name)}: several texts, such as {(value,)!r}, and not the text {value!r}")


def require_seed(config: Any) -> None:
    """Raises UsageError for a seed that no generator takes."""
    _require_fit(config, 64, "seed")


def at_least(config: Any, least: float, *names: str, num_bits: int = 64) -> None:
    """Raises UsageError for a setting that is less, or not finite. `num_bits`: what a whole number must fit; 32 where it is a tensor's
    size, whose bytes must be countable too."""
    for name, value in _numbers(config, names):
        if not least <= value < math.inf:
            raise UsageError(f"{flag_of(name)} {value}: must be {least} or more" + ", and finite" * (not math.isfinite(value)))
    _require_fit(config, num_bits, *names)


def _require_fit(config: Any, num_bits: int, *names: str) -> None:
    for name, value in _numbers(config, names):
        if isinstance(value, int) and not -2**(num_bits - 1) <= value < 2**(num_bits - 1):
            raise UsageError(f"{flag_of(name)} {value}: must fit {num_bits} bits")


def _numbers(config: Any, names: Iterable[str]) -> Iterator[tuple[str, float]]:
    """(name, number) of settings that hold one number, several, or None."""
    for name in names:
        value = getattr(config, name)
        yield from ((name, number) for number in (value if isinstance(value, tuple) else (value,)) if number is not None)


# What suits the bundled model better than the published defaults, which are those of the 2b and the 5b.
SHAPES = {
    "data.batch_size": 8,
    "data.trajectory_steps": 8,
    "loss.eta": 4.0,
    "loss.beta": 3.0,
    "optim.rank": 32,
    "optim.steps": 400,
    "optim.lr": 3e-3,
    "optim.schedule": "cosine",
    "output.sample_steps": 16,
}


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a config by dotted path, e.g. `optim.rank`."""
    found = {}
    for f in fields(config):
        value = getattr(config, f.name)
        found |= leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return found


def replaced(config: Any, values: dict[str, Any]) -> Any:
    """The config with settings replaced by dotted path; each section is validated anew."""
    own = {path: v for path, v in values.items() if "." not in path}
    for section in {path.split(".", 1)[0] for path in values if "." in path}:
        inner = {p.split(".", 1)[1]: v for p, v in values.items() if p.startswith(section + ".")}
        own[section] = replaced(getattr(config, section), inner)
    return dataclasses.replace(config, **own)
