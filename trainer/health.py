"""Watch a run at no cost: norms are reduced on the device, fused, and read one step late, so that no step waits.

A step whose loss, predictions or gradients are not finite is never applied. Fused AdamW takes that decision on the
device; the host learns of it one step later, before anything else is applied, and stops.
Under float16 with a loss scaler an infinite gradient alone only means that the scale was too high.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from memory.optimizers import update_norms
from memory.streams import pinning
from trainer.distributed import average, everyones, largest, num_ranks, rank
from trainer.erasers import in_backward
from trainer.findings import Bill, Finding, blocks_text, earlier_findings, finding, keep_findings
from trainer.inspection import Fingerprint, Subject, adapter_findings, adapter_name
from trainer.preflight import Preflight
from trainer.records import Judge, Pending, non_finite
from trainer.run_files import FINDINGS, read_object
from trainer.tracing import scale_collapsed, trace

logger = logging.getLogger(__name__)

MAX_SKIPS = 20  # in a row; a loss scale that starts at 65536 is below 1 after 17


class Health:
    """The watcher of one run. As a context manager it holds the hooks that measure activations."""

    def __init__(self, subject: Subject, *, run_dir: Path | None = None, resumed: bool = False):
        """`resumed`: what an earlier half of the run found stays in its findings.json."""
        self.earlier = earlier_findings(read_object(run_dir / FINDINGS)) if resumed else []
        self.subject, self.run_dir = subject, run_dir if rank() == 0 else None
        self.sinks: Sequence[Callable[[dict[str, Any]], None]] = ()
        """Called with the record of every step, one step late."""
        self.erasers, self.bill = subject.assembly.erasers, Bill()
        device = subject.assembly.device
        self._zero = torch.zeros((), device=device)
        self._forget_step()
        self._pending: Pending | None = None
        self._last_pass: tuple[bool, bool] | None = None  # that was not the teacher's: (with erasers, with gradients)
        self._host: Tensor | None = None  # pinned, where the device copies to
        self.judge, self._handles, self._fingerprint, self._skips = Judge(), [], None, 0

    def __enter__(self) -> "Health":
        assembly = self.subject.assembly
        self._handles = [assembly.transformer.register_forward_hook(self._measure_prediction)]
        for index, (block, adapter) in enumerate(zip(assembly.blocks, self.erasers.adapters)):
            self._handles.append(block.register_forward_pre_hook(self._measure_residual(index), with_kwargs=True))
            self._handles.append(adapter.register_forward_hook(self._measure_eraser(index)))
        last = self.erasers.parameters()[-1]  # backward meets it first
        if last.requires_grad:
            self._handles.append(last.register_hook(lambda gradient: self._measure_left(last.grad)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Raises Unhealthy where the erasers are not what was trained so far, or a backward() found nothing to learn, of which torch says no
        more than that."""
        for handle in self._handles:
            handle.remove()
        if isinstance(error, RuntimeError) and (found := list(adapter_findings(self.subject)) or self._unlearnt(str(error))):
            self._conclude(found, "backward() (no weight was changed)")

    def before_training(self) -> None:
        """The pre-flight. Erasers and optimizer must be fresh: call it before a checkpoint is restored.

        Raises Unhealthy for a fatal finding; says the others.
        """
        preflight = Preflight(self.subject)
        own = preflight.run()
        self.bill = Bill(checked=own.checked).with_findings(f for bill in everyones(own) for f in bill.findings)
        self._fingerprint = preflight.fingerprint
        self._forget_step()
        self._write()
        self.bill.raise_if_fatal("before the first step")
        for found in self.bill.findings:
            if found.severity == "warning":
                logger.warning("%s", found)

    def findings(self) -> list[dict[str, Any]]:
        """What was found so far, as plain values."""
        return self.bill.as_json()["findings"]

    def reduce(self, terms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add up the gradients of all processes, average `terms`, and join the norms of activations: once a step, before unscaling.

        After it every process has the same numbers, and so takes the same decision about the step. Gradients are added, of losses
        that were divided by the number of processes: in float16 they are then as large on their way as in one process.
        """
        if num_ranks() == 1:
            return terms
        squares = torch.stack([self._teacher, self._student, *self._eraser, *self._residual]).square() * num_ranks()
        means = [term.clone() for term in terms.values()]
        # Where one is missing here, something as large takes part in the sum; `apply` then refuses the step everywhere.
        gradients = [torch.full_like(p, math.nan) if p.grad is None else p.grad for p in self.erasers.parameters()]
        average([*gradients, *means, squares])
        torch._foreach_mul_(gradients, num_ranks())
        self._teacher, self._student, *norms = squares.sqrt()
        self._eraser, self._residual = norms[:len(self._eraser)], norms[len(self._eraser):]
        return dict(zip(terms, means))

    def apply(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Measure, clip and apply the gradients of `step`, unscaled; a step that is not finite changes no weight.

        `terms`: detached scalars, L as "loss".
        Raises Unhealthy if the step before was not sound; this one is then not applied either.
        """
        self.flush()
        self._check_parameters(step)
        parameters = self.erasers.parameters()
        gradients = torch._foreach_norm([p.grad for p in parameters])
        total = torch.linalg.vector_norm(torch.stack(gradients))
        head = torch.stack([*terms.values(), total, self._teacher, self._student])
        if self.subject.config.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.subject.config.optim.clip, total)
        updates, weights = update_norms(parameters, lambda: self._step_optimizer(~torch.isfinite(head).all()))
        scale = self.subject.scaler.scale(torch.ones_like(self._zero))
        left = self._zero if self._left is None else self._left
        packed = torch.cat([head, torch.stack([scale, left, *gradients, *updates, *weights, *self._eraser, *self._residual])])
        more = {"lr": self.subject.param_groups[0]["lr"]}
        self._pending = Pending(step, list(terms), self._copy(packed), more)
        self._forget_step()

    def add(self, **more: Any) -> None:
        """What goes into the record of the step just applied as it is."""
        self._pending.more.update(more)

    def flush(self) -> None:
        """Read what is still unread, hand it to the sinks, and judge it. Raises Unhealthy.

        Called before anything that depends on the last step being sound, such as saving.
        """
        if self._pending is None:
            return
        record, applied = self._pending.read(len(self.erasers.adapters))
        self._pending = None
        sound = applied and all(map(math.isfinite, record["blocks"]["weight"]))
        if self.subject.scaler.is_enabled():
            self._skips = 0 if applied else self._skips + 1
            sound = sound or self._may_skip(record)
            record["skipped"] = not applied
        else:
            del record["loss_scale"]
        for sink in self.sinks:
            sink(record)
        before, found = self.bill, self.judge.see(record) if sound else [self._locate(record)]
        self.bill = before.with_findings(map(self.subject.fitted, found))
        where = f"step {record['step'] + 1}"
        new = [f for f in self.bill.findings if f not in before.findings]
        warned: dict[str, list[Finding]] = {}
        for f in new:
            if f.severity != "fatal":  # such a one is raised, and said where the run ends
                warned.setdefault(f.code, []).append(f)
        for first, *others in warned.values():
            logger.warning("%s: %s%s", where, first, f"; likewise in {blocks_text([f.block for f in others])}" if others else "")
        if new:
            self._write()
        self.bill.raise_if_fatal(where + ("" if applied else " (no weight was changed)"))

    def frozen(self) -> str | None:
        """Identifies the frozen weights that the pre-flight saw."""
        return self._fingerprint and self._fingerprint.digest()

    def after_training(self) -> None:
        """Are the frozen weights still, to the bit, what they were? Raises Unhealthy if not."""
        self.flush()
        if self._fingerprint is None:
            return
        changed = sum(everyones(self._fingerprint.changed(Fingerprint(self.subject))), [])
        self._conclude([finding("frozen-weights-changed", "weights", module=changed[0], num_parameters=len(changed))] if changed else [],
                       "after training")

    def _conclude(self, found: Iterable[Finding], where: str) -> None:
        """Write the bill with `found`. Raises Unhealthy if any of it is fatal."""
        self.bill = self.bill.with_findings(found)
        self._write()
        self.bill.raise_if_fatal(where)

    def _check_parameters(self, step: int) -> None:
        """What the host knows without the device: who owns which parameter, and whether a gradient came at all."""
        found = list(adapter_findings(self.subject))
        without = [name for name, p in self.erasers.named_parameters() if p.grad is None]
        if without and not found:
            found = [finding("detached-eraser", "backward", block=int(without[0].split(".")[0]), step=step + 1,
                             module=adapter_name(without[0]), num_parameters=len(without))]
        if largest(len(found)):  # of any process: all end
            found = next(filter(None, everyones(found)))
            self._conclude(found, f"step {step + 1} (no weight was changed)")

    def _unlearnt(self, error: str) -> Sequence[Finding]:
        """Why nothing in a loss requires a gradient, if that is the error."""
        if "does not require grad" not in error or self._last_pass is None:
            return []
        code, phase, block = {(True, True): ("detached-eraser", "backward", 0), (True, False): ("no-grad-student", "student", None),
                              (False, True): ("student-without-erasers", "student", 0)}[self._last_pass]
        return [finding(code, phase, block=block, num_blocks=len(self.erasers.adapters), error=error)]

    def _may_skip(self, record: dict[str, Any]) -> bool:
        """Whether only the loss scale was too high, and not too often."""
        predictions = record["prediction_norms"].values()
        return (all(map(math.isfinite, [record["loss"], *predictions, *record["blocks"]["weight"]]))
                and self._skips < MAX_SKIPS and record["loss_scale"] >= 1)

    def _locate(self, record: dict[str, Any]) -> Finding:
        """The second pass: where does it begin?"""
        data, optim, scale = self.subject.config.data, self.subject.config.optim, record.get("loss_scale", 1.0)
        found, share = None, scale / optim.accumulation / num_ranks()  # as in the step
        for k in range(optim.accumulation):
            index = record["step"] * optim.accumulation + k
            if found is None:
                own = trace(self.subject, index % data.pool if data.pool else index, scale=share, loss=record["loss"])
                found = next(filter(None, everyones(own)), None)
        if self._skips and (found is None or scale_collapsed(found)):
            return finding("loss-scale-collapse", "backward", loss_scale=scale, num_skipped_steps=self._skips)
        if found is None:  # what happened does not happen again: say what was measured
            found = non_finite(record, second_pass="finite")
        run_away = next((f for f in self.bill.findings if f.code == "eraser-diverged"), None)
        if run_away and found.phase != "teacher" and found.code in ("non-finite-gradient", "non-finite-loss", "non-finite-activation"):
            return finding(run_away.code, found.phase, block=run_away.block, **run_away.evidence, ended_in=found.code, at=found.module)
        if found.phase != "training" and record["unlearn"] == 0:
            return finding("swallowed-loss", found.phase, block=found.block, module=found.module, unlearn=0.0,
                           behind_it=found.code)
        return found

    def _step_optimizer(self, bad: Tensor) -> None:
        for optimizer in self.subject.optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):  # fused: the kernel looks at found_inf itself
                optimizer.grad_scale, optimizer.found_inf = None, bad.float()
                try:
                    optimizer.step()
                finally:
                    del optimizer.grad_scale, optimizer.found_inf
            elif not bad:  # 8-bit optimizers know no such flag: this waits for the device
                optimizer.step()

    def _copy(self, packed: Tensor) -> tuple[Tensor, Any]:
        """The values on the way to the host, and the event that says that they are there."""
        if packed.device.type != "cuda":
            return packed, None
        if self._host is None:
            with pinning():
                self._host = torch.empty(packed.shape, pin_memory=True)
        self._host.copy_(packed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return self._host, event

    def _forget_step(self) -> None:
        self._teacher = self._student = self._zero
        self._left: Tensor | None = None
        self._eraser, self._residual = ([self._zero] * len(self.erasers.adapters) for _ in range(2))

    def _measure_prediction(self, module: nn.Module, args: tuple, output: tuple[Tensor]) -> None:
        enabled, graph = self.erasers.enabled, torch.is_grad_enabled()
        if enabled or graph:
            self._last_pass = enabled, graph
        if graph or not enabled:  # neither: sampling
            norm = _norm(output[0])
            if enabled:
                self._student = self._student + norm
            else:
                self._teacher = self._teacher + norm

    def _is_due(self, norm: Tensor) -> bool:
        """Whether a block's norm is to be measured now: in the step's first student pass, and not where that is recomputed."""
        return norm is self._zero and torch.is_grad_enabled() and not in_backward()

    def _measure_residual(self, index: int):
        def measure(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self._is_due(self._residual[index]):
                self._residual[index] = _norm(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

        return measure

    def _measure_eraser(self, index: int):
        def measure(adapter: nn.Module, args: tuple, output: Tensor) -> None:
            if self._is_due(self._eraser[index]):
                self._eraser[index] = _norm(output)

        return measure

    def _measure_left(self, gradient: Tensor | None) -> None:
        """What an earlier step left where the step's first gradient is about to be added."""
        if self._left is None:
            self._left = self._zero if gradient is None else _norm(gradient)

    def _write(self) -> None:
        if self.run_dir is not None:
            keep_findings(self.run_dir, self.bill.with_findings(self.earlier))


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)
