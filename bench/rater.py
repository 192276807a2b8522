"""What a CLIP model says of an erasure, beside what the rule says: two measures of the same eraser on the bundled model.

    python -m bench.rater

Writes bench/results/rater.json.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.provenance import RESULTS, require_known, settings_of, write_result
from trainer.config import SHAPES, TrainConfig, at_least, replaced
from trainer.evaluate import evaluate
from trainer.loop import train
from trainer.projection_encoders import locate
from trainer.video_config import EvaluateConfig

CONCEPTS = ("red", "circle", "left")


@dataclass(frozen=True, kw_only=True)
class Rater:
    """Train an eraser a concept and measure it both ways."""

    concepts: tuple[str, ...] = CONCEPTS
    """What is erased, each by itself."""
    rater: str = "shapes"
    """The CLIP model."""
    num_videos: int = 64
    """Videos of the concept, and of each or all that is preserved (`evaluate`)."""
    out: Path = RESULTS
    """Directory of the result."""

    def __post_init__(self):
        require_known("--concepts", self.concepts, CONCEPTS)
        at_least(self, 1, "num_videos")


def measure(config: Rater, concept: str) -> dict[str, Any]:
    """Both evaluations of one eraser."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = train(replaced(TrainConfig(), SHAPES | {"data.concept": concept, "output.out": Path(directory) / "run"}), {})
        return {by: evaluate(EvaluateConfig(run=run_dir, num_videos=config.num_videos, rater=rater))
                for by, rater in (("rule", None), ("clip", config.rater))}


def main(config: Rater) -> None:
    locate("clip", config.rater, flag="--rater", whole=True)  # what is wrong with it is said before anything is trained
    runs = {}
    for concept in config.concepts:
        runs[concept] = measure(config, concept)
        print(concept, {by: (e["target"]["before"], e["target"]["after"]) for by, e in runs[concept].items()}, flush=True)
    print(write_result("rater", {"runs": runs}, config.out))


if __name__ == "__main__":
    main(settings_of(Rater))
