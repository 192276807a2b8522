"""What a rule sees in videos of the bundled model: whether they show what their prompt says.

Legend: B videos, T frames, H W pixels.
"""

import random
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.assemble import Assembly, assemble, embed_prompts, is_bundled, open_backbone
from trainer.backbones.cogvideox import CogVideoX
from trainer.config import ModelConfig
from trainer.errors import UsageError
from trainer.generate import generate_latents
from trainer.prompts import Embeddings
from trainer.rates import rates
from trainer.shapes import world
from trainer.video_config import EvaluateConfig


@dataclass(frozen=True)
class ScenePrompt:
    """One prompt, what it names, and the group that it is measured in: target, synonyms or preserved."""

    group: str
    prompt: str
    scene: world.Scene


def scene_prompts(concept: str, num_videos: int, seed: int) -> list[ScenePrompt]:
    """`num_videos` prompts for the target, for its synonyms and for each sibling. Target: the eraser's training wordings. Synonyms: other
    words for the concept, in every wording. Preserved: the concept's siblings in wordings and words of all kinds. All are balanced over
    what else they show, and none was seen in pretraining where enough such captions exist."""
    attribute, name = world.kind_of(concept)
    rng = random.Random(f"{seed}/{concept}")
    scenes = world.scenes()
    ours = [s for s in scenes if getattr(s, attribute) == name]
    plain = {p for p, _ in world.erasure_pairs(concept)}
    synonyms = world.ATTRIBUTES[attribute][name][1:]

    def pick(group: str, among: Sequence[world.Scene], count: int, wanted) -> list[ScenePrompt]:
        chosen = []
        for i in range(count):
            scene = among[i % len(among)]
            options = [c for c in world.captions(scene) if wanted(c)]
            chosen.append(ScenePrompt(group, rng.choice([c for c in options if world.held_out(c)] or options), scene))
        return chosen

    found = pick("target", ours, num_videos, plain.__contains__)
    found += pick("synonyms", ours, num_videos, lambda c: any(w in c.split() for w in synonyms))
    for sibling in world.preserved_concepts(concept):
        theirs = [s for s in scenes if getattr(s, attribute) == sibling]
        found += pick("preserved", theirs, num_videos, lambda c: True)
    return found


def require_measurable(concept: str, model: ModelConfig) -> None:
    """Raises UsageError for what the rule that looks at videos of the bundled model cannot see."""
    try:
        world.kind_of(concept)
    except KeyError:
        raise UsageError(f"--concept {concept}: without --rater, only what the bundled model knows can be measured") from None
    if not is_bundled(model):
        raise UsageError(f"--model {model.model}: only videos of the bundled model, a copy of it or one of its configuration can be measured "
                         "by a rule; --rater openai/clip-vit-large-patch14, or another CLIP, measures others")
    own = {"frames": world.FRAMES, "height": world.SIZE, "width": world.SIZE}
    for name, value in own.items():
        if getattr(model, name) not in (None, value):
            raise UsageError(f"--{name} {getattr(model, name)}: only videos of {world.FRAMES} frames of {world.SIZE} x {world.SIZE} pixels can "
                             "be measured")


def require_own(concept: str, own: str | None, run: Path) -> None:
    """Raises UsageError for another concept than the one that `run` erases. Of what the world does not know anything may be measured."""
    with suppress(KeyError):
        if world.kind_of(own or "") != world.kind_of(concept):
            raise UsageError(f"--concept {concept}: {run} erases {own}; leave --concept out")


def measured(config: EvaluateConfig, model: ModelConfig, concept: str, *, own: str | None) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    """The evaluation and a before/after sheet's rows. `own`: the concept that the run erases, if it says so. Raises UsageError."""
    require_measurable(concept, model)
    require_own(concept, own, config.run)
    chosen = scene_prompts(concept, config.num_videos, config.seed)
    print(f"measuring {len(chosen)} videos, without the eraser and with it: a minute or more", file=sys.stderr, flush=True)
    backbone = open_backbone(model)
    embeddings = embed_prompts(backbone, model, config.memory, [*(c.prompt for c in chosen), ""])
    with assemble(backbone, model, config.memory, eraser=config.run) as assembly:
        return _measure(assembly, backbone, embeddings.to(assembly.device), concept, chosen, config)


def _measure(assembly: Assembly, backbone: CogVideoX, embeddings: Embeddings, concept: str, chosen: list[ScenePrompt],
             config: EvaluateConfig) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    decode = backbone.decoder(world.FRAMES, dtype=assembly.dtype, device=assembly.device, one_by_one=False)  # they are small
    videos = {}
    for when, on in (("before", False), ("after", True)):
        with assembly.erasers.switched(on):
            latents = generate_latents(assembly.predict, backbone.scheduler(), embeddings, [c.prompt for c in chosen],
                                       [config.seed + i for i in range(len(chosen))], assembly.latent_shape,
                                       num_steps=config.num_steps, guidance_scale=config.guidance_scale,
                                       guidance=config.memory.guidance)
        videos[when] = torch.cat([decode(part) for part in latents.split(16)])
    found = {when: [world.detect(v) for v in clip] for when, clip in videos.items()}
    result = {**_table(concept, chosen, found, videos), "dtype": str(assembly.dtype).removeprefix("torch."),
              "seeds": [config.seed, config.seed + len(chosen) - 1]}
    shown = [next(i for i, c in enumerate(chosen) if c.group == group) for group in ("target", "synonyms", "preserved")]
    shown.append(len(chosen) - 1)
    sheet = [(f"{when}: {chosen[i].prompt}", videos[when][i]) for i in shown for when in ("before", "after")]
    return result, sheet


def _table(concept: str, chosen: list[ScenePrompt], found: dict[str, list[world.Detection]],
           videos: dict[str, Tensor]) -> dict[str, Any]:
    attribute, name = world.kind_of(concept)
    indices = {group: [i for i, c in enumerate(chosen) if c.group == group]
               for group in ("target", "synonyms", "preserved")}

    def rate(members: list[int], kind: str) -> dict[str, Any]:
        """How often the video shows what the prompt says, of one kind."""
        return {"num_videos": len(members), **rates(**{
            when: [getattr(found[when][i], kind) == getattr(chosen[i].scene, kind) for i in members] for when in ("before", "after")})}

    preserved = []
    for kind, names in world.ATTRIBUTES.items():
        for value in names:
            members = [i for i in indices["preserved"] if getattr(chosen[i].scene, kind) == value]
            if members:
                preserved.append({"name": value, "kind": kind, **rate(members, kind)})
    for kind in world.ATTRIBUTES:
        if kind != attribute:
            preserved.append({"name": f"{kind} of {name} prompts", "kind": f"target-{kind}",
                              **rate(indices["target"], kind)})
    kept = indices["preserved"]
    distance = (videos["before"][kept] - videos["after"][kept]).square().mean((1, 2, 3, 4)).sqrt()
    return {
        "target": {"name": name, **rate(indices["target"], attribute)},
        "synonyms": {"names": list(world.ATTRIBUTES[attribute][name][1:]), **rate(indices["synonyms"], attribute)},
        "preserved": preserved,
        "motion": {when: sum(found[when][i].travel for i in kept) / len(kept) for when in ("before", "after")},
        "distance": {"preserved_rms": distance.mean().item()},
    }
