"""Train the bundled model "shapes" from nothing, in four stages, into a directory in diffusers' layout.

    python -m trainer.shapes.pretrain --out trainer/shapes/pipeline

1. text encoder: a tiny T5 learns what captions say and that synonyms mean the same, then is frozen.
2. VAE: a small AutoencoderKLCogVideoX learns to code the world's videos, then is frozen.
3. transformer: a small CogVideoXTransformer3DModel learns v-prediction on cached latents and embeddings.
4. refine: the same again from there in shorter cycles with other noise, for the last percent of the shapes.

Each stage is a function of the seed and writes its part when it is done, so `--stages` can repeat one of them.
Legend: B batch, T frames, F latent frames, C channels, H W latent size, L caption tokens, D text width.
"""

import random
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from trainer.backbones import published
from trainer.shapes import world

TEXT_LENGTH, TEXT_WIDTH = 16, 64
SCHEDULER = published.SCHEDULERS["cogvideox-5b"][1]


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train the bundled model."""

    out: Path = Path("trainer/shapes/pipeline")
    """Directory to write, in diffusers' layout."""
    stages: tuple[Literal["text", "vae", "transformer", "refine"], ...] = ("text", "vae", "transformer", "refine")
    """Which stages to run; the others are read from OUT."""
    seed: int = 0
    """Seed of every stage."""
    text_steps: int = 1500
    """Steps of the text encoder."""
    vae_steps: int = 1500
    """Steps of the VAE, batch 8."""
    transformer_steps: int = 4500
    """Steps of the transformer, batch 64."""
    refine_steps: int = 2500
    """Steps of each further cycle."""
    refine_cycles: int = 2
    """Further cycles."""
    num_videos: int = 6000
    """Videos rendered and encoded once for the transformer."""
    device: str = "cpu"
    """Where to train."""


def _tokenizer() -> T5TokenizerFast:
    """Whole words of the world as pieces; single characters stand in for any other word."""
    words = {w for t in world.TEMPLATES for w in t.split() if "{" not in w} | {"shape"}
    words |= {w for names in world.ATTRIBUTES.values() for synonyms in names.values() for w in synonyms}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    pieces += [(f"▁{w}", -1.0) for w in sorted(words)]
    pieces += [(c, -10.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def _ids(tokenizer: T5TokenizerFast, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True,
                     return_tensors="pt").input_ids  # (B, L)


def _schedule(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], num_steps,
                                               pct_start=0.05, div_factor=20, final_div_factor=100)


def _progress(stage: str, step: int, num_steps: int, started: float, **values: float) -> None:
    if step % 100 == 0 or step == num_steps - 1:
        numbers = "  ".join(f"{k} {v:.5f}" for k, v in values.items())
        print(f"{stage} {step + 1}/{num_steps}  {time.monotonic() - started:.0f} s  {numbers}", flush=True)


def _random_words(rng: random.Random, unsaid: float) -> tuple[list[str | None], list[str | None], list[str | None]]:
    """One random scene: its names, the words that say them, and the names as far as they are said."""
    names = [rng.choice(list(kind)) for kind in world.ATTRIBUTES.values()]
    said = [None if rng.random() < unsaid else name for name in names]
    words = [rng.choice(kind[name]) if name else None for kind, name in zip(world.ATTRIBUTES.values(), said)]
    return names, words, said


def train_text_encoder(config: Pretrain) -> None:
    """Attributes must be readable from the mean token; a synonym's tokens must lie close to its canonical word's."""
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    tokenizer = _tokenizer()
    model = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=3, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )).to(config.device)
    kinds = list(world.ATTRIBUTES.values())
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, len(kind) + 1) for kind in kinds).to(config.device)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    schedule, started = _schedule(optimizer, config.text_steps), time.monotonic()
    for step in range(config.text_steps):
        batch = [_random_words(rng, unsaid=0.2) for _ in range(64)]
        templates = [rng.choice(world.TEMPLATES) for _ in batch]
        said = [[(list(kind).index(name) + 1 if name else 0) for kind, name in zip(kinds, names)]
                for _, _, names in batch]
        targets = torch.tensor(said, device=config.device)  # (B, 3)
        spoken = _ids(tokenizer, [world.wording(t, *words) for t, (_, words, _) in zip(templates, batch)])
        plain = _ids(tokenizer, [world.wording(t, *names) for t, (_, _, names) in zip(templates, batch)])
        tokens = model(torch.cat([spoken, plain]).to(config.device)).last_hidden_state  # (2B, L, D)
        pooled, (ours, canonical) = tokens[:64].mean(1), tokens.chunk(2)
        understood = sum(F.cross_entropy(head(pooled), targets[:, i]) for i, head in enumerate(heads))
        aligned = F.mse_loss(ours, canonical.detach())
        (understood + 0.3 * aligned).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        _progress("text", step, config.text_steps, started, understood=understood.item(), aligned=aligned.item())
    tokenizer.save_pretrained(config.out / "tokenizer")
    model.save_pretrained(config.out / "text_encoder")


def _videos(num_videos: int, seed: int, *, lanes: bool = False) -> tuple[Tensor, list[list[str]]]:
    """Rendered videos in [-1, 1] (B, 3, T, H, W) and the names of what they show."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    names = [_random_words(rng, unsaid=0.0)[0] for _ in range(num_videos)]
    return torch.stack([world.render(world.Scene(*n), generator, lanes=lanes) * 2 - 1 for n in names]), names


def train_vae(config: Pretrain) -> None:
    """Mean absolute and squared error with a light KL; afterwards the latents' scale is written into the config.

    The decoder sees latents with a little noise, as a diffusion model's samples have it: what only an exact latent
    would show (a corner) has to be coded so that it survives. One video in four is from outside the lanes.
    """
    torch.manual_seed(config.seed + 1)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 32), down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=8, latent_channels=16,
        sample_height=world.SIZE, sample_width=world.SIZE,
    ).to(config.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule, started = _schedule(optimizer, config.vae_steps), time.monotonic()
    for step in range(config.vae_steps):
        seed = 10_000_000 + config.seed * 1_000_000 + step
        videos = _videos(8, seed=seed, lanes=step % 4 > 0)[0].to(config.device)
        posterior = vae.encode(videos).latent_dist
        z = posterior.sample()  # (B, C, F, H, W)
        disturbed = z + 0.3 * torch.rand(8, 1, 1, 1, 1).to(z) * _spread(z).detach() * torch.randn(z.shape).to(z)
        decoded = vae.decode(disturbed).sample
        error = F.l1_loss(decoded, videos) + F.mse_loss(decoded, videos)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (error + 1e-3 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        _progress("vae", step, config.vae_steps, started, error=error.item(), kl=kl.item())
    vae.register_to_config(scaling_factor=_scaling_factor(vae, config))
    vae.save_pretrained(config.out / "vae")


def _spread(latents: Tensor) -> Tensor:
    """Standard deviation of latents (B, C, F, H, W) around each channel's mean."""
    return (latents - latents.mean((0, 2, 3, 4), keepdim=True)).std()


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKLCogVideoX, config: Pretrain) -> float:
    """1 / the latents' spread.

    A channel's mean says nothing about a video; counted in, it would leave the content far below the noise at most
    timesteps, and what depends on fine detail (the shape) would never be learned.
    """
    latents = vae.encode(_videos(64, seed=config.seed + 2, lanes=True)[0].to(config.device)).latent_dist.mode()
    return round(1 / _spread(latents).item(), 4)


@torch.no_grad()
def _encode_videos(vae: AutoencoderKLCogVideoX, config: Pretrain) -> tuple[Tensor, list[list[str]]]:
    latents, names = [], []
    for part in range(0, config.num_videos, 100):
        videos, shown = _videos(min(100, config.num_videos - part), seed=20_000_000 + config.seed * 1_000_000 + part, lanes=True)
        latents += [vae.encode(v.to(config.device)).latent_dist.mode().cpu() for v in videos.split(25)]
        names += shown
    return torch.cat(latents).transpose(1, 2) * vae.config.scaling_factor, names  # (B, F, C, H, W)


@torch.no_grad()
def _encode_captions(config: Pretrain) -> tuple[Tensor, dict[tuple, list[int]]]:
    """Embeddings of all captions that pretraining may see, and which of them word which (partly said) scene."""
    tokenizer = T5TokenizerFast.from_pretrained(config.out / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(config.out / "text_encoder").to(config.device).eval()
    texts, index = [""], {}
    for said in product(*((None, *kind) for kind in world.ATTRIBUTES.values())):
        seen = sorted({c for c in world.captions(world.Scene(*said)) if not world.held_out(c)})
        index[said] = list(range(len(texts), len(texts) + len(seen)))
        texts += seen
    embeddings = [encoder(_ids(tokenizer, texts[i:i + 500]).to(config.device))[0].cpu()
                  for i in range(0, len(texts), 500)]
    return torch.cat(embeddings), index


def _new_transformer(size: int) -> CogVideoXTransformer3DModel:
    """For latents of `size` x `size`. AdaLN-zero (Peebles and Xie, arXiv:2212.09748): every block starts as the
    identity, the prediction as zero."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=6, time_embed_dim=128, text_embed_dim=TEXT_WIDTH,
        sample_width=size, sample_height=size, sample_frames=world.FRAMES, max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0, in_channels=16, out_channels=16,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    modulations = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm2)]
    for module in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(module.weight)
    return model


def _average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
    """Exponential moving average that forgets the first steps."""
    n = float(num_averaged)
    torch._foreach_lerp_(averaged, current, 1 - min(0.998, (1 + n) / (10 + n)))


def train_transformer(config: Pretrain, cycle: int = 0) -> None:
    """v-prediction over uniform timesteps; captions leave attributes unsaid, or say nothing, now and then."""
    num_steps, lr = (config.refine_steps, 1e-3) if cycle else (config.transformer_steps, 1.5e-3)
    torch.manual_seed(config.seed + 3 + cycle)
    rng = random.Random(config.seed + 3 + cycle)
    vae = AutoencoderKLCogVideoX.from_pretrained(config.out / "vae").to(config.device).eval()
    latents, names = _encode_videos(vae, config)
    embeddings, index = _encode_captions(config)
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER)
    model = (CogVideoXTransformer3DModel.from_pretrained(config.out / "transformer") if cycle
             else _new_transformer(latents.shape[-1])).to(config.device).train()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_average)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule, started = _schedule(optimizer, num_steps), time.monotonic()
    for step in range(num_steps):
        picked = torch.tensor([rng.randrange(len(names)) for _ in range(64)])
        chosen = []
        for i in picked.tolist():
            said = tuple(None if rng.random() < 0.12 else name for name in names[i])
            chosen.append(0 if rng.random() < 0.1 else rng.choice(index[said] or [0]))
        x0 = latents[picked].to(config.device)  # (B, F, C, H, W)
        noise = torch.randn(x0.shape).to(config.device)
        t = torch.randint(0, 1000, (64,)).to(config.device)
        # With 64 tokens, plain attention in bf16 is faster than a fused kernel's backward, and all in all 1.6 x fp32.
        with torch.autocast(torch.device(config.device).type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            v = model(scheduler.add_noise(x0, noise, t), embeddings[chosen].to(config.device), t, return_dict=False)[0]
        loss = F.mse_loss(v.float(), scheduler.get_velocity(x0, noise, t))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(model)
        _progress(f"refine {cycle}" if cycle else "transformer", step, num_steps, started, loss=loss.item())
        if step % 500 == 499 or step == num_steps - 1:
            average.module.save_pretrained(config.out / "transformer")
    scheduler.save_pretrained(config.out / "scheduler")


def refine_transformer(config: Pretrain) -> None:
    """Further cycles: the learning rate rises and falls again."""
    for cycle in range(1, config.refine_cycles + 1):
        train_transformer(config, cycle)


def main(config: Pretrain) -> None:
    stages = {"text": train_text_encoder, "vae": train_vae, "transformer": train_transformer,
              "refine": refine_transformer}
    for stage in config.stages:
        stages[stage](config)
    parts = dict(
        tokenizer=T5TokenizerFast.from_pretrained(config.out / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(config.out / "text_encoder"),
        vae=AutoencoderKLCogVideoX.from_pretrained(config.out / "vae"),
        transformer=CogVideoXTransformer3DModel.from_pretrained(config.out / "transformer"),
        scheduler=CogVideoXDDIMScheduler.from_pretrained(config.out / "scheduler"),
    )
    for part in (parts["vae"], parts["transformer"]):
        part.register_to_config(_name_or_path="shapes")  # not where OUT lay
    CogVideoXPipeline(**parts).save_pretrained(config.out)


if __name__ == "__main__":
    main(tyro.cli(Pretrain))
