"""The main job as a user runs it: `run.py` on the bundled model, timed, for one concept of each kind.

    python -m bench.main_run                            all of RUNS
    python -m bench.main_run --only circle-to-square    some of them; the others are kept from the file

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

from bench.provenance import RESULTS, ROOT, require_known, settings_of, write_result

RUNS: dict[str, tuple[str, ...]] = {
    "red": ("--concept", "red"),
    "circle": ("--concept", "circle"),
    "circle-to-square": ("--concept", "circle", "--instead", "square", "--eta", "1"),
    "left": ("--concept", "left"),
    "left-to-up": ("--concept", "left", "--instead", "up", "--eta", "1"),
}


@dataclass(frozen=True, kw_only=True)
class MainRun:
    """Run the main job and keep what it measures."""

    only: tuple[str, ...] = ()
    """Names of runs; by default all."""
    out: Path = RESULTS
    """Directory of the result."""
    assets: Path = ROOT / "assets"
    """Directory of the pictures."""

    def __post_init__(self):
        require_known("--only", self.only, RUNS)


def main(config: MainRun) -> None:
    path = config.out / "main.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for name in config.only or RUNS:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / name
            started = time.monotonic()
            done = subprocess.run([sys.executable, "run.py", *RUNS[name], "--out", str(out)], cwd=ROOT,
                                  stdout=subprocess.PIPE, text=True, check=True)
            seconds = time.monotonic() - started
            print(done.stdout, flush=True)
            runs[name] = {"flags": " ".join(RUNS[name]), "seconds": seconds,
                          "evaluation": json.loads((out / "evaluation.json").read_text())}
            config.assets.mkdir(exist_ok=True)
            shutil.copyfile(out / "before-after.png", config.assets / f"erased-{name}.png")
        write_result("main", {"runs": {n: runs[n] for n in RUNS if n in runs}}, config.out, in_parts=True)
    print(path)


if __name__ == "__main__":
    main(settings_of(MainRun))
