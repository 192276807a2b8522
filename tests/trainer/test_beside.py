"""Calls in a fork: the same results in any order, and no process left behind."""

import multiprocessing
import os
import time

import pytest

from trainer import beside
from trainer.beside import Beside


def _where(call):
    if call == "bad":
        raise ValueError("bad")
    if call == "dead" and multiprocessing.parent_process():
        os._exit(1)
    return call, os.getpid()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    yield
    for process in multiprocessing.active_children():  # of a test that failed: not for the next to see
        process.terminate()
        process.join()


def test_what_was_announced_is_shared_and_remembered(two_cores, tmp_path):
    def noted(call):
        """Here it takes until the other process has taken a call."""
        with (tmp_path / call).open("a") as f:
            f.write(f"{os.getpid()}\n")
        deadline = time.monotonic() + 60
        while not multiprocessing.parent_process() and len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return call.upper()

    run = Beside(noted)
    run.announce("abcdef")
    assert [run(call) for call in "abxfdec"] == list("ABXFDEC")  # x nobody announced
    run.announce(())
    pids = {call: (tmp_path / call).read_text().split() for call in "abcdefx"}
    assert all(len(made) == 1 for made in pids.values())  # each once, wherever
    here = [call for call in pids if pids[call] == [str(os.getpid())]]
    assert "a" in here and "x" in here and len(here) < 7
    assert run("b") == "B" and (tmp_path / "b").read_text().split() == pids["b"]
    assert not multiprocessing.active_children()


def test_one_process_serves_all_announcements(two_cores, tmp_path):
    def noted(call):
        """In the other process, b takes until it may end."""
        with (tmp_path / call).open("a") as f:
            f.write(f"{os.getpid()}\n")
        while multiprocessing.parent_process() and call == "b" and not (tmp_path / "go on").exists():
            time.sleep(0.01)
        return call.upper()

    run, deadline = Beside(noted), time.monotonic() + 60
    run.announce("abc")
    while not (tmp_path / "b").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.announce("xbyz")  # it is at b, and y and z are for it
    assert [run(call) for call in "cxa"] == list("CXA")  # c was meant for it once
    (tmp_path / "go on").touch()
    assert run._pipe.poll(60) and run("b") == "B"
    while not (tmp_path / "y").exists() or not (tmp_path / "y").stat().st_size:  # it is there before what is written is
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pids = {call: (tmp_path / call).read_text().split() for call in "abcxy"}
    assert all(len(made) == 1 for made in pids.values())
    assert pids["y"] == pids["b"] == [str(run._process.pid)] and pids["c"] == [str(os.getpid())]
    run.announce(())
    assert not multiprocessing.active_children()


def test_what_fails_here_fails_again(two_cores):
    run = Beside(_where)
    run.announce(["bad", "a", "b"])
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            run("bad")
    run.announce(())


def test_a_result_that_cannot_be_sent_is_made_here(two_cores):
    run = Beside(lambda call: lambda: call)
    run.announce("ab")
    assert run._pipe.poll(60)  # the other process has ended
    assert run("b")() == "b"


@pytest.mark.parametrize("call", ["bad", "dead"])
def test_what_fails_there_is_done_here(two_cores, call):
    run = Beside(_where)
    run.announce(["a", call])
    assert run._pipe.poll(60)  # the other process has ended
    if call == "bad":
        with pytest.raises(ValueError, match="bad"):
            run(call)
    else:
        assert run(call) == (call, os.getpid())
    assert run("c") == ("c", os.getpid()) and not multiprocessing.active_children()


def test_calls_need_not_be_equal_once_copied(two_cores):
    backbone = object()
    run = Beside(lambda call: os.getpid())
    run.announce([(backbone, 0), (backbone, 1)])
    assert run._pipe.poll(60)
    assert run((backbone, 1)) != os.getpid()
    run.announce(())


def test_with_one_core_all_is_done_here(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    run = Beside(_where)
    run.announce("abcd")
    assert {run(call)[1] for call in "abcd"} == {os.getpid()} and not beside._may_fork()


@pytest.mark.parametrize("where, what", [(multiprocessing.get_context("fork"), "Array"), (os, "fork")])
def test_without_shared_memory_or_another_process_all_is_done_here(two_cores, monkeypatch, where, what):
    def refuse(*args):
        raise OSError("no /dev/shm, or as many processes as there may be")

    monkeypatch.setattr(where, what, refuse)
    run = Beside(_where)
    run.announce("abcd")
    assert {run(call)[1] for call in "abcd"} == {os.getpid()} and not multiprocessing.active_children()
