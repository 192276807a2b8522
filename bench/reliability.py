"""What a run promises, and what was measured: every fault of the table put in on purpose, by the tests that do so.

    python -m bench.reliability            all rows, into bench/results/reliability.json (half an hour on two free cores)
    python -m bench.reliability kills oom  only these; the other rows stay as they were measured

A row holds when each of its tests passes; what they count on the way is its figure.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.provenance import RESULTS, ROOT, provenance, write_result

Properties = dict[str, Any]
_SAVING, _RUNS, _STATE = "tests/faults/test_checkpoint_faults.py", "tests/faults/test_run_faults.py", "tests/trainer/test_state.py"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One promise: the tests that put it to the test, and how to say what they found."""

    test: str
    target: str
    nodes: tuple[str, ...]
    """Test files, or tests in them; parametrised ones count by case."""
    figure: Callable[[Properties, int], str] = lambda found, num_tests: f"{num_tests} of {num_tests} as expected"
    """What was measured, from the tests' properties and their number, all passed."""


ROWS = {
    "identical": Row(
        test="killed at random twenty times", target="the result is bit-identical",
        nodes=(f"{_RUNS}::test_killed_at_random_twenty_times_the_result_is_bit_identical",),
        figure=lambda p, _: f"{p['kills']} kills in a run of {p['num_steps']} steps: {len(p['different'])} tensors or records differ, "
                            f"{p['went_back']} times back"),
    "kills": Row(
        test="random SIGKILL while saving in a loop", target="200 kills, always a valid newest checkpoint, step never goes back",
        nodes=(f"{_SAVING}::test_two_hundred_random_kills_while_saving",),
        figure=lambda p, _: f"{p['kills']} kills up to step {p['step']}: {len(p['bad'])} bad, {p['went_back']} times back; in stages "
                            + ", ".join(f"{stage}: {count}" for stage, count in p["died_in_stage"].items())),
    "points": Row(
        test="a named crash point before and after each of the 7 stages, with a power cut", target="each with its one expected outcome",
        nodes=(f"{_SAVING}::test_each_crash_point_has_its_one_outcome",),
        figure=lambda p, _: f"{p['num_crash_points']} of {p['num_crash_points']} as expected"),
    "order": Row(
        test="recorded order of calls", target="fsync file < manifest < directory < rename < parent < prune",
        nodes=(f"{_SAVING}::test_order_of_calls",), figure=lambda p, _: "as required, call by call"),
    "disk": Row(
        test="disk full at each write", target="old checkpoint verifies, warning, code 6 only after three",
        nodes=(f"{_SAVING}::test_the_writing_calls_of_a_save", f"{_SAVING}::test_disk_full_at_each_write",
               f"{_SAVING}::test_a_write_that_really_fails", "tests/trainer/test_checkpoint.py::test_saver_counts_failures_in_a_row")),
    "corruption": Row(
        test="corruption: truncate, extend, flip one bit, delete, empty",
        target="all detected; the one before is used; code 5 if none is left",
        nodes=tuple(f"{_SAVING}::{name}" for name in (
            "test_damage_is_detected_and_the_one_before_is_used", "test_a_wrong_length_is_told_from_wrong_content",
            "test_each_flipped_bit_is_detected", "test_every_bit_of_the_manifest_counts"))),
    "hostile": Row(
        test="hostile files: pickle named .safetensors, huge header, link out of the run, ../ in names; fuzzed readers",
        target="refused, nothing executed",
        nodes=(*(f"{_SAVING}::{name}" for name in (
            "test_pickle_named_safetensors_is_refused_and_not_executed", "test_hostile_headers_are_refused",
            "test_names_that_lead_out_are_refused", "test_links_to_files_are_refused", "test_links_to_directories_are_refused",
            "test_a_linked_checkpoint_root_is_refused_by_readers_and_writers")),
            "tests/trainer/test_checkpoint.py", "tests/trainer/test_eraser_files.py", "tests/faults/test_fuzz.py")),
    "resume": Row(
        test="resume: AdamW and 8-bit, at every kind of step, with accumulation, sampling in one run only, another memory plan",
        target="bitwise equal weights, moments, RNG, losses",
        nodes=tuple(f"{_STATE}::{name}" for name in (
            "test_interrupted_and_resumed_equals_straight_bitwise", "test_sampling_and_saving_change_nothing",
            "test_resumed_under_another_memory_plan_equals_straight_bitwise", "test_longer_run_goes_on_from_a_finished_one",
            "test_resume_with_other_settings_is_refused")) + ("tests/trainer/test_optimizer_state.py",)),
    "soak": Row(
        test="soak: hundreds of steps with a random kill every ~50", target="final weights bitwise those of the fault-free run",
        nodes=(f"{_RUNS}::test_soak",),
        figure=lambda p, _: f"{p['num_steps']} steps, {p['kills']} kills: {len(p['different'])} tensors or records differ"),
    "signals": Row(
        test="SIGINT / SIGTERM / SIGHUP in forward, backward, save, sampling",
        target="saved, 130 / 143 / 129, at most one more step; a second one leaves within a second with a valid newest checkpoint",
        nodes=(f"{_RUNS}::test_a_signal_in_any_phase_saves_and_ends_and_a_second_one_leaves_at_once", "tests/trainer/test_signals.py"),
        figure=lambda p, n: f"{p['signals']} of {p['signals']} saved with their code, at most {p['most_steps_after']} more steps; "
                            f"a second one: gone in {p['seconds_after_second']:.2f} s at most, the newest checkpoint valid; "
                            f"{n - 1} of {n - 1} of its other tests"),
    "nan": Row(
        test="NaN put into the loss, a gradient, an adapter weight",
        target="stopped before the step, weights bitwise unchanged, code 4, first tensor, block and step named",
        nodes=(f"{_STATE}::test_non_finite_stops_before_any_weight_changes", "tests/faults/test_fault_matrix.py::test_a_fault_is_named")),
    "oom": Row(
        test="out of memory put into each phase",
        target="phase, peak table, command to paste, code 3, last checkpoint valid; in sampling: a warning, and training goes on; "
               "--on-oom step-down ends with the same bits",
        nodes=("tests/trainer/test_recovery.py",)),
    "leak": Row(
        test="no leak over 200 steps", target="0 bytes on a card, under 5 MiB of host memory",
        nodes=(f"{_RUNS}::test_no_leak_over_two_hundred_steps",),
        figure=lambda p, _: f"{p['host_growth_bytes'] / 2**20:.2f} MiB of host memory from step {p['from_step']} to {p['to_step']}, "
                            f"{p['tensor_growth']} tensors; on a card: not measured"),
    "writers": Row(
        test="two processes on one run directory", target="the second stops with code 5, naming the pid",
        nodes=(f"{_SAVING}::test_second_writer_is_refused_naming_the_first_whose_death_frees_the_run",
               f"{_STATE}::test_run_directory_in_use_is_refused", f"{_RUNS}::test_directories_of_runs_that_start_together_differ")),
    "streams": Row(
        test="output not a terminal, closed, or full", target="no escape bytes, at most one line per interval, no traceback; a crash of "
        "the monitor never stops training",
        nodes=("tests/trainer/test_monitor.py::test_plain_lines_have_no_escapes_and_keep_the_interval",
               "tests/trainer/test_monitor.py::test_a_crash_of_the_monitor_is_a_warning",
               f"{_RUNS}::test_streams_that_nobody_reads_end_without_a_traceback", f"{_RUNS}::test_a_full_disk_behind_stdout_is_said",
               f"{_RUNS}::test_a_clock_that_jumps_changes_nothing")),
    "places": Row(
        test="places that cannot be written, before and in the middle of a run; a card or NVML that vanishes (emulated)",
        target="code 6 and one line that says where; older checkpoints stay; the monitor goes on",
        nodes=(f"{_RUNS}::test_a_directory_that_becomes_read_only_costs_the_run_but_no_checkpoint",
               f"{_RUNS}::test_places_that_cannot_be_written_end_with_a_word",
               "tests/trainer/test_config.py::test_a_place_is_refused_before_anything_is_loaded",
               "tests/trainer/test_doctor.py::test_a_lost_card_ends_training_in_one_line",
               "tests/trainer/test_monitor.py::test_a_card_that_vanishes_leaves_the_monitor_running",
               "tests/memory/test_meter.py::test_a_lost_card_does_not_end_the_run", "tests/memory/test_meter.py::test_a_sensor_that_fails_is_left_out",
               "tests/memory/test_exhaustion.py::test_a_lost_card_is_told_from_a_bug")),
    "processes": Row(
        test="two processes (gloo): losses; a signal, a NaN, a full disk or the death of one; torchrun --max-restarts",
        target="losses of one process to 1e-4; all end with the same code and a valid checkpoint; goes on by itself, bitwise",
        nodes=("tests/trainer/test_distributed.py",)),
}


def measure(row: Row) -> dict[str, Any]:
    """Run the tests of a row in a process of their own."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "slow or not slow", "-p", "no:cacheprovider", "-o", "junit_family=xunit1",
             f"--junitxml={report}", *row.nodes],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if not report.exists():
            raise RuntimeError(f"{row.test}: pytest ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        cases = ElementTree.parse(report).getroot().findall(".//testcase")
    outcomes = Counter(next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed") for case in cases)
    found: Properties = {p.get("name"): _value(p.get("value")) for case in cases for p in case.findall(".//property")}
    num_run = len(cases) - outcomes["skipped"]  # what needs a card is skipped without one
    holds = num_run > 0 and outcomes["passed"] == num_run
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    figure = row.figure(found, num_run) if holds else f"{outcomes['passed']} of {num_run}; not {', '.join(failed[:3])}"
    if outcomes["skipped"]:
        figure += f"; {outcomes['skipped']} more, on a card: not run"
    return {"test": row.test, "target": row.target, "figure": figure, "holds": holds, "num_tests": num_run, "measured": found,
            "seconds": round(time.monotonic() - started, 1), "commit": provenance()["commit"]}


def _value(text: str) -> Any:
    """A property as it was recorded: pytest writes `str(value)`."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description="Measure what a run promises.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all of them by default")
    names = parser.parse_args(argv).rows or list(ROWS)
    unknown = set(names) - set(ROWS)
    if unknown:
        parser.error(f"there is no row {sorted(unknown)[0]}; {', '.join(ROWS)} are")
    path, found = RESULTS / "reliability.json", {}
    for name in names:
        found[name] = measure(ROWS[name])
        print(f"{'holds' if found[name]['holds'] else 'FAILS':<6} {name:<11} {found[name]['figure']}", flush=True)
        known = json.loads(path.read_text())["rows"] if path.exists() else {}
        known |= found
        write_result("reliability", {"rows": {n: known[n] for n in ROWS if n in known}}, in_parts=True)
    return 0 if all(row["holds"] for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
