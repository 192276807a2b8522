"""Blocks compiled all the way. That strategies go on around compiled blocks is in test_contract.py."""

import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_transformer import BOUNDARY_NAMES, NUM_BLOCKS, assert_equal, make_tiny, plain_run
from torch import nn
from torch._dynamo.utils import counters

from memory import chunking
from memory.compiling import compile_blocks
from memory.plan import MemoryPlan, PlanError, apply_plan

ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", [pytest.param("sincos", marks=pytest.mark.slow), "rope"])
@pytest.mark.parametrize("fields", [
    pytest.param({"num_keep_attention": 5}, marks=pytest.mark.slow),  # a part of the other one
    {"resident_blocks": 1, "num_keep_attention": 2, "num_keep_everything": 1, "boundaries": "host", "kept": "host", "feed_forward_chunks": 2},
], ids=str)  # fmt: skip
def test_compiled_blocks_learn_the_same(kind, fields):
    tiny = make_tiny(kind, "cpu")
    applied = apply_plan(tiny.model, tiny.blocks, MemoryPlan(compile=True, **fields), device="cpu", boundary_names=BOUNDARY_NAMES,
                         feed_forwards=tiny.feed_forwards)
    for _ in range(2):
        assert_equal([tiny.step()], [plain_run(kind, "cpu")[0]], ROUNDING)
        assert_equal(tiny.gradients(), plain_run(kind, "cpu")[1], ROUNDING)
    assert counters["inductor"]["extern_calls"] > 0  # it did compile
    with applied.hooked():
        assert_equal([tiny.step()], [plain_run(kind, "cpu")[0]], ROUNDING)
    applied.undo()


class _ElementWiseOnAttention(nn.Module):
    """In what is compiled without a gradient before it, nothing but the kept output needs that memory any more."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8).requires_grad_(False), nn.Parameter(torch.ones(8))

    def forward(self, hidden):
        mixed = F.scaled_dot_product_attention(self.linear(hidden), hidden, hidden)
        return self.linear((2 * mixed).sin()) * self.scale


def test_kept_attention_is_not_overwritten():
    gradients = []
    for compile in (False, True):
        torch.manual_seed(0)
        block, hidden = _ElementWiseOnAttention(), torch.randn(2, 3, 24, 8)
        applied = apply_plan(nn.ModuleList([block]), [block], MemoryPlan(compile=compile, num_keep_attention=1), device="cpu")
        block(hidden).square().sum().backward()
        gradients.append(block.scale.grad)
        applied.undo()
    assert_equal([gradients[1]], [gradients[0]], ROUNDING)


def test_feed_forwards_go_in_chunks_as_ever(monkeypatch):
    """Their memory is what it was only if what the strategy does is no part of compiled code: Python runs it itself."""
    monkeypatch.setitem(compile_blocks.__kwdefaults__, "backend", "aot_eager")  # what becomes part of it is decided before
    tiny, calls = make_tiny("rope", "cpu"), []
    apply_plan(tiny.model, tiny.blocks, MemoryPlan(compile=True, feed_forward_chunks=3), device="cpu", feed_forwards=tiny.feed_forwards)
    tiny.step()
    sys.setprofile(lambda frame, event, arg: event == "call" and calls.append(frame.f_code))
    try:
        tiny.step()
    finally:
        sys.setprofile(None)
    assert calls.count(chunking._run_chunks.__code__) == NUM_BLOCKS * 6  # two passes of the teacher, two of the student, and recomputed


def test_blocks_share_what_is_compiled():
    """What is compiled for three blocks serves five: the first, whose input needs no gradient, and another, with and without one."""
    def num_graphs(num_blocks):
        torch._dynamo.reset()
        counters.clear()
        tiny = make_tiny("rope", "cpu")
        handle = compile_blocks(tiny.blocks[:num_blocks], device=torch.device("cpu"), backend="aot_eager")
        tiny.step()
        handle.undo()
        return counters["stats"]["unique_graphs"]

    assert 0 < num_graphs(3) == num_graphs(NUM_BLOCKS)


@torch._dynamo.config.patch(recompile_limit=3)  # fewer than torch's own 8: every variant takes seconds
def test_many_variants_are_all_compiled():
    tiny, limit = make_tiny("rope", "cpu"), torch._dynamo.config.recompile_limit
    handle = compile_blocks(tiny.blocks, device=torch.device("cpu"), backend="aot_eager")
    seen = []
    for batch in range(1, limit + 1):
        sample = torch.randn(batch, *tiny.latents.shape[1:])
        embeds = torch.randn(batch, *tiny.embeds.shape[1:])
        with torch.no_grad():
            tiny.model(sample, embeds, tiny.timestep.expand(batch), image_rotary_emb=tiny.rotary)
        seen.append(counters["stats"]["unique_graphs"])
    assert all(after > before for before, after in zip(seen, seen[1:]))
    handle.undo()
    assert torch._dynamo.config.recompile_limit == limit


def test_without_a_compiler_it_says_so():
    tiny = make_tiny("sincos", "cpu")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(PlanError, match="C\\+\\+ compiler"):
        apply_plan(tiny.model, tiny.blocks, MemoryPlan(compile=True), device="cpu", boundary_names=BOUNDARY_NAMES)
    assert_equal([tiny.step()], [plain_run("sincos", "cpu")[0]])


def test_a_failure_while_compiling_leaves_the_blocks_as_they_were():
    tiny, limit = make_tiny("rope", "cpu"), torch._dynamo.config.recompile_limit
    shared = tiny.blocks[1].attn1 = tiny.blocks[0].attn1  # it has a hook: the second block finds it compiled
    with pytest.raises(RuntimeError, match="compilation"):
        compile_blocks(tiny.blocks, device=torch.device("cpu"), backend="aot_eager")
    assert torch._dynamo.config.recompile_limit == limit
    assert not any("forward" in vars(module) for module in (*tiny.blocks, shared))
