"""Sharding in two processes on the CPU (gloo): the contract of test_contract.py, and what is particular to it."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_transformer import BOUNDARY_NAMES, assert_equal, make_tiny, plain_run
from torch.distributed.tensor import DTensor

from memory.plan import MemoryPlan, PlanError, apply_plan
from memory.sharding import can_shard, shard_blocks, whole

HERE = Path(__file__).parent
LAUNCHED = dist.is_torchelastic_launched()
together = pytest.mark.skipif(not LAUNCHED, reason="runs in the processes that test_in_two_processes starts")
alone = pytest.mark.skipif(LAUNCHED or not can_shard(), reason="starts the processes")


def in_two_processes(*selection: str) -> None:
    command = [sys.executable, str(HERE / "forked_ranks.py"), "-p", "no:cacheprovider", "--assert=plain",  # what is imported is not rewritten
               str(HERE / "test_contract.py"), str(HERE / "test_sharding.py"), *selection]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed") == 2, done.stdout


@alone
def test_in_two_processes():
    in_two_processes("-k", "(shard-mixed and ((rope and losses) or undo or training)) or test_sharding")


@alone
@pytest.mark.slow
def test_whole_contract_in_two_processes():
    in_two_processes()


@together
def test_each_process_holds_its_part_of_every_frozen_weight():
    tiny = make_tiny("rope")
    originals = {name: p for name, p in tiny.blocks.named_parameters() if not p.requires_grad}
    size = sum(p.nbytes for p in originals.values())
    handle = shard_blocks(tiny.model, tiny.blocks, num_shards=2, device="cpu")
    held = {name: p for name, p in tiny.blocks.named_parameters() if not p.requires_grad}
    assert all(isinstance(p, DTensor) for p in held.values())
    assert sum(p.to_local().nbytes for p in held.values()) == size / 2
    assert sum(p.nbytes for p in originals.values()) == 0  # nothing keeps the whole weights
    assert not any(isinstance(p, DTensor) for p in tiny.adapters)
    handle.undo()
    assert sum(p.nbytes for p in originals.values()) == size


@together
def test_blocks_are_freed_after_forward_and_after_backward():
    tiny = make_tiny("sincos")
    shard_blocks(tiny.model, tiny.blocks, num_shards=2, device="cpu")
    gathered = []
    for block in tiny.blocks:
        block.norm1.register_forward_pre_hook(
            lambda *_: gathered.append(sum(type(p) is torch.nn.Parameter for b in tiny.blocks for p in b.attn1.to_q.parameters())))
    tiny.step()
    assert max(gathered) == 2  # a weight and a bias: no block but the one that runs
    assert all(isinstance(p, DTensor) for p in tiny.blocks.parameters() if not p.requires_grad)


@together
def test_no_gradient_is_reduced_for_the_caller():
    """Each process feeds something else: adapters keep their own gradients, which the trainer reduces once a step."""
    tiny = make_tiny("sincos")
    expected = make_tiny("sincos")
    for model in (tiny, expected):
        model.embeds = model.embeds * (1 + dist.get_rank())
    shard_blocks(tiny.model, tiny.blocks, num_shards=2, device="cpu")
    assert_equal([tiny.step()], [expected.step()])
    gradients = tiny.gradients()
    assert_equal(gradients, expected.gradients())
    first = torch.stack([g.norm() for g in gradients])
    both = [torch.empty_like(first) for _ in range(2)]
    dist.all_gather(both, first)
    assert not torch.equal(*both)


@together
def test_applied_twice_by_itself_raises_and_whole_gathers():
    tiny = make_tiny("sincos")
    weight = tiny.blocks[0].attn1.to_q.weight.detach().clone()
    handle = shard_blocks(tiny.model, tiny.blocks, num_shards=2, device="cpu")
    with pytest.raises(RuntimeError, match="applied to this model already"):
        shard_blocks(tiny.model, tiny.blocks, num_shards=2, device="cpu")
    sharded = tiny.blocks[0].attn1.to_q.weight
    assert torch.equal(whole(sharded.detach()), weight) and whole(weight) is weight
    handle.undo()
    assert_equal([tiny.step()], [plain_run("sincos")[0]])


@alone
def test_one_process_has_nobody_to_share_with():
    tiny = make_tiny("sincos")
    with pytest.raises(PlanError, match="torchrun --nproc-per-node"):
        apply_plan(tiny.model, tiny.blocks, MemoryPlan(num_shards=2), device="cpu")
    assert_equal([tiny.step()], [plain_run("sincos")[0]])


@alone
def test_a_block_is_sharded_or_streamed():
    with pytest.raises(PlanError, match="num_shards is 2 and resident_blocks 3"):
        MemoryPlan(num_shards=2, resident_blocks=3)
    with pytest.raises(ValueError, match="matched nothing"):
        shard_blocks(torch.nn.Linear(1, 1), [], num_shards=2, device="cpu")


@together
def test_a_process_that_fails_while_a_plan_is_applied_says_so_alone(monkeypatch):
    """Undoing would gather, and wait for processes that have not failed."""
    tiny, alone = make_tiny("rope"), dist.get_rank() == 1
    if alone:
        monkeypatch.setattr("memory.checkpointing.checkpoint_blocks", _out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) if alone else nullcontext():
        apply_plan(tiny.model, tiny.blocks, MemoryPlan(num_shards=2), device="cpu", boundary_names=BOUNDARY_NAMES)


def _out_of_memory(*_):
    raise torch.OutOfMemoryError("made up")
