"""The second pass, on trouble only: run a pass again with a hook on every module and name the first non-finite tensor.

Every check waits for the device; nothing here runs in a healthy step. The pass always goes on to its end: of several
processes some may see nothing, and those that hold sharded weights need each other.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainer.erasers import in_backward
from trainer.findings import Finding, finding
from trainer.inspection import Subject, adapter_name, block_of, non_finite_embedding, non_finite_weight
from trainer.losses import student_backward

LARGE = 1e6  # no sound activation of a transformer is near this


class _First:
    """The first non-finite tensor that was met."""

    def __init__(self):
        self.found: Finding | None = None

    def bad(self, tensor: Tensor) -> bool:
        """Whether this is it. The caller then says what it found."""
        # Detached: what is looked at must not leave tensors for backward, of which a recomputation would then have fewer.
        return self.found is None and not bool(torch.isfinite(tensor.detach()).all())


def trace(subject: Subject, index: int, *, scale: float = 1.0, loss: float = 0.0) -> Finding | None:
    """Run student pass `index` again, its teacher included; None if everything in it is finite.

    The trajectory is walked again from its start, so nothing had to be kept for this. `scale` multiplies the loss.
    `loss` is what was measured, over all passes of the step: if it was not finite, that comes before any gradient.
    """
    known = non_finite_weight(subject) or non_finite_embedding(subject)
    if known:
        return known
    erasers, first = subject.assembly.erasers, _First()
    erasers.zero_grad()
    try:
        with subject.assembly.applied.hooked(), _hooked(subject, first):
            teacher = subject.teacher_copy()
            for i in range(teacher.latents.first_needed(index), index + 1):
                sample = teacher.sample(i)
            for name in ("target", "preserved_target"):
                _check_target(first, getattr(sample, name), name)
            terms = student_backward(subject.assembly.predict, erasers, sample, subject.config.loss, scale=scale)
        if first.found is not None and (first.found.phase != "backward" or math.isfinite(loss)):
            return first.found
        return (_bad_gradient(subject) if math.isfinite(loss) else None) or _bad_term(terms)
    finally:
        erasers.zero_grad()


def scale_collapsed(found: Finding) -> bool:
    """Whether it is an overflow on the way back through a float16 model, as against a NaN of another origin."""
    return found.code == "non-finite-gradient" and found.evidence.get("dtype") == "torch.float16"


def _check_target(first: _First, target: Tensor | None, name: str) -> None:
    if target is not None and first.bad(target.square().mean()):  # as the loss takes it
        first.found = finding("non-finite-target", "teacher", module=name, largest=target.abs().max().item())


def _bad_gradient(subject: Subject) -> Finding | None:
    """The first parameter, in the order of backward, whose gradient is not finite."""
    bad = [name for name, p in subject.assembly.erasers.named_parameters()
           if p.grad is not None and not torch.isfinite(p.grad).all()]
    if not bad:
        return None
    last = max(bad, key=lambda name: int(name.split(".")[0]))
    return finding("non-finite-gradient", "backward", block=int(last.split(".")[0]), module=adapter_name(last),
                   num_parameters=len(bad))


def _bad_term(terms: dict[str, Tensor]) -> Finding | None:
    bad = [name for name, value in terms.items() if not torch.isfinite(value)]
    return finding("non-finite-loss", "student", module=bad[0], **{bad[0]: terms[bad[0]].item()}) if bad else None


@contextmanager
def _hooked(subject: Subject, first: _First) -> Iterator[None]:
    """Within: `first` learns of a non-finite tensor that goes into the transformer or comes out of any module."""
    transformer = subject.assembly.transformer
    handles = [transformer.register_forward_pre_hook(_check_inputs(first), with_kwargs=True)]
    for name, module in transformer.named_modules():
        handles.append(module.register_forward_hook(_check_outputs(subject, first, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_inputs(first: _First):
    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for name, code in (("hidden_states", "non-finite-latents"), ("encoder_hidden_states", "non-finite-embedding")):
            tensor = kwargs[name]
            if first.bad(tensor):
                first.found = finding(code, "latents" if code == "non-finite-latents" else "embeddings", module=name,
                                      num_non_finite=int((~torch.isfinite(tensor)).sum()), num_elements=tensor.numel())

    return check


def _check_outputs(subject: Subject, first: _First, name: str):
    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        phase = "recompute" if in_backward() else "student" if subject.assembly.erasers.enabled else "teacher"
        for tensor in tree_leaves(output):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if first.bad(tensor):
                with torch.no_grad():
                    first.found = _explain(subject, name, phase, tensor, _largest((args, kwargs)))
            if tensor.requires_grad and phase != "recompute":
                tensor.register_hook(_check_gradient(first, name, tensor.dtype))

    return check


def _check_gradient(first: _First, name: str, dtype: torch.dtype):
    def check(gradient: Tensor) -> None:
        if first.bad(gradient):
            first.found = finding("non-finite-gradient", "backward", block=block_of(name), module=name, dtype=str(dtype),
                                  **_range(gradient))

    return check


def _explain(subject: Subject, name: str, phase: str, output: Tensor, largest_input: float) -> Finding:
    """The rule behind a non-finite output whose inputs are finite."""
    half = output.dtype == torch.float16
    acting = any(a.up.weight.any() or a.up.bias.any() for a in subject.assembly.erasers.adapters)
    if phase != "teacher" and acting and (half or largest_input > LARGE or ".attn1.adapter" in name):
        code = "eraser-diverged"
    elif half:
        code = "non-native-dtype" if subject.native_dtype == torch.bfloat16 else "half-precision-overflow"
    else:
        code = "non-finite-activation"
    return finding(code, phase, block=block_of(name), module=name, dtype=str(output.dtype),
                   largest_input=largest_input, **_range(output))


def _range(tensor: Tensor) -> dict[str, Any]:
    finite = tensor[torch.isfinite(tensor)]
    low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (float("nan"), float("nan"))
    return {"num_nan": int(torch.isnan(tensor).sum()), "num_infinite": int(torch.isinf(tensor).sum()),
            "num_elements": tensor.numel(), "finite_minimum": low, "finite_maximum": high}


def _largest(inputs: Any) -> float:
    """Largest finite magnitude among tensors."""
    sizes = [t[torch.isfinite(t)].abs().max().item() for t in tree_leaves(inputs)
             if isinstance(t, Tensor) and t.is_floating_point() and torch.isfinite(t).any()]
    return max(sizes, default=0.0)
