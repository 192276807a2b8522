import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_transformer import BOUNDARY_NAMES, assert_equal, make_tiny
from torch import nn

from memory.plan import MemoryPlan, PlanError, apply_plan, parse_checkpoint, resolve_keeps, varied


@pytest.mark.parametrize("changes, possible", [({"num_keep_attention": 5}, True), ({"num_keep_attention": 6}, False), ({"offload_buffers": 1}, False),
                                               ({"feed_forward_chunks": 64}, True)])
def test_a_variation_of_a_plan_is_one_for_the_model_or_none(changes, possible):
    plan = MemoryPlan(resident_blocks=0)
    assert varied(plan, 5, **changes) == (MemoryPlan(resident_blocks=0, **changes) if possible else None)


def test_importable_without_torch():
    code = "import sys, memory.plan; memory.plan.MemoryPlan(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp16"}, "dtype is 'fp16'; one of native, float32, bfloat16, float16"),
        ({"dtype": True}, "dtype is True"),
        ({"resident_blocks": -1}, "resident_blocks is -1; an integer, at least 0"),
        ({"resident_blocks": 1.5}, "resident_blocks is 1.5"),
        ({"offload_buffers": 1}, "offload_buffers is 1; an integer, at least 2"),
        ({"feed_forward_chunks": 0}, "feed_forward_chunks is 0"),
        ({"feed_forward_chunks": True}, "feed_forward_chunks is True"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"guidance": "both"}, "guidance is 'both'"),
        ({"passes": "together"}, "passes is 'together'; one of sequential, lockstep"),
        ({"num_shards": 2, "passes": "lockstep"}, "num_shards is 2 and passes = lockstep"),
        ({"num_shards": 2, "resident_blocks": 0}, "num_shards is 2 and resident_blocks 0: .* either divided .* or streamed"),
        ({"feed_forward_chunks": 10**20}, "feed_forward_chunks is 1.*, that fits 64 bits"),
        ({"feed_forward_chunks": 65}, "feed_forward_chunks is 65; at most 64"),
        ({"backbone_copies": 3}, "backbone_copies is 3; one of 1, 2"),
        ({"checkpoint": "some"}, "checkpoint is 'some'; one of all, none, every:N"),
        ({"checkpoint": "every:0"}, "every:0"),
        ({"checkpoint": 3}, "checkpoint is 3"),
        ({"boundaries": "host", "checkpoint": "none"}, "boundaries is host, but no block is checkpointed"),
        ({"boundaries": "host", "checkpoint": "first:0"}, "boundaries is host, but no block is checkpointed"),
        ({"num_keep_attention": 1, "checkpoint": "none"}, "num_keep_attention 1 exceed the 0 blocks that checkpoint = none names"),
        ({"kept": "host"}, "kept is host, but every block keeps its inputs only"),
        ({"kept": "host", "checkpoint": "every:1"}, "kept is host, but every block keeps its inputs only"),
    ],
)
def test_nonsense_is_refused_by_name(settings, message):
    with pytest.raises(PlanError, match=message):
        MemoryPlan(**settings)


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ({}, "iiiiii"),
        ({"checkpoint": "none"}, "eeeeee"),
        ({"checkpoint": "every:2"}, "ieieie"),
        ({"checkpoint": "every:4"}, "ieeeie"),
        ({"checkpoint": "first:2"}, "iieeee"),
        ({"num_keep_everything": 2}, "iiiiee"),
        ({"num_keep_attention": 2}, "iiiiaa"),
        ({"num_keep_attention": 2, "num_keep_everything": 1}, "iiiaae"),
        ({"checkpoint": "every:2", "num_keep_attention": 1, "num_keep_everything": 1}, "ieaeee"),
        ({"num_keep_everything": 6}, "eeeeee"),
        ({"kept": "host", "num_keep_everything": 2}, "iieiie"),
        ({"kept": "host", "num_keep_everything": 4, "num_keep_attention": 1}, "ieeaee"),
        ({"kept": "host", "num_keep_everything": 1, "num_keep_attention": 5}, "aaaaae"),
        ({"kept": "host", "checkpoint": "every:2", "num_keep_everything": 2}, "ieeeee"),
        ({"kept": "host", "num_keep_everything": 6}, "eeeeee"),
    ],
)
def test_what_each_block_keeps(settings, keeps):
    assert "".join(keep[0] for keep in resolve_keeps(MemoryPlan(**settings), 6)) == keeps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "first:7"}, "first:7, but the model has 6 blocks"),
        ({"num_keep_attention": 4, "num_keep_everything": 3}, "exceed the 6 blocks that checkpoint = all names"),
        ({"boundaries": "host", "num_keep_everything": 6}, "boundaries is host, but no block is checkpointed"),
        ({"kept": "host", "checkpoint": "first:6"}, "every block keeps its inputs only"),
    ],
)
def test_counts_must_suit_the_model(settings, message):
    with pytest.raises(PlanError, match=message):
        resolve_keeps(MemoryPlan(**settings), 6)


@given(st.integers(1, 50), st.data())
def test_counts_are_kept(num_blocks, data):
    everything = data.draw(st.integers(0, num_blocks))
    attention = data.draw(st.integers(0, num_blocks - everything))
    keeps = resolve_keeps(MemoryPlan(num_keep_everything=everything, num_keep_attention=attention), num_blocks)
    assert (len(keeps), keeps.count("everything"), keeps.count("attention")) == (num_blocks, everything, attention)
    # What keeps more comes later.
    assert list(keeps) == sorted(keeps, key=("inputs", "attention", "everything").index)


def test_parse_checkpoint():
    assert parse_checkpoint("all") == parse_checkpoint("every:1")
    assert parse_checkpoint("none") == parse_checkpoint("first:0")


def apply(tiny, **settings):
    return apply_plan(
        tiny.model, tiny.blocks, MemoryPlan(**settings), device="cpu",
        boundary_names=BOUNDARY_NAMES, feed_forwards=tiny.feed_forwards,
    )  # fmt: skip


def test_counters_and_buffers():
    tiny = make_tiny()
    applied = apply(tiny, resident_blocks=2, boundaries="host")
    assert (applied.num_loads, applied.num_recomputes, applied.bytes_streamed, applied.bytes_parked) == (0, 0, 0, 0)
    assert len(applied.host_buffers) == 3 and len(applied.device_buffers) == 2
    tiny.step()
    block_bytes = applied.device_buffers[0].numel()
    assert applied.num_recomputes == 2 * 5
    assert applied.bytes_streamed == applied.num_loads * block_bytes > 0
    # Two passes, four boundaries (the last block's stay): 12 video tokens and 6 text tokens of width 32 in float32.
    assert applied.bytes_parked == 2 * 4 * (12 + 6) * 32 * 4
    assert len(applied.host_buffers) > 3


def test_the_plain_plan_has_nothing_to_count():
    tiny = make_tiny()
    applied = apply(tiny, checkpoint="none")
    tiny.step()
    assert (applied.num_recomputes, applied.num_loads, applied.host_buffers, applied.device_buffers) == (0, 0, [], [])


def test_a_failure_while_applying_leaves_the_model_as_it_was():
    tiny = make_tiny()
    before = {name: tensor.data_ptr() for name, tensor in tiny.model.state_dict().items()}
    with pytest.raises(ValueError, match="boundary_names is empty"):
        apply_plan(tiny.model, tiny.blocks, MemoryPlan(boundaries="host"), device="cpu")
    assert {name: tensor.data_ptr() for name, tensor in tiny.model.state_dict().items()} == before
    assert not any("forward" in module.__dict__ for module in tiny.model.modules())
    with pytest.raises(ValueError, match="matched nothing"):
        apply_plan(tiny.model, tiny.blocks, MemoryPlan(feed_forward_chunks=2), device="cpu")


def test_a_model_is_copied_before_or_after():
    tiny = make_tiny()
    applied = apply_plan(tiny.model, tiny.blocks, MemoryPlan(resident_blocks=0), device="cpu")
    with pytest.raises(RuntimeError, match=r"a copy would run the original, .*undo\(\)"):
        copy.deepcopy(tiny.model)
    applied.undo()
    copy.deepcopy(tiny.model)


def test_a_weight_that_streams_is_not_used_outside_of_the_blocks():
    tiny = make_tiny("sincos")
    tiny.model.head = nn.Linear(2, 2)
    tiny.model.head.weight = tiny.blocks[0].ff.net[2].weight
    with pytest.raises(PlanError, match="resident_blocks: head.weight is a weight of a block as well"):
        apply_plan(tiny.model, tiny.blocks, MemoryPlan(resident_blocks=0), device="cpu", boundary_names=BOUNDARY_NAMES)
    apply_plan(tiny.model, tiny.blocks, MemoryPlan(), device="cpu", boundary_names=BOUNDARY_NAMES).undo()


@pytest.mark.parametrize("settings", [{"resident_blocks": 0}, {"dtype": "bfloat16"}, {"boundaries": "host"}])
def test_a_plan_applied_in_inference_mode_trains_as_any(settings):
    plain, tiny = make_tiny(), make_tiny()
    apply(plain, **settings)
    with torch.inference_mode():
        apply(tiny, **settings)
    assert torch.equal(tiny.step(), plain.step())
    assert_equal(tiny.gradients(), plain.gradients())


def test_the_cpu_may_have_an_index():
    tiny = make_tiny()
    applied = apply_plan(tiny.model, tiny.blocks, MemoryPlan(resident_blocks=0, boundaries="host"), device="cpu:0",
                         boundary_names=BOUNDARY_NAMES)
    tiny.step()
    assert applied.num_loads and applied.bytes_parked


def test_refuses_a_second_checkpointing():
    tiny = make_tiny()
    tiny.model.enable_gradient_checkpointing()
    with pytest.raises(PlanError, match="disable_gradient_checkpointing"):
        apply(tiny)


def test_more_resident_blocks_than_there_are():
    with pytest.raises(PlanError, match="resident_blocks is 6, but the model has 5 blocks"):
        apply(make_tiny(), resident_blocks=6)
    applied = apply(make_tiny(), resident_blocks=5)
    assert applied.offload is None


@pytest.mark.parametrize(("settings", "waits"), [({}, False), ({"resident_blocks": 0}, True), ({"boundaries": "host"}, True)])
def test_every_wait_for_a_copy_is_counted(settings, waits):
    from contextlib import contextmanager

    tiny, counted = make_tiny(), []

    @contextmanager
    def waiting():
        counted.append("begins")
        yield
        counted.append("ends")

    applied = apply_plan(tiny.model, tiny.blocks, MemoryPlan(**settings), device="cpu", boundary_names=BOUNDARY_NAMES)
    applied.count_waits(waiting)
    tiny.step()
    applied.undo()
    assert bool(counted) == waits and counted == ["begins", "ends"] * (len(counted) // 2)
    # On the CPU a copy is done when it returns: one wait a load of a block.
    assert "resident_blocks" not in settings or len(counted) == 2 * applied.num_loads
