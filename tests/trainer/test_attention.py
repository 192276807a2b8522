"""Attention with rotary positions a few heads at a time, against diffusers' own."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb

from trainer.backbones import attention
from trainer.backbones.attention import rotate

B, A, L, N, WIDTH = 2, 5, 3, 7, 8
ROUNDING = 5e-7  # of float32, at the values here: a product and its sum may be rounded together


def _case(dtype):
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(B, A, L + N, WIDTH, generator=dice).to(dtype).requires_grad_()
    angles = torch.rand(N, WIDTH // 2, generator=dice).repeat_interleave(2, -1) * 6
    return x, (angles.cos(), angles.sin()), torch.randn(B, A, L + N, WIDTH, generator=dice).to(dtype)


def _stock(x, positions):
    return torch.cat([x[:, :, :L], apply_rotary_emb(x[:, :, L:], positions)], 2)


@pytest.mark.parametrize("heads_at_once", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_diffusers(monkeypatch, dtype, heads_at_once):
    monkeypatch.setattr(attention, "CHUNK_BYTES", 4 * B * N * WIDTH * heads_at_once)
    x, positions, grad = _case(dtype)
    ours, stock = rotate(x, positions, L), _stock(x, positions)
    torch.testing.assert_close(ours, stock, rtol=0, atol=ROUNDING if dtype == torch.float32 else 0)
    (found,), (expected,) = torch.autograd.grad(ours, x, grad), torch.autograd.grad(stock, x, grad)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    else:  # nearer to the truth than autograd's own, which rounds in between
        true = torch.autograd.grad(_stock(x.double(), positions), x, grad.double())[0].double()
        exact = attention._rotated(grad.double(), *positions, L, back=True)
        assert (found - exact).abs().max() <= (expected - exact).abs().max() and true.dtype == torch.float64


def test_backward_is_the_inverse_of_forward():
    x, positions, _ = _case(torch.float32)
    there = attention._rotated(x.detach(), *positions, L, back=False)
    torch.testing.assert_close(attention._rotated(there, *positions, L, back=True), x.detach())


def test_gradients_may_lie_in_any_order():
    x, positions, grad = _case(torch.float32)
    turned = grad.transpose(-1, -2).contiguous().transpose(-1, -2)  # as the unfused attention's backward gives them
    results = [torch.autograd.grad(rotate(x, positions, L), x, each)[0] for each in (grad, turned)]
    assert torch.equal(*results)
