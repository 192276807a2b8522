"""The main job as a user runs it: `run.py` on the bundled model, timed, for one concept of each kind.

    python -m bench.main_run

Writes bench/results/main.json, and the before/after sheets to assets/.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from bench.provenance import RESULTS, write_result

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class MainRun:
    """Run the main job and keep what it measures."""

    concepts: tuple[str, ...] = ("red", "circle", "left")
    """What to erase, one run each."""
    out: Path = RESULTS
    """Directory of the result."""
    assets: Path = ROOT / "assets"
    """Directory of the pictures."""


def main(config: MainRun) -> None:
    path = config.out / "main.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for concept in config.concepts:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / concept
            started = time.monotonic()
            done = subprocess.run([sys.executable, "run.py", "--concept", concept, "--out", str(out)], cwd=ROOT,
                                  stdout=subprocess.PIPE, text=True, check=True)
            seconds = time.monotonic() - started
            print(done.stdout, flush=True)
            runs[concept] = {"seconds": seconds, "evaluation": json.loads((out / "evaluation.json").read_text())}
            config.assets.mkdir(exist_ok=True)
            shutil.copyfile(out / "before-after.png", config.assets / f"erased-{concept}.png")
        write_result("main", {"runs": runs}, config.out)
    print(path)


if __name__ == "__main__":
    main(tyro.cli(MainRun))
