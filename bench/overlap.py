"""On paper: does a block's weight transfer hide behind the block's own computation? Everything here is predicted.

    python -m bench.overlap     into bench/results/overlap.json

A forward pass of one block of width D over S tokens takes 24 S D² FLOPs in its linear layers and 4 S² D in attention; its weights
cross the host link once. Rates, links and the fractions of them that are reached are those of memory/cards.toml.
"""

import tomllib
from pathlib import Path
from typing import Any

import torch

import memory.cards
from bench.card.forecasts import Forecaster, card_here
from bench.card.gauge import Gauge
from bench.card.rig import measured
from bench.card.session import Session, register_toys
from bench.provenance import take_no_arguments, write_result
from memory.cards import Card, card_names, lookup
from memory.fake import FakeMode
from trainer.backbones.cogvideox import CogVideoX

LINKS = ("pcie3-x16", "pcie4-x16", "pcie5-x16")
CELLS = (("cogvideox-2b", 17), ("cogvideox-2b", 49), ("cogvideox-5b", 17), ("cogvideox-5b", 49), ("cogvideox1.5-5b", 81))


def block_seconds(card: Card, num_tokens: int, width: int) -> float:
    """Seconds of one block's forward pass on `card`, predicted."""
    linear, attention = 24.0 * num_tokens * width**2, 4.0 * num_tokens**2 * width
    return linear / (card.tensor_rate * card.matmul_fraction) + attention / (card.tensor_rate * card.attention_fraction)


def link_rates() -> dict[str, float]:
    """Bytes a second that a pinned copy reaches over each link, assumed."""
    table = tomllib.loads((Path(memory.cards.__file__).parent / "cards.toml").read_text())
    return {name: table["links"][name]["effective"] * 1e9 for name in LINKS}


def predict() -> dict[str, Any]:
    """Compute and transfer seconds of a block by model and size, for every listed card and PCIe 3, 4 and 5."""
    rates, cells = link_rates(), {}
    backbones = {model: CogVideoX(model, weights="random") for model, _ in CELLS}
    for model, frames in CELLS:
        backbone = backbones[model]
        _, height, width = backbone.default_size()
        num_tokens = backbone.num_tokens(backbone.latent_shape(frames, height, width))
        with FakeMode():
            block = backbone.blocks(backbone.fake_transformer(dtype=torch.bfloat16, num_blocks=1))[0]
            num_bytes = sum(p.nbytes for p in block.parameters())
        transfer = {link: num_bytes / rate for link, rate in rates.items()}
        cards = {}
        for card in map(lookup, card_names()):
            seconds = block_seconds(card, num_tokens, backbone.width)
            cards[card.name] = {
                "compute_seconds": seconds,
                "compute_over_transfer": {link: seconds / t for link, t in transfer.items()}}
        cells[f"{model} {frames}"] = {"num_tokens": num_tokens, "block_bytes": num_bytes, "transfer_seconds": transfer, "cards": cards}
    return {"predicted": True, "cells": cells}


def count_loads(num_blocks: int) -> dict[str, float]:
    """How often streamed weights cross the link in a step of a model of `num_blocks`, none of them resident. Counted on the CPU, where the ring
    loads what it loads on a card: order and number of loads depend on the passes over the blocks alone."""
    register_toys(num_blocks)
    session = Session(Gauge(torch.device("cpu")), card_here(dry=True), Forecaster(0), dry=True)
    plans = {"a whole step": {}, "one with --guidance batched": dict(guidance="batched"), "one with --passes lockstep": dict(passes="lockstep"),
             "a student's pass alone": dict(student_only=True)}
    found = {name: measured(session.cell("5b", 49, resident_blocks=0, **plan), session.gauge, num_steps=2) for name, plan in plans.items()}
    return {name: cell["bytes_streamed_a_step"] / cell["streamed_bytes"] for name, cell in found.items()}


if __name__ == "__main__":
    take_no_arguments(__doc__)
    print(write_result("overlap", predict() | {"loads": count_loads(42)}))
