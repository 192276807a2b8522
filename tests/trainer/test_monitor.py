"""The monitor: what it shows at 80 and 200 columns, plain lines elsewhere, and that it cannot hurt a run."""

import io
import logging
import math
import mmap
import os
import pty
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from memory.meter import Meter
from trainer import live_view
from trainer.clock import WAITING, PhaseClock
from trainer.findings import finding
from trainer.live_view import block_strip, duration, sparkline, trend, view
from trainer.monitor import NUM_WARM_UP, Monitor, Readings, read_memory, read_process, watch
from trainer.signals import StopFlag

GIB = 2**30
CARD = {"allocated_bytes": 11 * GIB, "reserved_bytes": 13 * GIB, "device_used_bytes": 15 * GIB,
        "device_total_bytes": 24 * GIB, "process_bytes": 21 * GIB, "host_available_bytes": 30 * GIB,
        "temperature_celsius": 71, "power_watts": 312}
HOST = {"process_bytes": 2 * GIB, "host_total_bytes": 16 * GIB, "host_available_bytes": 8 * GIB}


def record(step, num_blocks=42, **more):
    return {"step": step, "loss": 0.5 / (step + 1), "unlearn": 0.4, "loc": 1e-5, "pre": 0.1, "gradient_norm": 0.25,
            "seconds": 2.0, "blocks": {"gradient": [1e-3] * num_blocks, "update": [1e-4] * num_blocks},
            "phase_seconds": {"teacher": 1.0, "student": 0.5, "backward": 0.4, "optimizer": 0.04, WAITING: 0.06},
            "peak_bytes_by_phase": {"teacher": 9 * GIB, "backward": 14 * GIB}, **more}


def state(records, memory=CARD, **more):
    return {"title": "red", "num_steps": 100, "done": len(records), "records": records, "elapsed": 83.0,
            "seconds_per_step": 2.0, "eta": 140.0, "stopping": False, "memory": memory, "findings": [],
            "facts": {"budget_bytes": 22 * GIB, "predicted_peak_bytes": 12 * GIB}, **more}


def drawn(values, width=80):
    console = Console(file=io.StringIO(), width=width, height=60, color_system=None)
    console.print(view(values, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 129, 130, 200])
def test_the_view_keeps_inside_of_the_terminal(width):
    lines = drawn(state([record(i) for i in range(30)]), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= (24 if width >= 80 else 34)
    text = "\n".join(lines)
    for wanted in ("30/100", "ETA 2:20", "health", "unlearn", "gradients", "step time", "teacher", "memory", "71 °C"):
        assert wanted in text or width < 80


def test_everything_that_is_asked_for_is_shown():
    text = drawn(state([record(i) for i in range(30)]), 200)
    for wanted in ("30%", "2.00 s/step", "teacher 50%", "student 25%", "backward 20%", "optimizer 2%",
                   "waiting for transfers 3%", "allocated 11.0", "reserved 13.0", "device 15.0 of 24.0 GiB",
                   "budget 22.0", "predicted peak 12.0", "backward 14.0", "process 21.0 GiB", "312 W", "● healthy"):
        assert wanted in text, wanted


def test_progress_is_read_without_colour():
    line = drawn(state([record(i) for i in range(30)])).splitlines()[0]
    assert 0 < line.count("━") < line.count("╌")


def test_where_there_is_little_room_the_newest_value_is_in_the_line():
    values = [0.0] * 29 + [1.0]
    lines = drawn(state([record(i, loss=value) for i, value in enumerate(values)]), 26).splitlines()
    assert "█" in next(line for line in lines if line.startswith("loss"))


def test_the_step_time_is_read_without_colour():
    lines = drawn(state([record(i) for i in range(30)])).splitlines()
    line = next(i for i, line in enumerate(lines) if line.startswith("step time"))
    assert lines[line].split()[-1] == 30 * "█" + 15 * "▓" + 12 * "▒" + "░" + 2 * "╳"
    assert all(f"{mark} {name}" in "".join(lines[line + 1:line + 3]) for mark, name in zip("█▓▒░╳", ("teacher", "student", "backward", "optimizer", "waiting")))


def test_without_a_card_it_shows_process_memory():
    text = drawn(state([record(0)], memory=HOST))
    assert "process 2.00" in text and "host 8.00 of 16.0 GiB" in text and "reserved" not in text


@pytest.mark.parametrize("missing", ["blocks", "phase_seconds", "peak_bytes_by_phase", "loss"])
def test_what_is_missing_is_left_out(missing):
    records = [{k: v for k, v in record(i).items() if k != missing} for i in range(5)]
    assert "5/100" in drawn(state(records))
    assert "5/100" in drawn(state(records, memory={}))


@pytest.mark.parametrize("width", [30, 40, 50, 80])
def test_a_narrow_terminal_shows_that_the_run_is_stopping(width):
    text = drawn(state([record(0)], stopping=True), width=width)
    assert "stopping" in text and "elapsed" in text and "1/100" in text


def test_before_the_first_step_and_while_stopping():
    text = drawn(state([], eta=None, seconds_per_step=None))
    assert "0/100" in text and "ETA after warm-up" in text
    assert "stopping" in drawn(state([record(0)], stopping=True))


def test_dead_and_exploding_blocks_stand_out():
    norms = [1e-3 * (1 + i % 5) for i in range(42)]
    sick = list(norms)
    sick[7], sick[20], sick[30] = 0.0, 5.0, math.nan
    strip, dead, exploding = block_strip([norms] * 10 + [sick])
    assert dead == [7] and exploding == [20, 30]
    assert strip.plain[7] == "0" and strip.plain[20] == strip.plain[30] == "!" and strip.plain[0] in live_view.LEVELS
    text = drawn(state([record(i) for i in range(5)] + [record(5, blocks={"gradient": sick})]), 80)
    assert "dead: block 7" in text and "exploding: blocks 20, 30" in text


def test_healthy_spreads_raise_no_alarm():
    norms = [10 ** (-4 + 1.5 * i / 41) for i in range(42)]  # a decade and a half from first to last block
    assert block_strip([norms])[1:] == ([], [])


def test_all_blocks_exploding_or_dying_at_once_is_seen_against_the_steps_before():
    assert block_strip([[1.0] * 4] * 5 + [[1e4] * 4])[2] == [0, 1, 2, 3]
    assert block_strip([[1.0] * 4] * 5 + [[0.0] * 4])[1] == [0, 1, 2, 3]
    assert block_strip([[0.0] * 4])[1] == [0, 1, 2, 3]


def test_a_finding_names_block_and_cause():
    found = finding("wiped-attention", "teacher", block=7).as_json()
    assert "✗ wiped-attention in block 7 attention gives the same" in drawn(state([record(0)], findings=[found]))
    expected = finding("zero-down-gradient", "backward").as_json()
    assert "● healthy" in drawn(state([record(0)], findings=[expected]))
    assert "not checked" in drawn(state([record(0)], findings=None))


def test_sparkline_and_trend():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, math.nan, 1.0], 3) == "▁ ▁" and sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 50)) == 50
    assert sparkline([0, 6, 1, 5, 7, 3, 11, 3], 4) == "▁▁▅█"  # means 3, 3, 5, 7
    assert trend([2.0] * 20 + [1.0] * 20) == ("↘ -50%", "green")
    assert trend([1.0] * 20 + [30.0] * 20)[0] == "↗ x30"
    swinging = [4.0, 1.0, 0.0, 0.0, 2.0, 3.0, 1.0, 0.0] * 9  # as the timesteps of a trajectory do
    assert trend(swinging[:44])[0] != "→ +0%" and {trend(swinging[:n], 8)[0] for n in range(16, 72)} == {"→ +0%"} and trend(swinging[:15], 8)[0] == ""
    assert trend([1.0] * 50 + [2.0] * 50, 50)[0] == "↗ +100%"
    assert trend([1.0] * 39 + [math.inf])[0] == "not finite" and trend([1.0]) == ("", "")
    assert duration(42) == "0:42" and duration(4000) == "1:06:40" and duration(400_000) == "4 d 15:06:40"


def test_plain_lines_have_no_escapes_and_keep_the_interval():
    stream = io.StringIO()
    started = time.monotonic()
    with Monitor(400, stream=stream, interval=0.3, read_memory=lambda: HOST) as monitor:
        for i in range(400):
            monitor.step(record(i))
            time.sleep(0.0025)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert 2 <= len(lines) <= (time.monotonic() - started) / 0.3 + 2
    assert lines[-1].startswith("step 400/400  loss 0.00125  unlearn 0.4")
    assert "ETA 0:00" in lines[-1] and "process 2.00 GiB" in lines[-1]
    assert len(lines) == len(set(lines))


def test_a_step_is_said_once():
    stream = io.StringIO()
    with Monitor(2, stream=stream, interval=0.02) as monitor:
        monitor.step(record(0))
        deadline = time.monotonic() + 60
        while not stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
    assert stream.getvalue().count("step 1/2") == 1 == len(stream.getvalue().splitlines())


@pytest.mark.parametrize("fails", [False, True])
def test_the_run_is_named_once_before_anything_else(terminal, monkeypatch, fails):
    """Known however the run ends, and where the live view fails too."""
    if fails:
        monkeypatch.setattr(live_view, "view", lambda state, width: 1 / 0)
    with Monitor(1, stream=terminal.stream, run_dir=Path("runs/red-1"), refresh=0.02, interval=0.02) as monitor:
        monitor.step(record(0))
    text = terminal.text()
    assert text.startswith("run: runs/red-1\r\n") and text.count("runs/red-1") == 1


def test_findings_reach_plain_lines():
    stream = io.StringIO()
    with Monitor(1, stream=stream) as monitor:
        monitor.findings = lambda: [finding("no-op-adapter", "training").as_json()]
        monitor.step(record(0))
    assert "[warning: no-op-adapter]" in stream.getvalue()


def test_what_several_blocks_have_is_said_once():
    found = [finding("zero-gradient", "training", block=i, severity="warning").as_json() for i in range(42)]
    stream = io.StringIO()
    with Monitor(1, stream=stream) as monitor:
        monitor.findings = lambda: [*found, finding("dead-gelu", "training", block=7, severity="warning").as_json()]
        monitor.step(record(0))
    assert stream.getvalue().endswith("  [warning: zero-gradient in blocks 0, 1, 2, 3, 4, 5 and 36 more]  [warning: dead-gelu in block 7]\n")
    assert drawn(state([record(0)], findings=found)).count("zero-gradient") == 1


def test_a_step_that_takes_less_than_a_tenth_of_a_second_is_not_said_to_take_none():
    stream = io.StringIO()
    with Monitor(2, stream=stream) as monitor:
        monitor.step(record(0) | {"seconds": 0.0015})
    assert "  1.5 ms/step" in stream.getvalue()
    assert "  1.5 ms/step" in drawn(state([record(0)], seconds_per_step=0.0015), 120).splitlines()[0]
    assert "  2.00 s/step (1.80 s predicted)  " in drawn(state([record(0)], facts={"predicted_step_seconds": 1.8}), 120).splitlines()[0]


def test_off_is_silent():
    stream = io.StringIO()
    with Monitor(1, mode="off", stream=stream) as monitor:
        monitor.step(record(0))
    assert stream.getvalue() == ""


def test_without_stderr_it_is_silent(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # as in a process started with 2>&-
    with Monitor(1) as monitor:
        monitor.step(record(0))
    assert monitor.done == 1


def test_the_eta_leaves_warm_up_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monitor = Monitor(103, stream=io.StringIO())
    for i in range(NUM_WARM_UP):
        now[0] += 1000.0
        monitor.step(record(i))
        assert monitor.state()["eta"] is None
    for i in range(NUM_WARM_UP, NUM_WARM_UP + 10):
        now[0] += 2.0
        monitor.step(record(i))
    assert monitor.state()["eta"] == pytest.approx(2.0 * 90)
    assert monitor.state()["elapsed"] == pytest.approx(1000.0 * NUM_WARM_UP + 2.0 * 10)


def test_the_pace_is_that_of_the_last_steps():
    monitor = Monitor(100, stream=io.StringIO())
    assert monitor.state()["seconds_per_step"] is None
    for i in range(30):
        monitor.step(record(i) | {"seconds": 100.0 if i < 10 else i})
    assert monitor.state()["seconds_per_step"] == pytest.approx(19.5)  # of 10 to 29


class _Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("trouble", ["memory", "stream", "record"])
def test_a_crash_of_the_monitor_is_a_warning(trouble, caplog):
    def fail():
        raise RuntimeError("no such sensor")

    monitor = Monitor(3, stream=_Broken() if trouble == "stream" else io.StringIO(), interval=0.01,
                      read_memory=fail if trouble == "memory" else lambda: HOST)
    with monitor:
        for i in range(3):
            monitor.step({"step": i, "loss": "not a number"} if trouble == "record" else record(i))
        time.sleep(0.1)
    assert [r.getMessage() for r in caplog.records if "training goes on" in r.getMessage()]


def test_a_stuck_terminal_does_not_hold_up_the_end():
    class Stuck(io.StringIO):
        def write(self, text):
            released.wait(30)
            return len(text)

    released, started = threading.Event(), time.monotonic()
    with Monitor(1, stream=Stuck(), interval=0.01) as monitor:
        monitor.step(record(0))
        time.sleep(0.1)
    assert time.monotonic() - started < 5
    released.set()


def test_a_card_that_vanishes_leaves_the_monitor_running(tiny_config, monkeypatch, caplog):
    """The driver, NVML and its sensors fail from the second reading on; the allocator's counters are the host's."""
    asked = []

    def lost(device):
        asked.append(device)
        if len(asked) > 3:
            raise RuntimeError("GPU is lost")
        return 20 * GIB, 24 * GIB

    for name in ("mem_get_info", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, lost)
    counters = {"all": {"current": 3 * GIB}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict",
                        lambda device: {"allocated_bytes": counters, "reserved_bytes": counters})
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with watch(tiny_config(), Path(), StopFlag(), Meter("cuda")) as monitor:
        monitor.interval = 0.01
        for i in range(3):
            monitor.step(record(i))
            time.sleep(0.3)
        assert monitor.state()["memory"]["reserved_bytes"] == 3 * GIB
        lines = monitor.stream
    assert "step 3/6" in lines.getvalue() and "reserved 3.00 GiB" in lines.getvalue() and len(asked) > 6
    assert not [r for r in caplog.records if "monitor failed" in r.getMessage()]


def test_readings_of_a_run_without_a_card():
    assert read_memory(Meter("cpu")).keys() == read_process().keys()


def test_records_have_the_latest_counters_and_ask_driver_and_host_once_a_second(monkeypatch):
    now, held, asked = [0.0], [GIB], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict",
                        lambda device: dict.fromkeys(("allocated_bytes", "reserved_bytes"), {"all": {"current": held[0]}}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append("driver") or (20 * GIB, 24 * GIB))
    monkeypatch.setattr("trainer.monitor.host_bytes", lambda: asked.append("host") or (16 * GIB, 8 * GIB))
    monkeypatch.setattr("trainer.monitor.resident_bytes", lambda: held[0] + 1)
    meter = Meter("cuda")
    readings, expected = Readings(meter), read_memory(meter)
    for now[0], num_asked in ((0.0, 2), (0.5, 2), (0.9, 2), (1.1, 3), (2.0, 3)):
        held[0] += GIB
        read = readings()
        assert read.keys() == expected.keys() and read["allocated_bytes"] == read["reserved_bytes"] == read["process_bytes"] - 1 == held[0]
        assert read["device_used_bytes"] == 4 * GIB and asked.count("driver") == asked.count("host") == num_asked
    assert Readings(Meter("cpu"))().keys() == read_process().keys()


class _Terminal:
    """A pseudo terminal; `text()` is all that was written to it."""

    def __init__(self):
        self.main, side = pty.openpty()
        self.stream = os.fdopen(side, "w")
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        try:
            while data := os.read(self.main, 65536):
                self._written += data
        except OSError:  # the other side is closed
            return

    def text(self):
        self.stream.close()
        self._reader.join(5)
        os.close(self.main)
        return self._written.decode()


@pytest.fixture
def terminal(monkeypatch):
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "40")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return _Terminal()


def test_a_narrower_window_is_cleared_and_a_wider_one_is_not(terminal, monkeypatch):
    """The terminal breaks the old picture's lines in two; moving up by as many as there were leaves the first of them."""
    sizes = [os.terminal_size((140, 40))]
    monkeypatch.delenv("COLUMNS")
    monkeypatch.delenv("LINES")
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: sizes[-1])
    with Monitor(100, stream=terminal.stream, refresh=0.02, read_memory=lambda: CARD) as monitor:
        monitor.step(record(0))
        for columns in (140, 60, 140, 140):
            sizes.append(os.terminal_size((columns, 40)))
            time.sleep(0.3)
    assert terminal.text().count("\x1b[2J") == 1


def test_the_live_view_on_a_terminal(terminal):
    handler = logging.StreamHandler(terminal.stream)
    logging.getLogger().addHandler(handler)
    try:
        with Monitor(5, stream=terminal.stream, title="red", refresh=0.02, read_memory=lambda: CARD) as monitor:
            for i in range(5):
                monitor.step(record(i))
                time.sleep(0.05)
            logging.getLogger("test").warning("a word in between")
        assert handler.stream is terminal.stream
    finally:
        logging.getLogger().removeHandler(handler)
    text = terminal.text()
    assert "5/5" in text and "100%" in text and "\x1b[" in text
    assert re.search(r"a word in between\s*\r?\n", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))
    assert text.index("\x1b[?25h") < text.index("5/5")  # a killed process leaves a terminal with a cursor
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_terminal_too_narrow_for_anything_keeps_the_live_view(terminal, monkeypatch, caplog):
    monkeypatch.setenv("COLUMNS", "6")
    with Monitor(2, stream=terminal.stream, title="[/red]", refresh=0.02, read_memory=lambda: CARD) as monitor:
        for i in range(2):
            monitor.step(record(i))
            time.sleep(0.1)
    terminal.text()
    assert not caplog.records


def test_a_crash_of_the_live_view_falls_back_to_plain_lines(terminal, monkeypatch, caplog):
    def fail(state, width):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(live_view, "view", fail)
    with Monitor(2, stream=terminal.stream, refresh=0.02, interval=0.05, read_memory=lambda: HOST) as monitor:
        for i in range(2):
            monitor.step(record(i))
            time.sleep(0.1)
    text = terminal.text()
    assert "step 2/2" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "ZeroDivisionError: a bug" in caplog.text


@pytest.mark.parametrize("mode, term", [("plain", "xterm"), ("auto", "dumb")])
def test_plain_on_a_terminal(terminal, monkeypatch, mode, term):
    monkeypatch.setenv("TERM", term)
    with Monitor(1, mode=mode, stream=terminal.stream) as monitor:
        monitor.step(record(0))
    text = terminal.text()
    assert "step 1/1" in text and "\x1b" not in text


def test_process_memory_follows_an_allocation():
    before = read_process()
    with mmap.mmap(-1, 2**26) as kept:  # from the system, whatever the heap has left
        for page in range(0, len(kept), mmap.PAGESIZE):
            kept[page] = 1
        after = read_process()
    assert after["process_bytes"] - before["process_bytes"] > 48 * 2**20
    assert 0 < after["host_available_bytes"] < after["host_total_bytes"]


def test_in_a_container_the_host_is_what_the_container_may_have(monkeypatch):
    monkeypatch.setattr("memory.host._limits", lambda: [(3 * GIB, GIB)])
    assert (read_process()["host_total_bytes"], read_process()["host_available_bytes"]) == (3 * GIB, GIB)


def test_the_clock_splits_a_step():
    clock = PhaseClock(torch.device("cpu"))
    assert clock.read() == {}
    predict = clock.around(lambda: time.sleep(0.02), during="student", after="backward")
    for phase in ("teacher", "teacher"):
        clock.phase(phase)
        time.sleep(0.03)
    predict()
    with clock.waiting():
        time.sleep(0.02)
    time.sleep(0.02)
    clock.phase("optimizer")
    clock.end_step()
    read = clock.read()
    seconds = read["phase_seconds"]
    assert read["seconds"] == sum(seconds.values())
    assert list(seconds) == ["teacher", "student", "backward", WAITING, "optimizer"]
    assert seconds["teacher"] >= 0.06 and all(seconds[name] >= 0.02 for name in ("student", "backward", WAITING))
    assert seconds["optimizer"] < 0.02


def test_who_measures_by_phase_hears_of_phases_but_not_of_waits():
    heard = []
    clock = PhaseClock(torch.device("cpu"), on_phase=heard.append)
    clock.phase("teacher")
    with clock.waiting():
        pass
    clock.phase("optimizer")
    clock.end_step()
    clock.end_step()
    assert heard == ["teacher", "optimizer", None]


def test_the_clock_ignores_what_is_between_steps():
    clock = PhaseClock(torch.device("cpu"))
    with clock.waiting():
        pass
    clock.end_step()
    assert clock.read() == {}


def test_on_a_card_the_clock_never_waits_for_the_device(monkeypatch):
    """Events of a device that is behind: nothing but `record`, `query` and `elapsed_time` of passed events is called."""
    made = []

    class Event:
        passed = False

        def __init__(self, enable_timing):
            made.append(self)

        def record(self):
            self.passed, self.at = False, time.perf_counter()

        def query(self):
            return self.passed

        def elapsed_time(self, other):
            assert self.passed and other.passed
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = PhaseClock(torch.device("cuda", 0))

    def step():
        clock.phase("teacher")
        clock.phase("optimizer")
        clock.end_step()

    step()
    assert clock.read() == {}
    step()
    for event in made[:3]:
        event.passed = True
    assert list(clock.read()["phase_seconds"]) == ["teacher", "optimizer"]
    for _ in range(10):
        for event in made:
            event.passed = True
        clock.read()
        step()
    assert len(made) == 6  # events are used again
