"""What each part of the method does: losses, latents, η, anchor, rank and length, on the bundled model.

    python -m bench.erasure                  all variants, into bench/results/erasure.json
    python -m bench.erasure --only eta-3     some of them; the others are kept from the file

The picture assets/erasure.png shows the final samples of a few variants side by side.
Answers the claims *erase* and *preserve*. Every variant differs from the default run of `run.py` in what it names.
"""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.provenance import RESULTS, ROOT, require_known, settings_of, write_result
from trainer.config import SHAPES, TrainConfig, at_least, replaced
from trainer.evaluate import evaluate
from trainer.loop import train
from trainer.video_config import EvaluateConfig

_WITHOUT = {"unlearn": ("alpha", "beta"), "unlearn-loc": ("beta",), "unlearn-pre": ("alpha",), "all": ()}

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{terms}-{latents}": {f"loss.{weight}": 0.0 for weight in without} | {"data.latents": latents}
       for terms, without in _WITHOUT.items() for latents in ("trajectory", "noise")},
    **{f"eta-{eta}": {"loss.eta": float(eta)} for eta in (1, 3, 5, 7)},
    **{f"rank-{rank}": {"optim.rank": rank} for rank in (4, 8, 16, 32, 64)},
    "anchor-empty": {"loss.anchor": "empty"},
    "anchor-named": {"data.instead": "green", "loss.eta": 1.0},
    "two-steps": {"optim.steps": 2},
}


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """Measure the variants of the method on the bundled model."""

    only: tuple[str, ...] = ()
    """Names of variants; by default all."""
    num_videos: int = 24
    """Videos a row of each evaluation."""
    out: Path = RESULTS
    """Directory of the result."""
    assets: Path = ROOT / "assets"
    """Directory of the picture."""

    def __post_init__(self):
        require_known("--only", self.only, VARIANTS)
        at_least(self, 1, "num_videos")


PICTURED = ("two-steps", "unlearn-noise", "unlearn-trajectory", "all-trajectory")


def measure(name: str, num_videos: int, pictures: Path) -> dict[str, Any]:
    """Train one variant in a temporary directory and evaluate it; its final samples go to `pictures`/NAME.png."""
    with tempfile.TemporaryDirectory() as directory:
        config = replaced(TrainConfig(), SHAPES | VARIANTS[name] | {"output.out": Path(directory) / "run"})
        started = time.monotonic()
        run_dir = train(config, {})
        trained = time.monotonic()
        result = evaluate(EvaluateConfig(run=run_dir, num_videos=num_videos))
        if name in PICTURED:
            shutil.copyfile(max((run_dir / "samples").glob("step-*.png")), pictures / f"{name}.png")
        return {"settings": VARIANTS[name], "train_seconds": trained - started, "evaluation": result}


def summary(evaluation: dict[str, Any]) -> dict[str, float]:
    """The few rates that a table shows: lowest preserved rate of the siblings, and of the target's other attributes."""
    others = [r for r in evaluation["preserved"] if r["kind"].startswith("target-")]
    kept = [r for r in evaluation["preserved"] if not r["kind"].startswith("target-")]
    return {
        "target_before": evaluation["target"]["before"], "target": evaluation["target"]["after"],
        "synonyms": evaluation["synonyms"]["after"], "preserved_worst": min(r["after"] for r in kept),
        "preserved_mean": sum(r["after"] for r in kept) / len(kept),
        "target_other_worst": min(r["after"] for r in others),
        "motion": evaluation["motion"]["after"] / evaluation["motion"]["before"],
    }


def side_by_side(pictures: Path, path: Path) -> None:
    """One PNG of the pictured variants' samples, each under its name."""
    from PIL import Image, ImageDraw

    sheets = [(name, Image.open(pictures / f"{name}.png")) for name in PICTURED]
    whole = Image.new("RGB", (sum(s.width for _, s in sheets), 20 + max(s.height for _, s in sheets)), "white")
    left = 0
    for name, sheet in sheets:
        ImageDraw.Draw(whole).text((left + 4, 4), name, fill="black")
        whole.paste(sheet, (left, 20))
        left += sheet.width
    path.parent.mkdir(exist_ok=True)
    whole.save(path)


def main(config: Erasure) -> None:
    path = config.out / "erasure.json"
    variants = json.loads(path.read_text())["variants"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as pictures:
        for name in config.only or VARIANTS:
            variants[name] = measure(name, config.num_videos, Path(pictures))
            write_result("erasure", {"variants": {n: variants[n] for n in VARIANTS if n in variants}}, config.out, in_parts=True)
            row = summary(variants[name]["evaluation"])
            print(name, "  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
        if set(PICTURED) <= {p.stem for p in Path(pictures).iterdir()}:
            side_by_side(Path(pictures), config.assets / "erasure.png")
    print(path)


if __name__ == "__main__":
    main(settings_of(Erasure))
