"""What this thread has in force is put back, wherever an interrupt comes."""

import sys

import pytest
import torch

from memory import saving

CONTEXTS = {
    "packing": lambda: saving.packing(lambda tensor: None),
    "checkpoint_region": lambda: saving.checkpoint_region("recompute", {}),
    "returning": lambda: saving.returning(True),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_an_interrupt_on_the_way_in_leaves_nothing_in_force(name):
    code = getattr(saving, name).__wrapped__.__code__
    before, interrupted = dict(vars(saving._state)), 0
    for line in sorted({line for *_, line in code.co_lines() if line}):
        def interrupt(frame, event, arg, line=line):
            if frame.f_code is code and (event, frame.f_lineno) == ("line", line):
                raise KeyboardInterrupt
            return interrupt

        tracing, entered = sys.gettrace(), False
        sys.settrace(interrupt)
        try:
            with CONTEXTS[name]():
                sys.settrace(tracing)
                entered = True
        except KeyboardInterrupt:
            interrupted += not entered
        finally:
            sys.settrace(tracing)
        assert vars(saving._state) == before, f"line {line}"
    assert interrupted >= 2


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_was_in_force_around_it_is_so_again(name):
    with CONTEXTS[name]():
        around = dict(vars(saving._state))
        with CONTEXTS[name]():
            pass
        assert vars(saving._state) == around


def test_what_the_inner_packer_does_not_want_goes_to_the_one_around_it():
    """As activations do in a block whose weights stream."""
    asked = []
    with saving.packing(lambda tensor: asked.append("outer")), saving.packing(lambda tensor: asked.append("inner")):
        torch.ones(3, requires_grad=True).sin()
    assert asked == ["inner", "outer"]
