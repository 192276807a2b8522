"""The bundled encoders know their world, and forget one class of it with the default settings.

Qwen3-VL needs its 64 pictures a class for that: after twelve, a third of new pictures of the class are still in their place.
"""

import json
from pathlib import Path

from trainer.cli import main
from trainer.projection_encoders import BUNDLED

COMMON = ["--monitor", "off", "--device", "cpu"]


def forget(run: Path, *words: str) -> dict:
    main(["forget", "--out", str(run), *COMMON, *words])
    return json.loads((run / "evaluation.json").read_text())


def check(result: dict) -> None:
    assert result["target"]["before"] >= 0.95 and result["preserved_mean"]["before"] >= 0.97
    assert result["target"]["after"] <= 0.05
    assert result["preserved_mean"]["after"] >= result["preserved_mean"]["before"] - 0.03
    assert result["accepted"]


def test_clip(tmp_path):
    result = forget(tmp_path / "run", "--forget", "green square", "--num-images", "12")
    check(result)
    assert result["measure"] == "zero-shot" and result["synonyms"]["names"] == ["emerald", "box"]


def test_qwen3_vl_in_merger_space(tmp_path):
    result = forget(tmp_path / "run", "--encoder", "qwen3-vl", "--mergers", "main", "--num-answers", "0")
    check(result)
    assert result["target_nearest"] not in (None, "red circle")


def test_the_mean_of_what_is_kept_may_lie_nearest_to_what_is_forgotten(tmp_path):
    """Then nearest-class accuracy says nothing of an edit, and the evaluation says so."""
    result = forget(tmp_path / "run", "--encoder", "qwen3-vl", "--mergers", "main", "--num-answers", "0", "--target", "mean", "--steps", "500")
    assert result["accepted"] and result["target_nearest"] == "red circle" and result["target"]["after"] > 0.5


def test_the_encoders_are_small():
    assert sum(f.stat().st_size for f in BUNDLED.rglob("*") if f.is_file()) < 15 * 2**20
