"""What an eraser's rank costs: exact bytes by model, dtype and optimizer, beside the documents' tables.

    python -m bench.rank
"""

from typing import Any

from bench.provenance import take_no_arguments, write_result
from memory.optimizers import predict_state_bytes
from trainer.backbones import published

RANKS = (64, 96, 128, 256, 512)
SHAPES = {  # (blocks, width)
    "documents' 5b": (41, 1152),
    **{name: (c["num_layers"], 64 * c["num_attention_heads"]) for name, c in published.TRANSFORMERS.items()},
}
DOCUMENT = {  # rank -> millions of parameters a block and in all, MB in fp16, MB in training (document 000)
    64: (0.15, 6.2, 12, 37), 128: (0.30, 12.3, 25, 74), 256: (0.59, 24.2, 48, 145), 512: (1.18, 48.4, 97, 290)}


def numels(width: int, rank: int) -> tuple[int, int, int, int]:
    """Elements of one eraser's down.weight, down.bias, up.weight, up.bias."""
    return width * rank, rank, rank * width, width


def costs(num_blocks: int, width: int, rank: int) -> dict[str, int]:
    """Parameters, and bytes by dtype of the parameters and kind of optimizer: weights, gradients and state."""
    block, everything = numels(width, rank), numels(width, rank) * num_blocks
    found = {"params_per_block": sum(block), "params": sum(everything), "fp16_bytes": 2 * sum(everything),
             "fp32_bytes": 4 * sum(everything)}
    for kind in ("adamw", "adamw8bit"):
        found[f"train_{kind}_bytes"] = 8 * sum(everything) + predict_state_bytes(everything, kind)
    # What the documents' code does: weight, gradient and both moments in fp16. It diverges.
    return found | {"train_fp16_bytes": 8 * sum(everything)}


def main() -> None:
    models: dict[str, Any] = {
        name: {"num_blocks": blocks, "width": width, "ranks": {str(rank): costs(blocks, width, rank) for rank in RANKS}}
        for name, (blocks, width) in SHAPES.items()}
    document = {str(rank): dict(zip(("params_per_block", "params", "fp16_bytes", "train_bytes"), (v * 1e6 for v in row)))
                for rank, row in DOCUMENT.items()}
    print(write_result("rank", {"basis": "computed", "models": models, "document": document}))


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
