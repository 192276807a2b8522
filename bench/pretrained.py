"""How well the bundled model shows what a caption says: held-out captions, fresh seeds.

    python -m bench.pretrained

Writes bench/results/pretrained.json. The goal is 95 % each of colour, shape and direction.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.provenance import RESULTS, settings_of, write_result
from memory.plan import MemoryPlan
from trainer.assemble import assemble, embed_prompts, open_backbone
from trainer.config import ModelConfig, at_least
from trainer.generate import generate_latents
from trainer.rates import wilson
from trainer.shapes import world


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Measure the bundled model."""

    num_videos: int = 360
    """Videos; every scene comes equally often."""
    num_steps: int = 16
    """Denoising steps."""
    seed: int = 5000
    """First seed."""
    out: Path = RESULTS
    """Directory of the result."""

    def __post_init__(self):
        at_least(self, 1, "num_videos", "num_steps")


def accuracy(config: Pretrained) -> dict[str, Any]:
    """Rate and 95 % interval by kind over captions that pretraining never saw, no guidance."""
    model, plan, rng = ModelConfig(), MemoryPlan(), random.Random(config.seed)
    scenes = [world.scenes()[i % len(world.scenes())] for i in range(config.num_videos)]
    prompts = [rng.choice([c for c in world.captions(s) if world.held_out(c)]) for s in scenes]
    backbone = open_backbone(model)
    embeddings = embed_prompts(backbone, model, plan, [*prompts, ""])
    with assemble(backbone, model, plan) as assembly:
        latents = generate_latents(assembly.predict, backbone.scheduler(), embeddings, prompts,
                                   [config.seed + i for i in range(len(prompts))], assembly.latent_shape,
                                   num_steps=config.num_steps, guidance_scale=1.0)
    decode = backbone.decoder(world.FRAMES, dtype=torch.float32, one_by_one=False)
    found = [world.detect(video) for part in latents.split(16) for video in decode(part)]
    result = {}
    for kind in world.ATTRIBUTES:
        hits = sum(getattr(d, kind) == getattr(s, kind) for d, s in zip(found, scenes))
        result[kind] = {"rate": hits / len(scenes), "interval": wilson(hits, len(scenes))}
    return {"accuracy": result, "num_videos": config.num_videos, "num_steps": config.num_steps, "seed": config.seed}


if __name__ == "__main__":
    settings = settings_of(Pretrained)
    content = accuracy(settings)
    path = write_result("pretrained", content, settings.out)
    for kind, row in content["accuracy"].items():
        print(f"{kind:10s} {row['rate']:.1%}  ({row['interval'][0]:.1%} to {row['interval'][1]:.1%})")
    print(path)
