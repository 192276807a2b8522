"""A run's directory and what identifies it."""

import errno
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memory.plan import PlanError
from trainer.config import TrainConfig
from trainer.config_file import as_json, from_json
from trainer.errors import CheckpointError, InputOutputError, UsageError
from trainer.run_files import CONFIG, nearest, nested, read_bytes, read_metrics, read_object, write_json


def require_place(out: Path | None) -> None:
    """Refuse an --out that holds a run or cannot be written, as far as that can be told without writing: before minutes of loading."""
    place = Path("runs") if out is None else out
    if any("\udc80" <= letter <= "\udcff" for letter in str(place)):  # bytes that are no UTF-8, which safetensors does not open
        raise UsageError(f"--out {str(out).encode(errors='replace').decode()}: the name is not UTF-8; choose another directory")
    try:
        there = nearest(place)
        if out is not None and (out / CONFIG).exists():
            whose = f"a run already; go on with it by {resuming(out)}, or" if is_run(out) else f"a {CONFIG} that is no run's;"
            raise CheckpointError(f"{out} holds {whose} choose another --out")
    except OSError as e:  # a name that is too long
        raise _cannot_write(out, e.strerror) from e
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise _cannot_write(out, os.strerror(errno.EACCES if there.is_dir() else errno.ENOTDIR))


def probe(directory: Path) -> None:
    """Make a directory, and a file in it for a moment. Raises OSError where that cannot be."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / ".probe"
    file.touch()
    file.unlink(missing_ok=True)  # others may look at the same place


def _cannot_write(out: Path | None, reason: str | None) -> InputOutputError:
    where = f"--out {out}" if out else "runs/ in this directory"
    return InputOutputError(f"{where}: cannot be written ({reason}); choose another directory" + ("" if out else " with --out"))


def make_run_directory(out: Path | None, concept: str) -> Path:
    """The directory of a new run: --out, or the next free runs/<concept>-<number>. A directory in use is refused."""
    require_place(out)
    try:
        if out is None:
            return _new_directory(concept)
        probe(out)
    except OSError as e:
        raise _cannot_write(out, e.strerror) from e
    return out


def _new_directory(concept: str) -> Path:
    """The next runs/<concept>-<number>, by count and not by clock. Of processes that start together each gets its own."""
    stem = re.sub(r"[^a-z0-9]+", "-", concept.lower()).strip("-")[:100] or "concept"
    while True:
        taken = {int(m[1]) for p in Path("runs").glob(f"{stem}-*") if (m := re.fullmatch(rf"{stem}-(\d+)", p.name))}
        directory = Path("runs") / f"{stem}-{max(taken, default=0) + 1}"
        try:
            directory.mkdir(parents=True)
            return directory
        except FileExistsError:
            if not directory.is_dir():
                raise  # something else is in the way


def is_run(directory: Path) -> bool:
    """Whether its config.json holds settings of a run; a model's directory has one, too."""
    return isinstance(nested(read_object(directory / CONFIG), "config"), dict)


def program(num_processes: int) -> tuple[str, ...]:
    """How training is started, but for its flags."""
    return ("python", "run.py") if num_processes == 1 else ("torchrun", f"--nproc-per-node={num_processes}", "--", "run.py")


def resuming(run_dir: Path) -> str:
    """The command line by which a run goes on, of either kind: to be pasted, with as many processes as are at work now."""
    forgets = nested(read_object(run_dir / CONFIG), "command") == "forget"
    words = program(int(os.environ["WORLD_SIZE"]) if launch() else 1)
    return shlex.join([*words, *["forget"] * forgets, "--resume", str(run_dir)])


def write_config(run_dir: Path, config: Any, origins: Mapping[str, str], **facts: Any) -> None:
    """RUN/config.json: the resolved settings, where each came from, and facts about the run."""
    content = {"config": as_json(config), "origins": dict(origins), "launch": launch(), **facts}
    write_json(run_dir / CONFIG, content)


def launch() -> str | None:
    """What the processes that one torchrun starts, and starts again, have in common; None without it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return run_id and f"{run_id}/{os.getppid()}"


def restarted_run(config: TrainConfig) -> Path | None:
    """The directory of the run that torchrun has just started again after a failure (--max-restarts); None on a first start."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return None
    for directory in [config.output.out] if config.output.out else sorted(Path("runs").glob("*-[0-9]*")):
        try:
            if json.loads(read_bytes(directory / CONFIG)).get("launch") == launch():
                return directory
        except (OSError, ValueError, AttributeError):
            continue  # not the directory of this run
    return None


def read_config(run_dir: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings of a training run, and the whole content of its config.json. Raises CheckpointError if it is none."""
    content = read_content(run_dir)
    if content.get("command") == "forget":
        raise CheckpointError(f"{run_dir} is a run of forget; go on with it by `{resuming(run_dir)}`")
    try:
        return from_json(content["config"]), content
    except (ValueError, KeyError, TypeError, AttributeError, PlanError, UsageError) as e:
        raise CheckpointError(f"{run_dir}: not a run directory ({CONFIG}: {e})") from e


def require_none_due(run_dir: Path, *, save_every: int) -> None:
    """For a run without checkpoints, which begins anew: raises CheckpointError if it went on after its first one was due."""
    if len(read_metrics(run_dir)) > save_every:
        raise CheckpointError(f"--resume {run_dir}: there is no checkpoint; start again with another --out")


def read_content(run_dir: Path) -> dict[str, Any]:
    """The whole content of config.json, of a run of any command. Raises CheckpointError if there are no settings in it."""
    try:
        content = json.loads(read_bytes(run_dir / CONFIG))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{run_dir}: not a run directory ({CONFIG}: {e})") from e
    if not isinstance(nested(content, "config"), dict):
        raise CheckpointError(f"{run_dir}: not a run directory (its {CONFIG} holds no settings of a run)")
    return content
