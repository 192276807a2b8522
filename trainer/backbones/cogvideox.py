"""CogVideoX 2b, 5b, 1.5-5B and the bundled model, from a diffusers directory, a hub id or a published configuration.

Legend: B batch, F latent frames, C latent channels, H W latent size, L text tokens, D text width, T video frames.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from memory.applied import AppliedPlan
from memory.plan import MemoryPlan, apply_plan
from trainer.backbones import Decode, Predict, published
from trainer.backbones.location import complete, config_hash, locate, of_hub, read_config, reading, stored_dtype
from trainer.backbones.text_encoder import TextEncoder
from trainer.backbones.weights import allocate, assign, randomise
from trainer.errors import NonFinite, UsageError

BOUNDARY_NAMES = ("hidden_states", "encoder_hidden_states")
"""The arguments of a block's forward that the block before it returns."""


class CogVideoX:
    """A frozen transformer and what belongs to it. Opening one reads configuration only; weights are loaded by the methods.

    `name`: where it comes from. `num_blocks`, `width` of the transformer;
    `text_length`, `text_width` of its text embeddings, which `text_encoder` makes; `spatial_ratio`, `temporal_ratio` of the autoencoder.
    """

    def __init__(self, model: str, *, weights: str = "stored"):
        """`model`: "shapes", a directory in diffusers' layout, a hub id, or a published name: with `weights="random"` its
        configuration, otherwise its hub id."""
        self.name = model
        self.directory: Path | None = None
        self._is_whole = False
        self._dtypes: dict[str, torch.dtype] = {}
        if weights == "random":
            if model not in published.TRANSFORMERS:
                raise UsageError(f"--weights random knows {', '.join(published.TRANSFORMERS)}, not {model!r}")
            self._config = dict(published.TRANSFORMERS[model])
            self._vae_config: dict[str, Any] = dict(published.VAES[model])
        else:
            self.directory = locate(model)
            self._config = read_config(self.directory, "transformer")
            self._vae_config = read_config(self.directory, "vae")
        with reading(Path(self.directory or model)):
            self._read_configuration()
        if self.directory and not of_hub(model):  # there is no download to wait for, and damage is said at once
            self.stored_dtype("transformer")
        self.text_encoder = TextEncoder(self.directory, self.text_length, self.text_width)

    def fetch(self) -> None:
        """The download of the weights, if there is one. Raises UsageError."""
        if self.directory and not self._is_whole:
            complete(self.name, self.directory)
            self._is_whole = True

    @property
    def native_dtype(self) -> torch.dtype:
        """What the transformer's weights were published in."""
        return self.stored_dtype("transformer")

    def stored_dtype(self, component: str) -> torch.dtype:
        """What a component's weights were published in. Of a model of the hub that may take a request, at worst the download, and raises UsageError."""
        if component not in self._dtypes:
            self._dtypes[component] = (stored_dtype(self.name, self.directory, component) if self.directory
                                       else getattr(torch, published.NATIVE_DTYPES[self.name]))
        return self._dtypes[component]

    def _read_configuration(self) -> None:
        with torch.device("meta"):  # for its configuration with all defaults; one block is built in a moment
            c = self._build_transformer(num_layers=1).config
        self.num_blocks = int(self._config.get("num_layers", 30))
        self.config = c = SimpleNamespace(**{**c, "num_layers": self.num_blocks})
        if c.in_channels != c.out_channels:
            raise UsageError(f"--model {self.name}: the transformer takes {c.in_channels} latent channels and predicts {c.out_channels}, as for "
                             "image to video; a text-to-video model is needed")
        if c.use_learned_positional_embeddings:
            raise UsageError(f"--model {self.name}: the transformer has learned positions, as for image to video at one size; a text-to-video "
                             "model is needed")
        self.width = c.num_attention_heads * c.attention_head_dim
        self.text_length, self.text_width = c.max_text_seq_length, c.text_embed_dim
        levels = self._vae_config.get("block_out_channels", (128, 256, 256, 512))
        self.spatial_ratio = 2 ** (len(levels) - 1)
        self.temporal_ratio = int(self._vae_config.get("temporal_compression_ratio", 4))

    def _build_transformer(self, **changes: Any) -> nn.Module:
        from diffusers.utils import import_utils

        import_utils._bitsandbytes_available = False  # its quantizers are not used here, and a second of every start
        from diffusers import CogVideoXTransformer3DModel

        from trainer.backbones.lean import make_lean

        model = CogVideoXTransformer3DModel.from_config(self._config | changes)
        make_lean(model.transformer_blocks)
        return model

    def identity(self) -> dict[str, str]:
        """Name and configuration hash: what an eraser or a checkpoint belongs to."""
        return {"name": self.name, "config_hash": config_hash(vars(self.config))}

    def default_size(self) -> tuple[int, int, int]:
        """(frames, height, width) in pixels that the model was trained at."""
        if self.name in published.SIZES:
            return published.SIZES[self.name]
        c, s = self.config, self.spatial_ratio
        if c.patch_size_t is not None:  # 1.5 stores the largest grid, not the size that it was trained at
            frames, height, width = published.SIZES["cogvideox1.5-5b"]
            return frames, min(height, self._most_pixels(c.sample_height)), min(width, self._most_pixels(c.sample_width))
        return c.sample_frames, c.sample_height * s, c.sample_width * s

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents. Raises UsageError for sizes that the VAE cannot make or the model has no positions for."""
        c, r = self.config, self.temporal_ratio
        if num_frames < 1 or (num_frames - 1) % (2 * r):  # it decodes latent frames in pairs, the odd one first
            near = max(1, round((num_frames - 1) / (2 * r))) * 2 * r + 1
            raise UsageError(f"--frames {num_frames}: this VAE makes {2 * r}k+1 frames; {near} would work")
        side = self.spatial_ratio * c.patch_size
        for flag, value, largest in (("height", height, c.sample_height), ("width", width, c.sample_width)):
            most = self._most_pixels(largest)
            if c.patch_size_t is not None and value > most:  # 1.5 takes its rotary positions from a grid of fixed size
                raise UsageError(f"--{flag} {value}: this model has positions for {most} pixels at most")
            if value < side or value % side:
                raise UsageError(f"--{flag} {value}: must be a multiple of {side}; "
                                 f"{max(1, round(value / side)) * side} would work")
        num_latent_frames = (num_frames - 1) // r + 1
        return (num_latent_frames + self.num_padding_frames(num_latent_frames), c.in_channels,
                height // self.spatial_ratio, width // self.spatial_ratio)

    def _most_pixels(self, largest: int) -> int:
        """Of one side of latents whose size is `largest`, as far as whole patches go."""
        return largest // self.config.patch_size * self.config.patch_size * self.spatial_ratio

    def num_padding_frames(self, num_latent_frames: int) -> int:
        """Latent frames that 1.5 adds in front so that its temporal patch divides them; decoding drops them again."""
        return -num_latent_frames % (self.config.patch_size_t or 1)

    def num_tokens(self, latent_shape: tuple[int, int, int, int]) -> int:
        """Text and video tokens of one sample: the attention's sequence length."""
        return self.text_length + torch.Size(self.token_grid(latent_shape)).numel()

    def token_grid(self, latent_shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        """Video tokens as (frames, height, width), in the order of the sequence."""
        c, (f, _, h, w) = self.config, latent_shape
        return f // (c.patch_size_t or 1), h // c.patch_size, w // c.patch_size

    def load_transformer(self, *, dtype: torch.dtype, device: torch.device | str = "cpu",
                         latent_shape: tuple[int, int, int, int] | None = None) -> nn.Module:
        """The frozen transformer, in eval mode; `latent_shape` (F, C, H, W): what its positions are made for, in place of the model's own size."""
        with torch.device("meta"):
            model = self._build_transformer()
        self._weighted(model, "transformer", dtype, device)
        return self._with_positions(model, dtype, device, latent_shape)

    def fake_transformer(self, *, dtype: torch.dtype, num_blocks: int | None = None) -> nn.Module:
        """The transformer without data, for use under FakeTensorMode; `num_blocks`: a shorter one."""
        with torch.device("meta"):
            model = self._build_transformer(num_layers=num_blocks or self.num_blocks)
        return self._with_positions(allocate(model, dtype=dtype), dtype, "cpu")

    def _with_positions(self, model: nn.Module, dtype: torch.dtype, device: torch.device | str,
                        latent_shape: tuple[int, int, int, int] | None = None) -> nn.Module:
        """Sin-cos positions are computed, not stored: a model built on meta lacks them."""
        if "pos_embedding" in model.patch_embed._non_persistent_buffers_set:
            size = _made_for(model) if latent_shape is None else self._sample_size(latent_shape)
            self._set_positions(model, size, dtype, device)
        return model

    def _sample_size(self, latent_shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        frames, _, height, width = latent_shape
        return height, width, (frames - 1) * self.temporal_ratio + 1

    def _set_positions(self, model: nn.Module, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        embed = model.patch_embed
        embed.sample_height, embed.sample_width, embed.sample_frames = size
        embed.pos_embedding = embed._get_positional_embeddings(*size).to(device, dtype)

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Its transformer blocks in order of execution."""
        return transformer.transformer_blocks

    def apply(self, plan: MemoryPlan, transformer: nn.Module, device: torch.device) -> AppliedPlan:
        """`memory.plan.apply_plan` to a transformer of this kind."""
        blocks = self.blocks(transformer)
        return apply_plan(transformer, blocks, plan, device=device, feed_forwards=[block.ff for block in blocks], boundary_names=BOUNDARY_NAMES)

    def rotary(self, latent_shape: tuple[int, int, int, int], device: torch.device | str
               ) -> tuple[Tensor, Tensor] | None:
        """cos and sin (video tokens, head dim), or None for sin-cos models. Same grids as CogVideoXPipeline."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        c = self.config
        if not c.use_rotary_positional_embeddings:
            return None
        frames, height, width = self.token_grid(latent_shape)
        base = c.sample_height // c.patch_size, c.sample_width // c.patch_size
        if c.patch_size_t is None:
            grid = dict(crops_coords=get_resize_crop_region_for_grid((height, width), base[1], base[0]))
        else:
            grid = dict(crops_coords=None, grid_type="slice", max_size=base)
        return get_3d_rotary_pos_embed(embed_dim=c.attention_head_dim, grid_size=(height, width),
                                       temporal_size=frames, device=device, **grid)

    def predictor(self, transformer: nn.Module, latent_shape: tuple[int, int, int, int]) -> Predict:
        """What predicts velocities for latents of that shape, where the transformer's weights are now."""
        weight = transformer.proj_out.weight
        rotary, size = self.rotary(latent_shape, weight.device), self._sample_size(latent_shape)
        if rotary is None and _made_for(transformer) != size:  # diffusers would recompute the table in every forward
            embed, before = transformer.patch_embed, transformer.patch_embed.pos_embedding
            self._set_positions(transformer, size, weight.dtype, weight.device)
            before.data, embed.pos_embedding = embed.pos_embedding, before  # the buffer that an applied plan knows, to undo it
        ofs = {} if transformer.ofs_embedding is None else {"ofs": torch.full((1,), 2.0, device=weight.device)}

        def predict(latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return transformer(hidden_states=latents.to(weight.dtype), encoder_hidden_states=text.to(weight.dtype),
                               timestep=timestep, image_rotary_emb=rotary, return_dict=False, **ofs)[0]

        return predict

    def scheduler(self) -> Any:
        """A fresh diffusers scheduler."""
        import diffusers

        if self.directory is None:
            kind, config = published.SCHEDULERS[self.name]
            return getattr(diffusers, kind)(**config)
        index = self.directory / "model_index.json"
        with reading(index):
            kind = getattr(diffusers, json.loads(index.read_text())["scheduler"][1])
        with reading(self.directory / "scheduler"):
            return kind.from_pretrained(self.directory / "scheduler")

    def load_vae(self, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The frozen autoencoder."""
        return self._weighted(self._build_vae(), "vae", dtype, device)

    def fake_vae(self, *, dtype: torch.dtype) -> nn.Module:
        """The autoencoder without data, for use under FakeTensorMode."""
        return allocate(self._build_vae(), dtype=dtype)

    def _build_vae(self) -> nn.Module:
        from diffusers import AutoencoderKLCogVideoX

        with torch.device("meta"):
            return AutoencoderKLCogVideoX.from_config(self._vae_config)

    def _weighted(self, model: nn.Module, component: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        if self.directory is None:
            return randomise(model, dtype=dtype, device=device)
        self.fetch()
        return assign(model, self.directory / component, dtype=dtype, device=device)

    def decoder(self, num_frames: int, *, dtype: torch.dtype, device: torch.device | str = "cpu", one_by_one: bool = True) -> Decode:
        """What decodes latents to videos, a tile at a time, and the videos of a call one by one or together. It raises NonFinite."""
        vae = self.load_vae(dtype=dtype, device=device)
        enable_tiles(vae)
        vae.use_slicing = one_by_one
        scale = 1 / vae.config.scaling_factor
        num_latent_frames = (num_frames - 1) // self.temporal_ratio + 1

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            latents = latents[:, -num_latent_frames:].transpose(1, 2) * scale  # (B, C, F, H, W), without padding
            frames = vae.decode(latents.to(device, dtype)).sample.cpu().float()  # (B, 3, T, H, W); a gigabyte each where they are large
            if not all(bound.isfinite() for bound in frames.aminmax()):  # as bytes they would be black, or anything
                raise NonFinite("the VAE gives NaN or infinity: its weights are damaged, or it leaves the range of "
                                f"{str(dtype).removeprefix('torch.')}; copy the model again, or take another --dtype")
            return frames.div_(2).add_(0.5).clamp_(0, 1)

        return decode


def _made_for(transformer: nn.Module) -> tuple[int, int, int]:
    """What it has positions for: height and width of latents, and frames of the video."""
    embed = transformer.patch_embed
    return embed.sample_height, embed.sample_width, embed.sample_frames


def enable_tiles(vae: nn.Module) -> None:
    """Decode in tiles of about a quarter of the published height and width, and one video at a time.

    Tiles overlap by a quarter, which divides their sides in latents exactly: diffusers' own overlaps (1/6, 1/5) suit its
    half-size tiles only, other tiles would not fit together.
    """
    vae.enable_tiling(tile_sample_min_height=128, tile_sample_min_width=192,
                      tile_overlap_factor_height=0.25, tile_overlap_factor_width=0.25)
    vae.enable_slicing()
