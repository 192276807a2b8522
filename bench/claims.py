"""A verdict for every figure in the source documents, from the other results: bench/results/claims.json.

    python -m bench.claims

A claim whose result is not there yet is "open", and says what to run.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel

from bench.erasure import summary
from bench.provenance import RESULTS, of_cards, take_no_arguments, write_result
from memory.cards import GIB
from trainer.backbones import published
from trainer.config import SHAPES

HOLDS, CONTRADICTED, PREDICTED, MEASURED = "holds", "contradicted", "predicted here", "measured here"
_DOCUMENTS = "documents' 5b"


class Missing(Exception):
    """A result that a verdict needs is not there; the message is the command that makes it."""


def _load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise Missing(f"python -m bench.{name}")
    return json.loads(path.read_text())


def _rank(model: str, rank: int, what: str) -> int:
    return _load("rank")["models"][model]["ranks"][str(rank)][what]


def _ranks(what: str, unit: float, pattern: str) -> str:
    return " / ".join(format(_rank(_DOCUMENTS, rank, what) / unit, pattern) for rank in (64, 128, 256, 512))


def _cell(model: str, frames: int | str, name: str) -> dict[str, Any]:
    return _load("strategies")["cells"][f"{model}-{frames}"][name]


def _peak(model: str, frames: int | str, name: str) -> float:
    return _cell(model, frames, name)["step_peak_bytes"] / GIB


def _saving(before: str, after: str) -> str:
    """Percent saved, for each model and size."""
    cells = (name.rsplit("-", 1) for name in _load("strategies")["cells"])
    return ", ".join(f"{model} {frames} f: {1 - _peak(model, frames, after) / _peak(model, frames, before):.0%}"
                     for model, frames in cells)


def _on_card(part: str, *cells: str) -> tuple[str, list[float]]:
    """A card that the suite measured, and GiB allocated at the peak of its cells."""
    paths = of_cards(part, RESULTS)
    if not paths:
        raise Missing(f"python -m bench.card --only {part}")
    found = json.loads(paths[0].read_text())
    return found["provenance"]["card"], [found["cells"][cell]["allocated_bytes"] / GIB for cell in cells]


def _fits(name: str, card: str) -> str:
    s = _load("story")["variants"][name]
    where = s["cards"][card]
    end = "fits" if where["fits"] else f"breaks in {where['breaks_in'] or 'reserving'}"
    return f"{s['peak_bytes'] / GIB:.1f} GiB, {end}"


def rank_total() -> tuple[str, str]:
    return HOLDS, f"{_ranks('params', 1e6, '.2f')} M, for 41 blocks of width 1152"


def rank_train() -> tuple[str, str]:
    return CONTRADICTED, (f"fp32 with AdamW: {_ranks('train_adamw_bytes', 1e6, '.0f')} MB; with 8-bit states "
                          f"{_ranks('train_adamw8bit_bytes', 1e6, '.0f')} MB")


def rank_delta() -> tuple[str, str]:
    parts = []
    for model in (_DOCUMENTS, "cogvideox-2b", "cogvideox-5b"):
        saved = (_rank(model, 128, what) - _rank(model, 64, what) for what in ("train_adamw_bytes", "train_adamw8bit_bytes"))
        parts.append(f"{model} {' / '.join(f'{s / 1e6:.0f}' for s in saved)} MB")
    return CONTRADICTED, "in fp32 with AdamW / 8-bit AdamW: " + ", ".join(parts)


def rank_choice() -> tuple[str, str]:
    more = {m: (_rank(m, 512, "train_adamw_bytes") - _rank(m, 64, "train_adamw_bytes")) / GIB for m in ("cogvideox-2b", "cogvideox-5b")}
    return CONTRADICTED, f"memory hardly depends on it: from 64 to 512 {more['cogvideox-2b']:.2f} GiB (2b), {more['cogvideox-5b']:.2f} GiB (5b)"


def offload() -> tuple[str, str]:
    card, (whole, streamed, short, short_streamed) = _on_card("offload", "5b-49f all resident", "5b-49f ring", "5b-17f all resident", "5b-17f ring")
    return MEASURED, (f"streaming all blocks, over checkpointing, on {card}: 5b 17 f: {1 - short_streamed / short:.0%}, 5b 49 f: "
                      f"{1 - streamed / whole:.0%}; predicted: {_saving('checkpoint all', 'stream all')}")


def train_total() -> tuple[str, str]:
    card, (checkpointed,) = _on_card("speed", "5b 49f")
    return CONTRADICTED, (f"5b, 49 f, one backbone, no checkpointing: {_peak('cogvideox-5b', 49, 'no checkpointing'):.1f} GiB (predicted); checkpointed "
                          f"{checkpointed:.1f} GiB (measured on {card}); the second copy is not needed")


def naive_in_96gb() -> tuple[str, str]:
    card, (peak,) = _on_card("speed", "naive 2b 17f")
    return MEASURED, f"{peak:.1f} GiB on {card}, with all three losses; predicted: {_fits('as in the log, without CFG', '96gb')}"


def batch() -> tuple[str, str]:
    peaks = [_peak("cogvideox-2b", 49, name) for name in ("checkpoint all", "batch 2", "batch 4")]
    slope = peaks[1] - peaks[0]
    straight = abs(peaks[2] - peaks[0] - 3 * slope) < 0.02 * peaks[2]
    return (HOLDS if straight else CONTRADICTED), f"2b, 49 f: {peaks[0] - slope:.2f} GiB + {slope:.2f} GiB a sample (predicted)"


def full_finetuning() -> tuple[str, str]:
    naive = _load("feasibility")["cells"]["cogvideox-2b-17"]["naive"]["96gb"]
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(published.TRANSFORMERS["cogvideox-2b"])
    train_bytes = 16 * sum(p.numel() for p in model.parameters())
    return PREDICTED, (f"2b weights, gradients and AdamW in fp32 alone are {train_bytes / GIB:.1f} GiB before activations; "
                      f"the naive eraser step needs {naive['needed_bytes'] / GIB:.1f} GiB (predicted)")


def step_seconds() -> tuple[str, str]:
    planned = _load("feasibility")["cells"]["cogvideox-2b-17"]
    return PREDICTED, (f"on an H20, whole step with all three losses: naive fp32 {planned['naive']['h20']['step_seconds']:.1f} s, "
                      f"planned {planned['planned']['h20']['step_seconds']:.1f} s (predicted)")


def _variant(name: str) -> dict[str, float]:
    return summary(_load("erasure")["variants"][name]["evaluation"])


def erase() -> tuple[str, str]:
    two, whole = _variant("two-steps"), _variant("unlearn-trajectory")
    holds = two["target"] > 0.8 * two["target_before"] and whole["target"] < 0.2 * whole["target_before"]
    return (HOLDS if holds else CONTRADICTED), (f"bundled model: target detected after 2 steps {two['target']:.0%}, "
                                                f"after {SHAPES['optim.steps']} {whole['target']:.0%}")


def preserve() -> tuple[str, str]:
    alone, both = _variant("unlearn-trajectory"), _variant("unlearn-pre-trajectory")
    holds = alone["preserved_worst"] < both["preserved_worst"]
    return (HOLDS if holds else CONTRADICTED), (f"bundled model: worst preserved rate {alone['preserved_worst']:.0%} with L_unlearn alone, "
                                                f"{both['preserved_worst']:.0%} with L_pre")


VERDICTS: dict[str, tuple[str, str, Callable[[], tuple[str, str]]]] = {
    "rank-params": ("000", "one adapter at width 1152: 0.15 / 0.30 / 0.59 / 1.18 M parameters at rank 64 / 128 / 256 / 512",
                    lambda: (HOLDS, _ranks("params_per_block", 1, ",.0f"))),
    "rank-total": ("000", "41 blocks: 6.2 / 12.3 / 24.2 / 48.4 M", rank_total),
    "rank-fp16": ("000", "fp16 parameters 12 / 25 / 48 / 97 MB", lambda: (HOLDS, f"{_ranks('fp16_bytes', 1e6, '.1f')} MB")),
    "rank-train": ("000", "training 37 / 74 / 145 / 290 MB, about 4 x the parameters", rank_train),
    "5b-shape": ("000", "CogVideoX-5b: 41 blocks of width 1152", lambda: (
        CONTRADICTED, f"42 blocks of width 3072; {_rank('cogvideox-5b', 128, 'params'):,} parameters at rank 128")),
    "5b-summary": ("000", "about 8.4 M parameters at rank 128", lambda: (
        CONTRADICTED, f"{_rank('cogvideox-5b', 128, 'params') / 1e6:.2f} M; {_rank(_DOCUMENTS, 128, 'params') / 1e6:.2f} M for the documents' shape")),
    "rank-delta": ("000", "rank 128 to 64 saves about 25 MB", rank_delta),
    "rank-choice": ("000", "rank by card: under 24 GB 64-96 … over 80 GB 256-512", rank_choice),
    "2b-total": ("002", "14,807,040 parameters (2b, rank 128)", lambda: (HOLDS, f"{_rank('cogvideox-2b', 128, 'params'):,}")),
    "2b-layer": ("002", "245,888 parameters a block", lambda: (
        CONTRADICTED, f"{_rank('cogvideox-2b', 128, 'params_per_block'):,}: `up` was left out")),
    "tokens": ("002", "[2, 6976, 1920] after the last feed-forward at 17 frames with CFG", lambda: (HOLDS, "226 + 5 x 30 x 45 = 6,976")),
    "offload": ("000, 001", "CPU offload saves 60-70 % / 85-90 %; 120-170 GB down to 15-25 GB", offload),
    "fp16": ("000, 001", "fp16 saves about 50 %", lambda: (
        PREDICTED, f"16-bit over fp32, nothing else: {_saving('float32, no checkpointing', 'no checkpointing')} (predicted)")),
    "batch": ("000", "memory is linear in batch size", batch),
    "train-total": ("001", "training takes 120-170 GB, two copies of the model", train_total),
    "infer-total": ("001", "inference 20-30 GB", lambda: (PREDICTED, (
        f"5b, 49 f, all blocks resident: sampling {_cell('cogvideox-5b', 49, 'checkpoint all')['predicted']['by_phase']['sample'] / GIB:.1f} GiB, "
        f"all streamed {_cell('cogvideox-5b', 49, 'stream all')['predicted']['by_phase']['sample'] / GIB:.1f} GiB (predicted)"))),
    "24gb-oom": ("002", "24 GB runs out as soon as the transformer runs (2b, fp32, 17 f)", lambda: (
        PREDICTED, "two copies, T5 and VAE: " + _fits("as in the log, without CFG", "24gb") + " (predicted)")),
    "96gb-ok": ("002", "the same run fits 96 GB without CFG", naive_in_96gb),
    "96gb-cfg": ("002", "with CFG batching it does not fit 96 GB", lambda: (
        PREDICTED, _fits("as in the log, with CFG", "96gb") + "; with checkpointing " + _fits("with CFG, checkpointing", "96gb") + " (predicted)")),
    "full-ft": ("002", "full-parameter fine-tuning needs 47-65 GB", full_finetuning),
    "step-time": ("002", "11.9 s a step on an H20, 2b fp32 17 f", step_seconds),
    "fp16-nan": ("002", "fp16 adapters: NaN at step 2; fp32 adapters: no NaN", lambda: (
        HOLDS, "Adam's eps of 1e-8 is 0 in fp16, so a zero gradient gives 0/0 (tests/memory/test_optimizers.py)")),
    "wiped": ("002", "to_empty zeroes attention; only up.bias then learns", lambda: (
        HOLDS, "reproduced as a fault put in on purpose, and named (tests/faults)")),
    "latent-shape": ("003", "default latents 10 x 10", lambda: (CONTRADICTED, "60 x 90 for 480 x 720")),
    "erase": ("002", "2-step training changes almost nothing; 10 prompts x 50 steps x 1 epoch erases", erase),
    "preserve": ("002", "with L_unlearn alone preservation is poor", preserve),
}


def collect() -> dict[str, dict[str, str]]:
    """Every claim with its verdict and figure."""
    found = {}
    for name, (document, claim, judge) in VERDICTS.items():
        try:
            verdict, figure = judge()
        except (Missing, KeyError) as e:
            verdict, figure = "open", f"run `{e}`" if isinstance(e, Missing) else f"the result lacks {e}"
        found[name] = {"document": document, "claim": claim, "verdict": verdict, "figure": figure}
    return found


def main() -> None:
    print(write_result("claims", {"claims": collect()}))


if __name__ == "__main__":
    take_no_arguments(__doc__)
    main()
