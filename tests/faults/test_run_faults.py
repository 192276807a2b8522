"""Whole runs that are killed, interrupted and watched: the figures of the reliability table that need more than a function."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import run
from trainer.run_files import FINDINGS

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def in_memory():
    """A directory in memory where there is one: a kill cannot tell it from a disk, and a busy disk would make this slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


def victim(*arguments: object) -> dict:
    command = [sys.executable, str(REPOSITORY / "tests/faults/run_victim.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_at_random_twenty_times_the_result_is_bit_identical(in_memory, record_property):
    result = victim("kills", in_memory, 90, 20, 0)
    for key, value in result.items():
        record_property(key, value)
    assert (result["kills"], result["went_back"], result["different"]) == (20, 0, [])
    assert len(set(result["died_after_steps"])) > 3  # not always at the same place


@pytest.mark.slow
def test_soak(in_memory, record_property):
    """Hundreds of steps, a random kill about every fifty."""
    result = victim("soak", in_memory, 400, 50, 1)
    for key, value in result.items():
        record_property(key, value)
    assert result["kills"] >= 4 and (result["went_back"], result["different"]) == (0, [])


@pytest.mark.slow
def test_no_leak_over_two_hundred_steps(in_memory, record_property):
    result = victim("leak", in_memory, 310)
    for key, value in result.items():
        if key != "readings":
            record_property(key, value)
    assert result["to_step"] - result["from_step"] >= 190
    assert result["tensor_growth"] == 0 and result["tensor_growth_bytes"] == 0
    assert result["host_growth_bytes"] < 5 * 2**20


@pytest.mark.slow
def test_a_signal_in_any_phase_saves_and_ends_and_a_second_one_leaves_at_once(in_memory, record_property):
    results = victim("signals", in_memory)
    once, twice = results["once"], results["twice"]
    record_property("signals", len(once))
    record_property("most_steps_after", max(result["steps_after"] for result in once.values()))
    record_property("seconds_after_second", max(result["seconds"] for result in twice.values()))
    assert len(once) == len(twice) == 12
    for name, result in {**once, **twice}.items():
        assert result["exit_code"] == 128 + signal.Signals[name.split()[0]], name
    for name, result in once.items():
        assert 0 <= result["steps_after"] <= 1 and result["recorded"] == result["saved_step"] > 0, (name, result)
    for name, result in twice.items():
        # Nothing is saved any more, and what was is whole.
        assert result["seconds"] < 1 and result["saved_step"] > 0 and result["steps_after"] <= 0, (name, result)


@pytest.mark.slow
def test_a_directory_that_becomes_read_only_costs_the_run_but_no_checkpoint(in_memory):
    result = victim("readonly", in_memory)
    assert result["exit_code"] == 6 and "failure 3 of 3" in result["said"] and "Permission denied" in result["said"]
    assert result["saved_step"] == 2 and result["files"] == ["step-000001", "step-000002"]
    assert result["recorded"] == 5  # it went on for two more intervals


# --- streams that close, places that cannot be written, clocks that jump ----------------------------------------------------------------


def _run(command: str) -> tuple[int, str]:
    """(exit code, stderr) of a shell command line; `RUN` stands for `python run.py`."""
    command = command.replace("RUN", f"'{sys.executable}' run.py")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command, code", [
    ("RUN --help | (exec <&-; sleep 1)", 6),  # nobody reads at all
    ("RUN generate --help > /dev/full", 6),
    ("RUN --rank 0 2>&1 >/dev/null | (exec <&-; sleep 1)", 2),  # the message cannot be said; the code can
    ("RUN --rank 0 2>&-", 2),
    ("RUN --help >&-", 0),
])
def test_streams_that_nobody_reads_end_without_a_traceback(command, code):
    found, said = _run(command)
    assert found == code and "Traceback" not in said and "Exception ignored" not in said, said


def test_a_table_that_nobody_reads_ends_likewise(tmp_path):
    (tmp_path / FINDINGS).write_text('{"findings": [], "checked": []}')
    code, said = _run(f"RUN diagnose '{tmp_path}' | (exec <&-; sleep 1)")
    assert (code, said) == (6, "")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a place that even root cannot write")
@pytest.mark.parametrize("words", [
    ["--out", "/sys/red"], ["forget", "--out", "/sys/red"], ["generate", "--no-eraser", "--prompt", "a red circle", "--out", "/sys/x.mp4"]], ids=lambda w: w[0])
def test_places_that_cannot_be_written_end_with_a_word(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    code, said = run.main(), capsys.readouterr().err
    assert code == 6 and said.startswith("error: ") and "cannot be written" in said and said.count("\n") == 1, said


def test_a_full_disk_behind_stdout_is_said():
    assert _run("RUN generate --help > /dev/full")[1].startswith("error: output: No space left on device")


def test_a_clock_that_jumps_changes_nothing(monkeypatch):
    """Elapsed time and the ETA are monotonic, whatever the wall clock does."""
    from trainer.monitor import Monitor

    wall = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(wall)))
    with Monitor(10, mode="plain", stream=io.StringIO(), interval=0) as monitor:
        for step in range(6):
            monitor.step({"step": step, "loss": 1.0, "seconds": 0.01})
        state = monitor.state()
    assert 0 <= state["elapsed"] < 60 and 0 <= state["eta"] < 60


def test_nothing_reads_the_wall_clock():
    for package in ("memory", "trainer"):
        for path in (REPOSITORY / package).rglob("*.py"):
            text = path.read_text()
            assert "time.time(" not in text and "datetime.now(" not in text, path


def test_directories_of_runs_that_start_together_differ(tmp_path):
    program = ("import sys; from trainer.run_directory import make_run_directory\n"
               "sys.stdin.read(1); print(make_run_directory(None, 'red'))")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    children = [subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True) for _ in range(4)]
    time.sleep(1)
    made = [child.communicate("x")[0].strip() for child in children]
    assert sorted(made) == [f"runs/red-{number}" for number in (1, 2, 3, 4)]
