"""What a run leaves in numbers: metrics.jsonl always, and TensorBoard's event files on request."""

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import InputOutputError, UsageError
from trainer.run_files import METRICS, read_metrics, write_whole

EVENTS = "tensorboard"
logger = logging.getLogger(__name__)


class MetricsLog:
    """Append-only JSON lines; floats keep their full precision. A resumed run continues the same file."""

    def __init__(self, run_dir: Path, *, first_step: int = 0, tensorboard: bool = False,
                 events: Sequence[Mapping[str, Any]] = ()):
        """Records of `first_step` and later, left by a run that went on after its last checkpoint, are dropped.
        `events`: what happened to the run; those that no record has yet go into the next one, as `events`."""
        self.path = run_dir / METRICS
        kept = []
        try:
            if self.path.exists():
                kept = [r for r in read_metrics(run_dir) if r.get("step", -1) < first_step]
                write_whole(self.path, "".join(json.dumps(r) + "\n" for r in kept))
            self._file = self.path.open("ab", buffering=0)
        except OSError as e:
            raise InputOutputError(f"{self.path} cannot be written ({e}); the run directory must be writable") from e
        self._pending, self._warned = b"", False
        told = [event for record in kept if isinstance(record.get("events"), list) for event in record["events"]]
        self._untold = [dict(event) for event in events if event not in told]
        self._tensorboard = _open_events(run_dir, first_step) if tensorboard else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the operating system.

        What a full disk does not take waits for the next record: numbers are not worth a run.
        """
        if self._untold:
            record, self._untold = {**record, "events": self._untold}, []
        self._pending += json.dumps(record).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending):]
        except OSError as e:
            if not self._warned:
                logger.warning("%s cannot be written (%s); training goes on, records wait", self.path, e)
            self._warned = True
        if self._tensorboard:
            with self._bearing_a_full_disk():
                for tag, value in scalars(record).items():
                    self._tensorboard.add_scalar(tag, value, record["step"])

    @contextmanager
    def _bearing_a_full_disk(self) -> Iterator[None]:
        """Around what TensorBoard's writer does. Its thread ends with the first error, and every later call would raise that again."""
        try:
            yield
        except OSError as e:
            logger.warning("%s ends here, it cannot be written (%s)", self.path.with_name(EVENTS), e)
            self._tensorboard = None

    def close(self) -> None:
        if self._pending:
            logger.warning("%s: the last %d bytes could not be written", self.path, len(self._pending))
        self._file.close()
        if self._tensorboard:
            with self._bearing_a_full_disk():
                self._tensorboard.close()


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by tag; those inside of dicts and lists as `name/key` and `name/07`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, bool | int | float) and key != "step":
            found[prefix + key] = float(value)
        elif isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            found |= scalars({f"{i:02d}": v for i, v in enumerate(value)}, f"{prefix}{key}/")
    return found


def require_tensorboard() -> None:
    """UsageError unless the package that writes TensorBoard's event files is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard: the package tensorboard is not installed; pip install tensorboard, or say "
                         f"--no-tensorboard: {METRICS} and `python run.py report` need nothing else")


def _open_events(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / EVENTS), purge_step=first_step)
