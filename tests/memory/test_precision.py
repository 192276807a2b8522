import pytest
import torch
from tiny_transformer import make_tiny, plain_run
from torch import nn

from memory.precision import cast_frozen, make_scaler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_frozen_is_cast_and_what_is_trained_is_not(dtype):
    tiny = make_tiny()
    objects = dict(tiny.model.named_parameters())
    cast_frozen(tiny.model, dtype)
    for name, parameter in tiny.model.named_parameters():
        assert parameter is objects[name]
        assert parameter.dtype == (torch.float32 if "adapter" in name else dtype)
    assert {buffer.dtype for buffer in tiny.model.buffers()} == {dtype}
    assert tiny.predict(tiny.embeds[:1]).isfinite().all()


def test_undo_is_exact_after_a_widening():
    tiny = make_tiny()
    cast_frozen(tiny.model, torch.bfloat16)
    rounded = {name: tensor.clone() for name, tensor in tiny.frozen.items()}
    cast_frozen(tiny.model, torch.float32).undo()
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in tiny.frozen.items())


def test_undo_after_a_narrowing_restores_the_dtype_alone():
    tiny = make_tiny()
    handle = cast_frozen(tiny.model, torch.bfloat16)
    handle.undo()
    assert {tensor.dtype for tensor in tiny.model.state_dict().values()} == {torch.float32}
    assert not torch.equal(tiny.step(), plain_run("sincos")[0])


def test_running_out_of_memory_while_casting_leaves_the_former_dtypes(monkeypatch):
    tiny = make_tiny()
    to, calls = torch.Tensor.to, iter(range(1000))

    def exhausted(tensor, where):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        return to(tensor, where)

    with monkeypatch.context() as context, pytest.raises(torch.OutOfMemoryError):
        context.setattr(torch.Tensor, "to", exhausted)
        cast_frozen(tiny.model, torch.bfloat16)
    assert {tensor.dtype for tensor in tiny.model.state_dict().values()} == {torch.float32}


def test_integer_tensors_are_left_alone():
    module = nn.Linear(2, 2).requires_grad_(False)
    module.register_buffer("position", torch.arange(3))
    cast_frozen(module, torch.float16)
    assert module.position.dtype == torch.int64


def test_refusals():
    with pytest.raises(ValueError, match="matched nothing"):
        cast_frozen(nn.Linear(2, 2), torch.float16)
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2).half())
    with pytest.raises(ValueError, match="1.weight is trainable in torch.float16"):
        cast_frozen(module, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_scaling_where_none_is_needed(dtype):
    scaler = make_scaler(dtype, "cpu")
    loss = torch.tensor(3.0)
    assert scaler.scale(loss) is loss and not scaler.is_enabled()


def test_float16_gradients_survive_with_scaling_and_vanish_without():
    """A loss as small as the mean over a video makes it: its gradient is below float16's smallest number."""
    frozen, adapter = nn.Linear(4, 1).requires_grad_(False), nn.Parameter(torch.ones(4))
    frozen.weight.data.fill_(1)
    cast_frozen(nn.ModuleList([frozen]), torch.float16)
    optimizer = torch.optim.AdamW([adapter], lr=0.1, fused=True)

    def backward(scaler):
        adapter.grad = None
        loss = frozen(adapter.half()).float().sum() * 1e-9
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return adapter.grad

    assert backward(torch.amp.GradScaler("cpu", enabled=False)).count_nonzero() == 0
    scaler = make_scaler(torch.float16, "cpu")
    torch.testing.assert_close(backward(scaler), torch.full((4,), 1e-9), rtol=0.01, atol=0)
    scaler.step(optimizer)
    scaler.update()
    assert (adapter != 1).all()


def test_an_overflow_skips_the_step_and_halves_the_scale():
    adapter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([adapter], lr=0.1, fused=True)
    scaler = make_scaler(torch.float16, "cpu")
    scaler.scale((adapter * torch.inf).sum()).backward()
    before = scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(adapter, torch.ones(4))
    assert scaler.get_scale() == before / 2
