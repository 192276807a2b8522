"""What the phases around a training step need: prompt encoding, sampling, decoding, saving, each from the very modules on fake
tensors. Everything here is predicted.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch.utils._pytree import tree_leaves

from memory.assess import Limits, PhaseNeed, Workload, other_phases
from memory.cards import GIB, Card
from memory.chunking import chunk_feed_forwards
from memory.fake import FakeMode
from memory.offload import offload_blocks
from memory.plan import MemoryPlan
from memory.pools import round_request
from memory.ranking import CHUNKS
from memory.simulate import recording
from memory.timeline import pinned_bytes
from trainer.assemble import latent_shape, resolve_dtype, video_size
from trainer.backbones.cogvideox import CogVideoX, enable_tiles
from trainer.backbones.text_encoder import PROMPT_BATCH
from trainer.config import TrainConfig
from trainer.errors import DoesNotFit
from trainer.rehearse import peak_beyond


def phases_around(backbone: CogVideoX, config: TrainConfig, plan: MemoryPlan) -> tuple[PhaseNeed, ...]:
    """Prompt encoding, sampling, decoding and saving, each from the very modules on fake tensors."""
    frames, shape = video_size(backbone, config.model)[0], latent_shape(backbone, config.model)
    dtype = resolve_dtype(backbone, plan, insist=True)
    guided = config.output.guidance_scale != 1.0 and plan.guidance == "batched"
    return (
        PhaseNeed(name="encode prompts", with_backbone=False, **_encoding_bytes(backbone, dtype)),
        PhaseNeed(name="sample", with_backbone=True,
                  device_bytes=_sampling_bytes(backbone, dtype, shape, 1 + guided, plan.feed_forward_chunks)),
        PhaseNeed(name="decode", device_bytes=_decoding_bytes(backbone, dtype, frames, shape), with_backbone=True),
        PhaseNeed(name="save", device_bytes=0, with_backbone=True, host_bytes=3 * _adapter_bytes(backbone, config.optim.rank)),  # with both moments
        # Every process reads the whole model before it gives away all but its part, and where blocks stream, before any of it goes to
        # the card: what is not converted is mapped then, as the text encoder is.
        PhaseNeed(name="read weights", device_bytes=0, with_backbone=False, of_streaming=plan.num_shards == 1,
                  host_bytes=_transformer_bytes(backbone, dtype) if plan.num_shards > 1 or dtype != backbone.native_dtype else 0),
    )


def fit_to_generate(backbone: CogVideoX, config: TrainConfig, card: Card, *, beside: bool = False) -> MemoryPlan:
    """The configured plan with as many resident blocks as `card` holds while a video is made, and feed-forwards in chunks if no other
    fits. Where card and host share one memory all blocks are resident. `beside`: whether the transformer is still there when a video is
    decoded. Raises DoesNotFit.
    """
    plan, num_blocks = config.memory, backbone.num_blocks
    if card.unified:
        return replace(plan, resident_blocks=None)
    with FakeMode():
        transformer = backbone.fake_transformer(dtype=resolve_dtype(backbone, plan, insist=True))
        backbone.predictor(transformer, latent_shape(backbone, config.model))  # has positions of that size
        sizes = [_num_bytes(block) for block in backbone.blocks(transformer)]
        outside = _num_bytes(transformer) - sum(sizes) + _adapter_bytes(backbone, config.optim.rank)
    workspace, limits, misses = card.cublas_workspace_bytes, Limits(card), []
    for plan in (plan, replace(plan, feed_forward_chunks=max(plan.feed_forward_chunks, CHUNKS))):
        needs = [replace(need, with_backbone=need.name == "sample" or beside and need.name == "decode") for need in phases_around(backbone, config, plan)]
        for streamed in range(num_blocks + 1):
            on_card = num_blocks - streamed + min(plan.offload_buffers, streamed)
            found = other_phases(needs, streams=streamed > 0, standing_bytes=outside + on_card * max(sizes) + workspace, workspace_bytes=workspace,
                                 masters_bytes=streamed * pinned_bytes(max(sizes)))
            short = limits.shortage(found.reserved_bytes, found.host_bytes + Workload.host_bytes)
            if not any(short):
                return replace(plan, resident_blocks=num_blocks - streamed if streamed else None)
            where = f"on the card in {max(found.by_phase, key=found.by_phase.get)}" if short[0] else "of host memory"
            misses.append((max(short), where))
    missing, where = min(misses)
    raise DoesNotFit(f"{backbone.name} does not fit {card.label}: a video needs {missing / GIB:.2f} GiB more {where} (predicted); fewer "
                     "--frames, a smaller --height and --width need less, and --resident-blocks 0 tries nevertheless")


def decodes_beside(backbone: CogVideoX, config: TrainConfig, card: Card) -> bool:
    """Whether `card` is predicted to hold the transformer, by the configured plan, while a video is decoded."""
    try:
        most = fit_to_generate(backbone, config, card, beside=True)
    except DoesNotFit:
        return False
    ours, theirs = (backbone.num_blocks if plan.resident_blocks is None else plan.resident_blocks for plan in (config.memory, most))
    return ours <= theirs and most.feed_forward_chunks == config.memory.feed_forward_chunks


def _num_bytes(model: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _adapter_bytes(backbone: CogVideoX, rank: int) -> int:
    """Weights of all erasers in float32, biases excepted."""
    return 4 * backbone.num_blocks * 2 * backbone.width * rank


@lru_cache(maxsize=8)
def _transformer_bytes(backbone: CogVideoX, dtype: torch.dtype) -> int:
    with FakeMode():
        return sum(p.nbytes for p in backbone.fake_transformer(dtype=dtype).parameters())


@lru_cache(maxsize=8)
def _encoding_bytes(backbone: CogVideoX, dtype: torch.dtype) -> dict[str, int]:
    """A batch of prompts through the text encoder, its blocks streaming through two buffers: `PhaseNeed`'s figures.

    Weights are mapped from their file, which the host can do without; those that are converted are in its memory.
    """
    with FakeMode(), torch.no_grad():
        encoder = backbone.text_encoder.fake(dtype=dtype, num_blocks=3)  # the others are like the last of them
        offload = offload_blocks(encoder.encoder.block, device="cpu", gathered=False)
        ids = torch.zeros(PROMPT_BATCH, backbone.text_length, dtype=torch.int64)
        beyond = peak_beyond([encoder], lambda: encoder(ids))
        streamed = {id(p) for p in encoder.encoder.block.parameters()}
        standing = sum(p.nbytes for p in encoder.parameters() if id(p) not in streamed)
        stored = backbone.stored_dtype("text_encoder")
        converted = [sum(p.nbytes for p in block.parameters() if p.dtype != stored) for block in encoder.encoder.block]
        return {"device_bytes": beyond + standing + sum(b.nbytes for b in offload.device_buffers),
                "host_bytes": standing + sum(converted) + (backbone.text_encoder.num_blocks - 3) * converted[-1]}


@lru_cache(maxsize=8)
def _sampling_bytes(backbone: CogVideoX, dtype: torch.dtype, shape: tuple[int, ...], batch: int, num_chunks: int) -> int:
    with FakeMode(allow_non_fake_inputs=True), torch.no_grad():
        transformer = backbone.fake_transformer(dtype=dtype, num_blocks=3)
        if num_chunks > 1:
            chunk_feed_forwards([block.ff for block in backbone.blocks(transformer)], num_chunks)
        predict = backbone.predictor(transformer, shape)
        text = torch.empty(batch, backbone.text_length, backbone.text_width, dtype=dtype)
        return peak_beyond([transformer], lambda: predict(torch.empty(batch, *shape), torch.zeros(batch), text))


@lru_cache(maxsize=8)
def _decoding_bytes(backbone: CogVideoX, dtype: torch.dtype, frames: int, shape: tuple[int, ...]) -> int:
    """The autoencoder and one video through it, in tiles as on a card.

    A tile goes through in a few calls that are alike but for the first, and so are tiles: two calls are decoded. Where the
    others would be, as much is allocated as those needed and kept for the next call, by area.
    """
    num_frames = (frames - 1) // backbone.temporal_ratio + 1
    with FakeMode(), torch.no_grad():
        vae = backbone.fake_vae(dtype=dtype)
        enable_tiles(vae)
        height, width = min(shape[2], vae.tile_latent_min_height), min(shape[3], vae.tile_latent_min_width)
        first, later = (torch.empty(1, shape[1], count, height, width, dtype=dtype)  # (B, C, F, H, W)
                        for count in (2 + num_frames % 2, 2))
        with recording() as recorder:
            recorder.adopt([*vae.parameters(), *vae.buffers(), first, later], "weights")
            with recorder.phase("first"):
                cache = vae.decoder(first)[1]
            kept = [sum(round_request(leaf.nbytes) for leaf in tree_leaves(cache))]
            with recorder.phase("later"):
                cache = vae.decoder(later, conv_cache=cache)[1]
            kept += [sum(round_request(leaf.nbytes) for leaf in tree_leaves(cache))]
            del cache
        peaks = recorder.trace().peaks()
        needs = peaks["first"] - peaks["load"], peaks["later"] - peaks["load"] - kept[0]

        def stand_in(tile: torch.Tensor, *, conv_cache: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            area, call = tile.shape[3] * tile.shape[4] / (height * width), conv_cache is not None
            torch.empty(int(needs[call] * area), dtype=torch.uint8)
            made = backbone.temporal_ratio * tile.shape[2] - (backbone.temporal_ratio - 1) * (tile.shape[2] % 2)
            decoded = torch.empty(1, 3, made, *(side * backbone.spatial_ratio for side in tile.shape[3:]), dtype=dtype)
            return decoded, torch.empty(int(kept[call] * area), dtype=torch.uint8)

        vae.decoder.forward = stand_in
        for name in ("blend_v", "blend_h"):  # row by row, all alike
            setattr(vae, name, lambda above, below, extent, blend=getattr(vae, name): blend(above, below, min(extent, 1)))
        video = torch.empty(1, shape[1], num_frames, *shape[2:], dtype=dtype)
        return sum(p.nbytes for p in vae.parameters()) + peak_beyond([vae], lambda: vae.decode(video))
