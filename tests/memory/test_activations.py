import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny_transformer import BOUNDARY_NAMES, Tiny, _make, assert_equal, make_tiny, plain_run
from torch import nn

import memory.activations
from memory.activations import _alive, _Parked, offload_activations
from memory.checkpointing import checkpoint_blocks
from memory.masters import is_dense
from memory.slabs import Arena
from memory.streams import Lane

CPU = torch.device("cpu")


def apply(tiny, keeps=("inputs",) * 5, **settings):
    if set(keeps) != {"everything"}:
        checkpoint_blocks(tiny.blocks, keeps)
    return offload_activations(tiny.blocks, device="cpu", boundary_names=BOUNDARY_NAMES, min_bytes=1, **settings)


def parked_groups(handle):
    """What the blocks parked, the last one's first."""
    group = handle._group
    while group is not None:
        yield _alive(group)
        group = group._previous()


@pytest.mark.parametrize(("step", "num_moved"), [(Tiny.step, 2 * 4), (Tiny.step_in_lockstep, 9)])
def test_only_boundaries_move_and_the_last_call_keeps_its_own(step, num_moved):
    tiny = make_tiny("rope")
    handle = apply(tiny)
    step(tiny)
    boundary_bytes = (12 + 6) * 32 * 4  # video and text tokens of one block; time embedding and rotary tables stay
    assert handle.bytes_stored == handle.bytes_loaded == num_moved * boundary_bytes


@pytest.mark.parametrize(("step", "num_moved"), [(Tiny.step, 2 * 3), (Tiny.step_in_lockstep, 8)])
def test_attention_outputs_move_on_request_but_for_the_last_two_calls(step, num_moved):
    tiny = make_tiny("rope")
    handle = apply(tiny, keeps=["attention"] * 5, boundaries=False, kept=True)
    for _ in range(2):
        step(tiny)
    attention_bytes = 18 * 32 * 4 + 2 * 18 * 4  # output, and one log-sum-exp a head and token
    assert handle.bytes_stored == handle.bytes_loaded == 2 * num_moved * attention_bytes


def test_attention_outputs_that_move_leave_the_device(monkeypatch):
    tiny, sdpa, made = make_tiny("rope"), F.scaled_dot_product_attention, []

    def noted(*args, **kwargs):
        output = sdpa(*args, **kwargs)
        made.append(weakref.ref(output.untyped_storage()))
        return output

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    apply(tiny, keeps=["attention"] * 5, boundaries=False, kept=True)
    loss = tiny.predict(tiny.embeds[:1]).sum()
    assert [storage() is not None for storage in made] == [False] * 3 + [True] * 2
    del loss


def test_small_tensors_stay():
    tiny = make_tiny("rope")
    checkpoint_blocks(tiny.blocks, ["attention"] * 5)
    handle = offload_activations(
        tiny.blocks, device="cpu", boundary_names=BOUNDARY_NAMES, boundaries=False, kept=True, min_bytes=1000
    )
    tiny.step()
    assert handle.bytes_stored == 2 * 3 * 18 * 32 * 4  # the outputs without the log-sum-exps


def test_parameters_and_shared_inputs_stay_and_nothing_moves_twice():
    tiny = make_tiny("rope")
    fixed = {tensor.untyped_storage().data_ptr() for tensor in [*tiny.model.parameters(), *tiny.rotary]}
    handle = apply(tiny, keeps=["everything"] * 5, kept=True)
    sources = []
    copy = handle.store_lane.copy

    def traced(pairs, done):
        sources.extend(source for _, source in pairs)  # held, so that no address is used twice
        copy(pairs, done)

    handle.store_lane.copy = traced
    tiny.predict(tiny.embeds[:1]).sum().backward()
    assert not fixed & {source.untyped_storage().data_ptr() for source in sources}
    views = [(source.data_ptr(), source.shape, source.stride(), source._version) for source in sources]
    assert len(set(views)) == len(views) > 50


def test_parameters_that_were_given_other_memory_later_stay():
    class Multiply(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, hidden):
            return (hidden * 1) * self.weight * self.scale

    blocks = [Multiply(), nn.Identity(), nn.Identity()]
    handle = offload_activations(blocks, device="cpu", boundaries=False, kept=True, min_bytes=0)
    blocks[0].weight.data, blocks[0].scale = torch.full((4,), 2.0), nn.Parameter(torch.ones(4))
    blocks[0](torch.ones(4))
    assert handle.bytes_stored == 2 * 16  # what was multiplied, twice


def test_what_backward_is_through_with_is_not_held_by_a_graph_that_is_retained():
    tiny = make_tiny("rope")
    handle = apply(tiny, keeps=["everything"] * 5, kept=True)
    loss = tiny.predict(tiny.embeds[:1]).sum()
    loss.backward(retain_graph=True)
    parked = [found for found in gc.get_objects() if isinstance(found, _Parked) and found.parking is handle]
    assert len(parked) > 50 and all(each.tensor is None for each in parked)
    del loss


def test_device_memory_of_a_boundary_is_given_up_when_the_next_block_has_run():
    tiny = make_tiny("sincos")
    handle = apply(tiny)
    on_device = []

    def look(*_):
        # The hook runs before the forward that is wrapped, so the last group is that of block 2.
        on_device.extend([parked.tensor is not None for parked in group] for group in parked_groups(handle))

    tiny.blocks[3].register_forward_pre_hook(look)
    tiny.predict(tiny.embeds[:1])
    assert on_device == [[True, True], [False, False], [False, False]]


@pytest.mark.parametrize("block", [3, 4])  # of which the first parks, too, and the second keeps its own
def test_what_a_block_parked_has_the_next_two_blocks_time_to_arrive(block):
    """Two of three blocks in a row keep more than the link carries in their time, and the third makes up for it."""
    tiny = _make(rotary=False, num_blocks=6)
    handle = apply(tiny, keeps=["everything"] * 6, boundaries=False, kept=True)
    seen = []

    def look(*_):
        now, before, leaving, *_ = parked_groups(handle)
        assert all(parked.tensor is not None for parked in now + before)
        on_device = [parked.tensor is not None for parked in leaving]
        assert on_device == sorted(on_device), "oldest first"
        held = sum(parked.num_bytes for parked in leaving + now if parked.tensor is not None)
        seen.append((sum(on_device), held <= sum(parked.num_bytes for parked in leaving)))

    tiny.blocks[block].norm1.register_forward_hook(look)
    tiny.blocks[block].norm2.register_forward_hook(look)
    tiny.blocks[block].register_forward_hook(look)
    tiny.predict(tiny.embeds[:1])
    (early, _), (late, _), (end, _) = seen
    assert early > late > end == 0 and all(bounded for _, bounded in seen)


@pytest.mark.parametrize(("keeps", "boundaries", "expected"), [
    # Block 4 is at hand; each recomputation begins with the two boundaries of the block before it on their way.
    (["inputs"] * 5, True, ["load", "load", "compute"] * 4 + ["compute"]),
    # Attention's two outputs are asked for within a recomputation. Blocks 4 and 3 are at hand.
    (["attention"] * 5, False, ["compute", "compute", "load", "load", "compute", "load", "load", "compute", "load", "load", "compute"]),
    # Block 1, which parks nothing, is not in the way.
    (["attention", "inputs", "attention", "attention", "attention"], False, ["compute", "compute", *["load", "load", "compute"] * 2, "compute"]),
])  # fmt: skip
def test_backward_sends_for_one_block_ahead(keeps, boundaries, expected):
    tiny = make_tiny("sincos")
    handle = apply(tiny, keeps, boundaries=boundaries, kept=not boundaries)
    order = []
    load_copy = handle.load_lane.copy
    handle.load_lane.copy = lambda *args, **kwargs: (order.append("load"), load_copy(*args, **kwargs))
    for block in tiny.blocks:
        block.norm1.register_forward_pre_hook(lambda *_: order.append("compute"))
    loss = tiny.predict(tiny.embeds[:1]).sum()
    order.clear()
    loss.backward()
    assert order == expected


def test_host_memory_is_allocated_in_the_first_step_only():
    tiny = make_tiny("rope")
    handle = apply(tiny, keeps=["attention"] * 3 + ["everything"] * 2, kept=True)
    tiny.step()
    before = [slab.data_ptr() for slab in handle.host_buffers]
    used = list(handle.arena._packing._used)
    for _ in range(3):
        tiny.step()
    assert [slab.data_ptr() for slab in handle.host_buffers] == before
    assert handle.arena._packing._used == used


def test_undo_gives_the_host_its_memory_back_once_no_graph_reads_it():
    tiny = make_tiny("rope")
    handle = apply(tiny)
    loss = tiny.predict(tiny.embeds[:1]).sum()
    slabs = [weakref.ref(slab.untyped_storage()) for slab in handle.host_buffers]
    handle.undo()
    assert handle.host_buffers == [] and slabs and all(slab() is not None for slab in slabs)
    loss.backward()
    del loss
    gc.collect()
    assert all(slab() is None for slab in slabs) and handle.arena._free == {}


def test_a_graph_without_backward_gives_its_memory_back():
    tiny = make_tiny("rope")
    handle = apply(tiny)
    for _ in range(5):
        tiny.predict(tiny.embeds[:1])
        gc.collect()
    buffers = [buffer for free in handle.arena._free.values() for buffer in free]
    assert len(buffers) == 4 * 2


def test_a_retained_graph_is_read_again():
    tiny = make_tiny("rope")
    apply(tiny)
    loss = tiny.predict(tiny.embeds[:1]).sum()
    loss.backward(retain_graph=True)
    first = tiny.gradients()
    loss.backward()
    assert_equal(tiny.gradients(), first)


def test_undo_between_forward_and_backward():
    tiny = make_tiny("rope")
    tiny.predict(tiny.embeds[:1]).sum().backward()
    expected = tiny.gradients()
    handle = apply(tiny, keeps=["everything"] * 5, kept=True)
    loss = tiny.predict(tiny.embeds[:1]).sum()
    handle.undo()
    loss.backward()
    assert_equal(tiny.gradients(), expected)


def test_a_tensor_changed_in_place_between_two_saves_is_two_tensors():
    class Twice(nn.Module):
        def forward(self, hidden, weight):
            hidden = hidden * 1
            first = hidden * weight  # saves hidden
            with torch.no_grad():
                hidden.detach().add_(0)
            return first + hidden * weight

    blocks = [Twice(), nn.Identity(), nn.Identity()]
    handle = offload_activations(blocks, device="cpu", boundaries=False, kept=True, min_bytes=0)
    weight = torch.ones(4, requires_grad=True)
    loss = blocks[0](torch.ones(4), weight).sum()
    assert handle.bytes_stored == 2 * 16
    with pytest.raises(RuntimeError, match="changed in place"):  # as without us
        loss.backward()


def test_tensors_of_another_device_stay():
    class Multiply(nn.Module):
        def forward(self, hidden, weight):
            return (hidden * 1) * weight

    blocks = [Multiply(), nn.Identity(), nn.Identity()]
    handle = offload_activations(blocks, device="cpu", boundaries=False, kept=True, min_bytes=0)
    blocks[0](torch.ones(4, device="meta"), torch.ones(4, device="meta", requires_grad=True))
    assert handle.bytes_stored == 0
    blocks[0](torch.ones(4), torch.ones(4, requires_grad=True))
    assert handle.bytes_stored == 16


def test_layout_survives_the_trip():
    """Attention's output lies transposed in memory, and the reshape after it is a view only in that layout."""
    saved = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    handle = offload_activations([nn.Identity(), nn.Identity()], device="cpu", boundaries=False, kept=True, min_bytes=0)
    parked = handle.start_block(1).park(handle, saved, is_boundary=False)
    handle.start_block(0)
    handle.start_block(1)
    handle.make_room(parked.num_bytes)
    assert parked.tensor is None
    back = parked.unpack()
    assert torch.equal(back, saved) and back.stride() == saved.stride()
    assert back.data_ptr() != saved.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(2, 3), True),
        (torch.empty(2, 3, 4).transpose(0, 2), True),
        (torch.empty(2, 1, 4)[:, :, :], True),
        (torch.empty(4, 6)[:, 2:], False),
        (torch.empty(1, 6, 3)[:, 2:], True),
        (torch.empty(3, 1).expand(3, 2), False),
        (torch.empty(()), True),
    ],
)
def test_dense(tensor, expected):
    assert is_dense(tensor) is expected


def test_arena_slabs_are_powers_of_two_and_shared():
    arena = Arena(Lane(CPU), num_blocks=10)
    buffers = [arena.take(1000) for _ in range(10)]
    assert [slab.numel() for slab in arena.slabs] == [16384]  # ten times 1,024, rounded up
    assert len({buffer.flat.data_ptr() for buffer in buffers}) == 10
    arena.give_back(buffers[3])
    assert arena.take(500).flat.numel() == 512
    assert arena.take(900) is buffers[3]  # 1,024 once rounded to 256
    assert [slab.numel() for slab in arena.slabs] == [16384]
    arena.take(6000)
    assert [slab.numel() for slab in arena.slabs] == [16384, 65536]
    beside, after = arena.take(5000), arena.take(6000)  # what is left of the first slab has room for the one only
    assert beside.flat.data_ptr() == arena.slabs[0].data_ptr() + 10 * 1024 + 512
    assert after.flat.data_ptr() == arena.slabs[1].data_ptr() + 6144
    arena.take(65536 - 2 * 6144)  # all that is left of the second
    assert len(arena.slabs) == 2


def test_slabs_do_not_grow_beyond_a_size_but_hold_one_tensor_at_least(monkeypatch):
    monkeypatch.setattr("memory.slabs.MAX_SLAB_BYTES", 4096)
    arena = Arena(Lane(CPU), num_blocks=10)
    for num_bytes in (1024, 8192):
        arena.take(num_bytes)
    assert [slab.numel() for slab in arena.slabs] == [4096, 8192]


def test_equal_to_the_plain_run_without_checkpointing(kind):
    tiny = make_tiny(kind)
    apply(tiny, keeps=["everything"] * 5, kept=True)
    assert_equal([tiny.step()], [plain_run(kind)[0]])
    assert_equal(tiny.gradients(), plain_run(kind)[1])


def test_refusals():
    tiny = make_tiny()
    with pytest.raises(ValueError, match="matched nothing: the sequence"):
        offload_activations([], device="cpu", boundary_names=BOUNDARY_NAMES)
    with pytest.raises(ValueError, match="matched nothing: boundaries and kept are both False"):
        offload_activations(tiny.blocks, device="cpu", boundaries=False)
    with pytest.raises(ValueError, match="boundary_names is empty"):
        offload_activations(tiny.blocks, device="cpu")
    with pytest.raises(ValueError, match="block 0 has no argument 'hidden'; it has hidden_states"):
        offload_activations(tiny.blocks, device="cpu", boundary_names=["hidden"])
    apply(tiny)
    with pytest.raises(RuntimeError, match="already"):
        offload_activations(tiny.blocks, device="cpu", boundary_names=BOUNDARY_NAMES)


class _SavesTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.view(torch.int32))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        x, bits = ctx.saved_tensors
        assert (x.dtype, bits.dtype) == (torch.float32, torch.int32) and torch.equal(x.view(torch.int32), bits)
        return grad


class _Saving(nn.Module):
    def forward(self, hidden):
        return _SavesTwice.apply(2 * hidden)


def test_one_memory_in_two_dtypes_comes_back_as_both():
    blocks = nn.Sequential(_Saving(), _Saving(), _Saving())
    handle = offload_activations(blocks, device="cpu", boundaries=False, kept=True, min_bytes=0)
    blocks(torch.randn(8, requires_grad=True)).sum().backward()
    assert handle.bytes_loaded == 2 * 32


class _Transposing(nn.Module):
    def forward(self, hidden):
        hidden = 2 * hidden
        return hidden.sin() + hidden.t().cos()


class _Skipping(nn.Module):
    """Saves every second number of tensors that are gone at once, each perhaps to where the one before was."""

    def forward(self, hidden):
        for factor in range(1, 9):
            hidden = (factor / 4 * hidden.repeat(1, 2))[:, ::2].sin()
        return hidden


def assert_comes_back(block):
    blocks = nn.Sequential(block(), block(), block())
    hidden = torch.linspace(-1, 1, 256).view(16, 16).requires_grad_()
    expected = torch.autograd.grad(blocks(hidden).sum(), hidden)
    offload_activations(blocks, device="cpu", boundaries=False, kept=True, min_bytes=0)
    assert_equal(torch.autograd.grad(blocks(hidden).sum(), hidden), expected)


def test_one_memory_in_two_orders_comes_back_as_both():
    assert_comes_back(_Transposing)


def test_what_was_packed_is_not_taken_for_a_later_tensor_in_the_same_place(monkeypatch):
    monkeypatch.setattr(memory.activations, "_identity", lambda tensor: (tensor.shape, tensor.dtype))  # as if all were there
    assert_comes_back(_Skipping)


class _Sharing(nn.Module):
    def forward(self, hidden):
        hidden = 2 * hidden
        return hidden.sin() * hidden.cos()


def test_what_two_operators_saved_is_loaded_once():
    blocks = nn.Sequential(_Sharing(), _Sharing(), _Sharing())
    handle = offload_activations(blocks, device="cpu", boundaries=False, kept=True, min_bytes=0)
    blocks(torch.randn(8, requires_grad=True)).sum().backward()
    assert handle.bytes_loaded == handle.bytes_stored == 3 * 32  # its input, the sine and the cosine; the last two blocks' stay


@pytest.mark.parametrize("keeps, block", [(["attention"] * 5, 1), (["attention"] * 5, 4),
                                          (["inputs", "everything"] * 2 + ["inputs"], 3)])  # what block 3 keeps has not left yet
@pytest.mark.parametrize("kept", ["device", "host"])
def test_what_is_kept_and_then_changed_in_place_is_told(kept, keeps, block, monkeypatch):
    tiny, sdpa, calls = make_tiny("sincos"), F.scaled_dot_product_attention, iter(range(100))
    checkpoint_blocks(tiny.blocks, keeps)
    if kept == "host":
        offload_activations(tiny.blocks, device="cpu", boundaries=False, kept=True, min_bytes=0)

    def careless(*args, **kwargs):
        out = sdpa(*args, **kwargs)
        if next(calls) == block:
            with torch.no_grad():
                out.detach().mul_(2)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", careless)
    with pytest.raises(RuntimeError, match="changed in place|modified by an inplace operation"):
        tiny.predict(tiny.embeds[:1]).square().mean().backward()
