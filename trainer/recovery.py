"""Out of memory in a run: say where, what was held, and which cheaper plan would do; or take it and go on.

The plan to try next comes from the planner, which predicts what the phase that failed would need under each step down
(memory/advice.py). The batch is never touched: results keep their meaning, and where only the memory plan differs the
run is what it would have been with memory enough: on the CPU to the bit, or to rounding where passes change their order.

Going on means starting `train` again in the same process, once the frames of the error, which hold tensors, are gone.
It starts at the last optimizer step, which is saved first; where the error came while the optimizer was moving weights,
at the newest checkpoint, or at the beginning if there is none, and arrives at the same numbers.
"""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from memory.advice import Advice, difference, next_cheaper
from memory.cards import GIB, Card, size_text
from memory.exhaustion import exhausted, first_line, requested_bytes
from memory.meter import Meter, PhasePeak
from memory.plan import MemoryPlan
from memory.ranking import SEARCHED
from memory.streams import release_pinned
from memory.timeline import BACKWARD, FORWARD, shown
from trainer.assemble import open_backbone
from trainer.checkpoint import latest_checkpoint, save_checkpoint
from trainer.config import TrainConfig
from trainer.distributed import num_ranks, rank
from trainer.errors import DoesNotFit, OutOfMemory, TrainerError
from trainer.health import Health
from trainer.planning import forecast_as_given, forecast_pinning
from trainer.run_directory import read_config
from trainer.run_files import CONFIG
from trainer.state import TrainState

logger = logging.getLogger(__name__)

# (module, function) on the way to the failure -> the phase it is; the innermost decides.
PHASES = {
    ("trainer.assemble", "embed_prompts"): "encode prompts",
    ("trainer.assemble", "assemble"): "load",
    ("memory.standing", "allocate_standing"): "optimizer",
    ("trainer.losses", "sample"): "teacher",
    ("trainer.losses", "draw"): "teacher",
    ("trainer.losses", "__call__"): "teacher",  # of `Samples`, which moves what is in a pool
    ("trainer.losses", "student_backward"): "student",
    ("trainer.losses", "lockstep_backward"): "student",
    ("trainer.losses", "answered"): "teacher",
    ("trainer.preflight", "_prediction"): "student",
    ("torch._tensor", "backward"): "backward",
    ("trainer.health", "reduce"): "optimizer",
    ("trainer.health", "apply"): "optimizer",
    ("trainer.preflight", "_trial"): "optimizer",
    ("trainer.samples", "run"): "sample",
    ("trainer.state", "export"): "save",
    ("trainer.checkpoint", "save_checkpoint"): "save",
}
_AROUND = {("trainer.health", "before_training"): "pre-flight", ("trainer.tracing", "trace"): "second pass"}  # steps beside the loop's
_PLANNED = {shown(phase): phase for phase in (FORWARD, BACKWARD)}  # others by their name
_KEPT = ("optimizer", "dtype")  # a run does not go on with another


def phase_of(traceback: TracebackType | None) -> str:
    """The phase of a run in which an error arose."""
    phase, around = "training", ""
    while traceback is not None:
        frame = traceback.tb_frame
        where = frame.f_globals.get("__name__"), frame.f_code.co_name
        phase, around = PHASES.get(where, phase), _AROUND.get(where, around)
        traceback = traceback.tb_next
    return f"{phase} of the {around}" if around else phase


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Where memory ran out. Plain data: nothing in it holds a tensor."""

    phase: str
    whose: str
    """device or host"""
    said: str
    """The first line of the error."""
    requested_bytes: int | None
    pinned_bytes: int | None = None
    """What was pinned of the host's memory, where no more of it could be."""
    step: int = 0
    """Finished optimizer steps."""
    run_dir: Path | None = None
    saved_step: int | None = None
    """Of the newest checkpoint."""
    peaks: Mapping[str, PhasePeak]

    @classmethod
    def of(cls, error: BaseException, **more: Any) -> "Failure":
        """What an error that `exhausted` knows says of itself; `more`: what is known of the run."""
        return cls(phase=phase_of(error.__traceback__), whose=exhausted(error), said=first_line(error),
                   requested_bytes=requested_bytes(error), pinned_bytes=getattr(error, "pinned_bytes", None), **{"peaks": {}, **more})

    def __str__(self) -> str:
        return f"out of memory on the {self.whose} in {self.phase}, after {self.step} steps: {self.said}"

    @property
    def planned_phase(self) -> str:
        """Its name in forecasts."""
        name = self.phase.split(" of the ")[0]
        return _PLANNED.get(name, name)

    def table(self) -> str:
        """The largest readings by phase, and those of now."""
        lines = [f"{'peak, GiB':<24}{'allocated':>10}{'reserved':>10}{'host':>10}"]
        for name, peak in self.peaks.items():
            cells = (peak.allocated_bytes, peak.reserved_bytes, peak.host_bytes)
            lines.append(f"{name:<24}" + "".join(f"{'-' if c is None else f'{c / GIB:.2f}':>10}" for c in cells))
        return "\n".join(lines)


class Rescue:
    """Innermost context around the loop: when memory runs out, the last finished step is saved. Raises OutOfMemory."""

    def __init__(self, run_dir: Path, state: TrainState, health: Health, meter: Meter):
        self.run_dir, self.state, self.health, self.meter = run_dir, state, health, meter

    def __enter__(self) -> "Rescue":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None or not exhausted(error):
            return
        self.meter.turn_to(None)  # the phase that failed, too, has its row
        saved = self._save(sound=not phase_of(traceback).endswith("second pass"))
        # Before a checkpoint is restored, in the pre-flight of a run that goes on, the steps that are done are those of the checkpoint.
        raise OutOfMemory(Failure.of(error, step=max(self.state.step, saved or 0), run_dir=self.run_dir, saved_step=saved,
                                     peaks=dict(self.meter.peaks))) from error

    def _save(self, *, sound: bool) -> int | None:
        """Save the last finished step if it is newer than the newest checkpoint; returns the newest one's step."""
        found = latest_checkpoint(self.run_dir, rename_bad=not rank())
        newest = found.step if found else None
        if not sound or self.state.step <= (newest or 0) or not self.state.rewind():
            return newest
        try:
            self.health.flush()  # nothing unsound is saved
        except (MemoryError, RuntimeError) as e:  # it takes a second look at what is not finite
            if not exhausted(e):
                raise
            return newest
        try:
            tensors, description = self.state.export()
            save_checkpoint(self.run_dir, self.state.step, tensors=tensors, state=description)
        except (TrainerError, MemoryError, RuntimeError) as e:
            logger.warning("step %d could not be saved after memory ran out: %s", self.state.step, e)
            return newest
        return self.state.step


def train_in_memory(train: Callable[..., Path], config: TrainConfig, origins: Mapping[str, str], *, resume: Path | None,
                    card: Card, step_down: bool, command: Sequence[str]) -> Path:
    """`train`, which is `trainer.loop.train`, until it is through; returns the run directory.

    When memory runs out: with `step_down`, the next cheaper plan and on; otherwise, or when no plan is left, DoesNotFit
    with the phase, the peaks and a command made from `command`, which started this run.
    """
    events: list[dict[str, Any]] = []
    while True:
        try:
            return train(config, origins, resume=resume, events=events)
        except OutOfMemory as e:
            failure = e.failure
        except (MemoryError, RuntimeError) as e:
            if not exhausted(e):
                raise
            failure = Failure.of(e, step=_steps_done(resume))
        # Only here, outside of `except`, is nothing left that holds the tensors of the failed step.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        release_pinned()  # masters and parked activations of the plan that failed: the next one asks for other sizes
        run_dir = failure.run_dir
        begun = run_dir is not None and _written(run_dir, config)
        if begun:
            resume, command = run_dir, (*command[:command.index("run.py") + 1], "--resume", str(run_dir))
        advice = cheaper(config, card, failure)
        if advice is None or not step_down or num_ranks() > 1:  # of several processes none can go on alone
            raise DoesNotFit(described(failure, advice, advice and command_of(advice, command, begun=begun), on_cpu=card.is_cpu))
        logger.warning("%s", described(failure, advice, None))
        events.append({"event": "step-down", "step": failure.step, "phase": failure.phase, "change": advice.change,
                       "predicted_bytes": advice.needed_bytes})
        config = replace(config, memory=advice.plan)
        if not begun and run_dir is not None:  # stopped by the pre-flight: the same directory again
            config = replace(config, output=replace(config.output, out=run_dir))
        origins = {**origins, **{f"memory.{name}": f"step-down at step {failure.step}" for name in advice.change}}


def _written(run_dir: Path, config: TrainConfig) -> bool:
    """Whether a run says that it goes by these settings, which it does once it is through its pre-flight."""
    return (run_dir / CONFIG).exists() and read_config(run_dir)[0] == config


def _steps_done(resume: Path | None) -> int:
    """Of a run that goes on, before it could."""
    found = resume and latest_checkpoint(resume, rename_bad=False)
    return found.step if found else 0


def cheaper(config: TrainConfig, card: Card, failure: Failure) -> Advice | None:
    """The least costly plan that needs so much less in the failed phase that the failed request would have been met.

    None if no plan is predicted to lower that phase. All these steps move bytes from the card to the host: where that is short, and is
    another memory, it is the fastest plan that pins no more than could be pinned; None, too, if it was not pinning that failed.
    """
    if failure.whose == "host" and not card.unified:
        return _pinning_less(config, card, failure.pinned_bytes) if failure.pinned_bytes else None

    def needed(plan: MemoryPlan) -> int:
        found = forecast_as_given(replace(config, memory=plan), card)
        # Where there is but one memory, what is moved to the host is in it still.
        moved = found.prediction.host_bytes if card.unified else 0
        return moved + found.by_phase.get(failure.planned_phase, max(found.by_phase.values()))

    limit = None if failure.requested_bytes is None else needed(config.memory) - failure.requested_bytes
    return next_cheaper(config.memory, open_backbone(config.model).num_blocks, needed_bytes=needed, limit_bytes=limit, fixed=_KEPT)


def _pinning_less(config: TrainConfig, card: Card, pinned_bytes: int) -> Advice | None:
    best = forecast_pinning(config, card, pinned_bytes, _KEPT)
    if best is None or best.plan == config.memory:
        return None
    return Advice(plan=best.plan, change=difference(config.memory, best.plan), why="the fastest plan that pins no more of the host's memory",
                  needed_bytes=best.host_bytes, pins=True)


def command_of(advice: Advice, command: Sequence[str], *, begun: bool) -> str:
    """What to paste. Unless the run goes by what it says of itself, every field is named that the planner would choose again."""
    plan = {} if begun else {name: getattr(advice.plan, name) for name in (*SEARCHED, "num_shards")}
    if advice.plan.num_shards > 1 and plan:  # in place of offload, of which no flag may speak
        del plan["resident_blocks"], plan["passes"]
    return replace(advice, change={**plan, **advice.change}).command(command)


def described(failure: Failure, advice: Advice | None, command: str | None, *, on_cpu: bool = False) -> str:
    """The failure for people: phase, state of the run, peaks, and what would do. `on_cpu`: there is no card to keep anything on."""
    lines = [str(failure)]
    if failure.run_dir is not None:
        newest = "nothing is saved yet" if failure.saved_step is None else f"step {failure.saved_step} is saved"
        lines.append(f"{newest} in {failure.run_dir}")
    if failure.peaks:
        lines.append(failure.table())
    if advice is None:
        what = failure.planned_phase if failure.pinned_bytes is None else "host"
        said = _LAST_RESORT.get(what, _LAST_RESORT["device" if on_cpu else failure.whose])
        lines.append(said.removesuffix(_ON_THE_CPU) if on_cpu else said)
    else:
        where = "pinned" if advice.pins else f"in {shown(failure.planned_phase)}"
        lines.append(f"cheaper: {advice.why} (predicted: {size_text(advice.needed_bytes)} {where})")
        lines.append(command or "going on with that")
    return "\n".join(lines)


_ON_THE_CPU = ", or let --device cpu encode once: embeddings are remembered"
_LAST_RESORT = {
    "encode prompts": "no memory plan needs less there: the text encoder passes through block by block already; end what else uses "
                      "that memory" + _ON_THE_CPU,
    "device": "no memory plan needs less there; fewer --frames, a smaller --height and --width, or a new run with half the "
              "--batch-size and twice the --accumulation would",
    "host": "the host's memory is short: keep more on the card (a larger --resident-blocks, --boundaries device, --kept device), "
            "or close what else uses it",
}
