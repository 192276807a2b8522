"""What others measured of these very models on their cards, against what is predicted for it.

    python -m bench.published      into bench/results/published.json

bench/published.toml has their figures and where each stands. What they ran is run here on tensors without data: generations and
decoding with diffusers' own modules (decoding with those of the version that was measured, read from its wheel), LoRA training
as a plain loop with `pip install --no-deps peft accelerate`. None of the figures is ours.
"""

import importlib.util
import io
import statistics
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from bench.provenance import take_no_arguments, write_result
from memory.allocator import replay
from memory.cards import GIB, lookup
from memory.environment import cublas_workspace_bytes
from memory.fake import FakeMode
from memory.simulate import Recorder, recording
from memory.timeline import BACKWARD, FORWARD, OPTIMIZER, Trace
from memory.timing import load_of
from memory.work import Work
from trainer.backbones import Predict, lean
from trainer.backbones import published as configurations
from trainer.backbones.cogvideox import CogVideoX
from trainer.rehearse import with_8bit_state

PUBLISHED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
_GUIDED = 2  # both halves of guidance in one batch
_layer_norm = nn.functional.layer_norm


def main() -> int:
    if missing := [name for name in ("peft", "accelerate") if importlib.util.find_spec(name) is None]:
        print(f"error: the published training needs {', '.join(missing)}: pip install --no-deps {' '.join(missing)}", file=sys.stderr)
        return 2
    with patch.object(lean, "make_lean"):
        found = {"training": training(), "decoding": decoding(), "generation": generation(), "training_step": training_step()}
    write_result("published", {"sources": PUBLISHED["sources"], "shares": shares(), **found})
    return 0


def shares() -> dict[str, Any]:
    """What kernels reach of the rates in memory/cards.toml."""
    def share(card: str, tflops: list[float], rate: str) -> dict[str, float]:
        return {"num_reports": len(tflops), "tflops": statistics.median(tflops),
                "share": statistics.median(tflops) * 1e12 / getattr(lookup(card), rate)}

    attention = [row | {f"{way}_share": row[way] / row.get("rate", lookup(row["card"]).tensor_rate / 1e12)
                        for way in ("forward", "backward") if way in row} for row in PUBLISHED["attention"]]
    return {"matmul": {card: share(card, tflops, "tensor_rate") for card, tflops in PUBLISHED["matmul"].items()},
            "float32": {card: share(card, tflops, "fp32_rate") for card, tflops in PUBLISHED["float32"].items()},
            "attention": attention}


# ---- memory ------------------------------------------------------------------------------------------------------------


def training() -> list[dict[str, Any]]:
    """Bytes reserved at most by the first two steps, with the native allocator and a workspace of cuBLAS for each thread."""
    rows = []
    for row in PUBLISHED["training"]:
        trace = lora_steps(row["model"], row["rank"], row["batch_size"], checkpointing=row["checkpointing"])
        if row["optimizer"] != "adamw":
            trace = with_8bit_state(trace)
        events, sizes = trace.device_events()
        stats = replay([len(sizes), len(sizes) + 1, *events], [*sizes, *[cublas_workspace_bytes() // 2] * 2])
        rows.append(row | {"predicted_reserved_bytes": stats.peak_reserved_bytes, "predicted_allocated_bytes": stats.peak_allocated_bytes,
                           "error": stats.peak_reserved_bytes / GIB / row["reserved_gib"] - 1})
        print(rows[-1], flush=True)
    return rows


def lora_steps(model: str, rank: int, batch_size: int, *, checkpointing: bool) -> Trace:
    """Two steps of LoRA on the attention's projections in float32, the model in bfloat16, both under autocast.

    CUDA's autocast takes norms to float32, the CPU's does not: `_norm_in_float32` stands in for that.
    """
    from peft import LoraConfig

    backbone = CogVideoX(model, weights="random")
    shape = (batch_size, *backbone.latent_shape(*backbone.default_size()))  # (B, F, C, H, W)
    with FakeMode(allow_non_fake_inputs=True), patch.object(nn.functional, "layer_norm", _norm_in_float32):
        transformer = backbone.fake_transformer(dtype=torch.bfloat16).requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=rank, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        adapters = [p for p in transformer.parameters() if p.requires_grad]
        for parameter in adapters:
            parameter.data = parameter.data.float()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        predict = backbone.predictor(transformer.train(), shape[1:])
        optimizer = torch.optim.AdamW(adapters, foreach=False)  # torch's choice on a card makes temporaries, after the peak
        with recording() as recorder:
            recorder.adopt([*transformer.parameters(), *transformer.buffers()], "weights")
            for _ in range(2):
                _lora_step(recorder, predict, optimizer, shape, (batch_size, backbone.text_length, backbone.text_width))
    return recorder.trace()


def _lora_step(recorder: Recorder, predict: Predict, optimizer: torch.optim.Optimizer, shape: tuple[int, ...],
               text_shape: tuple[int, ...]) -> None:
    with recorder.phase(FORWARD):
        clean, text = torch.empty(shape, dtype=torch.bfloat16), torch.empty(text_shape, dtype=torch.bfloat16)
        noisy = clean + torch.randn_like(clean)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = predict(noisy, torch.zeros(shape[0]), text)
        loss = (output.float() + noisy - clean).square().mean()
    with recorder.phase(BACKWARD):
        loss.backward()
    with recorder.phase(OPTIMIZER):
        optimizer.step()
        optimizer.zero_grad()


def _norm_in_float32(x: torch.Tensor, shape: tuple[int, ...], weight: torch.Tensor | None = None, bias: torch.Tensor | None = None,
                     eps: float = 1e-5) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
    return _layer_norm(x, shape, weight, bias, eps)


def decoding() -> list[dict[str, Any]]:
    """Bytes allocated at most by a whole decoding beside the models."""
    rows = []
    for row in PUBLISHED["decoding"]:
        predicted, without = (_decoding_peak(row["model"], row["diffusers"], device) for device in ("cuda", "cpu"))
        measured = round((row["peak_gib"] - row["models_gib"]) * GIB)
        rows.append(row | {"measured_bytes": measured, "predicted_bytes": predicted, "error": predicted / measured - 1,
                           "predicted_without_copies_bytes": without})
        print(rows[-1], flush=True)
    return rows


@cache
def _decoding_peak(model: str, version: str, device: str) -> int:
    """`device`: whose kernels; the CPU's convolutions copy nothing."""
    with FakeMode(), torch.no_grad():
        vae = _old_autoencoder(version).from_config(configurations.VAES[model]).to(torch.bfloat16)
        peaks = _decoded(vae, model, device).peaks()
    return peaks["decode"] - peaks["load"]


def _old_autoencoder(version: str) -> type:
    """The autoencoder of an older diffusers, among the modules of this one."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"diffusers=={version}"], check=True)
        wheel = next(Path(folder).glob("*.whl")).read_bytes()
    source = zipfile.ZipFile(io.BytesIO(wheel)).read("diffusers/models/autoencoders/autoencoder_kl_cogvideox.py").decode()
    # It asks for the value of a tensor, where a tensor without data has none.
    source = source.replace("torch.prod(torch.tensor(input.shape)).item()", "input.numel()")
    name = "diffusers.models.autoencoders.autoencoder_kl_cogvideox_of_then"
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None))
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
    return module.AutoencoderKLCogVideoX


def _decoded(vae: nn.Module, model: str, device: str = "cuda") -> Trace:
    backbone = CogVideoX(model, weights="random")
    frames, channels, height, width = backbone.latent_shape(*backbone.default_size())
    latents = torch.empty(1, channels, frames, height, width, dtype=torch.bfloat16)
    with recording(device=device) as recorder:
        recorder.adopt([*vae.parameters(), *vae.buffers(), latents], "weights")
        with recorder.phase("decode"):
            vae.decode(latents)
    return recorder.trace()


# ---- time --------------------------------------------------------------------------------------------------------------


def generation() -> list[dict[str, Any]]:
    """Seconds of denoising steps, and of decoding where that was counted."""
    rows = []
    for row in PUBLISHED["generation"]:
        seconds = row["steps"] * _seconds(_denoising(row["model"], *row.get("size", ())), row["card"])
        if row["decoding"]:
            seconds += _seconds(_decoding(row["model"]), row["card"])
        rows.append(row | {"predicted_seconds": seconds, "error": seconds / row["seconds"] - 1})
        print(rows[-1], flush=True)
    return rows


def training_step() -> list[dict[str, Any]]:
    """Seconds of a checkpointed LoRA step."""
    rows = []
    for row in PUBLISHED["training_step"]:
        trace = lora_steps(row["model"], row["rank"], 1, checkpointing=True)
        seconds = _seconds(trace.work, row["card"]) / 2
        rows.append(row | {"predicted_seconds": seconds, "error": seconds / row["seconds"] - 1})
        print(rows[-1], flush=True)
    return rows


def _seconds(works: list[Work], name: str) -> float:
    """With FlashAttention-2, which torch picked on every card when these times were measured."""
    card = lookup(name)
    card = replace(card, attention_fraction=card.flash_fraction, attention_backward_fraction=card.flash_backward_fraction)
    return load_of(works, card).computing


@cache
def _denoising(model: str, *size: int) -> list[Work]:
    """`size`: (frames, height, width), if not the model's own."""
    backbone = CogVideoX(model, weights="random")
    shape = backbone.latent_shape(*size or backbone.default_size())
    with FakeMode(allow_non_fake_inputs=True), torch.no_grad():
        predict = backbone.predictor(backbone.fake_transformer(dtype=torch.bfloat16), shape)
        text = torch.empty(_GUIDED, backbone.text_length, backbone.text_width, dtype=torch.bfloat16)
        with recording() as recorder:
            predict(torch.empty(_GUIDED, *shape), torch.zeros(_GUIDED), text)
    return recorder.trace().work


@cache
def _decoding(model: str) -> list[Work]:
    with FakeMode(), torch.no_grad():
        return _decoded(CogVideoX(model, weights="random").fake_vae(dtype=torch.bfloat16), model).work


if __name__ == "__main__":
    take_no_arguments(__doc__)
    sys.exit(main())
