"""Real CogVideoX pipelines of random weights that are small enough to train in a second."""

from pathlib import Path

import torch

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
