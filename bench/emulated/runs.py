"""Whole runs on the emulated card, from weight files to samples, by the planner's plan and in the memory of the card it was made for.

Prompts go through T5-XXL, the watcher looks before the first step, steps are saved, latents are sampled and decoded: `trainer.loop` does
it all, from models of the published sizes whose weight files are holes. Only what the watcher thinks of such values is disregarded. Then
`trainer.generate` makes a video with what the run left, on the same card.
"""

import ctypes
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from bench.card.forecasts import shrunk
from bench.card.session import Session, goal
from memory.assess import MARGIN
from memory.meter import Meter
from trainer import generate as generating
from trainer import loop
from trainer.backbones import published
from trainer.backbones.location import BUNDLED
from trainer.config import TrainConfig, replaced
from trainer.findings import Bill
from trainer.memory_file import MemoryForecast
from trainer.planning import planned
from trainer.preflight import Preflight
from trainer.video_config import GenerateConfig

_RUNS = ((4, "cogvideox-2b", 17, True), (4, "cogvideox-5b", 49, True), (8, "cogvideox-5b", 49, True), (12, "cogvideox1.5-5b", 17, True),
         (24, "cogvideox-5b", 49, True), (4, "cogvideox-2b", 17, False), (8, "cogvideox-5b", 49, False))
"""(GiB, model, frames, whether segments grow)."""
_STEP = ("teacher", "student", "backward", "optimizer")


def measure(session: Session) -> dict[str, Any]:
    """The part's result: by run, the peaks of its phases beside what was predicted."""
    with tempfile.TemporaryDirectory() as scratch, patch.dict(os.environ, XDG_CACHE_HOME=f"{scratch}/cache"), _indifferent():
        found = {}
        for gib, model, frames, grow in ((8, "shapes", 9, True), (8, "shapes", 9, False)) if session.dry else _RUNS:
            with _segments(grow):
                run = _run(session, gib, model, frames, Path(scratch))
            found[f"{model} {frames}f for {gib}gb" + ", segments fixed" * (not grow)] = {"segments_grow": grow, **run}
    ended = [run for run in found.values() if "phases" in run]
    errors = [phase["predicted_bytes"] / phase["allocated_bytes"] - 1 for run in ended if run["segments_grow"]  # else rests count as allocated
              for phase in run["phases"].values() if "predicted_bytes" in phase]
    return {"runs": found, "goals": [
        goal("runs said to fit that did not end", len(found) - len(ended), 0),
        goal("videos said to fit that were not made", sum("reserved_bytes" not in run.get("video", {}) for run in ended), 0),
        goal("largest error of allocated in any phase", max(map(abs, errors), default=None), 0.01, unit="%"),
        goal("reserved, over what was predicted for the whole run",
             max((run["reserved_bytes"] / run["predicted_reserved_bytes"] for run in ended), default=None), 1 + MARGIN),
        goal("retries of the allocator", sum(run["num_retries"] for run in ended) if ended else None, 0)]}


def _run(session: Session, gib: float, model: str, frames: int, scratch: Path) -> dict[str, Any]:
    directory, out = scratch / model, scratch / "run"
    if not session.dry and not directory.exists():
        _write_hollow(model, directory)
    config = replaced(TrainConfig(), {
        "model.model": model if session.dry else str(directory), "model.frames": frames, "data.concept": "red",
        "data.preserve": ("circle", "square", "triangle", "left"),
        "optim.steps": 3, "output.out": out, "output.save_every": 2, "output.sample_every": 2, "output.sample_steps": 2, "output.monitor": "off"})
    card = shrunk(session.card, gib)
    config, _, known = planned(config, card, ())
    meters: list[Meter] = []

    def metered(device: torch.device) -> Meter:
        meters.append(Meter(device))
        return meters[-1]

    def run() -> dict[str, Any]:
        before = session.gauge.counters()
        with patch.object(loop, "Meter", metered), _sized(session, card.available_bytes):
            loop.train(config, {}, forecast=MemoryForecast(card, known))
        if len(list((out / "samples").iterdir())) != 3:  # one that fails is a warning
            raise RuntimeError("not all samples were written")
        predicted = json.loads((out / "memory.json").read_text())["predicted"]["peak_bytes_by_phase"]
        predicted["pre-flight"] = max(predicted[phase] for phase in _STEP)
        peaks = {name: {"allocated_bytes": peak.allocated_bytes, "reserved_bytes": peak.reserved_bytes}
                 | ({"predicted_bytes": predicted[name]} if name in predicted else {}) for name, peak in meters[0].peaks.items()}
        return {"phases": peaks, "reserved_bytes": max(peak["reserved_bytes"] for peak in peaks.values()),
                "num_retries": session.gauge.counters()["num_retries"] - before["num_retries"]}

    def video() -> dict[str, Any]:
        wanted = GenerateConfig(prompt=("red",), eraser=out, out=out / "video.png", num_steps=2, model=config.model, memory=config.memory)
        session.gauge.begin()
        with patch.object(generating, "assemble", wraps=generating.assemble) as assemble, _sized(session, card.available_bytes):
            session.gauge.phase("video")
            generating.generate(wanted, card)
        return {"resident_blocks": assemble.call_args.args[2].resident_blocks, **session.gauge.end()["video"]}

    attempt = session.gauge.attempt(run)
    made = {"video": session.gauge.attempt(video).as_json()} if attempt.worked else {}
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(scratch / "cache", ignore_errors=True)  # the next run encodes its prompts, too
    settings = {name: value for name, value in vars(known.plan).items() if value != getattr(TrainConfig().memory, name)}
    return {"cap_bytes": card.available_bytes, "settings": settings,
            "predicted_reserved_bytes": known.needed_bytes - card.context_bytes, **attempt.as_json(), **made}


@contextmanager
def _segments(grow: bool) -> Iterator[None]:
    """Within, the caching allocator's segments grow or do not, and the planner knows."""
    before, told = os.environ["PYTORCH_ALLOC_CONF"], f"expandable_segments:{grow}"
    with patch.dict(os.environ, PYTORCH_ALLOC_CONF=told):
        torch._C._accelerator_setAllocatorSettings(told)
        try:
            yield
        finally:
            torch._C._accelerator_setAllocatorSettings(before)


@contextmanager
def _sized(session: Session, num_bytes: int) -> Iterator[None]:
    """Within, the card has `num_bytes` beside its context. Under a cap of torch's (`Gauge.capped`), the allocator would try again where a
    request fits as far as it is not mapped yet, but not as a whole."""
    def resize(num_bytes: int) -> None:
        ctypes.CDLL(None).emulated_card_resize(ctypes.c_size_t(num_bytes))

    total = session.gauge.total_bytes()
    resize(session.gauge.context_bytes() + num_bytes)
    try:
        yield
    finally:
        resize(total)


@contextmanager
def _indifferent() -> Iterator[None]:
    """Within, whoever judges values looks at them as ever, and finds nothing."""
    def nothing(bill: Bill, findings: Any) -> Bill:
        list(findings)  # what is looked at runs as it is asked for
        return bill

    with ExitStack() as patches:
        patches.enter_context(patch.object(Bill, "with_findings", nothing))
        patches.enter_context(patch("trainer.prompts._require_sense", lambda prompts, table: None))
        patches.enter_context(patch("trainer.preflight._finite", lambda tensors: True))
        patches.enter_context(patch.object(Preflight, "_underflow", lambda self, zero: None))
        yield


def _write_hollow(model: str, directory: Path) -> None:
    """A pipeline's directory as published, but for its weights, which are zeros that take no room, and its words, which are the bundled model's."""
    kind, scheduler = published.SCHEDULERS[model]
    with torch.device("meta"):
        parts = {"transformer": diffusers.CogVideoXTransformer3DModel(**published.TRANSFORMERS[model]),
                 "vae": diffusers.AutoencoderKLCogVideoX(**published.VAES[model]), "text_encoder": T5EncoderModel(T5Config(**published.T5_XXL))}
    shutil.copytree(BUNDLED / "tokenizer", directory / "tokenizer")
    getattr(diffusers, kind)(**scheduler).save_pretrained(directory / "scheduler")
    index = json.loads((BUNDLED / "model_index.json").read_text()) | {"scheduler": ["diffusers", kind]}
    (directory / "model_index.json").write_text(json.dumps(index))
    for name, part in parts.items():
        part.config.save_pretrained(directory / name) if name == "text_encoder" else part.save_config(directory / name)
        _write_zeros(part, directory / name / "model.safetensors", getattr(torch, published.NATIVE_DTYPES[model]))


def _write_zeros(model: nn.Module, file: Path, dtype: torch.dtype) -> None:
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + parameter.numel() * dtype.itemsize
        header[name] = {"dtype": {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype], "shape": list(parameter.shape), "data_offsets": [start, end]}
    words = json.dumps(header).encode()
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(words)) + words)
        f.truncate(f.tell() + end)
