"""Fixtures: real but tiny CogVideoX pipelines on disk, one of each published kind, and settings to train on them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: no test may reach for the network

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainer.backbones.cogvideox import CogVideoX
from trainer.config import TrainConfig, replaced

FRAMES, SIDE = 9, 16  # latents (3, 4, 4, 4): 12 video tokens
KINDS = ("2b", "5b", "1.5")
_TRANSFORMERS = {
    "2b": dict(sample_height=4, sample_width=4),
    "5b": dict(sample_height=4, sample_width=4, use_rotary_positional_embeddings=True),
    "1.5": dict(sample_height=8, sample_width=8, use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
}


def build_pipeline(directory: Path, kind: str, *, dtype: torch.dtype = torch.float32, ofs: bool = False) -> Path:
    """Save a pipeline of random weights: 2 blocks of width 32, a VAE of 4x4 and 4 frames, a T5 of width 16."""
    from diffusers import (AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline,
                           CogVideoXTransformer3DModel)
    from transformers import T5Config, T5EncoderModel

    from trainer.shapes.pretrain import SCHEDULER, TEXT_LENGTH, _tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, out_channels=4, time_embed_dim=16,
            text_embed_dim=16, sample_frames=FRAMES, max_text_seq_length=TEXT_LENGTH, spatial_interpolation_scale=1.0,
            ofs_embed_dim=16 if ofs else None, **_TRANSFORMERS[kind])
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4,
            down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
            sample_height=SIDE, sample_width=SIDE)
        text_encoder = T5EncoderModel(T5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))
    scheduler = CogVideoXDDIMScheduler if kind == "2b" else CogVideoXDPMScheduler
    for model in (transformer, vae, text_encoder) if dtype != torch.float32 else ():
        model.to(dtype)
    pipeline = CogVideoXPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
                                 scheduler=scheduler(**SCHEDULER))
    pipeline.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cached embeddings of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories by kind. Read only: a test that damages one takes `copied`."""
    root = tmp_path_factory.mktemp("pipelines")
    found = {kind: build_pipeline(root / kind, kind) for kind in KINDS}
    found["5b-bf16"] = build_pipeline(root / "5b-bf16", "5b", dtype=torch.bfloat16)
    found["1.5-ofs"] = build_pipeline(root / "1.5-ofs", "1.5", ofs=True)
    return found


@pytest.fixture
def copied(pipelines: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one pipeline that a test may damage."""
    return lambda kind: Path(shutil.copytree(pipelines[kind], tmp_path / f"copy-{kind}"))


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest, pipelines: dict[str, Path]) -> CogVideoX:
    return CogVideoX(str(pipelines[request.param]))


@pytest.fixture
def sincos(pipelines: dict[str, Path]) -> CogVideoX:
    """The 2b-like one, where the kind does not matter."""
    return CogVideoX(str(pipelines["2b"]))


@pytest.fixture
def tiny_config(pipelines: dict[str, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of 6 steps on the 2b-like pipeline, with settings by dotted path on top."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,safe\na red circle moving left,a circle moving left\nthe square is red and goes up,the square goes up\n"
                       "a video of a red ball heading down,a video of a ball heading down\n")

    def make(**overrides) -> TrainConfig:
        values = {"model.model": str(pipelines["2b"]), "model.device": "cpu", "data.prompts": prompts,
                  "data.preserve": ("a blue circle moving left", "a green square moving up"),
                  "data.trajectory_steps": 4, "data.batch_size": 2, "optim.rank": 4, "optim.steps": 6, "optim.warmup": 2,
                  "optim.lr": 1e-2, "output.out": tmp_path / "run", "output.save_every": 3, "output.sample_steps": 2,
                  "output.sample_prompts": ("a red circle",)}
        return replaced(TrainConfig(), values | {name.replace("__", "."): v for name, v in overrides.items()})

    return make
