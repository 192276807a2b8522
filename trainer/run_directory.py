"""A run's directory and what identifies it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig, as_json, from_json
from trainer.errors import CheckpointError, InputOutputError, UsageError

CONFIG = "config.json"


def make_run_directory(config: TrainConfig) -> Path:
    """The directory of a new run: --out, or the next free runs/<concept>-<number>. A directory in use is refused."""
    out = config.output.out
    if out is None:
        stem = re.sub(r"[^a-z0-9]+", "-", config.data.concept.lower()).strip("-") or "concept"
        taken = {int(m[1]) for p in Path("runs").glob(f"{stem}-*") if (m := re.fullmatch(rf"{stem}-(\d+)", p.name))}
        out = Path("runs") / f"{stem}-{max(taken, default=0) + 1}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / CONFIG).exists():
            raise CheckpointError(f"{out} holds a run already; go on with it by --resume {out}, or choose another --out")
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise InputOutputError(f"--out {out}: cannot be written ({e.strerror}); choose another directory") from e
    return out


def write_config(run_dir: Path, config: TrainConfig, origins: Mapping[str, str], **facts: Any) -> None:
    """RUN/config.json: the resolved settings, where each came from, and facts about the run."""
    content = {"config": as_json(config), "origins": dict(origins), **facts}
    try:
        part = run_dir / f".{CONFIG}.part"
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(run_dir / CONFIG)
    except OSError as e:
        raise InputOutputError(f"{run_dir / CONFIG} cannot be written ({e.strerror})") from e


def read_config(run_dir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings of a run, and the whole content of its config.json."""
    try:
        content = json.loads((run_dir / CONFIG).read_text())
        return from_json(content["config"]), content
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as e:
        raise CheckpointError(f"{run_dir}: not a run directory ({CONFIG}: {e})") from e
