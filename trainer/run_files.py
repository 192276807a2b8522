"""What a run directory holds: read with patience, parts that are missing or damaged are empty; written whole or not at all.

config.json           settings, where each came from, the base model
metrics.jsonl         losses, norms, step time, memory, one record a step
findings.json         {"findings": [...], "checked": [...]}
evaluation.json       before and after, with intervals; before-after.png beside it
samples/step-*.png    pictures on the way
memory.json           what the run is predicted to need (trainer.memory_file)
"""

import errno
import json
import logging
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import CheckpointError, InputOutputError
from trainer.lock import refuse_unbegun

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, FINDINGS, MEMORY = "config.json", "metrics.jsonl", "findings.json", "memory.json"
EVALUATION, PICTURES = "evaluation.json", "before-after.png"
_ABSENT = (FileNotFoundError, NotADirectoryError)  # Path.exists() takes also what cannot be looked at for absent, from Python 3.14 on
logger = logging.getLogger(__name__)


@dataclass
class RunFiles:
    """What is there of a run."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)

    @classmethod
    def read(cls, run: Path) -> "RunFiles":
        """Raises CheckpointError if `run` holds neither settings nor metrics, nor the findings of a run that the pre-flight stopped."""
        config = read_object(run / CONFIG)
        if "config" not in config and not any((run / name).exists() for name in (METRICS, FINDINGS)):
            refuse_unbegun(run)
            raise CheckpointError(f"{run}: not a run directory (none of a run's {CONFIG}, {METRICS} and {FINDINGS} is in it)")
        try:
            records = read_metrics(run)
        except OSError as e:
            logger.warning("%s: left out, it cannot be read (%s)", run / METRICS, e)
            records = []
        return cls(run, config, records, read_object(run / FINDINGS),
                   read_object(run / EVALUATION), read_object(run / MEMORY),
                   sorted((run / "samples").glob("step-[0-9]*[0-9].png")))

    @property
    def forgets(self) -> bool:
        """Whether it is a run of `forget`, whose settings have no sections."""
        return self.config.get("command") == "forget"

    def setting(self, path: str) -> Any:
        """A setting by dotted path, or None."""
        return nested(self.config, "config", *path.split("."))

    def num_steps(self) -> int:
        """Finished steps; one that was not finite was not applied."""
        if not self.records:
            return 0
        last = self.records[-1]
        said = (nested(last, *keys) for keys in (("loss",), ("gradient_norm",), ("prediction_norms", "teacher"), ("prediction_norms", "student")))
        refused = not last.get("skipped") and any(isinstance(value, float) and not math.isfinite(value) for value in said)
        return last.get("step", -1) + (0 if refused else 1)

    def series(self, *keys: str) -> list[tuple[float, float]]:
        """(step, value) of a number that records hold, possibly inside of dicts; steps are counted from 1, as progress is."""
        found = ((record.get("step"), nested(record, *keys)) for record in self.records)
        return [(step + 1, float(value)) for step, value in found if step is not None and isinstance(value, int | float)]

    def measured_peaks(self) -> dict[str, float]:
        """Bytes by phase, the highest of all steps."""
        peaks: dict[str, float] = {}
        for record in self.records:
            for phase, value in (record.get("peak_bytes_by_phase") or {}).items():
                peaks[phase] = max(value, peaks.get(phase, 0.0))
        return peaks


def nested(value: Any, *keys: str) -> Any:
    """What nested dicts hold under keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def nearest(path: Path) -> Path:
    """`path`, or the first directory above it that is there. Raises OSError where that cannot be told, as of a name that is too long."""
    try:
        path.stat()
        return path
    except _ABSENT:
        return nearest(path.absolute().parent)


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises OSError, for a pipe or a device too, which might be waited for without end."""
    _require_file(path)
    return path.read_bytes()


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read."""
    try:
        content = json.loads(read_bytes(path))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except _ABSENT:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        logger.warning("%s: left out, it cannot be read (%s)", path, e)
        return {}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in order. A line that a crash or a full disk cut short, or whose step is no whole number, is left out."""
    path, records = run_dir / METRICS, []
    try:
        text = read_bytes(path).decode(errors="replace")
    except _ABSENT:
        text = ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step", -1)) is int:
            records.append(record)
        else:
            logger.warning("%s: left out a damaged line: %.40s…", path, line)
    return records


def write_json(path: Path, content: Any, *, indent: int | None = 2, advice: str = "") -> None:
    """Write a JSON file, whole or not at all. Raises InputOutputError, with `advice` at its end."""
    try:
        write_whole(path, json.dumps(content, indent=indent) + "\n")
    except OSError as e:
        raise InputOutputError(f"{path} cannot be written ({e.strerror}){advice}") from e


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file, whole or not at all. Raises OSError, or SafetensorError when the disk is full."""
    from safetensors.torch import save_file

    with part_of(path) as part:
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)  # what the umask makes of a new file; safetensors leaves 0600
        save_file(dict(tensors), part, metadata={"format": "pt"})
        part.chmod(mode)
        sync(part)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises OSError."""
    with part_of(path) as part:
        part.write_text(text, encoding="utf-8")
        sync(part)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's entries, to the disk: what is renamed before that may be empty after a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno != errno.EINVAL or not path.is_dir():  # some file systems, as of folders shared with a virtual machine, do this for files only
            raise
    finally:
        os.close(descriptor)


@contextmanager
def part_of(path: Path, ending: str = "") -> Iterator[Path]:
    """Within: the file to write, which becomes `path` when it is complete; what is there stays until then, and if it fails. A link stays,
    and what it points to is written. Raises OSError where a device or a pipe is there, which a user who may do so would replace by a file."""
    path = Path(os.path.realpath(path))
    _require_file(path)
    part = path.with_name(f".{path.name}.part{ending}")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # where it could not be made it cannot be removed either
            part.unlink()
        raise


def _require_file(path: Path) -> None:
    """Raises OSError for what is neither a file nor a directory: those the system refuses itself."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def withdraw(run_dir: Path) -> None:
    """Remove the evaluation of an eraser that has been trained further."""
    for name in (EVALUATION, PICTURES):
        (run_dir / name).unlink(missing_ok=True)
