"""Figures that others published: what the card table says of them, and that the committed comparison is of today's predictions."""

import importlib.util
import math
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import diffusers
import pytest
import torch

from bench import published
from bench.markdown import load
from memory.cards import card_names, lookup
from memory.timing import FP32_FRACTION, LARGEST_ERROR, TYPICAL_ERROR
from trainer.backbones import lean

PUBLISHED = published.PUBLISHED


def test_every_figure_says_where_it_stands():
    rows = [row for kind in ("attention", "generation", "decoding", "training", "training_step") for row in PUBLISHED[kind]]
    assert {row["source"] for row in rows} | {"products"} == set(PUBLISHED["sources"])
    assert all(url.startswith("https://") for url in PUBLISHED["sources"].values())


def test_the_card_table_has_the_shares_that_were_published():
    shares = published.shares()
    for card, found in shares["matmul"].items():
        assert lookup(card).matmul_fraction == pytest.approx(found["share"], abs=0.006), card
    measured = {card for card in card_names() if "matmul_fraction" not in lookup(card).assumed}
    assert measured == set(PUBLISHED["matmul"])
    preferred = {row["card"] for row in shares["attention"] if row.get("kernel") == "cuDNN"}
    for row in shares["attention"]:
        card = lookup(row["card"])
        flash, picked = ((card.flash_fraction, card.flash_backward_fraction), (card.attention_fraction, card.attention_backward_fraction))
        forward, backward = picked if "kernel" in row else flash
        assert forward == pytest.approx(row["forward_share"], abs=0.025), card.name
        assert backward == pytest.approx(row.get("backward_share", backward), abs=0.025), card.name
        assert (flash == picked) == (card.name not in preferred)
    assert statistics.median(found["share"] for found in shares["float32"].values()) == pytest.approx(FP32_FRACTION, abs=0.03)


def test_times_are_within_the_error_that_a_plan_states():
    result = load("published")
    errors = [row["error"] for row in result["generation"] + result["training_step"]]
    assert math.sqrt(statistics.mean(e * e for e in errors)) == pytest.approx(TYPICAL_ERROR, abs=0.005)
    assert LARGEST_ERROR - 0.01 < max(map(abs, errors)) <= LARGEST_ERROR


def test_peaks_are_near_what_was_published():
    result = load("published")
    errors = sorted(abs(row["error"]) for row in result["training"])
    assert len(errors) == len(PUBLISHED["training"]) and errors[len(errors) // 2] < 0.015 and errors[-1] < 0.06
    assert all(abs(row["error"]) < 0.01 for row in result["decoding"])


def test_the_committed_times_are_todays():
    row = next(row for row in load("published")["generation"] if row["card"] == "l40" and row["steps"] == 1)
    published._denoising.cache_clear()
    with patch.object(lean, "make_lean"):
        seconds = published._seconds(published._denoising(row["model"]), row["card"])
    published._denoising.cache_clear()
    assert seconds == pytest.approx(row["predicted_seconds"], rel=1e-9), "run `python -m bench.published`"


def test_the_published_training_is_two_whole_steps(monkeypatch):
    """With projections of the model itself in place of peft's adapters."""
    def adapt(transformer, config):
        assert config["r"] == 16
        for block in transformer.transformer_blocks:
            block.attn1.to_q.requires_grad_(True)

    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(LoraConfig=lambda **config: config))
    monkeypatch.setattr(diffusers.CogVideoXTransformer3DModel, "add_adapter", adapt)
    trace = published.lora_steps("cogvideox-2b", 16, 1, checkpointing=True)
    peaks, trained = trace.peaks(), 30 * 1920 * 1921 * 4
    assert peaks["student backward"] == max(peaks.values())
    state = [storage for storage in trace.storages if storage.category == "optimizer"]
    assert sum(storage.num_bytes for storage in state) == pytest.approx(2 * trained, rel=0.01)
    assert sum(work.kind == "attention backward" for work in trace.work) == 2 * 30


def test_norms_are_in_float32_under_autocast_alone():
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    assert published._norm_in_float32(x, (4,), weight).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert published._norm_in_float32(x, (4,), weight).dtype == torch.float32


def test_an_older_autoencoder_is_read_from_its_wheel(monkeypatch):
    here = Path(diffusers.__file__).parent / "models/autoencoders/autoencoder_kl_cogvideox.py"

    def download(command, check):
        assert command[-1] == "diffusers==0.1.2" and check
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "diffusers-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("diffusers/models/autoencoders/autoencoder_kl_cogvideox.py", here.read_text())

    monkeypatch.setattr(subprocess, "run", download)
    autoencoder = published._old_autoencoder("0.1.2")
    assert autoencoder is not diffusers.AutoencoderKLCogVideoX and autoencoder.__name__ == "AutoencoderKLCogVideoX"
    monkeypatch.delitem(sys.modules, autoencoder.__module__)


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert published.main() == 2
    assert "pip install --no-deps peft accelerate" in capsys.readouterr().err
