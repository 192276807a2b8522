"""Where a committed figure comes from: versions, machine class, commit and command."""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.errors import UsageError
from trainer.run_files import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "safetensors")


def provenance() -> dict[str, Any]:
    """Versions, processor or card, commit, command and time of this process."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True,
                                cwd=ROOT).stdout.strip()
    except FileNotFoundError:  # a copy of the tree on a machine without git
        commit = ""
    words = (program() or f"python {Path(sys.argv[0]).name}").split()
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "card": card, "num_cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine(),
        "commit": commit, "command": shlex.join([*words, *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
    }


def program() -> str | None:
    """`python -m MODULE`, where this process was started so."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {module.name.removesuffix('.__main__')}" if module else None


def _versions() -> dict[str, str]:
    """Of the packages that are here: what was measured without one of them must not be lost for want of its number."""
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def take_no_arguments(doc: str | None) -> None:
    """For benchmarks without options: --help says what it is, and any other word is refused before anything is measured."""
    argparse.ArgumentParser(prog=program(), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def settings_of(kind: type) -> Any:
    """A benchmark's settings from the command line. Leaves the program, with argparse's code for it, where they make no sense."""
    import tyro  # slow to import, and most benchmarks have no settings

    try:
        return tyro.cli(kind, prog=program())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def require_known(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError at the first name that is not known."""
    for name in names:
        if name not in known:
            raise UsageError(f"{flag} {name}: one of {', '.join(known)}")


def of_cards(part: str, directory: Path = RESULTS) -> list[Path]:
    """Results of a part of the card suite, card by card. Those of dry runs mean nothing."""
    return sorted(path for path in directory.glob(f"*/{part}.json") if path.parent.name != "dry")


def write_result(name: str, content: dict[str, Any], directory: Path = RESULTS, *, in_parts: bool = False, command: str | None = None) -> Path:
    """Write `bench/results/NAME.json` with provenance beside the content; returns the path.

    `in_parts`: some of the content may come from earlier calls; what makes all of it is the command without options.
    `command`: what makes it, where that is not this process' own.
    """
    path, source = directory / f"{name}.json", provenance()
    if in_parts:
        source["command"] = " ".join(source["command"].split()[:3])
    source["command"] = command or source["command"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"provenance": source, **content}, indent=1) + "\n")
    return path
