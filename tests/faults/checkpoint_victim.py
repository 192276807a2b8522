"""Processes that die while they save, and what they leave. A program of its own: `fork` wants a process without threads.

    python tests/faults/checkpoint_victim.py kills RUN_DIR COUNT SEED      SIGKILL at random moments of a loop that only saves
    python tests/faults/checkpoint_victim.py crashes DIR                   SIGKILL and power cut at every named point

Each prints one JSON object; test_checkpoint_faults.py says what it must hold.
"""

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from trainer import checkpoint
from trainer.checkpoint import latest_checkpoint, save_checkpoint
from trainer.lock import RunLock


def save(run_dir: Path, step: int) -> None:
    """A checkpoint whose content is a function of the step."""
    tensors = {
        "adapter": {"up": torch.full((64, 64), float(step)), "down": torch.full((64,), step, dtype=torch.bfloat16)},
        "optimizer": {"state1": torch.full((8192,), step % 256, dtype=torch.uint8), "step": torch.tensor(step)},
    }
    save_checkpoint(run_dir, step, tensors=tensors, state={"step": step})


def newest(run_dir: Path) -> int:
    """The step of the newest valid checkpoint, 0 if there is none; raises unless all its content is of that step."""
    found = latest_checkpoint(run_dir, rename_bad=False)
    if found is None:
        return 0
    values = [*found.tensors("adapter").values(), *found.tensors("optimizer").values()]
    assert found.state == {"step": found.step} and len(values) == 4
    for value in values:
        assert bool((value == (found.step % 256 if value.dtype == torch.uint8 else found.step)).all())
    return found.step


def run_until_killed(child: Callable[[], None], wait: Callable[[], None] | None = None) -> None:
    """Fork; the child runs `child` and is killed when `wait` returns, or kills itself."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(1)
    if wait is not None:
        wait()
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the child ended by itself, status {status}"


# --- random kills -----------------------------------------------------------------------------------------------------------------------


def kills(run_dir: Path, count: int, seed: int) -> dict:
    """Kill a saving loop `count` times at random moments; each new process takes the lock over and goes on from the newest checkpoint.

    Nearly all the time of a save is fsync, and a kill cannot tell a done one from a skipped one (a power cut can: see `crashes`). Every
    second process skips it, so that as many kills fall into writing, renaming and pruning.
    """
    now_in = mmap.mmap(-1, 1)  # shared with the children: the stage that each died in

    def save_for_ever(skip_fsync: bool) -> None:
        def marked(number: int, stage: Callable) -> Callable:
            def run(save: object) -> None:
                now_in[0] = number
                stage(save)

            return run

        checkpoint.STAGES = tuple(marked(number, stage) for number, stage in enumerate(checkpoint.STAGES, start=1))
        if skip_fsync:
            os.fsync = lambda _: None
        with RunLock(run_dir):
            found = latest_checkpoint(run_dir)
            step = found.step if found else 0
            while True:
                step += 1
                save(run_dir, step)

    start = time.monotonic()
    for step in (1, 2, 3):
        save(run_dir, step)
    one_save = (time.monotonic() - start) / 3  # seconds; the disk may be busy with other things
    moments = random.Random(seed)

    def wait() -> None:
        deadline = time.monotonic() + 60
        while now_in[0] == 0 and moments.random() < 0.99:  # a few die before they save
            assert time.monotonic() < deadline, "the child never came to save"
            time.sleep(0.001)
        time.sleep(min(moments.uniform(0, 6 * one_save), 1.0))

    died_in, went_back = Counter(), 0
    for number in range(count):
        now_in[0] = 0
        run_until_killed(partial(save_for_ever, number % 2 == 1), wait)
        died_in[now_in[0]] += 1
        found = newest(run_dir)
        went_back += found < step
        step = found
    left = sorted(path.name for path in (run_dir / "ckpt").iterdir() if path.name.startswith("bad-"))
    return {"kills": count, "step": step, "went_back": went_back, "bad": left, "died_in_stage": dict(sorted(died_in.items()))}


# --- named points -----------------------------------------------------------------------------------------------------------------------


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def points() -> dict[str, Callable[[], None]]:
    """name -> a function that, called in the child, plants the crash: before and after each stage, and inside the first and the last."""
    planted: dict[str, Callable[[], None]] = {}

    def at(index: int, *replacement: Callable) -> Callable[[], None]:
        def plant() -> None:
            checkpoint.STAGES = checkpoint.STAGES[:index] + replacement + checkpoint.STAGES[index + 1 :]

        return plant

    for index, stage in enumerate(checkpoint.STAGES):
        planted[f"before {index + 1}"] = at(index, die, stage)
        planted[f"after {index + 1}"] = at(index, stage, die)

    def die_before_second_file() -> None:
        real, calls = checkpoint.save_file, []
        checkpoint.save_file = lambda *args: calls.append(1) or (die() if len(calls) == 2 else real(*args))

    planted["inside 1"] = die_before_second_file
    planted["inside 7"] = lambda: setattr(shutil, "rmtree", die)
    return planted


def cut_power(root: Path, synced: set[int]) -> None:
    """What a power cut may do: a file that was never synced exists, but is empty."""
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_ino not in synced:
            os.truncate(path, 0)


def crashes(directory: Path) -> dict:
    """For each point: steps 1 and 2 are saved, the process dies saving step 3 and the power goes; then what is there, and a new process."""
    real_fsync, outcomes = os.fsync, {}
    for name, plant in points().items():
        run_dir = directory / name.replace(" ", "-")
        log = directory / "synced"
        log.write_text("")

        def fsync(descriptor: int) -> None:
            real_fsync(descriptor)
            with log.open("a") as file:
                file.write(f"{os.fstat(descriptor).st_ino}\n")

        os.fsync = fsync
        save(run_dir, 1)
        save(run_dir, 2)
        run_until_killed(lambda: (plant(), save(run_dir, 3)))
        os.fsync = real_fsync
        root = run_dir / "ckpt"
        left = sorted(path.name for path in root.iterdir())
        cut_power(root, {int(line) for line in log.read_text().split()})
        step = newest(run_dir)
        with RunLock(run_dir):
            found = latest_checkpoint(run_dir)
            save(run_dir, found.step + 1)
        outcomes[name] = {
            "newest": step,
            "left": [path.rpartition("-")[0] if path.startswith(".tmp") else path for path in left],  # without the pid
            "after_restart": sorted(path.name for path in root.iterdir()),
        }
    return outcomes


if __name__ == "__main__":
    command, place, *numbers = sys.argv[1:]
    print(json.dumps({"kills": kills, "crashes": crashes}[command](Path(place), *map(int, numbers))))
