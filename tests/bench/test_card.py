"""The suite for a card, walked through at toy size on the CPU; and what it computes without one."""

import gzip
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError
from unittest.mock import patch

import pytest
import torch

import run
from bench import provenance, test_peaks
from bench.card import __main__ as suite
from bench.card import minimum, offload, peaks, rig, speed, tables
from bench.card.feasibility import came_to
from bench.card.forecasts import Forecaster
from bench.card.gauge import Gauge, covered, overlap
from bench.card.offload import PEERS
from bench.card.peaks import thick, thin
from bench.card.rig import Cell
from bench.card.session import Session, failures, goal
from bench.overlap import block_seconds, count_loads
from bench.provenance import RESULTS, of_cards
from bench.times import cell_of
from memory.cards import lookup
from memory.compiling import compile_blocks
from memory.plan import MemoryPlan
from memory.snapshots import replay_snapshot
from trainer.backbones import published

PARTS = ("short", "health", "peaks", "cap", "feasibility", "minimum", "speed", "choice", "offload")


@pytest.fixture
def toys_may_come(monkeypatch):
    """Toy models that a test registers are gone after it."""
    for name in ("TRANSFORMERS", "SIZES", "NATIVE_DTYPES", "VAES", "SCHEDULERS"):
        monkeypatch.setattr(published, name, dict(getattr(published, name)))
    monkeypatch.setattr(rig, "_backbones", {})


def test_every_part_walks_through_and_is_not_measured_twice(tmp_path, toys_may_come, monkeypatch, capsys):
    monkeypatch.setitem(compile_blocks.__kwdefaults__, "backend", "eager")  # in a fraction of the time; test_compiling.py goes all the way
    monkeypatch.setattr(Gauge, "release", lambda gauge: None)  # on the CPU it only collects garbage, after each of a hundred cells
    monkeypatch.delitem(sys.modules, "bench.card.__main__")  # as in a process of its own
    monkeypatch.setattr(sys, "argv", ["run.py", "bench", "card", "--dry", "--out", str(tmp_path)])
    code = run.main()
    shown, said = capsys.readouterr()
    assert code == 0, said
    results = {name: json.loads((tmp_path / "dry" / f"{name}.json").read_text()) for name in PARTS}
    for name, result in results.items():
        assert result["dry"] and not result["skipped"] and result["provenance"]["versions"]["torch"]
        assert result["goals"] and all(g["reached"] is None for g in result["goals"])
        # Every goal is computed, as on a card; only a card's own record shows copies beside computation, and addresses;
        # and where nobody knows what the host has, nothing is kept there.
        assert {g["goal"] for g in result["goals"] if g["measured"] is None} <= {
            "share of copies to the device that computation does not wait for", "requests that the simulator serves at another address",
            "time saved, 5b at 49 frames under 24 GB, where blocks may keep things on the host"}
        assert f"{name}: {result['goals'][0]['goal']}" in shown
    # Nothing failed or ran out of memory along the way, peers included.
    for name in set(PARTS) - {"peaks", "choice"}:
        for label, cell in results[name]["cells"].items():
            assert {"failed", "out_of_memory"}.isdisjoint(cell), f"{name} {label}: {cell}"
    assert results["choice"]["grid"] and not [c for c in results["choice"]["grid"].values() if "step_seconds" not in c]
    assert results["choice"]["regret"] and results["cap"]["time_saved"]
    assert all(set(row["allocated_error_by_phase"]) == {"teacher", "student forward", "student backward", "optimizer"}
               for row in results["peaks"]["cells"])
    ring = results["offload"]["cells"]["5b-17f ring"]["seconds_by_phase"]
    assert 0 < ring["waiting for transfers"] < sum(ring.values())
    equality = results["offload"]["equality"]
    assert len(equality) == 4 and all(e["equal"] and e["num_tensors"] > 10 for e in equality.values())
    assert results["offload"]["cells"]["5b-17f ring"]["bytes_streamed_a_step"] > 0
    assert "5b-17f planner's residency" in results["offload"]["cells"]
    losses = {results["speed"]["cells"][name]["loss"] for name in ("2b 17f compiled", "2b 17f streamed, compiled")}
    assert len(losses) == 1 and set(results["speed"]["share_of_matrix_rate"]) == {"5b 49f", "5b 49f math", "5b 49f compiled"}
    assert results["feasibility"]["naive"] and all(n["ran"] for n in results["feasibility"]["naive"].values())
    assert results["health"]["cells"]["2b 17f"]["num_drawn"] == 2  # beside the watched rig in both rounds, and never beside the plain one

    before = (tmp_path / "dry" / "health.json").stat().st_mtime_ns
    assert suite.run(["--dry", "--only", "health", "--out", str(tmp_path)]) == 0
    assert "health: cost of the checks" in capsys.readouterr().out
    assert (tmp_path / "dry" / "health.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("words, message", [
    (["--only", "peeks"], "peeks"), (["--seconds", "0"], "--seconds 0: from 10 to 86400"), (["--workers", "-1"], "--workers -1"),
    ([], "there is no CUDA card here; --dry")])
def test_wrong_input_ends_with_2_and_a_word(words, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = suite.run(words)
    except SystemExit as e:  # what tyro cannot parse
        code = e.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_call_begins_what_it_can_end_and_the_next_goes_on():
    left, calls = list(suite.PARTS), 0
    while left:
        now = suite.in_time(left, suite.Suite().seconds)
        assert now == left[:len(now)] and now
        left, calls = left[len(now):], calls + 1
    assert tuple(suite.PARTS) == PARTS and calls == 4
    assert suite.in_time(["speed", "cap"], 10) == ["speed"] and suite.in_time([], 480) == []


def test_a_signal_ends_it_with_what_was_measured(tmp_path, monkeypatch, capsys):
    def measure(session, out):
        done = []
        for cell in session.within_budget(("first", "second"), skipped := []):
            done.append(cell)
            os.kill(os.getpid(), signal.SIGTERM)
        return {"goals": [goal("cells", len(done), 1)], "table": [["a"]], "skipped": skipped}

    monkeypatch.setattr(suite.peaks, "measure", measure)
    before = signal.getsignal(signal.SIGTERM)
    assert suite.main(suite.Suite(dry=True, out=tmp_path, only=("peaks", "cap"))) == 0
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "dry" / "peaks.json").read_text())["skipped"] == ["second"]
    told = "peaks: 1 cells were not measured, as the time ended or a signal came; --again --only peaks measures all"
    assert told in said
    assert "not begun: cap; the same command again measures it" in said and signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(suite.cap, "measure", lambda session, out: {"goals": [], "table": [["a"]], "skipped": []})
    assert suite.main(suite.Suite(dry=True, out=tmp_path, only=("peaks", "cap"))) == 0
    assert told in capsys.readouterr().out  # of what an earlier call has left, too


def test_a_part_that_fails_is_told_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def fail(session, out):
        raise KeyError("a bug")

    monkeypatch.setattr(suite.peaks, "measure", fail)
    monkeypatch.setattr(suite.health, "measure", lambda session, out: {"goals": [goal("cost", 0.1, 1.0)], "table": [["a"]], "skipped": []})
    assert suite.main(suite.Suite(dry=True, out=tmp_path, only=("peaks", "health"))) == 1
    said = capsys.readouterr()
    assert "a bug" in said.err and "--only peaks" in said.err and "health: cost" in said.out
    assert [p.name for p in (tmp_path / "dry").iterdir()] == ["health.json"]


@pytest.mark.parametrize("gib", [8, 15])
def test_a_card_below_the_smallest_cap_has_its_plain_steps_measured(tmp_path, monkeypatch, gib):
    monkeypatch.setattr(Gauge, "total_bytes", lambda gauge: gib << 30)
    assert suite.run(["--dry", "--only", "cap", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "dry" / "cap.json").read_text())
    assert list(result["cells"]) == ["5b 49f plain"] and {g["measured"] for g in result["goals"]} == {None}


def test_a_forecast_that_fails_costs_no_measurement(tmp_path, monkeypatch):
    real, calls = peaks.peaks_of, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no such trace")
        return real(*args)

    for part in (peaks, minimum, speed):
        monkeypatch.setattr(part, "peaks_of", failing)
    assert suite.run(["--dry", "--only", "peaks", "--out", str(tmp_path)]) == 0
    first, *others = json.loads((tmp_path / "dry" / "peaks.json").read_text())["cells"]
    assert "no such trace" in first["predicted"]["failed"] and "step_seconds" in first["measured"]
    assert others and all("allocated_error" in cell for cell in others)


def test_a_planner_that_fails_costs_its_own_cells_only(tmp_path, monkeypatch, capsys):
    def fail(*args, **settings):
        raise RuntimeError("no such plan")

    monkeypatch.setattr("bench.card.forecasts.search", fail)
    assert suite.run(["--dry", "--only", "cap", "feasibility", "choice", "--out", str(tmp_path)]) == 0
    results = {part: json.loads((tmp_path / "dry" / f"{part}.json").read_text()) for part in ("cap", "feasibility", "choice")}
    assert list(results["cap"]["cells"]) == ["5b 49f plain"] and len(results["choice"]["grid"]) == 3 and results["feasibility"]["naive"]
    assert all(cell["failed"].endswith("RuntimeError: no such plan") for cell in results["feasibility"]["cells"].values())
    assert "the planner failed: RuntimeError: no such plan" in capsys.readouterr().err


def test_nothing_is_predicted_beside_what_measures_the_host(tmp_path, monkeypatch):
    order = []
    for name, part in suite.PARTS.items():
        monkeypatch.setattr(part, "measure", lambda session, out, name=name: order.append(name) or {"goals": [], "table": [["a"]]})
        monkeypatch.setattr(part, "prepare", lambda session, name=name: order.append(f"predict {name}"), raising=False)
    assert suite.run(["--dry", "--only", "cap", "short", "peaks", "health", "--out", str(tmp_path)]) == 0
    assert order == ["short", "health", "predict peaks", "predict cap", "peaks", "cap"]


def test_a_device_that_is_gone_ends_the_suite_with_what_was_measured(tmp_path, monkeypatch, capsys):
    def gone():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def measure(session, out):
        done = []
        for cell in session.within_budget(("first", "second", "third"), skipped := []):
            if done:  # from here on the card does not answer
                session.gauge.is_card = True
                monkeypatch.setattr(torch.cuda, "synchronize", lambda device: gone())
            done.append(session.gauge.attempt(gone if done else lambda: cell).as_json())
        return {"goals": [goal("cells", len(done), 1)], "table": [["a"]], "skipped": skipped, "cells": done}

    monkeypatch.setattr(suite.peaks, "measure", measure)
    monkeypatch.setattr(suite.cap, "measure", lambda *_: pytest.fail("measured on a device that is gone"))
    assert suite.main(suite.Suite(dry=True, out=tmp_path, only=("peaks", "cap"))) == 1
    said, result = capsys.readouterr(), json.loads((tmp_path / "dry" / "peaks.json").read_text())
    assert result["cells"] == ["first", {"failed": "RuntimeError: CUDA error: an illegal memory access was encountered"}] and result["skipped"] == ["third"]
    assert "does not answer any more: CUDA error: an illegal" in said.err and "not begun: cap; the same command again" in said.out


def test_rates_are_kept_of_a_device_that_goes_in_the_first_step(tmp_path, monkeypatch):
    def lose(cell, gauge, **settings):
        gauge.lost = "CUDA error: an illegal memory access was encountered"
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: torch.empty(-1))
        raise RuntimeError(gauge.lost)

    monkeypatch.setattr(speed, "measured", lose)
    assert suite.run(["--dry", "--only", "speed", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "dry" / "speed.json").read_text())
    assert result["rates"]["matrix_flops_per_second"] > 0 and "illegal memory access" in result["cells"]["5b 49f"]["failed"]


def test_a_part_that_loses_the_device_is_told(tmp_path, monkeypatch, capsys):
    def fail(session, out):
        session.gauge.is_card = True
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: torch.empty(-1))
        raise KeyError("a bug")

    monkeypatch.setattr(suite.peaks, "measure", fail)
    monkeypatch.setattr(suite.cap, "measure", lambda *_: pytest.fail("measured on a device that is gone"))
    assert suite.main(suite.Suite(dry=True, out=tmp_path, only=("peaks", "cap"))) == 1
    assert "does not answer any more" in (said := capsys.readouterr().err) and "--only peaks\n" in said


def test_a_result_that_cannot_be_read_is_measured_anew(tmp_path, capsys):
    path = tmp_path / "peaks.json"
    assert suite.stored(path) is None
    path.write_text('{"goals": []}')
    assert suite.stored(path) == {"goals": []}
    path.write_text('{"goals": [')
    assert suite.stored(path) is None and "cannot be read" in capsys.readouterr().err


def test_hidden_time_is_the_time_that_both_sets_of_intervals_cover():
    assert covered([(0, 2), (1, 3), (5, 6)]) == 4
    assert overlap([(0, 2), (1, 3)], [(2, 4), (2.5, 5)]) == 1
    assert overlap([(0, 1)], [(1, 2)]) == 0


def test_a_thinned_snapshot_replays_as_the_whole_one():
    def entry(action, addr, size, stream):
        return {"action": action, "addr": addr, "size": size, "stream": stream, "frames": ["…"] * 50}

    history = [entry("segment_alloc", 10, 2 << 20, 77), entry("alloc", 10, 4096, 77), entry("free_requested", 10, 4096, 77),
               entry("free_completed", 10, 4096, 77), {"action": "oom", "size": 1, "stream": 77}]
    thinned = thin({"device_traces": [history]})
    assert "frames" not in json.dumps(thinned)
    whole = {"device_traces": [[{"addr": 0} | e for e in history]]}
    assert replay_snapshot(thick(thinned)) == replay_snapshot(whole)


@pytest.mark.parametrize("value, at_least, reached", [(0.02, False, False), (0.01, False, True), (5, True, True), (None, True, None)])
def test_goal(value, at_least, reached):
    assert goal("", value, {False: 0.01, True: 5}[at_least], at_least=at_least)["reached"] is reached


def test_where_bits_are_compared_no_kernel_adds_in_an_order_of_its_own():
    state = lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
                     torch.utils.deterministic.fill_uninitialized_memory)
    before = state()
    with pytest.raises(ArithmeticError), Gauge(torch.device("cpu")).reproducible():
        assert state() == (True, False, False)
        raise ArithmeticError
    assert state() == before == (False, False, True)


@pytest.mark.skipif(test_peaks.ON_CARD, reason="measures at toy size, without a card")
@pytest.mark.parametrize("name", ["checkpoint all", "keep all on host", "stream, boundaries on host, chunks", "stream, lockstep"])
def test_a_whole_step_peaks_where_it_is_predicted_to(name, benchmark, toys_may_come):
    cell = Cell(model="toy-5b", frames=9, rank=64, plan=MemoryPlan(**test_peaks.PLANS[name]))
    found = test_peaks.measure(benchmark, cell)
    assert found["peak_bytes"] == pytest.approx(found["predicted_bytes"], rel=1e-3)


def test_how_often_streamed_weights_cross_the_link_in_a_step(toys_may_come):
    loads = count_loads(10)
    # There and back, what the ring's two buffers still hold at either end left out; three passes of the teacher, and two of those.
    assert loads["a student's pass alone"] == pytest.approx((2 * 10 - 4) / 10)
    assert loads["a whole step"] == pytest.approx((7 * 10 - 8) / 10)
    assert loads["one with --guidance batched"] == pytest.approx(loads["a whole step"] - 1)


def test_a_block_of_the_5b_takes_what_its_operations_take_at_the_assumed_rates():
    card = lookup("4090")  # 7.91 TFLOPs forward at 49 frames
    assert block_seconds(card, 17_776, 3072) == pytest.approx(
        4.03e12 / (card.tensor_rate * card.matmul_fraction) + 3.88e12 / (card.tensor_rate * card.attention_fraction), rel=2e-3)


def test_a_cells_peaks_stay_its_own():
    gauge = Gauge(torch.device("cpu"))
    gauge.begin()
    gauge.phase("teacher")
    peaks = gauge.end()
    before = {name: dict(peak) for name, peak in peaks.items()}
    gauge.phase("teacher")  # the next one warms up, and begins to be measured later
    gauge.phase("optimizer")
    gauge.phase("teacher")
    assert peaks == before and set(peaks) == {"teacher"}


@pytest.mark.parametrize("error, full", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True), (MemoryError("the host has no more"), True),
    (RuntimeError("CUDA error: out of memory\nmore"), True),  # the driver's own, as where a kernel is loaded
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True), (RuntimeError("a bug"), False)])
def test_whoever_says_that_memory_ran_out_is_believed(error, full):
    def run():
        raise error

    attempt = Gauge(torch.device("cpu")).attempt(run)
    assert (attempt.out_of_memory is not None) == full == (attempt.failed is None)
    assert (attempt.out_of_memory or attempt.failed).endswith(str(error).splitlines()[0])


def test_a_cell_whose_dtype_the_card_lacks_is_told_and_not_measured():
    session = Session(Gauge(torch.device("cpu")), lookup("t4"), Forecaster(0))
    bf16, fp16 = session.cell("5b", 9), session.cell("5b", 9, dtype="float16")
    with patch("bench.card.session.measured", return_value={"step_seconds": 1.0}) as measure:
        assert session.measure(bf16, num_steps=1) == {"settings": bf16.name(), "num_forecasts_beside": 0, "failed": "Tesla T4 has no bfloat16"}
        assert not measure.called
        assert session.measure(fp16, num_steps=1) == {"settings": fp16.name(), "num_forecasts_beside": 0, "step_seconds": 1.0}


def test_forecasts_under_way_are_counted_and_leave_cores_and_signals_to_others():
    forecaster = Forecaster(1)
    try:
        forecaster.ask(time.sleep, 0.5)
        forecaster.ask(os.nice, 0)
        assert forecaster.num_under_way() == 2
        assert forecaster.answer(os.nice, 0) == min(os.nice(0) + 19, 19) and forecaster.num_under_way() == 0
        assert forecaster.answer(signal.getsignal, signal.SIGINT) == signal.SIG_IGN  # else Ctrl-C would end what is measured too
    finally:
        forecaster.close()


def test_a_forecast_that_nobody_waits_for_does_not_hold_up_the_end():
    forecaster = Forecaster(1)
    forecaster.ask(os.nice, 0)
    forecaster.ask(time.sleep, 30)
    forecaster.answer(os.nice, 0)  # the worker is there
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))  # of the program around it
    other.start()
    started = time.monotonic()
    forecaster.close()
    for worker in set(multiprocessing.active_children()) - {other}:  # as the interpreter does when it ends
        worker.join()
    assert time.monotonic() - started < 10
    assert other.is_alive()
    other.terminate()
    other.join()


def test_a_worker_that_is_killed_takes_no_answer_along():
    forecaster = Forecaster(1)
    try:
        worker = forecaster.answer(os.getpid)
        forecaster.ask(time.sleep, 60)
        os.kill(worker, signal.SIGKILL)
        while forecaster.num_under_way():
            time.sleep(0.01)
        forecaster.ask(max, 1, 2)  # ahead of need, where nobody is left to do it
        assert forecaster.answer(max, 1, 2) == 2
        assert forecaster.answer(os.getpid) == worker != os.getpid()
    finally:
        forecaster.close()


def test_a_forecast_that_does_not_end_holds_nothing_up(monkeypatch):
    monkeypatch.setattr("bench.card.session.PATIENCE", 0.5)
    session = Session(Gauge(torch.device("cpu")), lookup("4090"), Forecaster(0), deadline=time.monotonic() + 0.5)
    (done := Future()).set_result(2)
    session.forecaster._futures |= {(max, (1, 2)): done, (time.sleep, (60,)): Future()}
    told = session.forecast(time.sleep, 60)
    assert told.failed == "TimeoutError: the forecast did not come in time" and time.monotonic() > session.deadline + 0.5
    assert session.forecast(max, 1, 2).value == 2  # what is there is there
    assert session.forecast(max, 3, 4).failed  # and nothing is begun here


def test_what_was_measured_is_written_where_a_package_is_missing(tmp_path, monkeypatch):
    def version(package):
        if package == "bitsandbytes":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(provenance, "version", version)
    written = json.loads(provenance.write_result("peaks", {"cells": [1]}, tmp_path).read_text())
    assert written["cells"] == [1] and written["provenance"]["versions"]["torch"] == "1.0" and "bitsandbytes" not in written["provenance"]["versions"]


@pytest.mark.parametrize("failed, complete, count", [([], True, None), ([False], False, None), ([False, False], True, 0), ([False, True], False, 1)])
def test_what_was_not_asked_has_not_succeeded(failed, complete, count):
    assert failures(failed, complete=complete) == count


def test_goals_of_what_was_not_measured_are_neither_reached_nor_missed():
    cell = {"step_seconds": 1.0, "allocated_bytes": 10, "num_retries": 0, "num_driver_allocations": 0, "grown_bytes": 0, "streamed_bytes": 0}
    for found in ({}, {"5b-17f all resident": cell}, {f"2b-17f {PEERS[-1]}": cell}):
        for g in offload.goals(found, {}, {}):
            assert g["measured"] is None or "retries" in g["goal"], g


@pytest.mark.parametrize("ours, seconds, over, added", [(9, 1.0, -0.5, 6.0), (10, 1.0, -0.5, 6.0), (11, 1.0, None, None), (9, 0.8, -0.6, 150.0)])
def test_a_peer_is_compared_with_what_holds_no_more(ours, seconds, over, added):
    """And what ours adds to all-resident is not taken to be less than steps differ by anyway."""
    def cell(seconds, num_bytes):
        return {"step_seconds": seconds, "allocated_bytes": num_bytes, "num_retries": 0, "num_driver_allocations": 0, "grown_bytes": 0}

    found = {"2b-17f all resident": cell(0.8, 20), "2b-17f ring": cell(seconds, ours), "5b-17f ring": cell(0.1, 1),
             f"2b-17f {PEERS[-1]}": cell(2.0, 10)}
    reached = {g["goal"]: g["measured"] for g in offload.goals(found, {}, {})}
    measured = [reached[name] for name in reached if PEERS[-1] in name or "sequential offload adds" in name]
    assert measured == [over and pytest.approx(over), added and pytest.approx(added)]


def test_sizes_that_a_card_cannot_stand_for_are_left_out(monkeypatch):
    session = Session(Gauge(torch.device("cpu")), lookup("4090"), Forecaster(0))
    assert session.sizes([8.0, 96.0]) == [8.0, 96.0]  # of the CPU nothing is asked
    monkeypatch.setattr(session.gauge, "total_bytes", lambda: int(23.6 * 2**30))
    assert session.sizes([8.0, 24.0, 29.0, 48.0]) == [8.0, 24.0, 29.0]


@pytest.mark.parametrize("naive, words", [
    ({"ran": True}, "runs"), ({"ran": False, "out_of_memory": "x", "broke_in": "teacher", "failed": None}, "breaks in teacher"),
    ({"ran": False, "out_of_memory": None, "broke_in": "teacher", "failed": "a bug"}, "failed: a bug")])
def test_a_recipe_that_failed_did_not_break_for_want_of_memory(naive, words):
    assert came_to(naive) == words


@pytest.mark.parametrize("num_cells, words", [(0, ""), (1, "| 1 |"), (2, "With a constant fitted to the card")])
def test_a_part_of_the_peaks_makes_a_table(num_cells, words, monkeypatch):
    """Where the time ended, and where no snapshot could be taken."""
    rows = [{"settings": "cogvideox-2b 17f", "allocated_error": 0.01, "reserved_error": 0.02, "measured": {"allocated_bytes": 2**30, "reserved_bytes": 2**30},
             "predicted": {"allocated_bytes": 2**30, "reserved_bytes": 2**30}}] * num_cells
    part = {"card": "NVIDIA H200", "cells": rows, "snapshots": {"2b-9f-plain": {"failed": "RuntimeError"}}, "fit": peaks._fit(rows),
            "provenance": {"card": "NVIDIA H200", "versions": {"torch": "2.11.0"}, "date": "2026-12-01", "commit": ""}}
    monkeypatch.setattr(tables, "results", lambda *parts: [("peaks", part)])
    assert words in tables.peaks() and "in 0 recorded runs" in tables.peaks()


def test_dry_results_are_of_no_card(tmp_path):
    for name in ("dry", "some-card"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "peaks.json").write_text("{}")
    assert of_cards("peaks", tmp_path) == [tmp_path / "some-card" / "peaks.json"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/snapshot-*.json.gz")), ids=lambda path: path.name)
def test_every_request_of_a_recorded_run_is_served_at_the_address_that_the_card_chose(path):
    replayed = replay_snapshot(thick(json.loads(gzip.decompress(path.read_bytes()))))
    assert replayed.num_placed_alike == replayed.num_requests > 10_000
    assert replayed.simulated.peak_reserved_bytes == replayed.recorded_peak_reserved_bytes


def test_a_cell_is_read_back_from_its_name():
    for cell in (Cell(model="cogvideox-2b", frames=9, rank=16, plan=MemoryPlan(resident_blocks=0, boundaries="host", checkpoint="every:2")),
                 Cell(model="cogvideox-5b", frames=49, student_only=True, plan=MemoryPlan(optimizer="adamw8bit", feed_forward_chunks=4))):
        assert cell_of(cell.name()) == cell
