"""What goes wrong in a training step when these are called with it: an injection takes the subject and a stack that undoes it, and may
return another subject. `block` is where a fault sits.
"""

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.watched import NUM_BLOCKS, Inject
from trainer import losses
from trainer.diffusion import Sampler
from trainer.erasers import Erasers
from trainer.inspection import Subject


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
