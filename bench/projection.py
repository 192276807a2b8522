"""Forgetting in a projection as a user runs it: `run.py forget` on the bundled encoders, timed, for each target.

    python -m bench.projection

Writes bench/results/projection.json. The goals: forgotten class at most 5 % (chance 6.7 %), preserved classes within
3 points, each run under 3 minutes on two cores.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.provenance import RESULTS, ROOT, require_known, settings_of, write_result
from trainer.shapes import pictures

TARGETS = {"clip": ("empty", "random", "mean"), "qwen3-vl": ("random", "mean")}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Run both encoders with every target and keep what is measured."""

    encoders: tuple[str, ...] = tuple(TARGETS)
    """Which encoders."""
    forget: tuple[str, ...] = ("red circle", "blue square", "yellow triangle")
    """Classes to forget; the first one with every target, the others with the default."""
    out: Path = RESULTS
    """Directory of the result."""

    def __post_init__(self):
        require_known("--encoders", self.encoders, TARGETS)
        require_known("--forget", self.forget, pictures.CLASSES)


def _cpu_seconds() -> float:
    """Of all processes that were waited for: other work on the machine is not in it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(config: Projection) -> None:
    path = config.out / "projection.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for encoder in config.encoders:
        for i, name in enumerate(config.forget):
            for target in TARGETS[encoder] if i == 0 else TARGETS[encoder][:1]:
                with tempfile.TemporaryDirectory() as directory:
                    out = Path(directory) / "run"
                    environment = os.environ | {"XDG_CACHE_HOME": directory}  # timed without any earlier run's cache
                    started, used = time.monotonic(), _cpu_seconds()
                    subprocess.run([sys.executable, "run.py", "forget", "--encoder", encoder, "--forget", name, "--target", target,
                                    "--out", str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
                    runs[f"{encoder}/{name}/{target}"] = {
                        "seconds": time.monotonic() - started, "cpu_seconds": _cpu_seconds() - used,
                        "evaluation": json.loads((out / "evaluation.json").read_text())}
                print(f"{encoder} {name} {target}: {runs[f'{encoder}/{name}/{target}']['seconds']:.0f} s", flush=True)
                write_result("projection", {"runs": runs}, config.out, in_parts=True)
    print(path)


if __name__ == "__main__":
    main(settings_of(Projection))
