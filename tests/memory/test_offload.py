import functools
import operator

import pytest
import torch
from tiny_transformer import assert_equal, make_tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from memory.checkpointing import checkpoint_blocks
from memory.masters import ALIGNMENT
from memory.offload import offload_blocks, place
from memory.plan import PlanError, resident_indices


@pytest.mark.parametrize(
    ("num_blocks", "num_resident", "expected"),
    [(6, None, {0, 1, 2, 3, 4, 5}), (6, 0, set()), (6, 1, {5}), (6, 2, {2, 5}), (6, 3, {1, 3, 5}), (5, 4, {1, 2, 3, 4})],
)
def test_resident_blocks_are_spread_and_hold_the_turn(num_blocks, num_resident, expected):
    assert resident_indices(num_blocks, num_resident) == expected


@pytest.mark.parametrize("num_resident", range(43))
def test_as_many_resident_as_asked(num_resident):
    resident = sorted(resident_indices(42, num_resident))
    assert len(resident) == num_resident
    gaps = [b - a for a, b in zip(resident, resident[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden))


def make_blocks(num_blocks=6):
    torch.manual_seed(0)
    return nn.Sequential(*[Block() for _ in range(num_blocks)]).requires_grad_(False)


def trace(handle, monkeypatch):
    """The order in which blocks are loaded."""
    loads = []
    ring = handle._ring
    names = {master.flat.data_ptr(): index for index, master in ring.masters.items()}
    copy = ring.lane.copy

    def traced(pairs, done):
        loads.extend(names[source.data_ptr()] for _, source in pairs)
        copy(pairs, done)

    monkeypatch.setattr(ring.lane, "copy", traced)
    return loads


def student_pass(blocks):
    hidden = torch.ones(2, 8, requires_grad=True)
    blocks(hidden).sum().backward()
    return hidden.grad


def test_loads_run_ahead_and_the_turn_needs_none(monkeypatch):
    blocks = make_blocks()
    expected = student_pass(blocks)
    handle = offload_blocks(blocks, device="cpu")
    checkpoint_blocks(blocks, ["inputs"] * 6)
    loads = trace(handle, monkeypatch)
    with torch.no_grad():
        blocks(torch.ones(2, 8))
    assert loads == [0, 1, 2, 3, 4, 5, 0]  # block 0 again, for the next pass
    loads.clear()
    assert torch.equal(student_pass(blocks), expected)
    assert loads == [1, 2, 3, 4, 5, 3, 2, 1, 0]  # 4 and 5 are still there when backward starts
    loads.clear()
    assert torch.equal(student_pass(blocks), expected)
    assert loads == [2, 3, 4, 5, 3, 2, 1, 0]
    assert handle.num_late_loads == 1  # the very first
    assert handle.num_loads == 24


def test_bytes_of_a_student_pass_stay_under_twice_what_is_streamed():
    blocks = make_blocks()
    handle = offload_blocks(blocks, device="cpu", num_resident=2, num_buffers=3)
    checkpoint_blocks(blocks, ["inputs"] * 6)
    student_pass(blocks)
    before = handle.bytes_loaded
    student_pass(blocks)
    streamed = sum(buffer.numel() for buffer in handle.host_buffers)
    assert 0 < handle.bytes_loaded - before < 2 * streamed


def test_a_block_ahead_is_loaded_before_it_is_asked_for():
    blocks = make_blocks()
    handle = offload_blocks(blocks, device="cpu")
    seen = []
    blocks[2].linear.register_forward_pre_hook(lambda *_: seen.append({slot.block for slot in handle._ring.slots}))
    with torch.no_grad():
        blocks(torch.ones(2, 8))
    assert seen == [{2, 3}]


def test_a_resident_block_gives_time_to_load_two():
    blocks = make_blocks()
    handle = offload_blocks(blocks, device="cpu", num_resident=3)  # 1, 3 and 5
    seen = []
    blocks[3].linear.register_forward_pre_hook(lambda *_: seen.append({slot.block for slot in handle._ring.slots}))
    with torch.no_grad():
        blocks(torch.ones(2, 8))
    assert seen == [{4, 0}]


def test_parameters_point_at_aligned_masters_and_at_slots_only_while_running():
    blocks = make_blocks()
    for block in blocks:
        block.after_a_bias = nn.Linear(8, 8).requires_grad_(False)
    handle = offload_blocks(blocks, device="cpu")
    masters = {buffer.untyped_storage().data_ptr() for buffer in handle.host_buffers}
    slots = {buffer.untyped_storage().data_ptr() for buffer in handle.device_buffers}
    during = []
    blocks[1].linear.register_forward_pre_hook(
        lambda module, _: during.append(module.weight.untyped_storage().data_ptr())
    )
    with torch.no_grad():
        blocks(torch.ones(2, 8))
    assert during[0] in slots
    for parameter in blocks.parameters():
        assert parameter.untyped_storage().data_ptr() in masters
        assert parameter.storage_offset() * parameter.itemsize % ALIGNMENT == 0


def test_weights_are_not_loaded_past_what_is_on_the_device():
    blocks = make_blocks()
    before = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    more = {name: tensor + 1 for name, tensor in before.items()}
    handle = offload_blocks(blocks, device="cpu", num_resident=1)
    with pytest.raises(RuntimeError, match=r"0.linear.(weight|bias) is streamed, .*; undo\(\) the offload first"):
        blocks.load_state_dict(more)
    assert all(torch.equal(tensor, before[name]) for name, tensor in blocks.state_dict().items())
    (resident,) = set(range(6)) - handle.streamed
    blocks[resident].load_state_dict({name: more[f"{resident}.{name}"] for name in blocks[resident].state_dict()})
    handle.undo()
    blocks.load_state_dict(more)
    assert all(torch.equal(tensor, more[name]) for name, tensor in blocks.state_dict().items())


@pytest.mark.parametrize("change", [lambda m: m.to(torch.float64), lambda m: m[1].linear.half(), lambda m: m[1].linear.to_empty(device="cpu")])
def test_weights_are_not_cast_or_moved_past_what_is_on_the_device(change):
    blocks, expected = make_blocks(), make_blocks()
    handle = offload_blocks(blocks, device="cpu")
    with pytest.raises(RuntimeError, match=r"cannot be cast or moved, .*undo\(\) it first"):
        change(blocks)
    hidden = torch.randn(2, 8)
    assert torch.equal(blocks(hidden), expected(hidden))
    handle.undo()
    change(blocks)


def test_weights_are_not_cast_layer_by_layer_while_a_block_runs():
    blocks = make_blocks()
    blocks[1].linear.register_forward_pre_hook(lambda module, _: module.half() and None)  # as diffusers' layerwise casting does
    offload_blocks(blocks, device="cpu")
    with pytest.raises(RuntimeError, match="cannot be cast or moved"):
        blocks(torch.ones(2, 8))


def test_a_first_pass_in_inference_mode_leaves_training_alone():
    blocks, hidden = make_blocks(), torch.randn(2, 8)
    offload_blocks(blocks, device="cpu")
    with torch.inference_mode():
        blocks(hidden)
    gradients = []
    for stack in (blocks, make_blocks()):
        given = hidden.clone().requires_grad_()
        stack(given).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


def test_a_slot_has_one_set_of_parameters_for_all_blocks_that_are_alike():
    blocks, seen = make_blocks(), []
    blocks[2].linear = nn.Linear(8, 8, bias=False).requires_grad_(False)
    expected = blocks(torch.ones(2, 8))
    handle = offload_blocks(blocks, device="cpu")
    for block in blocks:
        block.linear.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    assert torch.equal(blocks(torch.ones(2, 8)), expected)
    assert len({id(parameter) for parameter in seen}) == len(handle.device_buffers) + 1
    assert [parameter is seen[2] for parameter in seen] == [False, False, True, False, False, False]


def test_slots_are_never_reallocated():
    blocks = make_blocks()
    handle = offload_blocks(blocks, device="cpu")
    before = [buffer.data_ptr() for buffer in handle.device_buffers]
    for _ in range(3):
        with torch.no_grad():
            blocks(torch.ones(2, 8))
    assert [buffer.data_ptr() for buffer in handle.device_buffers] == before


def test_there_are_no_more_slots_than_streamed_blocks():
    handle = offload_blocks(make_blocks(), device="cpu", num_resident=3, num_buffers=5)
    assert len(handle.device_buffers) == 3


def test_undo_frees_the_masters():
    blocks = make_blocks()
    handle = offload_blocks(blocks, device="cpu")
    handle.undo()
    assert handle.host_buffers == [] and handle.device_buffers == []
    assert len({parameter.untyped_storage().data_ptr() for parameter in blocks.parameters()}) == 12


def test_a_load_under_way_is_waited_for_before_its_slot_is_freed(monkeypatch):
    blocks = make_blocks()
    handle = offload_blocks(blocks, device="cpu")
    ring, joined = handle._ring, []
    monkeypatch.setattr(ring.lane, "join", joined.append)
    for slot in ring.slots:
        slot.loaded = object()
    expected = [slot.loaded for slot in ring.slots]
    handle.undo()
    assert joined == expected


def test_undo_between_forward_and_backward_is_told():
    blocks = make_blocks()
    handle = offload_blocks(blocks, device="cpu")
    loss = blocks(torch.ones(2, 8, requires_grad=True)).sum()
    handle.undo()
    with pytest.raises(RuntimeError, match="its offload was undone meanwhile"):
        loss.backward()


def test_undo_in_the_wrong_order_is_refused():
    blocks = make_blocks()
    offload = offload_blocks(blocks, device="cpu")
    checkpointing = checkpoint_blocks(blocks, ["inputs"] * 6)
    with pytest.raises(RuntimeError, match="undo in the reverse order"):
        offload.undo()
    checkpointing.undo()
    offload.undo()


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("num_buffers", [2, 3])
def test_the_text_encoder_streams_through_the_same_engine(num_buffers, gathered):
    """Its first block has one parameter more than the others."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=4, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    encoder = T5EncoderModel(config).eval().requires_grad_(False)
    ids = torch.randint(0, 50, (2, 7))
    with torch.inference_mode():
        expected = encoder(ids)[0]
        handle = offload_blocks(encoder.encoder.block, device="cpu", num_buffers=num_buffers, gathered=gathered)
        for _ in range(2):
            assert torch.equal(encoder(ids)[0], expected)
    handle.undo()
    assert torch.equal(encoder(ids)[0], expected)


def test_weights_that_are_not_gathered_stay_where_they_are_in_training_too():
    blocks, plain = make_blocks(), make_blocks()
    where = [parameter.data_ptr() for parameter in blocks.parameters()]
    handle = offload_blocks(blocks, device="cpu", gathered=False)
    hidden, expected = (torch.ones(2, 8, requires_grad=True) for _ in range(2))
    blocks(hidden).sum().backward()
    plain(expected).sum().backward()
    assert torch.equal(hidden.grad, expected.grad)
    assert handle.host_buffers == [] and handle.bytes_loaded == handle.num_loads * handle.device_buffers[0].numel() > 0
    handle.undo()
    assert [parameter.data_ptr() for parameter in blocks.parameters()] == where


def test_trainable_parameters_and_buffers_stay():
    tiny = make_tiny()
    for block in tiny.blocks:
        block.register_buffer("num_passes", torch.zeros(()))
        block.register_forward_pre_hook(lambda module, _: module.num_passes.add_(1) and None)
    before = {id(parameter): parameter.data_ptr() for parameter in tiny.adapters}
    handle = offload_blocks(tiny.blocks, device="cpu")
    tiny.step()
    assert {id(parameter): parameter.data_ptr() for parameter in tiny.adapters} == before
    assert [block.num_passes.item() for block in tiny.blocks] == [4] * 5
    handle.undo()


def test_parameters_that_share_storage_inside_a_block_or_across_blocks():
    blocks = make_blocks(3)
    blocks[0].second = nn.Linear(8, 8).requires_grad_(False)
    blocks[0].second.weight = blocks[0].linear.weight  # one Parameter, two names
    blocks[1].linear.weight.data = blocks[2].linear.weight.data  # two Parameters, one storage
    expected = blocks(torch.ones(2, 8))
    handle = offload_blocks(blocks, device="cpu")
    assert torch.equal(blocks(torch.ones(2, 8)), expected)
    handle.undo()
    assert torch.equal(blocks(torch.ones(2, 8)), expected)


@pytest.mark.parametrize("gathered", [True, False])
def test_weights_keep_the_order_of_their_dimensions(gathered):
    """Else products of other kernels, which round otherwise."""
    blocks, seen = make_blocks(3), []
    weights = [block.linear.weight for block in blocks]
    weights[1].data = weights[1].data.t().contiguous().t()
    blocks[1].before = nn.Parameter(torch.ones(3), requires_grad=False)  # in the buffer, too
    weights[2].data = torch.randn(8, 16)[:, ::2]  # with gaps, which nobody needs
    expected = blocks[:2](torch.ones(2, 8))
    handle = offload_blocks(blocks, device="cpu", gathered=gathered)
    for block in blocks:
        block.linear.register_forward_pre_hook(lambda module, _: seen.append(module.weight.stride()))
    assert torch.equal(blocks[:2](torch.ones(2, 8)), expected)
    blocks[2](expected)
    assert seen == [(8, 1), (1, 8), (8, 1)] and torch.equal(blocks[1].before, torch.ones(3))
    handle.undo()
    assert [weight.stride() for weight in weights[:2]] == [(8, 1), (1, 8)]


def raises(message, blocks, **settings):
    with pytest.raises((PlanError, ValueError), match=message):
        offload_blocks(blocks, device="cpu", **settings)
    assert not any("forward" in block.__dict__ for block in blocks)


def test_refusals():
    raises("matched nothing", [])
    raises("num_buffers is 1; at least 2", make_blocks(), num_buffers=1)
    raises("resident_blocks is 7, but the model has 6 blocks", make_blocks(), num_resident=7)
    raises("listed twice", [make_blocks()[0]] * 2)
    raises("block 0 has no frozen parameters", make_blocks().requires_grad_(True))
    shared = make_blocks()
    shared[4].linear.weight = shared[2].linear.weight
    raises("blocks 2 and 4 share a frozen parameter", shared)
    meta = make_blocks()
    meta[3].to("meta")
    raises("block 3: linear.weight is on the meta device", meta)


def test_running_out_of_memory_while_applying_leaves_the_model_as_it_was(monkeypatch):
    blocks = make_blocks()
    expected = blocks(torch.ones(2, 8))
    empty = torch.empty
    calls = iter(range(100))

    def exhausted(*args, **kwargs):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        return empty(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(torch, "empty", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            offload_blocks(blocks, device="cpu")
    assert not any("forward" in block.__dict__ for block in blocks)
    assert len({parameter.untyped_storage().data_ptr() for parameter in blocks.parameters()}) == 12
    assert torch.equal(blocks(torch.ones(2, 8)), expected)


def test_an_interrupt_while_a_block_is_gathered_leaves_its_weights_where_they_were(monkeypatch):
    blocks, copy, calls = make_blocks(), torch.Tensor.copy_, iter(range(100))
    expected = blocks(torch.ones(2, 8))

    def interrupted(tensor, source):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return copy(tensor, source)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(torch.Tensor, "copy_", interrupted)
        offload_blocks(blocks, device="cpu")
    assert next(calls) == 4 and all(p.untyped_storage().nbytes() == p.nbytes for p in blocks.parameters())
    assert torch.equal(blocks(torch.ones(2, 8)), expected)


def test_running_out_of_memory_while_placing_leaves_the_module_where_it_was(monkeypatch):
    to, asked = torch.Tensor.to, []

    def exhausted(tensor, device):
        asked.append(device.type)
        if len(asked) == 3:
            raise torch.OutOfMemoryError("no more")
        return to(tensor, device)

    with FakeTensorMode():
        blocks = make_blocks()
        monkeypatch.setattr(torch.Tensor, "to", exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            place(blocks, torch.device("cuda", 0))
    assert asked == ["cuda"] * 3 + ["cpu"] * 3  # a fake tensor does not tell where its data went


def test_other_orders_of_blocks_are_right_too():
    """The order is a guess about what to load, not a condition for the result."""
    blocks = make_blocks()
    order = [3, 0, 0, 5, 2, 4, 1]
    run = functools.partial(functools.reduce, lambda hidden, index: blocks[index](hidden), order)
    hidden = torch.ones(2, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(run(hidden).sum(), hidden)
    offload_blocks(blocks, device="cpu")
    assert_equal(torch.autograd.grad(run(hidden).sum(), hidden), [expected])


def test_an_interrupted_load_is_done_again(monkeypatch):
    blocks = make_blocks()
    hidden = torch.randn(2, 8)
    expected = blocks(hidden)
    handle = offload_blocks(blocks, device="cpu")
    copy, calls = handle._ring.lane.copy, iter(range(100))

    def interrupted(pairs, done):
        copy(pairs, done)
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(handle._ring.lane, "copy", interrupted)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            blocks(hidden)
        assert torch.equal(blocks(hidden), expected)


def test_an_interrupt_between_two_parameters_leaves_none_behind():
    interrupts = [KeyboardInterrupt]

    class Interrupting(list):
        def __iter__(self):
            for seat in super().__iter__():
                yield seat
                if interrupts:
                    raise interrupts.pop()

    blocks = make_blocks()
    parameters = list(blocks.parameters())
    handle = offload_blocks(blocks, device="cpu")
    for master in handle._ring.masters.values():
        master.seats = Interrupting(master.seats)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        blocks(torch.randn(2, 8))
    assert all(map(operator.is_, blocks.parameters(), parameters))
    master.seats[0][0]["weight"] = torch.nn.Parameter(torch.zeros(8, 8))  # an interrupt while they take their seats again
    handle.undo()
    assert all(map(operator.is_, blocks.parameters(), parameters))
