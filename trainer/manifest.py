"""The manifest of a checkpoint: which files it has, how long each is, and the digest of each.

safetensors notices a truncated file and a damaged header, but loads a flipped data byte without a word; hence our own digest of every file,
and one of the manifest itself, so that damage is never mistaken for the work of a newer version.

    {"format": 1, "step": 500, "files": {"adapter.safetensors": {"bytes": 1024, "sha256": "…"}, …}, "sha256": "… of all the above"}
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trainer.errors import CheckpointError, InputOutputError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # one component: no separator, no leading dot, hence no way out
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_MANIFEST_BYTES = 2**20
_MAX_JSON_BYTES = 64 * 2**20

# A file that is missing, a link, a directory, or on a bad sector makes the checkpoint bad. Anything else (permissions, too many open files)
# says nothing about the checkpoint and must not condemn it.
_BAD_FILE_ERRNOS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EIO}


class NewerFormat(CheckpointError):
    """An intact checkpoint of a format that this version does not read."""


def write_manifest(directory: Path, step: int) -> None:
    """Describe every file now in `directory` and bring the description to the disk (OSError if that fails)."""
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    body = {"format": FORMAT, "step": step, "files": files}
    with (directory / MANIFEST).open("x", encoding="utf-8") as file:
        json.dump({**body, "sha256": _digest_of(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(directory: Path, step: int) -> frozenset[str]:
    """Check every byte of the checkpoint in `directory` against its manifest.

    Returns the names of its files. Raises CheckpointError naming the first difference, NewerFormat for an intact checkpoint of a later
    version, InputOutputError where reading was refused for a reason that says nothing about the checkpoint.
    """
    if not stat.S_ISDIR(directory.lstat().st_mode):
        raise CheckpointError(f"{directory.name} is not a directory (a link is never followed)")
    files = parse_manifest(_read(directory / MANIFEST, _MAX_MANIFEST_BYTES), step)
    for name, entry in files.items():
        try:
            with open_regular(directory / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    raise CheckpointError(f"{name} has {size:,} bytes where the manifest says {entry['bytes']:,}")
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise CheckpointError(f"the content of {name} is not what was written (sha256 differs)")
        except OSError as error:
            raise _judge(error, directory / name) from error
    return frozenset(files)


def parse_manifest(data: bytes, step: int) -> Mapping[str, Mapping[str, Any]]:
    """The `files` of a manifest, name -> {"bytes": int, "sha256": str}; CheckpointError unless it is whole, harmless and of `step`."""
    manifest = parse_json(data, MANIFEST)
    if manifest.pop("sha256", None) != _digest_of(manifest):
        raise CheckpointError(f"{MANIFEST} is damaged (its own sha256 differs)")
    if manifest.get("format") != FORMAT:
        raise NewerFormat(
            f"the checkpoint has format {manifest.get('format')!r} and this version reads {FORMAT}: resume with the version that wrote it"
        )
    if type(manifest.get("step")) is not int or manifest["step"] != step:
        raise CheckpointError(f"{MANIFEST} is of step {manifest.get('step')!r}, its directory says {step}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{MANIFEST} lists no files")
    for name, entry in files.items():
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(f"{MANIFEST} names {name!r}: only plain file names inside the checkpoint are allowed")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not _DIGEST.fullmatch(str(entry.get("sha256"))):
            raise CheckpointError(f"the entry of {name} in {MANIFEST} has no valid size and sha256")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file of at most 64 MiB; CheckpointError or InputOutputError otherwise."""
    return parse_json(_read(path, _MAX_JSON_BYTES), path.name)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from bytes of unknown origin; CheckpointError for everything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, integers of thousands of digits
        raise CheckpointError(f"{name} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a JSON {type(value).__name__} where an object belongs")
    return value


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, binary; OSError for a link, CheckpointError for a pipe, device or directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK: a pipe would wait for ever
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise _judge(error, path) from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path.name} is larger than {max_bytes:,} bytes: this program does not write such files")
    return data


def _judge(error: OSError, path: Path) -> CheckpointError | InputOutputError:
    """Whether a failed read condemns the checkpoint or only this attempt."""
    if error.errno in _BAD_FILE_ERRNOS:
        reason = "is a symbolic link, and links are never followed" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        return CheckpointError(f"{path.name} {reason}")
    return InputOutputError(f"cannot read {path}: {error.strerror}; the checkpoint may be sound, so it was left as it is")


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
