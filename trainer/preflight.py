"""One step before training, with everything looked at that never shows in a loss. It leaves no trace in the run.

Checks run in the order of cause and effect and stop at the first stage that finds something fatal: what comes later
would only repeat it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memory.optimizers import reset_state
from trainer.findings import Bill, Finding, finding
from trainer.inspection import (Fingerprint, Subject, adapter_findings, adapter_name, block_of, held, non_finite_embedding, non_finite_weight,
                                own_parameters, values)
from trainer.losses import student_backward
from trainer.preflight_hooks import Watch
from trainer.tracing import scale_collapsed, trace

TRIAL_LR = 1e-2  # large enough that a step shows in a 16-bit output
ROUNDING = 1e-12  # of the target's mean square: what float32 leaves of a difference that is none
LARGEST_LR_SHARE = 0.5  # of the weights' root mean square
LARGEST_HALF = 65504 / 8  # of activations in float16, which what follows multiplies
LARGEST_PUSH, LARGEST_ETA = 30.0, 50.0  # ‖target - v‖ / ‖v‖; published η are 5 and 7

CHECKED = (
    "frozen weights: finite, none constant or zero; checksum kept",
    "text embeddings: finite",
    "erasers: float32, trainable, the very objects that the optimizer holds",
    "attention output: differs from token to token in every block",
    "erasers: off in the teacher, on in the student and at recompute",
    "checkpointed blocks: recomputed in backward",
    "latents: move along the trajectory",
    "output: without change before the first update, changed after it",
    "activations in float16: within an eighth of its range",
    "loss terms, predictions, gradients: finite, not zero",
    "target and learning rate: of a size that can be learned",
)


class Preflight:
    """Runs the step and judges it; `run()` gives the bill. For fresh erasers, before a checkpoint is restored."""

    def __init__(self, subject: Subject):
        self.subject, self.erasers = subject, subject.assembly.erasers
        self.predict = subject.assembly.predict
        self.fingerprint: Fingerprint | None = None
        self.terms: dict[str, float] = {}
        self.failure: RuntimeError | None = None

    def run(self) -> Bill:
        """The bill of health. The run's erasers, optimizer, scaler and latents are as before."""
        bill = Bill()
        weights = self.erasers.state_dict()
        try:
            for stage in (self._still, self._step, self._plumbing, self._numbers, self._gradients, self._trial):
                bill = bill.with_findings(map(self.subject.fitted, stage()))
                if bill.fatal:
                    return bill
        finally:
            self.erasers.load_state_dict(weights)
            self.erasers.zero_grad()
        return Bill(findings=bill.findings, checked=CHECKED)

    def _still(self) -> Iterator[Finding]:
        """What can be seen without running anything."""
        self.fingerprint = Fingerprint(self.subject)
        damaged = None if self.fingerprint.finite else non_finite_weight(self.subject)
        damaged = damaged or non_finite_embedding(self.subject)
        if damaged:
            yield damaged
        yield from self.fingerprint.findings()
        bounds = values([bound for a in self.erasers.adapters for bound in torch.aminmax(a.down.weight.detach())])
        wiped = [i for i, (low, high) in enumerate(zip(bounds[::2], bounds[1::2])) if low == high]  # `up` begins at zero, `down` does not
        if wiped:
            yield finding("wiped-weights", "adapters", block=wiped[0], module=adapter_name(f"{wiped[0]}.down.weight"),
                          num_blocks=len(wiped), value=bounds[2 * wiped[0]])
        yield from adapter_findings(self.subject)
        owned = held(self.subject)  # the trial's step would move what is frozen, too, and nothing takes that back
        if unfrozen := [n for n, p in own_parameters(self.subject.assembly.transformer).items() if p.requires_grad and id(p) in owned]:
            yield finding("frozen-weights-changed", "optimizer", block=block_of(unfrozen[0]), module=unfrozen[0], num_parameters=len(unfrozen))

    def _step(self) -> Iterator[Finding]:
        """Run teacher and student once."""
        watch = self.watch = Watch(self.subject)
        teacher = self.subject.teacher_copy(of_rank=0)  # the same in every process
        with watch.hooked():
            watch.phase = "teacher"
            self.sample = teacher.sample(0)
            later = teacher.latents.at(1)[0] if teacher.latents.prompt_index(1) == 0 else None
            self.stuck = later is not None and torch.equal(later, self.sample.latents)
            self.next_lost = 0 if later is None else int((~torch.isfinite(later)).sum())
            self.scale = self.subject.scaler.get_scale() if self.subject.scaler.is_enabled() else 1.0
            watch.phase = "student"
            while True:
                self.gradients = {}  # those of a larger scale go first
                self.gradients = self._backward(self.scale)
                lost = not math.isfinite(self.terms.get("loss", math.nan))
                if not self.subject.scaler.is_enabled() or lost or self.scale < 1 or _finite(self.gradients.values()):
                    break
                self.scale /= 2
            watch.phase = ""
        self.off, self.on = self._prediction(False), self._prediction(True)
        blind = [i for i, spread in watch.spread.items() if spread == 0]
        if blind:
            name = f"transformer_blocks.{blind[0]}.attn1"
            yield finding("wiped-attention", "teacher", block=blind[0], module=name, range_over_tokens=0.0,
                          num_blocks=len(blind))

    def _backward(self, scale: float) -> dict[str, Tensor | None]:
        """Gradients by name, unscaled; None where there are none. A failing step is kept for judgement."""
        self.erasers.zero_grad()
        try:
            terms = student_backward(self.predict, self.erasers, self.sample, self.subject.config.loss, scale=scale)
            self.terms = {name: value.item() for name, value in terms.items()}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            self.failure = e
        gradients = {}
        for name, parameter in self.erasers.named_parameters():  # held once, as in a step
            gradients[name], parameter.grad = None if parameter.grad is None else parameter.grad.div_(scale), None
        return gradients

    @torch.no_grad()
    def _prediction(self, on: bool) -> Tensor:
        with self.erasers.switched(on):
            return self.predict(self.sample.latents, self.sample.timestep, self.sample.text).float()

    def _plumbing(self) -> Iterator[Finding]:
        """Is what ran what was meant to run?"""
        watch, blocks = self.watch, range(len(self.erasers.adapters))
        yield from _first("teacher-with-erasers", "teacher", [i for i in blocks if watch.calls["teacher", i]])
        if watch.no_grad_blocks:
            yield finding("reentrant-checkpointing" if watch.grad_outside else "no-grad-student", "student",
                          block=watch.no_grad_blocks[0] if watch.grad_outside else None,
                          num_blocks=len(set(watch.no_grad_blocks)))
            return
        # Of a student without any eraser all is frozen. Attention may not even have been seen: erasers that were taken out, or sit in another model.
        unlearnt = "does not require grad" in str(self.failure)
        without = [i for i in blocks if not watch.calls["student", i] and (watch.returned["student", i] or not self.failure or unlearnt)]
        if without:
            yield from _first("student-without-erasers", "student", without, enabled=watch.switch.get(("student", 0)))
            return
        turned = [i for i in blocks if ("recompute", i) in watch.switch
                  and watch.switch["recompute", i] != watch.switch["student", i]]
        yield from _first("switched-before-recompute", "recompute", turned[::-1])  # backward meets the last one first
        owned = held(self.subject)
        yield from _first("replaced-parameters", "optimizer",
                          [i for i in watch.used if not owned.issuperset(watch.used[i])])
        cut = watch.detached
        if not cut and (not self.failure or unlearnt):
            cut = sorted({int(name.split(".")[0]) for name, gradient in self.gradients.items() if gradient is None})
        yield from _first("detached-eraser", "backward", cut)
        applied = self.subject.assembly.applied
        yield from _first("checkpointing-off", "recompute", [
            i for i, keep in enumerate(applied.keeps)
            if keep != "everything" and not watch.attention_calls["recompute", i] and not self.failure])
        if self.stuck:
            yield finding("trajectory-not-advanced", "latents", std=self.sample.latents.std().item(), change=0.0)

    def _numbers(self) -> Iterator[Finding]:
        """Are predictions, loss and gradients finite and what they should be?"""
        if self.failure:  # that no check could explain
            raise self.failure
        sample, loss = self.sample, self.terms["loss"]
        own = (self.on - sample.target).square().mean().item()
        finite = _finite([self.off, self.on, sample.target, torch.tensor(list(self.terms.values()))])
        acting = [i for i, size in self.watch.output.items() if size > 0]
        if self.terms["unlearn"] == 0 and own != 0:
            cause = trace(self.subject, 0)
            yield finding("swallowed-loss", "student", block=cause and cause.block, module=cause and cause.module,
                          unlearn=0.0, own_computation=own, behind_it=cause and cause.code)
        elif not finite or not _finite(self.gradients.values()):
            found = trace(self.subject, 0, scale=self.scale, loss=loss)
            if self.scale < 1 and (found is None or scale_collapsed(found)):
                yield from self._far_target()  # no other dtype would make it a sound one
                found = finding("loss-scale-collapse", "backward", loss=loss, loss_scale=self.scale)
            yield found or finding("non-finite-loss", "student", loss=loss, second_pass="finite")
        elif self.next_lost:  # of predictions that are finite
            yield finding("non-finite-latents", "latents", timesteps=self.subject.config.data.trajectory_steps, num_non_finite=self.next_lost)
        elif own <= ROUNDING * sample.target.float().square().mean().item():
            yield finding("nothing-to-learn", "teacher", loss=loss, eta=self.subject.config.loss.eta)
        elif not torch.equal(self.on, self.off):
            yield from _first("untrained-eraser-acts", "student", acting or [None],
                              difference=(self.on - self.off).abs().max().item())
        if large := [(i, size) for i, tensor in self.watch.residual if LARGEST_HALF < (size := tensor.item()) < math.inf]:
            yield finding("near-overflow", "teacher", block=min(large)[0], largest=max(size for _, size in large))

    def _gradients(self) -> Iterator[Finding]:
        """Do gradients reach every eraser?"""
        norms = dict(zip(self.gradients, values([g.norm() for g in self.gradients.values()])))
        blocks = range(len(self.erasers.adapters))
        dead = [i for i in blocks if norms[f"{i}.up.weight"] == 0 < norms[f"{i}.up.bias"]]
        yield from _first("dead-gelu", "student", [i for i in dead if self.watch.alive[i] < 1e-6],
                          largest_unit=self.watch.alive[dead[0]].item() if dead else 0.0)
        zero = [i for i in blocks if norms[f"{i}.up.bias"] == 0 == norms[f"{i}.up.weight"]]
        learning = not torch.equal(self.on, self.sample.target)
        if self.watch.half and learning and (zero or not self.subject.scaler.is_enabled()):
            found = self._underflow(zero)
            if found:
                yield found
                return
        if learning:
            yield from _first("zero-gradient", "backward", zero, of_blocks=len(blocks))
        if not zero and all(norms[f"{i}.down.weight"] == 0 for i in blocks):
            yield finding("zero-down-gradient", "backward", up_gradient_norm=norms["0.up.weight"],
                          down_gradient_norm=0.0)

    def _underflow(self, zero: list[int]) -> Finding | None:
        """An experiment: does a larger loss scale bring gradients back?"""
        before = best = _norm(self.gradients.values())
        factor = 1.0
        for exponent in (10, 20, 30):
            norm = _norm(self._backward(self.scale * 2.0 ** exponent).values())
            if math.isfinite(norm) and norm > best:
                best, factor = norm, 2.0 ** exponent
        if before >= best / 2:
            return None
        some = 0 < len(zero) < len(self.erasers.adapters)
        return finding("gradient-underflow", "backward", block=zero[-1] if some else None, loss_scale=self.scale, gradient_norm=before,
                       larger_by=factor, gradient_norm_then=best)

    def _far_target(self) -> Iterator[Finding]:
        push, eta = ((self.sample.target - self.off).norm() / self.off.norm()).item(), self.subject.config.loss.eta
        if push > LARGEST_PUSH or eta > LARGEST_ETA:
            yield finding("eta-too-large", "teacher", eta=eta, target_away_from_prediction=push)

    def _trial(self) -> Iterator[Finding]:
        """One optimizer step, taken back afterwards: do weights move, and does the output follow?"""
        config, optimizers, groups = self.subject.config, self.subject.optimizers, self.subject.param_groups
        yield from self._far_target()
        size = torch.stack([a.down.weight.detach().square().mean() for a in self.erasers.adapters]).mean().sqrt().item()
        if config.optim.lr > LARGEST_LR_SHARE * size:
            yield finding("learning-rate-too-high", "optimizer", lr=config.optim.lr, weights_root_mean_square=size)
        before = [p.detach().clone() for p in self.erasers.parameters()]
        rates, stateless = [group["lr"] for group in groups], [not optimizer.state for optimizer in optimizers]
        try:
            for parameter, gradient in zip(self.erasers.parameters(), self.gradients.values()):
                parameter.grad = gradient
            for group in groups:
                group["lr"] = TRIAL_LR
            for optimizer in optimizers:
                optimizer.step()
            moved = any(not torch.equal(p, b) for p, b in zip(self.erasers.parameters(), before))
            changed = (self._prediction(True) - self.off).abs().max().item()
        finally:
            for optimizer, fresh in zip(optimizers, stateless):
                if fresh:  # other optimizers than ours, whose state may begin with other values than zero, make it in their first step
                    optimizer.state.clear()
                else:
                    reset_state(optimizer)
            for group, rate in zip(groups, rates):
                group["lr"] = rate
        gradient = max(values([g.abs().max() for g in self.gradients.values()]))
        if not moved and gradient > 0:
            yield finding("weights-never-move", "optimizer", largest_gradient=gradient, largest_update=0.0)
        elif moved and changed == 0:
            yield finding("no-op-adapter", "student", output_difference=0.0)


def _first(code: str, phase: str, blocks: Sequence[int | None], **evidence: Any) -> Iterator[Finding]:
    """One finding for all blocks concerned, at the first."""
    if blocks:
        module = None if blocks[0] is None else f"transformer_blocks.{blocks[0]}.attn1.adapter"
        yield finding(code, phase, block=blocks[0], module=module, num_blocks=len(blocks), **evidence)


def _norm(gradients: Iterable[Tensor | None]) -> float:
    return math.hypot(*values([g.norm() for g in gradients if g is not None]))


def _finite(tensors) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)
