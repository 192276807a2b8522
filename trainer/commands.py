"""What each command of the command line takes. Field docstrings are its --help; nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from memory.cards import size_bytes
from trainer.config import TrainConfig, expand
from trainer.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train concept erasers on a frozen text-to-video transformer.

    Settings: defaults < plan < TOML file < flags. Other commands: plan, generate, evaluate, report,
    diagnose, doctor, export, forget, each with a --help; and bench, which lists what it can measure.
    """

    profile: str = "auto"
    """The card to fit: a name (4090), a size (24gb), or auto, the card in this machine.
    Without a card there is a plan only where this is given; auto is then the CPU and its memory."""
    config: Path | None = None
    """A TOML file with settings: sections model, data, loss, optim, output, memory."""
    resume: Path | None = None
    """Go on with the run in this directory, with its settings."""
    on_oom: Literal["stop", "step-down"] = "stop"
    """Out of memory: stop and name the next cheaper memory plan, or take it and go on from the last step."""
    settings: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        expand(self, "config", "resume")


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write an eraser in the layout that T2VUnlearning's authors released: eraser_weights.pt + eraser_config.json."""

    eraser: Path
    """A run directory or an eraser file; `export RUN --out DIR` says the same."""
    out: Path
    """The directory to write into."""

    def __post_init__(self):
        expand(self, "eraser", "out")


@dataclass(frozen=True, kw_only=True)
class DiagnoseCommand:
    """Say what is wrong, with evidence, cause and fix: with a run, with an eraser, or with settings.

    Without a target, all settings of training are understood, as in `diagnose --model DIR --dtype float16`: one step of
    such a run is examined before any training. Exit status 4 if a finding is fatal.
    """

    target: Path | None = None
    """A run directory or an eraser file; `diagnose RUN` says the same."""
    json: bool = False
    """Print JSON in place of a table."""

    def __post_init__(self):
        expand(self, "target")


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write what a run was as one HTML file that needs no network."""

    run: Path
    """A run directory; `report RUN` says the same."""
    out: Path | None = None
    """The file to write; RUN/report.html by default."""

    def __post_init__(self):
        expand(self, "run", "out")


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Say whether this machine is fit to train: packages, card, memory, disk, link, the bundled model; and what to do if not."""

    json: bool = False
    """Print JSON in place of a table."""


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Say what a run will need on a card and which settings are fastest there, without the card and, of published models, without weights.

    Takes all settings of training; those given as flags are honoured and predicted as given. Exit status 3 if nothing fits.
    """

    profile: str = "auto"
    """A card (4090), a size (24gb), or auto for the card that is present, or the CPU."""
    config: Path | None = None
    """A TOML file with settings."""
    json: bool = False
    """Print JSON in place of tables."""
    host: str | None = None
    """The host's memory that is free, such as 64gb: what blocks keep may go there.
    --profile auto knows this machine's; of other cards' hosts nothing is assumed."""
    cards: int = 1
    """Cards of this kind in one machine, as torchrun would use them; the batch is divided among them."""
    explain: bool = False
    """Also say what limits the step, how fast the host has to be, and which figures of the card are assumed."""
    settings: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self):
        expand(self, "config")
        if not 1 <= self.cards <= 1024:
            raise UsageError(f"--cards {self.cards}: from 1 to 1024, in one machine")
        if self.host is not None and not size_bytes(self.host):
            raise UsageError(f"--host {self.host}: a size such as 64gb")
