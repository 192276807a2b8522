"""Whole runs that die, and go on. A program of its own: `fork` wants a process without threads, and saves the imports.

    python tests/faults/run_victim.py kills DIR NUM_STEPS NUM_KILLS SEED     killed at random moments, so many times
    python tests/faults/run_victim.py soak DIR NUM_STEPS EVERY SEED          killed at random about every so many steps
    python tests/faults/run_victim.py signals DIR                            SIGINT, SIGTERM and SIGHUP in every phase
    python tests/faults/run_victim.py readonly DIR                           checkpoints' directory is made read-only in mid-run
    python tests/faults/run_victim.py leak DIR NUM_STEPS                     memory of the process and its tensors, step by step

Each prints one JSON object; test_run_faults.py says what it must hold.
"""

import gc
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import bitsandbytes  # noqa: F401  here, so that no child has to
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel  # noqa: F401
from transformers import T5EncoderModel  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
from compared_runs import differences
from tiny_pipelines import build_pipeline

from memory.meter import resident_bytes
from trainer import checkpoint, loop, losses, samples
from trainer.checkpoint import latest_checkpoint
from trainer.config import TrainConfig, replaced
from trainer.errors import InputOutputError, Interrupted
from trainer.loop import train
from trainer.metrics import MetricsLog
from trainer.run_files import CONFIG, read_metrics
from trainer.signals import ONE_STROKE, SIGNALS

SAVE_EVERY = 5


def config_of(directory: Path, name: str, num_steps: int) -> TrainConfig:
    """Settings of a run on a tiny pipeline; saves lie in the middle of trajectories."""
    return replaced(TrainConfig(), {
        "model.model": str(directory / "pipeline"), "model.device": "cpu", "data.concept": "red", "data.preserve": ("a blue circle",),
        "data.trajectory_steps": 4, "data.batch_size": 1, "optim.rank": 4, "optim.steps": num_steps, "optim.warmup": 2, "optim.lr": 1e-2,
        "output.out": directory / name, "output.save_every": SAVE_EVERY, "output.sample_steps": 1, "output.monitor": "off",
        "output.sample_prompts": ("a red circle",)})


def forked(work: Callable[[], int | None]) -> int:
    """Start `work` in a child; returns its pid. The child ends with what `work` returns."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = work() or 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def finished(pid: int) -> int:
    """Exit code of a child, minus the signal's number if one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def build(directory: Path) -> None:
    """The tiny pipeline, built by a child: building it starts threads."""
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
    assert finished(forked(lambda: build_pipeline(directory / "pipeline", "2b") and None)) == 0


class Progress:
    """The last step that a child has recorded, shared with its parent."""

    def __init__(self):
        self._shared = mmap.mmap(-1, 8)
        self.step = -1

    @property
    def step(self) -> int:
        return struct.unpack("q", self._shared[:])[0]

    @step.setter
    def step(self, value: int) -> None:
        self._shared[:] = struct.pack("q", value)

    def watched(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, whose metrics move the step."""
        def run() -> None:
            write = MetricsLog.write

            def marked(log: MetricsLog, record: Any) -> None:
                write(log, record)
                self.step = record["step"]

            MetricsLog.write = marked
            work()

        return run


def killed(directory: Path, num_steps: int, seed: int, *, steps_between: int, num_kills: int | None) -> dict[str, Any]:
    """One run that nobody disturbs, and one that is killed at random moments and goes on; then both, bit for bit.

    Moments are spread over starting up, steps and saving, about `steps_between` steps apart. With `num_kills` so many,
    otherwise until the run is through.
    """
    build(directory)
    straight, broken = config_of(directory, "straight", num_steps), config_of(directory, "broken", num_steps)
    assert finished(forked(lambda: train(straight, {}) and None)) == 0
    one_step = median(record["seconds"] for record in read_metrics(straight.output.out))
    run_dir, progress, moments = broken.output.out, Progress(), random.Random(seed)
    went_back, newest, died_after_steps = 0, 0, []

    def work() -> None:
        train(broken, {}, resume=run_dir if (run_dir / CONFIG).exists() else None)

    def wait(pid: int) -> None:
        target = newest - 1 + moments.randint(0, 2 * steps_between)
        if num_kills is not None:
            target = min(target, num_steps - 2)
        deadline = time.monotonic() + 600
        while progress.step < target and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert time.monotonic() < deadline, "the run does not move"
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5 * one_step))

    while True:
        progress.step = newest - 1
        pid = forked(progress.watched(work))
        if len(died_after_steps) != num_kills:
            wait(pid)
            os.kill(pid, signal.SIGKILL)
        code = finished(pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"the run ended by itself, status {code}"
        found = latest_checkpoint(run_dir, rename_bad=False) if (run_dir / "ckpt").exists() else None
        step = found.step if found else 0
        went_back += step < newest
        died_after_steps.append(progress.step - newest + 1)
        newest = step
    return {"kills": len(died_after_steps), "num_steps": num_steps, "died_after_steps": died_after_steps, "went_back": went_back,
            "different": differences(straight.output.out, run_dir, more=("rng",))}


# --- signals ----------------------------------------------------------------------------------------------------------------------------

PHASES: dict[str, tuple[Any, str, int]] = {  # where, and the call: in the second step, or after it
    "forward": (losses.F, "mse_loss", 6), "backward": (torch.autograd, "backward", 6), "save": (checkpoint, "_to_host", 6),
    "sampling": (samples, "generate_latents", 2)}


def signalled(directory: Path, phase: str, numbers: tuple[int, ...]) -> dict[str, Any]:
    """A run that saves every step and gets signals in one phase: its exit code, the newest checkpoint, steps finished
    after the signal, and seconds from the last signal to the end."""
    base = config_of(directory, "-".join((phase, *map(str, numbers))), 12)
    config = replace(base, output=replace(base.output, save_every=1, sample_every=2 if phase == "sampling" else 0))
    finished_before, moment_ns, num_finished = Progress(), Progress(), 0

    def work() -> int:
        owner, name, call = PHASES[phase]
        real, end_step, calls = getattr(owner, name), loop.PhaseClock.end_step, []

        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                finished_before.step = num_finished
                for i, number in enumerate(numbers):
                    time.sleep(2 * ONE_STROKE if i else 0)  # sooner, it would be one signal that came twice
                    moment_ns.step = time.monotonic_ns()
                    os.kill(os.getpid(), number)
                if len(numbers) > 1:
                    time.sleep(10)  # work that would go on
            return real(*args, **kwargs)

        def ended(clock: Any) -> None:
            nonlocal num_finished
            num_finished += 1
            end_step(clock)

        setattr(owner, name, function)
        loop.PhaseClock.end_step = ended
        try:
            train(config, {})
        except Interrupted as e:
            return e.exit_code
        return 0

    code = finished(forked(work))
    seconds = (time.monotonic_ns() - moment_ns.step) / 1e9
    found = latest_checkpoint(config.output.out, rename_bad=False)
    step = found.step if found else 0
    return {"exit_code": code, "saved_step": step, "recorded": len(read_metrics(config.output.out)),
            "steps_after": step - finished_before.step, "seconds": round(seconds, 3)}


def signals(directory: Path) -> dict[str, Any]:
    build(directory)
    for number in SIGNALS:  # the tests may run under nohup, or in the background of a script
        signal.signal(number, signal.SIG_DFL)
    return {"once": {f"{number.name} in {phase}": signalled(directory, phase, (number,)) for phase in PHASES for number in SIGNALS},
            "twice": {f"{number.name} twice in {phase}": signalled(directory, phase, (number, number)) for phase in PHASES
                      for number in SIGNALS}}


# --- a directory that is read-only from now on -----------------------------------------------------------------------------------------

NOBODY = 65534


def readonly(directory: Path) -> dict[str, Any]:
    """A run that saves every step; after its second checkpoint nothing more can be written beside it."""
    build(directory)
    base = config_of(directory, "readonly", 12)
    config = replace(base, output=replace(base.output, save_every=1))

    def work() -> int:
        if os.geteuid() == 0:  # root may write anywhere
            for path in (directory, *directory.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        save = loop.Saver.save

        def saved(saver: Any, step: int, **content: Any) -> Path | None:
            path = save(saver, step, **content)
            if step == 2:
                path.parent.chmod(0o555)
            return path

        loop.Saver.save = saved
        try:
            train(config, {})
        except InputOutputError as e:
            (directory / "said").write_text(str(e))
            return e.exit_code
        return 0

    code = finished(forked(work))
    return {"exit_code": code, "saved_step": latest_checkpoint(config.output.out, rename_bad=False).step,
            "said": (directory / "said").read_text() if code else "", "recorded": len(read_metrics(config.output.out)),
            "files": sorted(path.name for path in (config.output.out / "ckpt").iterdir())}


# --- leaks ------------------------------------------------------------------------------------------------------------------------------


def leak(directory: Path, num_steps: int) -> dict[str, Any]:
    """Resident bytes of the process and the number and bytes of its tensors, every tenth step."""
    build(directory)
    config = config_of(directory, "leak", num_steps)
    readings = directory / "readings.jsonl"

    def work() -> None:
        write = MetricsLog.write

        def read(log: MetricsLog, record: Any) -> None:
            write(log, record)
            if record["step"] % 10 == 0:
                gc.collect()
                tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
                with readings.open("a") as file:
                    print(json.dumps([record["step"], resident_bytes(), len(tensors), sum(t.nbytes for t in tensors)]), file=file)

        MetricsLog.write = read
        train(config, {})

    assert finished(forked(work)) == 0
    rows = [json.loads(line) for line in readings.read_text().splitlines()]
    warm = next(row for row in rows if row[0] >= num_steps // 3)  # caches and the arena have their size by then
    last = rows[-1]
    return {"from_step": warm[0], "to_step": last[0], "host_growth_bytes": last[1] - warm[1], "tensor_growth": last[2] - warm[2],
            "tensor_growth_bytes": last[3] - warm[3], "readings": rows}


if __name__ == "__main__":
    command, place, *rest = sys.argv[1:]
    values = [int(number) for number in rest]
    programs = {
        "kills": lambda d, steps, count, seed: killed(d, steps, seed, steps_between=SAVE_EVERY, num_kills=count),
        "soak": lambda d, steps, every, seed: killed(d, steps, seed, steps_between=every, num_kills=None),
        "signals": signals, "readonly": readonly, "leak": leak}
    print(json.dumps(programs[command](Path(place), *values)))
