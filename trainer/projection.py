"""Forgetting in a projection: a LoRA on the one linear layer after a frozen encoder, trained on precomputed inputs."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory.advice import flag_of
from memory.meter import Meter
from memory.optimizers import make_optimizer, require_usable
from trainer.assemble import chosen_device
from trainer.checkpoint import Checkpoint, Saver, latest_checkpoint
from trainer.clock import PhaseClock
from trainer.config_file import as_json
from trainer.errors import CheckpointError, Interrupted
from trainer.findings import Bill, Unhealthy, earlier_findings, keep_findings
from trainer.lock import RunLock
from trainer.lora import Lora, save_lora, save_merged
from trainer.metrics import MetricsLog
from trainer.monitor import Monitor, read_memory
from trainer.optimizer_state import export_optimizer, import_optimizer
from trainer.projection_config import WOULD_HELP, ForgetConfig
from trainer.projection_encoders import encoder_fingerprint
from trainer.projection_evaluate import evaluate_forgetting
from trainer.projection_health import conclude, examine, unsound
from trainer.projection_memory import keep_prediction, predict_step
from trainer.projection_problem import Case, Problem, make_problem, prepare
from trainer.run_directory import make_run_directory, read_content, require_none_due, require_place, resuming, write_config
from trainer.run_files import FINDINGS, read_object
from trainer.signals import StopFlag

logger = logging.getLogger(__name__)


class Run:
    """The moving parts of a run: layer after layer, attempt after attempt, step after step."""

    def __init__(self, problems: Mapping[str, Problem], config: ForgetConfig):
        self.problems, self.config = list(problems.values()), config
        self.step = self.layer = self.attempt = self.attempt_step = 0
        self.best_loss = math.inf
        self.done: dict[str, tuple[Tensor, Tensor]] = {}  # (A, B), the best of each finished layer
        self.attempts: list[dict[str, Any]] = []
        self._begin()

    @property
    def finished(self) -> bool:
        return self.layer == len(self.problems)

    @property
    def num_steps(self) -> int:
        """Steps in all, as far as is known: those of every attempt so far, and one attempt of each layer that is left."""
        return self.config.steps * (len(self.attempts) + len(self.problems) - self.layer)

    @property
    def lambda_forget(self) -> float:
        return self.config.lambda_forget + 0.05 * self.attempt

    def _begin(self) -> None:
        """A fresh LoRA for the current layer and attempt."""
        self.attempt_step, self.best_loss = 0, math.inf
        if self.finished:
            return
        self.problem = self.problems[self.layer]
        self.lora = Lora(self.problem.layer, rank=self.config.rank, alpha=self.config.alpha, seed=self.config.seed,
                         index=self.attempt)
        self.best = (self.lora.A.detach().clone(), self.lora.B.detach().clone())
        self.optimizer = make_optimizer(self.lora.parameters(), kind=self.config.memory.optimizer, lr=self.config.lr)

    def advance(self, phase: Callable[[str], object] = lambda name: None) -> dict[str, Any]:
        """One full-batch step; returns its record. Raises Unhealthy before anything that is not finite is applied.

        `phase(name)` is called where a phase begins.
        """
        phase("forward")
        terms = self.problem.terms(self.lora.update(), self.lambda_forget, self.config)
        phase("backward")
        terms["loss"].backward()
        phase("optimizer")
        gradients = torch.nn.utils.get_total_norm([p.grad for p in self.lora.parameters()])
        values = torch.stack([*(t.detach() for t in terms.values()), gradients]).tolist()
        record = {"step": self.step, **dict(zip([*terms, "gradient_norm"], values)), "lr": self.config.lr,
                  "layer": self.problem.layer.name, "attempt": self.attempt, "lambda_forget": self.lambda_forget}
        for code, value in (("non-finite-loss", values[0]), ("non-finite-gradient", values[-1])):
            if not math.isfinite(value):
                Bill(findings=(unsound(code, module=self.problem.layer.name, loss=values[0]),)).raise_if_fatal(
                    f"step {self.step + 1} (no weight was changed)")
        self._keep_if_best(record["loss"])  # the loss of the weights as they are now, before they move on
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.attempt_step = self.step + 1, self.attempt_step + 1
        if self.attempt_step == self.config.steps:
            self._judge()
        return record

    def _keep_if_best(self, loss: float) -> None:
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = (self.lora.A.detach().clone(), self.lora.B.detach().clone())

    def _judge(self) -> None:
        """Accept the attempt's best weights if the forgotten class came near enough to its target; else try again."""
        with torch.no_grad():
            self._keep_if_best(self.problem.terms(self.lora.update(), self.lambda_forget, self.config)["loss"].item())
        A, B = self.best
        before, after = self.problem.distance().item(), self.problem.distance(self.lora.scale * (B @ A)).item()
        fall = 1 - after / before if before > 0 else 0.0
        accepted = fall >= self.config.acceptance
        self.attempts.append({"layer": self.problem.layer.name, "lambda_forget": self.lambda_forget, "loss": self.best_loss,
                              "distance_before": before, "distance_after": after, "fall": fall, "accepted": accepted})
        if not accepted and self.attempt + 1 < self.config.max_attempts:
            self.attempt += 1
        else:
            if not accepted:
                logger.warning("%s: the distance to the target fell by %.0f %%, not by %.0f %%, in %d attempts; the last is kept. %s",
                               self.problem.layer.name, 100 * fall, 100 * self.config.acceptance, self.config.max_attempts, WOULD_HELP)
            self.done[self.problem.layer.name] = self.best
            self.layer, self.attempt = self.layer + 1, 0
        self._begin()

    def updates(self) -> dict[str, Tensor]:
        """The finished layers' updates (E, D), on the host."""
        return {name: (self.config.alpha / self.config.rank * (B @ A)).cpu() for name, (A, B) in self.done.items()}

    def export(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """(tensors by file, JSON state) for a checkpoint."""
        tensors = {"done": {f"{name}.{letter}": t for name, pair in self.done.items() for letter, t in zip("AB", pair)}}
        state = {key: getattr(self, key) for key in ("step", "layer", "attempt", "attempt_step", "attempts")}
        if not self.finished:
            moments, state["optimizer_state"] = export_optimizer(self.optimizer, dict(self.lora.named_parameters()))
            tensors |= {"adapter": dict(self.lora.state_dict()), "best": dict(zip("AB", self.best)), "optimizer": moments}
            state["best_loss"] = self.best_loss if self.attempt_step else None
        return tensors, state

    def restore(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Become what the checkpoint holds."""
        for key in ("step", "layer", "attempt"):
            setattr(self, key, checkpoint.state[key])
        self.attempts = list(checkpoint.state["attempts"])
        done = {name: t.to(device) for name, t in checkpoint.tensors("done").items()}
        self.done = {p.layer.name: (done[f"{p.layer.name}.A"], done[f"{p.layer.name}.B"]) for p in self.problems[:self.layer]}
        self._begin()
        if not self.finished:
            self.attempt_step = checkpoint.state["attempt_step"]
            self.lora.load_state_dict(checkpoint.tensors("adapter"))
            best = checkpoint.tensors("best")
            self.best = (best["A"].to(device), best["B"].to(device))
            self.best_loss = math.inf if checkpoint.state["best_loss"] is None else checkpoint.state["best_loss"]
            import_optimizer(self.optimizer, dict(self.lora.named_parameters()), checkpoint.tensors("optimizer"),
                             checkpoint.state["optimizer_state"])


def forget(config: ForgetConfig, origins: Mapping[str, str], *,
           resume: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Forget as configured, measure, and return the run directory and the evaluation.

    Raises UsageError for input that cannot work, NonFinite before any weight is touched, Interrupted after saving (in the main thread
    only: in another one, signals are the calling program's), Unhealthy where the frozen layers have changed.
    """
    device, started = chosen_device(config.device), time.monotonic()
    require_usable(config.memory.optimizer, device)
    if not resume:
        require_place(config.out)
    meter = Meter(device)
    case = meter.phase("encode")(prepare)(config, device)
    problems = {name: make_problem(case, name, config, device) for name in case.layers}
    frozen = {name: problem.layer.weight.clone() for name, problem in problems.items()}
    run, run_dir = Run(problems, config), resume or make_run_directory(config.out, case.forget)
    with RunLock(run_dir):
        bill = _train(run, problems, case, run_dir, origins, meter, resume=resume is not None)
        # From here on a signal ends the process as it always does: what was trained is saved.
        save_lora(run_dir, run.done, alpha=config.alpha, base_model=str(config.model))
        if config.merge:
            save_merged(run_dir, case.layers, run.updates(), case.dtype)
        bill = conclude(bill, problems, run.updates(), frozen, run.step)
        keep_findings(run_dir, bill)
        bill.raise_if_fatal("after training")
        result = evaluate_forgetting(run_dir, config, case, problems, run.updates(), attempts=run.attempts, device=device,
                                     started=started)
    return run_dir, result


def _train(run: Run, problems: Mapping[str, Problem], case: Case, run_dir: Path, origins: Mapping[str, str], meter: Meter, *,
           resume: bool) -> Bill:
    """Train `run` to its end, and save it; returns what was found before training. Raises Unhealthy, and Interrupted after saving."""
    config, clock = run.config, PhaseClock(meter.device, on_phase=meter.turn_to)
    facts = {"base_model": encoder_fingerprint(case.tower.directory), "examples": case.digest()}
    trace = max((predict_step(problem, config) for problem in problems.values()), key=lambda t: t.prediction().peak_bytes)
    monitor = Monitor(run.num_steps, mode=config.monitor, title=case.forget, run_dir=run_dir,
                      facts={"predicted_peak_bytes": trace.prediction().peak_bytes})
    with ExitStack() as files, StopFlag() as stop, monitor:
        checkpoint = _restore(run, run_dir, facts, meter.device) if resume else None  # before anything is written
        bill = examine(problems).with_findings(earlier_findings(read_object(run_dir / FINDINGS)) if resume else ())
        keep_findings(run_dir, bill)
        bill.raise_if_fatal("before training (nothing was changed)")
        write_config(run_dir, config, origins, command="forget", concept=case.forget, first_step=run.step, **facts)
        keep_prediction(run_dir, trace)
        log, saver = MetricsLog(run_dir, first_step=run.step), Saver(run_dir, last_step=checkpoint and checkpoint.step)
        files.callback(log.close)

        def save(*, final: bool = False) -> None:
            tensors, state = run.export()
            saver.save(run.step, tensors=tensors, state=state | facts | {"config": as_json(config)}, final=final)

        monitor.done, monitor.num_steps, monitor.findings = run.step, run.num_steps, lambda: [f.as_json() for f in bill.findings]
        while not run.finished and not stop:
            try:
                record = run.advance(clock.phase)
            except Unhealthy as e:
                keep_findings(run_dir, bill.with_findings(e.findings))
                raise
            clock.end_step()
            record |= clock.read()
            if record["step"] % 100 == 0 or run.finished:
                record |= {"memory": read_memory(meter), "peak_bytes_by_phase": meter.highest()}
            log.write(record)
            monitor.num_steps = run.num_steps
            monitor.step(record)
            if run.step % config.save_every == 0:
                save()
        monitor.close()
        save(final=True)
        if stop:
            raise Interrupted(f"stopped at step {run.step} and saved; go on with {resuming(run_dir)}", stop.signal_number)
    return bill


# What may differ between two halves of a run: where it runs, how it is watched and saved, how much is measured, where its files are.
_FREE = ("out", "device", "monitor", "save_every", "merge", "batch_size", "memory", "question", "num_answers", "images", "model",
         "forget_images", "preserve_images", "preserve_file")
_KEPT = ("dtype", "optimizer")  # of the memory plan, what may not


def _restore(run: Run, run_dir: Path, facts: Mapping[str, str], device: torch.device) -> Checkpoint | None:
    """Make `run` what the newest checkpoint holds, which is returned; None where the run ended before its first one.

    Raises CheckpointError where the run began with other settings or other `facts`: what identifies its model and its examples.
    """
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint:
        earlier = checkpoint.state
    else:
        earlier = read_content(run_dir)
        require_none_due(run_dir, save_every=earlier["config"]["save_every"])
    if earlier.get("base_model") != facts["base_model"]:
        raise CheckpointError(f"--resume {run_dir}: the model is not the one that the run began with; give that one back")
    if earlier.get("examples", facts["examples"]) != facts["examples"]:
        raise CheckpointError(f"--resume {run_dir}: the texts or pictures are not those that the run began with; give those back")
    ours, saved = as_json(run.config), earlier["config"]
    pairs = {name: (saved.get(name), value) for name, value in ours.items() if name not in _FREE}
    pairs |= {name: (saved["memory"].get(name), ours["memory"][name]) for name in _KEPT}
    for name, (then, now) in pairs.items():
        if then != now:
            raise CheckpointError(f"cannot resume: {flag_of(name)} was {then!r} and is {now!r} now; "
                                  "a resumed run keeps what it trains on")
    if checkpoint:
        run.restore(checkpoint, device)
    else:
        logger.warning("%s ended before its first checkpoint: it begins anew, and arrives at the same", run_dir)
    return checkpoint
