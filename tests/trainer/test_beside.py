"""Calls in a fork: the same results in any order, and no process left behind."""

import multiprocessing
import os

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


def test_every_other_call_is_made_elsewhere(two_cores):
    run = Beside(_where)
    run.start("abcdef")
    found = {call: run(call) for call in "abdfxe"}  # c and e were not for the other process; x nobody announced
    run.stop()
    assert all(result[0] == call for call, result in found.items())
    assert [call for call, (_, pid) in found.items() if pid != os.getpid()] == ["b", "d", "f"]
    assert not multiprocessing.active_children() and run("b") == ("b", os.getpid())


@pytest.mark.parametrize("call", ["bad", "dead"])
def test_what_fails_there_is_done_here(two_cores, call):
    run = Beside(_where)
    run.start(["a", call, "b", "c"])
    if call == "bad":
        with pytest.raises(ValueError, match="bad"):
            run(call)
    else:
        assert run(call) == (call, os.getpid())
    assert run("c") == ("c", os.getpid()) and not multiprocessing.active_children()


def test_with_one_core_all_is_done_here(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    run = Beside(_where)
    run.start("abcd")
    assert {run(call)[1] for call in "abcd"} == {os.getpid()} and not beside._may_fork()
