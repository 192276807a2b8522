"""What the phases around a training step need: prompt encoding, sampling, decoding, saving, each from the very modules on fake
tensors. Everything here is predicted.
"""

from functools import lru_cache

import torch
from torch.utils._pytree import tree_leaves

from memory.assess import PhaseNeed
from memory.chunking import chunk_feed_forwards
from memory.fake import FakeMode
from memory.offload import offload_blocks
from memory.plan import MemoryPlan
from memory.pools import round_request
from memory.simulate import recording
from trainer.assemble import resolve_dtype, video_size
from trainer.backbones.cogvideox import CogVideoX, enable_tiles
from trainer.config import TrainConfig
from trainer.rehearse import peak_beyond

_PROMPT_BATCH = 16


def phases_around(backbone: CogVideoX, config: TrainConfig, plan: MemoryPlan) -> tuple[PhaseNeed, ...]:
    """Prompt encoding, sampling, decoding and saving, each from the very modules on fake tensors."""
    frames, height, width = video_size(backbone, config.model)
    shape = backbone.latent_shape(frames, height, width)
    dtype = resolve_dtype(backbone, plan, insist=True)
    guided = config.output.guidance_scale != 1.0 and plan.guidance == "batched"
    adapter_bytes = 4 * backbone.num_blocks * 2 * backbone.width * config.optim.rank
    return (
        PhaseNeed(name="encode prompts", with_backbone=False, **_encoding_bytes(backbone, dtype)),
        PhaseNeed(name="sample", with_backbone=True,
                  device_bytes=_sampling_bytes(backbone, dtype, shape, 1 + guided, plan.feed_forward_chunks)),
        PhaseNeed(name="decode", device_bytes=_decoding_bytes(backbone, dtype, frames, shape), with_backbone=True),
        PhaseNeed(name="save", device_bytes=0, with_backbone=True, host_bytes=3 * adapter_bytes),  # with both moments
        # Every process reads the whole model before it gives away all but its part.
        PhaseNeed(name="read weights", device_bytes=0, with_backbone=False,
                  host_bytes=_transformer_bytes(backbone, dtype) if plan.num_shards > 1 else 0),
    )


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
        ids = torch.zeros(_PROMPT_BATCH, backbone.text_length, dtype=torch.int64)
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
