"""Steps of the trainer under the watcher, on a real CogVideoX transformer of three blocks of width 32: sound settings, and a runner."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.backbones import published
from trainer.config import TrainConfig, replaced
from trainer.diagnose import prepare
from trainer.findings import Bill, Unhealthy
from trainer.health import Health
from trainer.inspection import Subject
from trainer.losses import student_backward

NUM_BLOCKS, TEXT_LENGTH, TEXT_WIDTH = 3, 8, 16
WORDS = "a the red blue circle square moving left up".split()
SCHEDULER = published.SCHEDULERS["cogvideox-2b"][1]


def tiny_pipeline(directory: Path, *, rotary: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A pipeline directory with random weights. The VAE is a configuration only: nothing is decoded here."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0), *((f"▁{w}", -1.0) for w in WORDS)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=NUM_BLOCKS, in_channels=4, out_channels=4,
            time_embed_dim=16, text_embed_dim=TEXT_WIDTH, sample_width=4, sample_height=4, sample_frames=9,
            max_text_seq_length=TEXT_LENGTH, use_rotary_positional_embeddings=rotary)
        encoder = T5EncoderModel(T5Config(
            vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
            is_encoder_decoder=False, use_cache=False))
    scheduler = (CogVideoXDPMScheduler if rotary else CogVideoXDDIMScheduler)(**SCHEDULER)
    for name, part in (("transformer", transformer.to(dtype)), ("text_encoder", encoder.to(dtype)), ("tokenizer", tokenizer),
                       ("scheduler", scheduler)):
        part.save_pretrained(directory / name)
    (directory / "vae").mkdir()
    (directory / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [4, 4, 4, 4], "scaling_factor": 1.0}))
    (directory / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", type(scheduler).__name__]}))
    (directory / "prompts.csv").write_text("prompt,safe\na red circle,a circle\nthe red square moving up,the square moving up\n")
    return directory


def settings(pipeline: Path, **changes: Any) -> TrainConfig:
    """Settings for a tiny pipeline, with `optim__rank=4` and the like on top."""
    values = {"model.model": str(pipeline), "model.device": "cpu", "data.prompts": pipeline / "prompts.csv",
              "data.preserve": ("a blue circle",), "data.trajectory_steps": 4, "optim.rank": 4, "optim.warmup": 0,
              "optim.lr": 1e-3}
    return replaced(TrainConfig(), values | {name.replace("__", "."): value for name, value in changes.items()})


@dataclass
class Outcome:
    """What the watcher said, and after how many steps it stopped the run (None: it did not)."""

    bill: Bill
    stopped: int | None
    touched: bool
    """Whether any weight of an eraser moved after the fault was put in."""

    @property
    def named(self) -> tuple[str, int | None]:
        """Code and block of what is held responsible; ("healthy", None) without."""
        blamed = [f for f in self.bill.findings if f.severity != "expected"]
        blamed.sort(key=lambda f: f.severity != "fatal")
        return (blamed[0].code, blamed[0].block) if blamed else ("healthy", None)


Inject = Callable[[Subject, ExitStack], Subject | None]
"""A fault: it changes what trains, or returns something else to train; the stack takes it back."""


def watch(config: TrainConfig, *, inject: Inject | None = None, at: int = 0, num_steps: int = 3) -> Outcome:
    """Train for some steps under the watcher; `inject` acts before step `at`, and 0 is before the pre-flight."""
    subject, before = prepare(config), {}
    with ExitStack() as stack:
        stack.enter_context(subject.assembly)

        def strike() -> None:
            nonlocal subject, before
            subject = (inject and inject(subject, stack)) or subject
            before = subject.assembly.erasers.state_dict()

        if at == 0:
            strike()
        health, step, stopped = Health(subject), 0, None
        try:
            with health:
                health.before_training()
                for step in range(num_steps):
                    if at == step > 0:
                        health.flush()
                        strike()
                    one_step(subject, health, step)
                health.after_training()
        except Unhealthy:
            stopped = step
        after = subject.assembly.erasers.state_dict()
        return Outcome(health.bill, stopped, any(not torch.equal(after[name], t) for name, t in before.items()))


def one_step(subject: Subject, health: Health, step: int) -> None:
    """A step of the training loop."""
    accumulation, scaler, totals = subject.config.optim.accumulation, subject.scaler, {}
    for k in range(accumulation):
        sample = subject.teacher.sample(step * accumulation + k)
        share = scaler.scale(torch.full((), 1 / accumulation))
        terms = student_backward(subject.assembly.predict, subject.assembly.erasers, sample, subject.config.loss, scale=share)
        totals = {name: totals.get(name, 0.0) + value / accumulation for name, value in terms.items()}
    scaler.unscale_(subject.optimizer)
    health.apply(step, totals)
    scaler.update()
    subject.optimizer.zero_grad(set_to_none=True)


PLANS: dict[str, dict[str, Any]] = {
    "default": {}, "no checkpointing": {"checkpoint": "none"}, "every second": {"checkpoint": "every:2"},
    "streamed": {"resident_blocks": 0}, "one resident": {"resident_blocks": 1, "checkpoint": "first:2"},
    "boundaries on the host": {"boundaries": "host"}, "attention kept": {"num_keep_attention": 2},
    "attention kept on the host": {"num_keep_attention": 1, "kept": "host", "resident_blocks": 1},
    "chunks and one batch": {"feed_forward_chunks": 2, "guidance": "batched"}, "8-bit optimizer": {"optimizer": "adamw8bit"},
}
VARIATIONS: tuple[dict[str, Any], ...] = (
    {}, {"data__latents": "noise"}, {"loss__alpha": 0.0, "loss__beta": 0.0}, {"optim__accumulation": 2}, {"loss__eta": 7.0},
    {"loss__anchor": "empty"}, {"data__batch_size": 2}, {"data__trajectory_guidance": 3.0}, {"optim__clip": 0.0},
    {"data__trajectory_steps": 1}, {"optim__lr": 1e-4, "optim__weight_decay": 0.1},
)
PIPELINES: dict[str, dict[str, Any]] = {
    "2b": {}, "5b": {"rotary": True}, "fp16": {"dtype": torch.float16}, "bf16": {"rotary": True, "dtype": torch.bfloat16}}


def healthy_settings(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`count` sound configurations as (pipeline, changes): every plan, variation, dtype and rank in turn, new seeds."""
    ranks = itertools.cycle((1, 4, 7, 32))
    plans, variations, pipelines = (itertools.cycle(kind) for kind in (PLANS.values(), VARIATIONS, PIPELINES))
    for seed in range(count):
        changes = {f"memory__{name}": value for name, value in next(plans).items()} | next(variations)
        pipeline = next(pipelines)
        if seed % len(PLANS) == len(PLANS) - 1:
            next(pipelines), next(ranks)  # keep the cycles out of step
        yield pipeline, changes | {"optim__rank": next(ranks), "optim__seed": seed}
