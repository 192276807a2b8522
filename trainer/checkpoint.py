"""Checkpoints that a kill, a full disk or a power cut cannot spoil.

    RUN/ckpt/.tmp-000500-<pid>/       adapter.safetensors  optimizer.safetensors  state.json
      1 write files   2 set mode by umask, fsync each   3 manifest.json + fsync   4 fsync directory
      5 rename to RUN/ckpt/step-000500   6 fsync RUN/ckpt   7 verify, then prune older ones (at least 2 stay)

The rename is the commit: a directory named `step-…` was complete when it got its name. There is no `latest` pointer to go stale: the
newest directory whose manifest verifies is the latest. Tensors are safetensors and all else is JSON; nothing here unpickles anything.
Whoever saves holds the run's lock (lock.py).
"""

import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory.cards import size_text
from trainer.errors import CheckpointError, InputOutputError
from trainer.manifest import NewerFormat, read_json, verify, write_manifest
from trainer.run_files import sync

logger = logging.getLogger(__name__)

STATE = "state.json"
_FLAGS = {"base_model.config_hash": "--model (its configuration's hash)", "adapter.rank": "--rank", "optimizer": "--optimizer"}
_STEP = re.compile(r"step-(\d{6,})")
_TENSORS_NAME = re.compile(r"[a-z][a-z0-9_]*")
_NUM_KEPT = 2  # the newest may prove bad later
_MAX_FAILURES = 3  # in a row
_SPARE_BYTES = 2**20  # headers, manifest and directory blocks beside the tensors themselves


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose every byte was verified."""

    step: int
    path: Path
    state: Mapping[str, Any]
    files: frozenset[str]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of NAME.safetensors on the host, as they were saved; CheckpointError if there is no such file or it is damaged."""
        if f"{name}.safetensors" not in self.files:
            raise CheckpointError(f"{self.path} has no {name}.safetensors; it has {', '.join(sorted(self.files))}")
        return read_tensors(self.path / f"{name}.safetensors")


def save_checkpoint(
    run_dir: Path, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Save one checkpoint durably and return its directory, RUN/ckpt/step-NNNNNN.

    `tensors` maps a file's stem to its tensors, on any device; `state` must be plain JSON. Afterwards the newest two checkpoints stay.
    Raises InputOutputError when the disk is full or fails: the older checkpoints are untouched and nothing half-written is left. Raises
    CheckpointError when a checkpoint of this step or a later one exists: it is another run's, and runs are not mixed.
    """
    for name in tensors:
        if not _TENSORS_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a file of tensors: lower-case letters, digits and _ only")
    root = _root(run_dir)
    save = _Save(
        temporary=root / f".tmp-{step:06d}-{os.getpid()}",
        final=root / f"step-{step:06d}",
        step=step,
        tensors=tensors,
        state_text=json.dumps(state, indent=1, allow_nan=False),
    )
    try:
        _make_root(root)
        _refuse_other_run(root, step)
        _check_space(save)
        try:
            for stage in STAGES:
                stage(save)
        except Exception:
            shutil.rmtree(save.temporary, ignore_errors=True)
            if stage is not _verify_and_prune:  # `final` was not there before, so it is ours
                shutil.rmtree(save.final, ignore_errors=True)
            raise
    except OSError as error:
        raise InputOutputError(f"cannot write {error.filename or save.temporary}: {error.strerror or error}") from error
    return save.final


def latest_checkpoint(run_dir: Path, *, rename_bad: bool = True) -> Checkpoint | None:
    """The newest checkpoint whose manifest verifies, or None if the run has none at all.

    A bad one is logged as a warning, renamed `bad-step-…` (so it is reported once) and passed over. Readers that do not hold the run's
    lock set `rename_bad=False`, and nothing is written. Raises CheckpointError if there were checkpoints and none is good.
    """
    root = _root(run_dir)
    if not root.is_dir():
        return None
    steps = _steps(root)
    for step, path in reversed(steps):
        try:
            return _open(path, step)
        except FileNotFoundError:
            continue  # pruned by the run that is writing while we read
        except NewerFormat as error:
            raise NewerFormat(f"{path}: {error}") from error
        except CheckpointError as error:
            logger.warning("checkpoint %s is bad%s: %s", path, ", using the one before" if path != steps[0][1] else "", error)
            if rename_bad:
                _set_aside(path)
    bad = sorted(path.name for path in root.iterdir() if path.name.startswith("bad-"))
    if bad or _steps(root):
        raise CheckpointError(
            f"no checkpoint in {root} is good (set aside: {', '.join(bad) or 'none'}): restore that directory from a copy, "
            "or start again in a new run directory"
        )
    return None


def _open(path: Path, step: int) -> Checkpoint:
    files = verify(path, step)
    if STATE not in files:
        raise CheckpointError(f"its manifest lists no {STATE}")
    return Checkpoint(step=step, path=path, state=read_json(path / STATE), files=files)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the host; CheckpointError if it is anything else. Nothing in the file is ever executed."""
    try:
        # pread, not mmap: a mapped file that shrinks later would kill the process with a bus error.
        return load_file(path, device="cpu", backend="pread")
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def compatible(saved_state: Mapping[str, Any], current_state: Mapping[str, Any]) -> None:
    """Refuse to resume `saved_state` as `current_state` if base model, adapter or optimizer kind differ; any memory plan may.

    Raises CheckpointError naming the first field that differs, by its flag if it has one, and both values.
    """
    for field in ("base_model", "adapter", "optimizer"):
        saved, current = _leaves(field, saved_state), _leaves(field, current_state)
        for key in current | saved:  # in the current order first
            if saved.get(key) != current.get(key):
                raise CheckpointError(
                    f"cannot resume: {_FLAGS.get(key, key)} was {saved.get(key, 'missing')!r} and is {current.get(key, 'missing')!r} now; "
                    "give what it was, or start in a new run directory"
                )


class Saver:
    """Saves at the loop's intervals: a failure warns and training goes on; the third in a row stops the run.

    `last_step` is the step of the checkpoint last saved or resumed from, which is not saved a second time.
    """

    def __init__(self, run_dir: Path, *, last_step: int | None = None):
        self.run_dir, self.last_step = run_dir, last_step
        self.num_failures = 0  # in a row

    def save(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], final: bool = False
    ) -> Path | None:
        """`save_checkpoint`, but None and a logged warning if it failed. Raises InputOutputError at the third failure in a row, and at any
        failure of a `final` save, after which there is no next interval."""
        if step == self.last_step:
            return _root(self.run_dir) / f"step-{step:06d}"
        try:
            path = save_checkpoint(self.run_dir, step, tensors=tensors, state=state)
        except InputOutputError as error:
            self.num_failures += 1
            message = f"checkpoint of step {step} was not saved (failure {self.num_failures} of {_MAX_FAILURES}): {error}"
            if final or self.num_failures >= _MAX_FAILURES:
                older = "" if self.last_step is None else f"; older checkpoints in {_root(self.run_dir)} are untouched"
                raise InputOutputError(message + older) from error
            logger.warning("%s; training goes on and tries again at the next interval", message)
            return None
        self.last_step, self.num_failures = step, 0
        return path


# --- the seven stages -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Save:
    temporary: Path
    final: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state_text: str


def _write_files(save: _Save) -> None:
    save.temporary.mkdir()
    for name, group in save.tensors.items():
        path = save.temporary / f"{name}.safetensors"
        group = _to_host(group)  # outside the `try`: running out of memory here is not a matter of the disk
        try:
            save_file(group, path)
        except (SafetensorError, RuntimeError) as error:  # neither is an OSError, even when the disk is full
            raise InputOutputError(f"cannot write {path}: {error}") from error
    (save.temporary / STATE).write_text(save.state_text, encoding="utf-8")


def _sync_files(save: _Save) -> None:
    mode = stat.S_IMODE((save.temporary / STATE).stat().st_mode)  # what the umask makes of a new file; safetensors leaves 0600
    for path in sorted(save.temporary.iterdir()):
        path.chmod(mode)
        sync(path)


def _write_manifest(save: _Save) -> None:
    write_manifest(save.temporary, save.step)


def _sync_temporary(save: _Save) -> None:
    sync(save.temporary)


def _commit(save: _Save) -> None:
    save.temporary.rename(save.final)


def _sync_root(save: _Save) -> None:
    sync(save.final.parent)


def _verify_and_prune(save: _Save) -> None:
    try:
        verify(save.final, save.step)
        older = _steps(save.final.parent)[:-_NUM_KEPT]
    except CheckpointError as error:
        shutil.rmtree(save.final, ignore_errors=True)
        raise InputOutputError(f"{save.final} does not read back as it was written: {error}; suspect the disk") from error
    except InputOutputError as error:  # of looking: it is committed all the same, and those before it stay
        logger.warning("checkpoint %s was saved and not looked at: %s", save.final, error)
        return
    for _, path in older:
        try:
            # Renamed first: a kill half-way through must not leave a `step-…` that is not whole.
            doomed = path.rename(path.with_name(f".tmp-{path.name.removeprefix('step-')}-{os.getpid()}"))
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error)


STAGES: tuple[Callable[[_Save], None], ...] = (
    _write_files, _sync_files, _write_manifest, _sync_temporary, _commit, _sync_root, _verify_and_prune,
)  # fmt: skip


# --- directories ------------------------------------------------------------------------------------------------------------------------


def _root(run_dir: Path) -> Path:
    root = Path(run_dir) / "ckpt"
    if root.is_symlink():  # pruning must never reach outside the run
        raise CheckpointError(f"{root} is a symbolic link, and links are never followed: put the whole run directory on the other disk")
    return root


def _make_root(root: Path) -> None:
    if not root.is_dir():
        root.mkdir(parents=True)
        sync(root.parent)


def _steps(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every directory named as a checkpoint, oldest first, good or not."""
    try:
        matches = [(_STEP.fullmatch(path.name), path) for path in root.iterdir()]
    except OSError as error:
        raise InputOutputError(f"cannot list {root}: {error.strerror}") from error
    return sorted((int(match[1]), path) for match, path in matches if match)


def _refuse_other_run(root: Path, step: int) -> None:
    steps = _steps(root)
    if steps and steps[-1][0] >= step:
        raise CheckpointError(
            f"{root} already has step {steps[-1][0]}, so step {step} belongs to another run: "
            "resume the one there, or choose a new run directory"
        )


def _check_space(save: _Save) -> None:
    needed = sum(tensor.nbytes for group in save.tensors.values() for tensor in group.values()) + len(save.state_text) + _SPARE_BYTES
    free = shutil.disk_usage(save.final.parent).free
    if free < needed:
        raise InputOutputError(f"{size_text(needed)} needed and {size_text(free)} free in {save.final.parent}: make room there")


def _set_aside(path: Path) -> None:
    number = 0
    while os.path.lexists(target := path.with_name(f"bad-{path.name}" + (f"-{number}" if number else ""))):
        number += 1
    try:
        path.rename(target)
    except OSError as error:
        logger.warning("cannot rename %s to %s: %s", path, target.name, error)


def _to_host(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host, contiguous, no two sharing memory (safetensors refuses to write shared memory twice)."""
    host, seen = {}, set()
    for name, tensor in group.items():
        copy = tensor.detach().to("cpu").contiguous()
        if copy.untyped_storage().data_ptr() in seen:
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        host[name] = copy
    return host


def _leaves(field: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """{"adapter.rank": 128, …} for a mapping, {"optimizer": "adamw"} for a plain value, {} if the state lacks the field."""
    value = state.get(field)
    if isinstance(value, Mapping):
        return {f"{field}.{key}": leaf for key, leaf in value.items()}
    return {} if value is None else {field: value}
