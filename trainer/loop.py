"""The training loop, top to bottom.

One frozen backbone is teacher and student. Every step: the teacher makes a sample, the student learns from it, the
gradient is checked and applied, numbers are written down. Saving comes before sampling, so that whatever a sample
does, nothing is lost.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from memory.meter import Meter
from memory.optimizers import require_usable
from trainer.assemble import assemble, chosen_device, embed_prompts, open_training
from trainer.checkpoint import Saver, latest_checkpoint
from trainer.clock import PhaseClock
from trainer.config import TrainConfig
from trainer.distributed import agreed, num_ranks, on_main, shared
from trainer.eraser_files import save_eraser
from trainer.errors import Interrupted
from trainer.health import Health
from trainer.inspection import Subject
from trainer.lock import RunLock
from trainer.losses import Samples, lockstep_backward, student_backward
from trainer.memory_file import MemoryForecast, keep_forecast
from trainer.metrics import MetricsLog
from trainer.monitor import Readings, watch
from trainer.recovery import Rescue
from trainer.run_directory import make_run_directory, require_place, resuming, write_config
from trainer.run_files import withdraw
from trainer.samples import Sampling, picture
from trainer.signals import StopFlag
from trainer.state import TrainState, learning_rate, unsaved

logger = logging.getLogger(__name__)


def train(config: TrainConfig, origins: Mapping[str, str], *, resume: Path | None = None,
          events: Sequence[Mapping[str, Any]] = (), forecast: MemoryForecast | None = None) -> Path:
    """Train erasers as configured and return the run directory. `events`, what happened so far, goes into the metrics;
    `forecast`, what the run is predicted to need (trainer.memory_file), into memory.json and the live view.

    Raises Unhealthy before a step that is not sound touches a weight, OutOfMemory, and Interrupted when a signal came,
    both after saving. Called in another thread than the main one it leaves signals to the program that calls it: none stops it then.
    """
    # What is asked for, checked as far as it can be before anything is loaded or written.
    if not resume:
        on_main(require_place, config.output.out)
    backbone, prompts, columns = open_training(config)
    device = chosen_device(config.model.device)
    require_usable(config.memory.optimizer, device)
    meter = Meter(device)
    readings = Readings(meter)

    # Text first: the encoder is gone before the transformer comes.
    sampling = Sampling(backbone, config, prompts, meter)
    embeddings = meter.phase("encode prompts")(embed_prompts)(
        backbone, config.model, config.memory, [*prompts.texts, *sampling.prompts]).to(device)

    # The frozen transformer, erasers in it, memory plan around it; the teacher, the optimizer.
    assembly = meter.phase("load")(assemble)(backbone, config.model, config.memory, rank=config.optim.rank,
                                             seed=config.optim.seed)
    subject = Subject.of(config, backbone, assembly, prompts, embeddings, columns)
    erasers, predict, teacher, optimizer = assembly.erasers, assembly.predict, subject.teacher, subject.optimizer
    samples = Samples(teacher, config.data.pool, device)
    state = TrainState(config, origins, backbone.identity(), prompts, erasers, optimizer, subject.scaler,
                       [s for s in (teacher.latents, teacher.preserved_latents) if s is not None], backbone.native_dtype,
                       embeddings.signature(prompts.texts))

    # The run directory, and where an earlier half of the run stopped. Of several processes, the first one writes.
    run_dir = resume or shared(make_run_directory, config.output.out, config.data.concept)
    clock = PhaseClock(device, on_phase=meter.turn_to)
    student, together = (f and clock.around(f, during="student", after="backward") for f in (predict, assembly.applied.lockstep))
    assembly.applied.count_waits(clock.waiting)
    health = Health(subject, run_dir=run_dir, resumed=bool(resume))
    rescue = Rescue(run_dir, state, health, meter)
    with ExitStack() as files, StopFlag() as stop, watch(config, run_dir, stop, meter) as monitor, assembly, health, rescue:
        on_main(files.enter_context, RunLock(run_dir))
        checkpoint = shared(latest_checkpoint, run_dir) if resume else None
        if resume:
            earlier = checkpoint.state if checkpoint else shared(unsaved, run_dir)
            state.check(earlier)  # before anything is written
        meter.phase("pre-flight")(health.before_training)()  # one step, looked at from all sides and taken back
        state.frozen = health.frozen()
        state.require_same()
        if resume:
            state.check(earlier)  # the weights, too, are known now
        if checkpoint:
            state.restore(checkpoint)
        elif resume:
            logger.warning("%s ended before its first checkpoint: it begins anew, and arrives at the same", run_dir)
        facts = state.described() | {"base_model": backbone.identity(), "first_step": state.step}
        on_main(write_config, run_dir, config, origins, **facts)
        saver = Saver(run_dir, last_step=checkpoint and checkpoint.step)
        log = on_main(MetricsLog, run_dir, first_step=state.step, tensorboard=config.output.tensorboard, events=events)
        if log:
            files.callback(log.close)
        monitor.facts |= shared(keep_forecast, run_dir, config, forecast)
        health.judge.expected_seconds = monitor.facts.get("predicted_step_seconds")
        monitor.done, monitor.findings, health.sinks = state.step, health.findings, (log.write, monitor.step) if log else ()
        if sampling.due(state.step) and not shared(picture(run_dir, state.step).exists):
            sampling.run(run_dir, state.step, assembly, embeddings, stop)

        # Step by step.
        num_passes, scaler = config.optim.accumulation, state.scaler
        while state.step < config.optim.steps and not agreed(stop):
            state.begin_step()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, config)
            totals: dict[str, torch.Tensor] = {}
            for k in range(num_passes):
                clock.phase("teacher")
                number = state.step * num_passes + k
                share = scaler.scale(torch.full((), 1 / num_passes / num_ranks(), device=device))
                if together:
                    terms = lockstep_backward(together, predict, erasers, teacher, samples.drawn(number), config.loss, scale=share)
                else:
                    terms = student_backward(student, erasers, samples(number), config.loss, scale=share)
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0.0) + value / num_passes
            clock.phase("optimizer")
            totals = health.reduce(totals)
            scaler.unscale_(optimizer)

            # Measured, clipped, and applied only if it is finite; the record goes to the log and the monitor a step
            # later, so that no step waits for the device.
            health.apply(state.step, totals)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            clock.end_step()
            health.add(**clock.read(), memory=readings(), peak_bytes_by_phase=meter.highest())
            state.step += 1

            # Safety, then pictures.
            if state.step % config.output.save_every == 0:
                health.flush()  # nothing unsound is saved
                tensors, description = state.export()
                on_main(saver.save, state.step, tensors=tensors, state=description)
            if sampling.due(state.step):
                sampling.run(run_dir, state.step, assembly, embeddings, stop)

        # The end, or an interruption: saved either way.
        health.flush()
        monitor.close()
        tensors, description = state.export()
        on_main(saver.save, state.step, tensors=tensors, state=description, final=True)
        if resume and state.step > facts["first_step"]:
            on_main(withdraw, run_dir)
        on_main(save_eraser, run_dir, erasers, base_model=backbone.identity(), training=description["config"])
        if agreed(stop):
            raise Interrupted(f"stopped at step {state.step} and saved; go on with {resuming(run_dir)}", stop.signal_number)
        health.after_training()  # the frozen weights are what they were
        sampling.run(run_dir, state.step, assembly, embeddings, stop)
        if agreed(stop):
            raise Interrupted(f"stopped after the last step, in its samples; all else is in {run_dir}", stop.signal_number)
    return run_dir
