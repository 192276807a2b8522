"""What two runs left, compared to the bit."""

from pathlib import Path

import torch

from trainer.checkpoint import latest_checkpoint
from trainer.eraser_files import load_eraser
from trainer.run_files import read_metrics

NO_SEED_DECIDES = ("seconds", "phase_seconds", "memory", "peak_bytes_by_phase")


def numbers(run_dir: Path) -> list[dict]:
    """The records of a run, without what no seed decides."""
    return [{k: v for k, v in record.items() if k not in NO_SEED_DECIDES} for record in read_metrics(run_dir)]


def differences(one: Path, two: Path, *, pooled: bool = False, more: tuple[str, ...] = ()) -> list[str]:
    """What of two finished runs is not the same: metrics, eraser, last checkpoint, of which `more` names further files.

    `pooled`: a pool that is full has no teacher pass and no trajectory.
    """
    records = [numbers(run_dir) for run_dir in (one, two)]
    for record in (*records[0], *records[1]) if pooled else ():
        del record["prediction_norms"]
    left, right = (latest_checkpoint(run_dir, rename_bad=False) for run_dir in (one, two))
    pairs = {"eraser": (load_eraser(one).state, load_eraser(two).state)}
    pairs |= {file: (left.tensors(file), right.tensors(file)) for file in ("adapter", "optimizer", *["latents"] * (not pooled), *more)}
    return ["metrics"] * (records[0] != records[1]) + ["step"] * (left.step != right.step) + [
        f"{file} {name}" for file, (a, b) in pairs.items() for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(a[name], b[name])]
