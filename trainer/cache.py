"""What is computed once and kept on disk: tensors in files that any later run may read, and can do without."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import UsageError
from trainer.run_files import part_of

_OLD = 24 * 3600  # seconds since the last write, after which nobody is writing
logger = logging.getLogger(__name__)
_warn_once = lru_cache(logger.warning)  # videos are stored one by one


def cache_directory(kind: str) -> Path:
    """Where what is of this kind is cached: in $XDG_CACHE_HOME/eraser-trainer, by default under ~/.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eraser-trainer" / kind
    except RuntimeError as e:
        raise UsageError("there is no home directory to cache in; XDG_CACHE_HOME names another place") from e


def store(files: Mapping[Path, Mapping[str, Tensor]], what: str) -> None:
    """Write cache files, each whole or not at all. Where that fails, a later run computes `what` again."""
    try:
        for file, tensors in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with part_of(file, f".{os.getpid()}") as part:
                save_file(dict(tensors), part)
        for file in {file.parent: file for file in files}.values():
            _remove_left_overs(file)
    except (OSError, SafetensorError) as e:
        _warn_once("%s are not cached in %s (%s); XDG_CACHE_HOME names another place", what, file.parent,
                   e.strerror if isinstance(e, OSError) else str(e))


def _remove_left_overs(file: Path) -> None:
    """Remove what killed processes left half written beside a file of just now. Machines may share the directory, so that age tells."""
    now = file.stat().st_mtime  # by the clock that the others' times are of
    for part in file.parent.glob(".*.part.*"):
        with suppress(OSError):  # another process removes it as well
            if now - part.stat().st_mtime > _OLD:
                part.unlink()


def recall(file: Path, *names: str) -> dict[str, Tensor] | None:
    """The tensors of a cache file, or None where it is absent, damaged or of other names: it is written anew then."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError):
        return None
    return tensors if set(tensors) == set(names) else None
