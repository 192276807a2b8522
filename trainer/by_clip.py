"""What a CLIP model sees in videos, zero-shot: for models whose videos no rule reads.

Every video is taken for the description with the highest cosine: the concept, what stands in its place, or one of those that are preserved.
CLIP sees stills, of which its processor takes the square in the middle; it sees no motion.

Legend: B videos, K descriptions, S stills a video, E embedding width, T frames, H W pixels.
"""

import hashlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from memory.cards import Card
from memory.plan import MemoryPlan
from trainer.assemble import assemble, chosen_device, embed_prompts, is_bundled, latent_shape, resolve_dtype, video_size
from trainer.backbones.cogvideox import CogVideoX
from trainer.backbones.location import fingerprint
from trainer.by_rule import require_own
from trainer.cache import cache_directory, recall, store
from trainer.config import DataConfig, ModelConfig
from trainer.diffusion import scheduler_hash
from trainer.eraser_files import EraserFile
from trainer.errors import UsageError
from trainer.generate import generate_latents, opened, trained_config
from trainer.live_view import duration
from trainer.projection_encoders import ClipText, ClipVision, Tower, embedded, locate
from trainer.projection_examples import Example
from trainer.projection_features import compute
from trainer.prompts import TEMPLATES, UNSEEN, Embeddings, collect, word
from trainer.rates import rates
from trainer.run_directory import is_run
from trainer.state import prompts_kept
from trainer.video import spread, stills
from trainer.video_config import EvaluateConfig

logger = logging.getLogger(__name__)
_NUM_STILLS, _BATCH = 8, 32
_LATENTS = 2  # what is cached: another number for another way to sample


@dataclass(frozen=True)
class LabelledPrompt:
    """One prompt, and the description that its video should be taken for."""

    prompt: str
    label: str


def labelled_prompts(config: EvaluateConfig, model: ModelConfig, concept: str) -> tuple[list[LabelledPrompt], list[str]]:
    """`num_videos` prompts of the concept, then as many of all that is preserved; and the descriptions, the concept first. Prompts are those
    of the run or the flags; made from words, they are in wordings that training did not have, or the bundled model's captions."""
    run = trained_config(config.run)
    data, bundled = run.data if run else DataConfig(), is_bundled(model)
    if bundled:
        require_own(concept, data.concept if run else None, config.run)
    elif not config.preserve and any(word(concept).fullmatch(name) for name in data.preserve):
        raise UsageError(f"--concept {concept}: {config.run} erases {data.concept} and preserves {concept}; leave --concept out")
    kept = {"preserve": config.preserve, "preserve_file": None} if config.preserve else {}
    synonyms = data.synonyms if concept == data.concept else ()
    wanted = replace(data, concept=concept, synonyms=synonyms, instead="", prompts=config.prompts or data.prompts, **kept)
    for file, flag in ((wanted.prompts, "--prompts"), (wanted.preserve_file, "--preserve")):
        if file and file != config.prompts and not file.exists():  # it was named when the run began, perhaps in another directory
            raise UsageError(f"{config.run} was trained with {file}, which is not there; {flag} names others")
    prompts = collect(wanted, bundled=bundled, templates=UNSEEN)
    if not (config.prompts or config.preserve) and is_run(config.run) and not prompts_kept(config.run):
        logger.warning("the files of %s's prompts were edited since it was trained: it is measured by what they say now", config.run)
    if wanted.prompts != config.prompts and wanted.concept != data.concept and not any(map(word(wanted.concept).search, prompts.prompts)):
        raise UsageError(f"--concept {concept}: {config.run} erases {data.concept}, of which its prompts are ({data.prompts}); leave --concept out, "
                         "or name prompts of it by --prompts")
    labels: dict[str, str] = {}
    for label in (prompts.concept, *filter(None, [data.instead]), *(label for label, _ in prompts.kept)):
        labels.setdefault(label.casefold(), label)  # CLIP's tokenizer tells no capitals: of two alike one would never be taken
    if len(labels) < 2:
        raise UsageError(f"there is nothing that a video could show in place of {concept!r}; name related things by --preserve")
    chosen = [LabelledPrompt(prompt, prompts.concept) for prompt in _evenly(prompts.prompts, config.num_videos)]
    for (label, own), count in Counter(_evenly(prompts.kept, config.num_videos)).items():
        chosen += [LabelledPrompt(prompt, labels[label.casefold()]) for prompt in _evenly(own, count)]
    return chosen, list(labels.values())


def _evenly(among: Sequence[Any], count: int) -> list[Any]:
    """`count` of them, evenly, or all of them in turn."""
    if count < len(among):
        return [among[i * len(among) // count] for i in range(count)]
    return [among[i % len(among)] for i in range(count)] if among else []


def measured(config: EvaluateConfig, model: ModelConfig, concept: str, card: Card | None, *, eraser: EraserFile
             ) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    """The evaluation and a before/after sheet's rows. Raises UsageError, and what generating raises."""
    chosen, labels = labelled_prompts(config, model, concept)
    backbone, plan = opened(model, config.memory, card, eraser=eraser, guidance_scale=config.guidance_scale, does="measures")
    rater = locate("clip", config.rater, flag="--rater", whole=True)  # which may be a download: after what can be refused
    device = chosen_device(model.device)
    described = [template.format(label) for label in labels for template in TEMPLATES]
    texts = _embed(ClipText(rater), described, device).view(len(labels), len(TEMPLATES), -1)  # (K, templates, E)
    texts = normalize(texts.mean(1), dim=1)  # (K, E)
    _embed(ClipVision(rater), [Image.new("RGB", (64, 64))], device)  # what is wrong with it is to be known before the hours that videos take
    print(f"measuring {2 * len(chosen)} videos, half of them without the eraser", file=sys.stderr, flush=True)
    embeddings = embed_prompts(backbone, model, plan, [*(asked.prompt for asked in chosen), ""])
    latents = _latents(config, backbone, model, plan, embeddings.to(device), chosen, eraser)
    decode = backbone.decoder(video_size(backbone, model)[0], dtype=resolve_dtype(backbone, plan, insist=True), device=device)
    shown, distances = [], []  # stills (3, S, H, W) before and after
    for asked, pair in zip(chosen, latents):
        before, after = (decode(part)[0] for part in pair)  # (3, T, H, W)
        shown += [spread(before, _NUM_STILLS), spread(after, _NUM_STILLS)]
        if asked.label != labels[0]:
            distances.append((before - after).square().mean().sqrt().item())
    del decode
    pictures = [still for video in shown for still in stills(video, _NUM_STILLS)]
    seen = _embed(ClipVision(rater), pictures, device).view(len(shown), _NUM_STILLS, -1)  # (2 B, S, E)
    cosines = (normalize(seen.mean(1), dim=1) @ texts.t()).view(len(chosen), 2, -1)  # (B, before and after, K)
    result = {"rater": config.rater, "chance": 1 / len(labels), **_table(chosen, labels, cosines), "synonyms": None, "motion": None,
              "distance": {"preserved_rms": sum(distances) / len(distances)} if distances else {},
              "dtype": str(embeddings.table.dtype).removeprefix("torch."), "seeds": [config.seed, config.seed + len(chosen) - 1]}
    if result["target"]["before"] < 0.5:
        logger.warning("%s takes only %.0f%% of the videos without the eraser for %r: its rates say little about it", config.rater,
                       100 * result["target"]["before"], labels[0])
    ends = sorted({0, config.num_videos - 1, min(config.num_videos, len(chosen) - 1), len(chosen) - 1})
    return result, [(f"{when}: {chosen[i].prompt}", shown[2 * i + j]) for i in ends for j, when in enumerate(("before", "after"))]


def _latents(config: EvaluateConfig, backbone: CogVideoX, model: ModelConfig, plan: MemoryPlan, embeddings: Embeddings,
             chosen: Sequence[LabelledPrompt], eraser: EraserFile) -> list[tuple[Tensor, Tensor]]:
    """Of each prompt, latents (1, F, C, H, W) without and with the eraser, on the host. They are cached as they are made: an evaluation that
    was interrupted goes on, and what is without an eraser serves that of another one."""
    files = _cache_files(config, backbone, model, plan, embeddings, chosen, eraser)
    found = {which: known["latents"] for which, file in files.items() if (known := recall(file, "latents"))}
    missing = [(i, on) for i in range(len(chosen)) for on in (False, True) if (i, on) not in found]
    if found:
        print(f"{len(found)} of them are there from an earlier call", file=sys.stderr, flush=True)
    if missing:
        with assemble(backbone, model, plan, eraser=config.run) as assembly, _said_to_be_kept(files.values()):
            started = time.monotonic()
            for count, (i, on) in enumerate(missing, 1):
                with assembly.erasers.switched(on):
                    made = generate_latents(assembly.predict, backbone.scheduler(), embeddings, [chosen[i].prompt], [config.seed + i],
                                            assembly.latent_shape, num_steps=config.num_steps, guidance_scale=config.guidance_scale,
                                            guidance=plan.guidance)
                found[i, on] = made
                if files:
                    store({files[i, on]: {"latents": made}}, "videos")
                left = (time.monotonic() - started) / count * (len(missing) - count)
                print(f"{count} of {len(missing)} videos made, {duration(left)} left", file=sys.stderr, flush=True)
    return [(found[i, False], found[i, True]) for i in range(len(chosen))]


@contextmanager
def _said_to_be_kept(files: Iterable[Path]) -> Iterator[None]:
    """Within: who interrupts hours of making videos is told that those in `files` are not lost."""
    try:
        yield
    except KeyboardInterrupt:
        if kept := sum(file.exists() for file in files):
            print(f"{kept} videos are kept, and the same command goes on with the rest", file=sys.stderr, flush=True)
        raise


def _cache_files(config: EvaluateConfig, backbone: CogVideoX, model: ModelConfig, plan: MemoryPlan, embeddings: Embeddings,
                 chosen: Sequence[LabelledPrompt], eraser: EraserFile) -> dict[tuple[int, bool], Path]:
    """Where the latents of each prompt, without and with the eraser, are cached: by all that they depend on. Those of random weights are not."""
    if backbone.directory is None:
        return {}
    weights = fingerprint(file for file in sorted((backbone.directory / "transformer").iterdir()) if file.is_file())
    common = (_LATENTS, weights, scheduler_hash(backbone.scheduler()), latent_shape(backbone, model), plan.compile, config.num_steps, config.guidance_scale)
    trained, files = _digest(eraser.state.values()), {}
    for i, asked in enumerate(chosen):
        texts = _digest(map(embeddings.row, (asked.prompt, "")))
        for on in (False, True):
            key = hashlib.sha256(repr((common, texts, config.seed + i, on and trained)).encode()).hexdigest()[:32]
            files[i, on] = cache_directory("latents") / f"{key}.safetensors"
    return files


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _embed(tower: Tower, contents: Sequence[Any], device: torch.device) -> Tensor:
    """Normalised embeddings (N, E) of texts or pictures, on the host; CLIP has come and gone when this returns."""
    (name,) = tower.layer_names
    examples = [Example("", "test", content) for content in contents]
    return embedded(tower, compute(tower, examples, plan=MemoryPlan(), device=device, batch_size=_BATCH)[name])


def _table(chosen: Sequence[LabelledPrompt], labels: Sequence[str], cosines: Tensor) -> dict[str, Any]:
    """Rates from cosines (B, before and after, K), and the mean cosine with what each video should show."""
    taken = cosines.argmax(2).tolist()

    def row(name: str) -> dict[str, Any]:
        members, own = [i for i, asked in enumerate(chosen) if asked.label == name], labels.index(name)
        before, after = ([taken[i][when] == own for i in members] for when in (0, 1))
        cosine = cosines[members, :, own].mean(0).tolist()
        return {"name": name, "num_videos": len(members), **rates(before=before, after=after), "cosine": dict(zip(("before", "after"), cosine))}

    return {"target": row(labels[0]),
            "preserved": [{"kind": "preserved", **row(name)} for name in dict.fromkeys(asked.label for asked in chosen) if name != labels[0]]}
