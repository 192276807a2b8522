"""Passes block by block together: what they load, hold and leave behind. That the step is the same is in the contract."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tiny_transformer import BOUNDARY_NAMES, assert_equal, make_tiny, plain_run, snapshot
from torch import nn

from memory.lockstep import Lockstep, Pass
from memory.plan import MemoryPlan, apply_plan, resident_indices


def apply(tiny, **fields):
    return apply_plan(tiny.model, tiny.blocks, MemoryPlan(**fields), device="cpu", boundary_names=BOUNDARY_NAMES)


def num_loads(applied, step):
    before = applied.num_loads
    step()
    return applied.num_loads - before


@pytest.mark.parametrize("checkpoint", ["all", "none"])
@pytest.mark.parametrize("num_resident", [0, 2])
@pytest.mark.parametrize("num_buffers", [2, 3])
def test_a_step_loads_every_block_once_each_way(checkpoint, num_resident, num_buffers):
    tiny = make_tiny("rope")
    applied = apply(tiny, resident_blocks=num_resident, offload_buffers=num_buffers, checkpoint=checkpoint)
    tiny.step_in_lockstep()
    num_streamed = len(tiny.blocks) - len(resident_indices(len(tiny.blocks), num_resident))
    assert num_loads(applied, tiny.step_in_lockstep) == 2 * (num_streamed - num_buffers)  # the turns need none
    assert applied.offload.num_late_loads <= 1  # the very first
    assert num_loads(applied, tiny.step) >= 4 * (num_streamed - num_buffers)


def test_every_pass_runs_in_its_own_state():
    tiny = make_tiny("rope")
    seen = []
    for block in tiny.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(torch.is_grad_enabled()))
    call = partial(tiny.predict, tiny.embeds[:1])
    off, on = Lockstep(tiny.model, tiny.blocks, BOUNDARY_NAMES)([Pass(call, torch.no_grad), Pass(call, nullcontext)])
    assert seen == [False, True] * len(tiny.blocks)
    assert not off.requires_grad and on.requires_grad and torch.equal(off, on) and torch.equal(off, tiny.predict(tiny.embeds[:1]))


def test_blocks_may_return_one_tensor():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden):
            for block in self.blocks:
                hidden = block(hidden)
            return hidden * 2

    torch.manual_seed(0)
    chain, (one, two) = Chain(), torch.randn(2, 3, 4)
    lockstep = Lockstep(chain, chain.blocks, ("input",))
    outputs = lockstep([Pass(partial(chain, one), torch.no_grad), Pass(partial(chain, two), nullcontext)])
    assert_equal(outputs, [chain(one), chain(two)])
    assert [output.requires_grad for output in outputs] == [False, True]


def test_forward_hooks_of_the_model_see_each_pass_once():
    tiny = make_tiny("sincos")
    seen = []
    tiny.model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    outputs = Lockstep(tiny.model, tiny.blocks, BOUNDARY_NAMES)(
        [Pass(partial(tiny.predict, tiny.embeds[i : i + 1]), torch.no_grad) for i in (0, 1)])
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, outputs))


@pytest.mark.parametrize("where", ["before", "in", "after"])
def test_an_exception_leaves_the_model_as_it_was(where):
    tiny = make_tiny("sincos")
    before = snapshot(tiny.model)
    module = {"before": tiny.model.patch_embed, "in": tiny.blocks[2], "after": tiny.model.proj_out}[where]

    def fail(module, args):
        raise ArithmeticError("as an out-of-memory error would")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        tiny.step_in_lockstep()
    hook.remove()
    assert snapshot(tiny.model) == before
    assert_equal([tiny.step_in_lockstep()], [plain_run("sincos")[0]])


def test_nothing_is_held_once_the_results_are_gone():
    tiny, storages = make_tiny("sincos"), []

    def note(module, args, outputs):
        storages.extend(weakref.ref(output.untyped_storage()) for output in outputs)

    for block in tiny.blocks:
        block.register_forward_hook(note)
    gc.disable()
    try:
        Lockstep(tiny.model, tiny.blocks, BOUNDARY_NAMES)(
            [Pass(partial(tiny.predict, tiny.embeds[i : i + 1]), torch.no_grad) for i in (0, 1)])
        assert len(storages) == 4 * len(tiny.blocks) and not any(storage() is not None for storage in storages)
    finally:
        gc.enable()


def test_arguments_that_a_block_collects_arrive():
    class Scaled(nn.Linear):
        def forward(self, hidden, **more):
            (scale,) = more.values()
            return super().forward(hidden) * scale

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Scaled(4, 4) for _ in range(3))

        def forward(self, hidden):
            for block in self.blocks:
                hidden = block(hidden, scale=3.0)
            return hidden

    model, x = Chain(), torch.randn(2, 4)
    one, two = Lockstep(model, model.blocks, ("hidden",))([Pass(partial(model, x), nullcontext), Pass(partial(model, 2 * x), torch.no_grad)])
    assert torch.equal(one, model(x)) and torch.equal(two, model(2 * x))


def test_wrong_use_is_told():
    class Unnamed(nn.Linear):
        def forward(self, *hidden):
            return super().forward(*hidden)

    chain = nn.Module()
    chain.blocks = nn.ModuleList([Unnamed(2, 2)])
    with pytest.raises(ValueError, match="gives a block's arguments by name, and .hidden has none"):
        Lockstep(chain, chain.blocks, ("hidden",))
    tiny = make_tiny("sincos")
    for blocks in (list(tiny.blocks)[1:], list(tiny.blocks)[::-1]):
        with pytest.raises(ValueError, match="no ModuleList of the model holds"):
            Lockstep(tiny.model, blocks, BOUNDARY_NAMES)
    with pytest.raises(ValueError, match="no ModuleList"):
        Lockstep(nn.Linear(2, 2), tiny.blocks, BOUNDARY_NAMES)
    with pytest.raises(RuntimeError, match="never reached the blocks"):
        Lockstep(tiny.model, tiny.blocks, BOUNDARY_NAMES)([Pass(lambda: None, nullcontext)])
