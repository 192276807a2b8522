"""Faults put into a training step on purpose."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.watched import NUM_BLOCKS, Inject, Outcome, settings, watch
from trainer import losses
from trainer.cache import cache_directory
from trainer.config import TrainConfig
from trainer.diagnose import prepare
from trainer.diffusion import Sampler
from trainer.erasers import Erasers
from trainer.inspection import Subject

# `block` is where a fault sits.


def _attention(subject: Subject, block: int) -> nn.Module:
    return subject.assembly.blocks[block].attn1


def _adapter(subject: Subject, block: int) -> nn.Module:
    return subject.assembly.erasers.adapters[block]


def _filled(parameter: nn.Parameter, value: float) -> None:
    parameter.data.fill_(value)


def _changed_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], stack: ExitStack) -> None:
    forward = module.forward
    stack.enter_context(patch.object(module, "forward", lambda *args: change(forward(*args))))


def wipe_attention(block: int) -> Inject:
    def inject(subject, stack):
        attention = _attention(subject, block).to_empty(device="cpu")
        for parameter in attention.parameters():  # fresh pages hold zeros; what to_empty() gives here is not defined
            parameter.data.zero_()

    return inject


def wipe_feed_forward(block: int) -> Inject:
    return lambda subject, stack: _filled(subject.assembly.blocks[block].ff.net[2].weight, 0.0)


def wipe_positions(subject: Subject, stack: ExitStack) -> None:
    subject.assembly.transformer.patch_embed.pos_embedding.zero_()


def half_adapters(subject: Subject, stack: ExitStack) -> Subject:
    for adapter in subject.assembly.erasers.adapters:
        adapter.half()
    return _with_optimizer(subject, subject.assembly.erasers.parameters())


def _with_optimizer(subject: Subject, parameters: list[nn.Parameter]) -> Subject:
    return dataclasses.replace(subject, optimizer=torch.optim.AdamW(parameters, lr=1e-3))


def overflow(block: int) -> Inject:
    """Activations of about 1e7 inside the feed-forward: within bfloat16's range, outside of float16's."""
    def inject(subject, stack):
        for layer in (subject.assembly.blocks[block].ff.net[0].proj, subject.assembly.blocks[block].ff.net[2]):
            layer.weight.data.mul_(2e3)

    return inject


def outlier(block: int) -> Inject:
    """One channel of one token at 2e4, as some models have it: within float16's range, and not far from its end."""
    def inject(subject, stack):
        def grown(block, args, output):
            hidden, *others = output
            hidden[:, 0, 0] = 2e4
            return hidden, *others

        stack.callback(subject.assembly.blocks[block].register_forward_hook(grown, prepend=True).remove)

    return inject


def left_out(*blocks: int) -> Inject:
    def inject(subject, stack):
        kept = [p for n, p in subject.assembly.erasers.named_parameters() if int(n[0]) not in blocks]
        return _with_optimizer(subject, kept or [nn.Parameter(torch.zeros(1))])

    return inject


def detach(block: int) -> Inject:
    return lambda subject, stack: _changed_output(_adapter(subject, block), torch.Tensor.detach, stack)


def _with_predict(subject: Subject, wrap: Callable) -> Subject:
    return dataclasses.replace(subject, assembly=dataclasses.replace(subject.assembly, predict=wrap(subject.assembly.predict)))


def student_under_no_grad(subject: Subject, stack: ExitStack) -> Subject:
    return _with_predict(subject, torch.no_grad())


def loop_under_inference_mode(subject: Subject, stack: ExitStack) -> None:
    stack.enter_context(torch.inference_mode())


def detach_all(subject: Subject, stack: ExitStack) -> None:
    for block in range(NUM_BLOCKS):
        detach(block)(subject, stack)


def detach_prediction(subject: Subject, stack: ExitStack) -> Subject:
    return _with_predict(subject, lambda predict: lambda *args: predict(*args).detach())


def replace_parameters(block: int) -> Inject:
    """As an offload hook does that puts a new Parameter in before every forward pass."""
    def inject(subject, stack):
        def refresh(layer: nn.Module, args: tuple) -> None:
            layer.weight = nn.Parameter(layer.weight.detach().clone())

        stack.callback(_adapter(subject, block).register_forward_pre_hook(
            lambda adapter, args: refresh(adapter.up, args)).remove)

    return inject


def switch_before_recompute(subject: Subject, stack: ExitStack) -> None:
    backward, erasers = torch.Tensor.backward, subject.assembly.erasers

    def off_first(tensor, *args, **kwargs):
        with erasers.switched(False):
            backward(tensor, *args, **kwargs)

    stack.enter_context(patch.object(torch.Tensor, "backward", off_first))


def never_switched(on: bool) -> Inject:
    """`switched` has no effect: erasers stay on (or off)."""
    def inject(subject, stack):
        switched, always = Erasers.switched, on
        stack.enter_context(patch.object(Erasers, "switched", lambda erasers, on: switched(erasers, always)))

    return inject


def reentrant(subject: Subject, stack: ExitStack) -> None:
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # torch's own hint, which a long log hides
    for block in subject.assembly.blocks:
        def forward(*args, inner=block.forward, **kwargs):
            return checkpoint(lambda *a: inner(*a, **kwargs), *args, use_reentrant=True)

        def positional(hidden_states, encoder_hidden_states, temb, forward=forward, **kwargs):
            return forward(hidden_states, encoder_hidden_states, temb, **kwargs)

        stack.enter_context(patch.object(block, "forward", positional))


def checkpointing_off(block: int) -> Inject:
    def inject(subject, stack):
        stack.enter_context(patch.object(subject.assembly.blocks[block], "forward", subject.assembly.blocks[block].forward.inner))

    return inject


def stuck_trajectory(subject: Subject, stack: ExitStack) -> None:
    stack.enter_context(patch.object(Sampler, "step", lambda self, velocity, index, latents, generator=None: latents))


def diverging_sampler(subject: Subject, stack: ExitStack) -> None:
    stack.enter_context(patch.object(Sampler, "step", lambda self, velocity, index, latents, generator=None: latents / 0))


def nan_in_weight(block: int) -> Inject:
    def inject(subject, stack):
        subject.assembly.blocks[block].ff.net[0].proj.weight.data[0, 0] = float("nan")

    return inject


def nan_in_embedding(subject: Subject, stack: ExitStack) -> None:
    subject.teacher.embeddings.table.fill_(float("nan"))


def nan_in_gradient(block: int) -> Inject:
    def inject(subject, stack):
        stack.callback(_adapter(subject, block).up.weight.register_hook(lambda gradient: gradient * float("nan")).remove)

    return inject


def infinite_flow(block: int) -> Inject:
    """The gradient that flows back out of a block's attention is infinite."""
    def inject(subject, stack):
        def spoil(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * float("inf"))

        stack.callback(_attention(subject, block).to_out[0].register_forward_hook(spoil).remove)

    return inject


def dead_gelu(block: int) -> Inject:
    return lambda subject, stack: _filled(_adapter(subject, block).down.bias, -100.0)


def underflow(subject: Subject, stack: ExitStack) -> Subject:
    """A loss as small as a mean over millions of elements makes it, and no loss scaler."""
    mse = losses.mean_squared_error
    stack.enter_context(patch.object(losses, "mean_squared_error", lambda a, b: mse(a, b) * 1e-9))
    return dataclasses.replace(subject, scaler=torch.amp.GradScaler("cpu", enabled=False))


def underflow_in_autocast(subject: Subject, stack: ExitStack) -> Subject:
    return _with_predict(underflow(subject, stack), torch.autocast("cpu", torch.float16))


def nan_in_student(block: int) -> Inject:
    """A NaN that only the student sees."""
    def inject(subject, stack):
        def spoil(module, args, output):
            return output * float("nan") if torch.is_grad_enabled() else output

        stack.callback(subject.assembly.blocks[block].ff.net[0].proj.register_forward_hook(spoil).remove)

    return inject


def swallow(block: int) -> Inject:
    def inject(subject, stack):
        mse = losses.mean_squared_error
        stack.enter_context(patch.object(losses, "mean_squared_error", lambda a, b: torch.nan_to_num(mse(a, b), nan=0.0)))
        nan_in_student(block)(subject, stack)

    return inject


def run_away(block: int, weight: float = 3e38) -> Inject:
    return lambda subject, stack: _filled(_adapter(subject, block).up.weight, weight)


def no_optimizer_step(subject: Subject, stack: ExitStack) -> None:
    stack.enter_context(patch.object(subject.optimizer, "step", lambda: None))


def no_zero_grad(subject: Subject, stack: ExitStack) -> None:
    stack.enter_context(patch.object(subject.optimizer, "zero_grad", lambda set_to_none: None))


def always_acts(block: int) -> Inject:
    return lambda subject, stack: _changed_output(_adapter(subject, block), lambda o: o + 0.1, stack)


def never_acts(subject: Subject, stack: ExitStack) -> None:
    for block in range(NUM_BLOCKS):
        _changed_output(_adapter(subject, block), lambda o: o - o.detach(), stack)


def closed_gate(block: int) -> Inject:
    return lambda subject, stack: _changed_output(_adapter(subject, block), lambda o: o * 0.0, stack)


def freeze(block: int) -> Inject:
    def inject(subject, stack):
        _adapter(subject, block).requires_grad_(False)

    return inject


def freeze_all(subject: Subject, stack: ExitStack) -> None:
    subject.assembly.transformer.requires_grad_(False)


# Damage to files, before anything is loaded: a function of the settings.

def damaged_weight_file(config: TrainConfig) -> None:
    file = next((Path(config.model.model) / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["transformer_blocks.1.ff.net.2.weight"][0, 3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


def damaged_cache(config: TrainConfig) -> None:
    prepare(config).assembly.applied.undo()
    for file in cache_directory("embeddings").glob("*.safetensors"):
        row = load_file(file)["embedding"]
        row[0, 0] = float("nan")
        save_file({"embedding": row}, file)


def same_prompts(config: TrainConfig) -> None:
    config.data.prompts.write_text("prompt,safe\na red circle,a red circle\n")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: what is done, and what must be named."""

    name: str
    code: str
    block: int | None = None
    inject: Inject | None = None
    damage: Callable[[TrainConfig], None] | None = None
    pipeline: str = "2b"
    settings: dict[str, Any] = field(default_factory=dict)
    at: tuple[int, ...] = (0,)
    """Before which steps it may strike."""


def run_fault(fault: Fault, at: int, pipeline: Path) -> Outcome:
    """Train with one fault on a pipeline that it may damage, in a cache of its own."""
    config = settings(pipeline, **fault.settings)
    with patch.dict(os.environ, XDG_CACHE_HOME=str(pipeline / "cache")):
        if fault.damage:
            fault.damage(config)
        return watch(config, inject=fault.inject, at=at, num_steps=at + 2)


HALF = dict(memory__dtype="float16", model__force_dtype=True)
DELTA = dict(loss__alpha=0.0, loss__beta=0.0)


def _each(name: str, code: str, make: Callable[[int], Inject], blocks: Iterable[int] = range(NUM_BLOCKS),
          **more: Any) -> Iterator[Fault]:
    return (Fault(name=f"{name}, block {k}", code=code, block=k, inject=make(k), **more) for k in blocks)


FAULTS: tuple[Fault, ...] = (
    *_each("to_empty() on wrapped attention", "wiped-attention", wipe_attention),
    *_each("feed-forward never loaded", "wiped-weights", wipe_feed_forward),
    Fault(name="positions wiped", code="wiped-weights", inject=wipe_positions),
    Fault(name="fp16 adapters under Adam", code="half-precision-adapters", block=0, inject=half_adapters),
    *_each("fp16 on a bf16-native model", "non-native-dtype", overflow, pipeline="bf16", settings=HALF, at=(0, 2)),
    *_each("overflow of an fp16-native model", "half-precision-overflow", overflow, pipeline="fp16", at=(0, 2)),
    *_each("outlier of an fp16-native model", "near-overflow", outlier, pipeline="fp16"),
    Fault(name="learning rate x 1000 (1e-4)", code="learning-rate-too-high", settings={"optim__lr": 0.1}),
    Fault(name="learning rate x 1000 (1e-3)", code="learning-rate-too-high", settings={"optim__lr": 1.0}),
    Fault(name="eta absurd", code="eta-too-large", settings={"loss__eta": 5000.0}),
    Fault(name="eta beyond float32", code="non-finite-target", settings={"loss__eta": 3e38}),
    Fault(name="adapters left out of the optimizer", code="not-in-optimizer", block=0, inject=left_out(0, 1, 2)),
    *_each("one adapter left out of the optimizer", "not-in-optimizer", left_out),
    *_each("adapter detached", "detached-eraser", detach, at=(0, 2)),
    Fault(name="all adapters detached", code="detached-eraser", block=0, inject=detach_all, at=(0, 2)),
    Fault(name="prediction detached", code="detached-eraser", block=0, inject=detach_prediction, at=(0, 2)),
    Fault(name="student under no_grad", code="no-grad-student", inject=student_under_no_grad, at=(0, 2)),
    Fault(name="loop under inference_mode", code="no-grad-student", inject=loop_under_inference_mode, at=(0, 2)),
    *_each("parameters replaced by an offload hook", "replaced-parameters", replace_parameters, at=(0, 2)),
    Fault(name="switched off before recompute", code="switched-before-recompute", block=2, inject=switch_before_recompute),
    Fault(name="student with erasers off", code="student-without-erasers", block=0, inject=never_switched(False), at=(0, 2)),
    Fault(name="teacher with erasers on", code="teacher-with-erasers", block=0, inject=never_switched(True)),
    Fault(name="reentrant checkpointing", code="reentrant-checkpointing", block=0, inject=reentrant,
          settings={"memory__checkpoint": "none"}),
    *_each("checkpointing silently off", "checkpointing-off", checkpointing_off),
    Fault(name="trajectory not advanced", code="trajectory-not-advanced", inject=stuck_trajectory),
    Fault(name="sampler gives infinity", code="non-finite-latents", inject=diverging_sampler, at=(2,)),
    Fault(name="NaN in the embedding cache", code="non-finite-embedding", damage=damaged_cache),
    Fault(name="NaN in the embeddings", code="non-finite-embedding", inject=nan_in_embedding, at=(0, 2)),
    Fault(name="NaN in one weight file", code="non-finite-weight", block=1, damage=damaged_weight_file),
    *_each("NaN in one weight", "non-finite-weight", nan_in_weight, at=(0, 2)),
    *_each("NaN in one gradient", "non-finite-gradient", nan_in_gradient, at=(0, 2)),
    *_each("NaN in one gradient, fp16 with a scaler", "non-finite-gradient", nan_in_gradient, pipeline="fp16"),
    *_each("infinite flow back out of attention", "non-finite-gradient", infinite_flow, (1, 2), at=(0, 2)),  # beyond block 0 there is no eraser
    *_each("NaN in the student alone", "non-finite-activation", nan_in_student, at=(0, 2)),
    *_each("loss swallowed to 0", "swallowed-loss", swallow, at=(0, 2)),
    *_each("dead GELU", "dead-gelu", dead_gelu, at=(0, 2)),
    Fault(name="gradients underflow in fp16", code="gradient-underflow", inject=underflow, pipeline="fp16", settings=DELTA),
    Fault(name="gradients underflow in an autocast to fp16", code="gradient-underflow", inject=underflow_in_autocast, settings=DELTA),
    Fault(name="gradients overflow at any loss scale", code="loss-scale-collapse", inject=infinite_flow(1), pipeline="fp16"),
    *_each("eraser diverged", "eraser-diverged", run_away, at=(2,)),
    *_each("eraser diverged, all finite", "eraser-diverged", partial(run_away, weight=1e4), at=(2,)),
    Fault(name="optimizer step skipped", code="weights-never-move", inject=no_optimizer_step, at=(0, 2)),
    Fault(name="gradients never zeroed", code="gradients-not-zeroed", inject=no_zero_grad, at=(0, 2)),
    *_each("untrained eraser acts", "untrained-eraser-acts", always_acts),
    Fault(name="eraser without effect", code="no-op-adapter", inject=never_acts),
    *_each("gate of 0 after the eraser", "zero-gradient", closed_gate, at=(0, 2)),
    *_each("frozen eraser", "frozen-eraser", freeze, at=(0, 2)),
    Fault(name="all erasers frozen", code="frozen-eraser", block=0, inject=freeze_all, at=(0, 2)),
    Fault(name="prompt and safe prompt the same", code="nothing-to-learn", damage=same_prompts,
          settings={"loss__beta": 0.0}),
)
