"""Encoders of random weights on disk, in transformers' layout, and synthetic problems."""

from pathlib import Path

import torch

from trainer.lora import Layer
from trainer.projection_config import ForgetConfig
from trainer.projection_problem import Problem
from trainer.seeding import noise


def save_encoder(directory: Path, encoder: str) -> Path:
    """The bundled encoder's architecture, untrained."""
    from trainer.shapes import pretrain_encoders as pretrain

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if encoder == "clip":
            tokenizer, processor = pretrain.clip_tokenizer(), pretrain.clip_processor()
            model = pretrain.clip_model(tokenizer)
        else:
            tokenizer, processor = pretrain.qwen_tokenizer(), pretrain.qwen_processor()
            model = pretrain.qwen_model(tokenizer)
    for part in (model, tokenizer, processor):
        part.save_pretrained(directory)
    return directory


def problem(*, separable: bool = True, bias: bool = True) -> Problem:
    """8 forgotten and 40 preserved inputs of width 24, outputs of width 12; separable: in directions of their own."""
    forget, preserve = noise((8, 24), 0, "forget"), noise((40, 24), 0, "preserve")
    if separable:
        forget[:, 6:], preserve[:, :6] = 0, 0
        forget[:, 0] += 4
    layer = Layer("head", noise((12, 24), 0, "weight") / 5, noise((12,), 0, "bias") if bias else None)
    return Problem(layer, forget, preserve, noise((12,), 0, "target"))


def settings(**values) -> ForgetConfig:
    return ForgetConfig(**({"rank": 3, "alpha": 3.0, "steps": 300, "seed": 1, "device": "cpu", "monitor": "off"} | values))
