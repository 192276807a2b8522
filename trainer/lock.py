"""One writer per run directory."""

import errno
import fcntl
import logging
import os
import re
import shutil
from pathlib import Path

from trainer.errors import CheckpointError, InputOutputError

logger = logging.getLogger(__name__)
LOCK = "run.lock"
_LEFT_OVER = re.compile(r"\.tmp-\d{6,}-\d+")


class RunLock:
    """The right to write in a run directory, as a context manager; made if need be, and held by at most one process.

    The lock is an flock on RUN/run.lock, which the kernel releases when its holder dies, however it dies; the pid in the file only serves
    the message. Being alone, its holder removes what dead processes left. Where a file system has no locks, it warns. A child forked without
    exec shares the lock. Raises CheckpointError naming the holder's pid, InputOutputError where the directory cannot be written.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        path = self.run_dir / LOCK
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                alone = _locked(descriptor)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                if alone:
                    _remove_left_overs(self.run_dir / "ckpt")
                else:
                    logger.warning("%s: this file system has no locks; see to it that no other process writes there", self.run_dir)
            except BlockingIOError as error:
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise CheckpointError(
                    f"{self.run_dir} is in use by process {holder}: wait for it, stop it, or choose another run directory"
                ) from error
            except Exception:
                os.close(descriptor)
                raise
        except OSError as error:
            raise InputOutputError(f"cannot lock {path}: {error.strerror or error}; the run directory must be writable") from error
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: removing it would let two processes hold locks on two files of the same name.
        os.close(self._descriptor)
        self._descriptor = None


def _locked(descriptor: int) -> bool:
    """Lock a file; False where the file system cannot, as some that many machines share. Raises BlockingIOError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    return True


def refuse_unbegun(run_dir: Path) -> None:
    """Raises CheckpointError where nothing but the lock is in a directory: nothing is kept yet of that run."""
    try:
        names = os.listdir(run_dir)
    except OSError:  # whoever reads the run says why
        return
    if names == [LOCK]:
        raise CheckpointError(f"{run_dir}: the run there is still being set up, or was killed while it was; if it is gone, start it again: "
                              "nothing of it is kept")


def _remove_left_overs(root: Path) -> None:
    """Remove what saves cut short by death left in RUN/ckpt."""
    if root.is_dir() and not root.is_symlink():
        for path in root.iterdir():
            if _LEFT_OVER.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path)
