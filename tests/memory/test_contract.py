"""One contract for all memory strategies and sensible pairs, on the real transformer, tiny; on a card when there is one.

Sharding needs several processes: started by torchrun, this file holds it to the same contract (test_sharding.py does that).
"""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from tiny_transformer import BOUNDARY_NAMES, DEVICES, Tiny, assert_equal, make_tiny, plain_run, snapshot
from torch import nn

import memory.activations
import memory.compiling
import memory.offload
from memory.plan import MemoryPlan, apply_plan
from memory.sharding import whole

# Bitwise unless stated. Chunks of a matrix product may round otherwise than the whole.
CHUNK_TOLERANCE = 2e-6
PLANS = {
    "checkpoint-all": {},
    "checkpoint-every-2": {"checkpoint": "every:2"},
    "checkpoint-first-3": {"checkpoint": "first:3"},
    "keep-attention": {"num_keep_attention": 5},
    "keep-some-of-each": {"num_keep_attention": 2, "num_keep_everything": 1},
    "offload": {"resident_blocks": 0},
    "offload-2-resident": {"resident_blocks": 2},
    "offload-4-buffers": {"resident_blocks": 0, "offload_buffers": 4},
    "offload-more-buffers-than-blocks": {"resident_blocks": 0, "offload_buffers": 9},
    "offload-one-streamed": {"resident_blocks": 4},
    "offload-unchecked": {"resident_blocks": 0, "checkpoint": "none"},
    "offload-mixed": {"resident_blocks": 1, "num_keep_attention": 2, "num_keep_everything": 2},
    "boundaries": {"boundaries": "host"},
    "boundaries-every-2": {"boundaries": "host", "checkpoint": "every:2"},
    "kept": {"kept": "host", "checkpoint": "none"},
    "kept-attention": {"kept": "host", "boundaries": "host", "num_keep_attention": 3},
    "kept-offload": {"kept": "host", "checkpoint": "none", "resident_blocks": 0},
    "chunks": {"feed_forward_chunks": 7},
    "chunks-unchecked": {"feed_forward_chunks": 3, "checkpoint": "none"},
    "chunks-offload": {"feed_forward_chunks": 7, "resident_blocks": 0},
    "chunks-offload-unchecked": {"feed_forward_chunks": 7, "resident_blocks": 0, "checkpoint": "none"},
    "everything-at-once": {
        "resident_blocks": 1, "offload_buffers": 3, "num_keep_attention": 2, "num_keep_everything": 1,
        "boundaries": "host", "kept": "host", "feed_forward_chunks": 2,
    },
}  # fmt: skip
PARTS_COMPILED = ["keep-attention-compiled", "kept-offload-compiled"]  # what they do is part of everything at once, compiled
PLANS |= {f"{name}-compiled": PLANS[name] | {"compile": True} for name in ("keep-attention", "kept-offload", "everything-at-once")}
if dist.is_torchelastic_launched():
    PLANS = {
        "shard": {"num_shards": 2},
        "shard-unchecked": {"num_shards": 2, "checkpoint": "none"},
        "shard-mixed": {"num_shards": 2, "num_keep_attention": 2, "num_keep_everything": 2},
        "shard-boundaries": {"num_shards": 2, "boundaries": "host"},
        "shard-kept": {"num_shards": 2, "kept": "host", "checkpoint": "none"},
        "shard-chunks": {"num_shards": 2, "feed_forward_chunks": 7},
        "shard-compiled": {"num_shards": 2, "compile": True, "num_keep_attention": 2},
    }
NAMES_16_BIT = ["shard", "shard-mixed"] if "shard" in PLANS else ["checkpoint-all", "offload", "everything-at-once"]


# Compiling takes longer than all the rest: one kind of model, and mostly one plan, stand for all.
OF_BOTH_KINDS = [pytest.param(name, kind, marks=pytest.mark.slow if kind == "sincos" and name.endswith("compiled") else [])
                 for name in PLANS for kind in ("sincos", "rope")]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in PARTS_COMPILED else []) for name in PLANS])
def plan(request):
    return MemoryPlan(**PLANS[request.param])


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    # The tiny model's activations are below the size from which moving one to the host pays.
    monkeypatch.setitem(memory.activations.offload_activations.__kwdefaults__, "min_bytes", 0)
    # Compiled as far as autograd goes, and then run as it is: in a tenth of the time. test_compiling.py goes all the way.
    monkeypatch.setitem(memory.compiling.compile_blocks.__kwdefaults__, "backend", "aot_eager")
    if request.param == "cuda":
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
        torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poison(monkeypatch):
    """Whenever a block is fetched, every slot but its own is filled with NaN and must be loaded again. Masters are NaN but for
    while they are copied: on a card they are on another device, where no kernel reads them."""
    acquire = memory.offload._Ring.acquire
    whole = {}

    def poisoned(ring, index, way):
        for master in ring.masters.values():
            master.flat.copy_(whole.setdefault(id(master), master.flat.clone()))
        slot = acquire(ring, index, way)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        for master in ring.masters.values():
            master.flat.fill_(0xFF)  # a NaN in every floating dtype
        for other in ring.slots:
            if other is not slot:
                other.flat.fill_(0xFF)
                other.block = None
        return slot

    monkeypatch.setattr(memory.offload._Ring, "acquire", poisoned)


def apply(tiny, plan, device):
    return apply_plan(
        tiny.model, tiny.blocks, plan, device=device, boundary_names=BOUNDARY_NAMES, feed_forwards=tiny.feed_forwards
    )


def tolerance_of(plan):
    return CHUNK_TOLERANCE if plan.feed_forward_chunks > 1 else 0.0


def assert_two_steps_are_the_plain_ones(step, plan, kind, device):
    tiny = make_tiny(kind, device)
    applied = apply(tiny, plan, device)
    for _ in range(2):
        assert_equal([step(tiny)], [plain_run(kind, device)[0]], tolerance_of(plan))
        assert_equal(tiny.gradients(), plain_run(kind, device)[1], tolerance_of(plan))
    num_checkpointed = sum(keep != "everything" for keep in applied.keeps)
    assert applied.num_recomputes == 2 * 2 * num_checkpointed


@pytest.mark.parametrize("plan, kind", OF_BOTH_KINDS, indirect=True)
def test_same_losses_and_gradients(plan, kind, device):
    assert_two_steps_are_the_plain_ones(Tiny.step, plan, kind, device)


@pytest.mark.skipif("shard" in PLANS, reason="about offload")
@pytest.mark.parametrize("plan", [name for name in PLANS if "resident_blocks" in PLANS[name]], indirect=True)
def test_nothing_reads_a_stale_slot_or_a_master(plan, device, poison):
    tiny = make_tiny("rope", device)
    apply(tiny, plan, device)
    assert_equal([tiny.step()], [plain_run("rope", device)[0]], tolerance_of(plan))
    assert_equal(tiny.gradients(), plain_run("rope", device)[1], tolerance_of(plan))


def joint_gradients(tiny):
    sum(tiny.predict(tiny.embeds[i : i + 1]).square().mean() * (i + 1) for i in (0, 1)).backward()
    return tiny.gradients()


@pytest.fixture(scope="module")
def plain_joint():
    return {}


def test_joint_backward_of_two_passes(plan, device, poison, plain_joint):
    """The graph of the first pass is older than the second pass' use of every slot."""
    if device not in plain_joint:
        plain = make_tiny("rope", device)
        plain.model.to(device)
        plain_joint[device] = joint_gradients(plain)
    tiny = make_tiny("rope", device)
    apply(tiny, plan, device)
    assert_equal(joint_gradients(tiny), plain_joint[device], tolerance_of(plan))


@pytest.mark.skipif("shard" in PLANS, reason="sharded blocks are gathered pass by pass")
@pytest.mark.parametrize("plan, kind", OF_BOTH_KINDS, indirect=True)
def test_lockstep_is_the_same_step(plan, kind, device, poison):
    assert_two_steps_are_the_plain_ones(Tiny.step_in_lockstep, plan, kind, device)


def train(tiny, num_steps=3):
    optimizer = torch.optim.AdamW(tiny.adapters, lr=1e-2, fused=True)
    for _ in range(num_steps):
        tiny.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def plain_adapters():
    return {}


def test_training_changes_adapters_as_without_and_nothing_else(plan, device, plain_adapters):
    if device not in plain_adapters:
        plain = make_tiny("sincos", device)
        plain.model.to(device)
        train(plain)
        plain_adapters[device] = plain.adapters
    tiny = make_tiny("sincos", device)
    frozen = {name: tensor.clone() for name, tensor in tiny.frozen.items()}
    parameters = dict(tiny.model.named_parameters())
    keys = {name: (tensor.shape, tensor.dtype) for name, tensor in tiny.model.state_dict().items()}
    applied = apply(tiny, plan, device)
    train(tiny)

    after = tiny.model.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == keys
    assert all(torch.equal(whole(after[name]).cpu(), frozen[name]) for name in frozen)
    # Sharded weights are other objects until undo() brings the former ones back.
    kept = [(name, p) for name, p in tiny.model.named_parameters() if p.requires_grad or plan.num_shards == 1]
    assert kept and all(parameter is parameters[name] for name, parameter in kept)
    # Adam divides by the root of a squared gradient, so a rounding of a small gradient can be a large one of the weight.
    assert_equal(tiny.adapters, plain_adapters[device], 1e-3 if plan.feed_forward_chunks > 1 else 0.0)
    applied.undo()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in tiny.frozen.items())
    assert all(parameter is parameters[name] for name, parameter in tiny.model.named_parameters())


def test_undo_leaves_nothing_and_allows_another(plan, device):
    tiny = make_tiny("rope", device)
    before = snapshot(tiny.model)
    applied = apply(tiny, plan, device)
    assert snapshot(tiny.model) != before
    tiny.step()
    tiny.gradients()
    applied.undo()
    assert snapshot(tiny.model) == before
    assert all(tensor.device.type == "cpu" for tensor in tiny.model.state_dict().values())
    applied.undo()  # a second call does nothing
    tiny.model.to(device)
    assert_equal([tiny.step()], [plain_run("rope", device)[0]])
    assert_equal(tiny.gradients(), plain_run("rope", device)[1])
    tiny.model.to("cpu")
    apply(tiny, plan, device)
    assert_equal([tiny.step()], [plain_run("rope", device)[0]], tolerance_of(plan))


def test_applied_twice_raises(plan, device):
    tiny = make_tiny("sincos", device)
    apply(tiny, plan, device)
    with pytest.raises(RuntimeError, match="applied to this model already"):
        apply(tiny, plan, device)
    assert_equal([tiny.step()], [plain_run("sincos", device)[0]], tolerance_of(plan))


def test_nothing_matched_raises(plan):
    with pytest.raises(ValueError, match="matched nothing"):
        apply_plan(nn.Linear(2, 2), [], plan, device="cpu", boundary_names=BOUNDARY_NAMES)


@pytest.mark.parametrize("num_calls_before", [7, 17])
def test_survives_an_exception(plan, device, num_calls_before):
    """In a teacher pass, and in a student's recomputation (without one, in the next student's forward)."""
    tiny = make_tiny("sincos", device)
    applied = apply(tiny, plan, device)
    calls = iter(range(1000))

    def fail_once(module, args, kwargs):
        if next(calls) == num_calls_before:
            raise ArithmeticError("as an out-of-memory error would")

    hooks = [block.norm2.register_forward_pre_hook(fail_once, with_kwargs=True) for block in tiny.blocks]
    with applied.hooked(), pytest.raises(ArithmeticError):
        tiny.step()
    for hook in hooks:
        hook.remove()
    for parameter in tiny.adapters:
        parameter.grad = None
    state = tiny.model.state_dict()
    assert all(torch.equal(whole(state[name]).cpu(), tensor) for name, tensor in make_tiny("sincos").frozen.items())
    assert_equal([tiny.step()], [plain_run("sincos", device)[0]], tolerance_of(plan))
    assert_equal(tiny.gradients(), plain_run("sincos", device)[1], tolerance_of(plan))


def test_a_graph_that_no_backward_walks_is_freed(plan, device):
    """As where memory runs out in forward: only with that memory back can a run go on."""
    tiny, made = make_tiny("rope", device), []
    applied = apply(tiny, plan, device)

    def note(module, args, output):
        made.append(weakref.ref(output.untyped_storage()))

    hooks = [linear.register_forward_hook(note) for block in tiny.blocks for linear in block.modules() if isinstance(linear, nn.Linear)]
    with applied.hooked():
        tiny.predict(tiny.embeds[:1])
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert made and not any(reference() for reference in made)


def test_adapters_written_under_one_plan_load_under_another(device):
    written = make_tiny("rope", device)
    apply(written, MemoryPlan(**PLANS["shard"]) if "shard" in PLANS else MemoryPlan(resident_blocks=1, boundaries="host"), device)
    train(written)
    state = {name: tensor.cpu() for name, tensor in written.model.state_dict().items() if "adapter" in name}

    read = make_tiny("rope", device)
    apply(read, MemoryPlan(num_keep_everything=2), device)
    assert not read.model.load_state_dict(state, strict=False).unexpected_keys
    assert_equal([read.step()], [written.step()])


@pytest.mark.parametrize("name", NAMES_16_BIT)
def test_a_16_bit_backbone_stays_close(name, kind, device):
    """bfloat16 has 8 bits: 5 blocks of it move the loss by a few percent. The adapters and their gradients stay float32."""
    tiny = make_tiny(kind, device)
    applied = apply(tiny, MemoryPlan(dtype="bfloat16", **PLANS[name]), device)
    assert_equal([tiny.step()], [plain_run(kind, device)[0]], 0.1)
    assert all(parameter.dtype == torch.float32 for parameter in tiny.adapters)
    gradients = torch.cat([gradient.flatten() for gradient in tiny.gradients()])
    expected = torch.cat([gradient.flatten() for gradient in plain_run(kind, device)[1]])
    assert torch.cosine_similarity(gradients, expected, dim=0) > 0.98
    reference = make_tiny(kind, device)
    apply(reference, MemoryPlan(dtype="bfloat16"), device)
    assert_equal([tiny.step()], [reference.step()], 0.02 if "chunks" in str(PLANS[name]) else 0.0)
    applied.undo()
    assert {tensor.dtype for tensor in tiny.model.state_dict().values()} == {torch.float32}


@pytest.mark.gpu
def test_steady_state_never_waits_nor_allocates(plan, device):
    if device != "cuda":
        pytest.skip("about a card")
    tiny = make_tiny("rope", device)
    applied = apply(tiny, plan, device)
    for _ in range(2):
        tiny.step()
        tiny.gradients()
    torch.cuda.synchronize()
    num_segments = torch.cuda.memory_stats()["segment.all.allocated"]
    late = applied.offload.num_late_loads if applied.offload else 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        tiny.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["segment.all.allocated"] == num_segments
    assert (applied.offload.num_late_loads if applied.offload else 0) == late
