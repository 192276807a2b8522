"""Norm and rotary positions in one operator, against diffusers' own."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from memory.work import scratch_bytes
from trainer.backbones import norm_rotate
from trainer.backbones.norm_rotate import RotatingNorm

B, A, L, N, WIDTH = 2, 5, 3, 7, 16
ROUNDING = 2e-6  # of float32, at the values here


def _case(dtype: torch.dtype):
    torch.manual_seed(0)
    norm = RotatingNorm(WIDTH, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight, 1.0, 0.5), nn.init.normal_(norm.bias)
    angles = torch.rand(N, WIDTH // 2).repeat_interleave(2, -1) * 6
    x, grad = torch.randn(2, B, L + N, A, WIDTH).to(dtype)
    return norm.to(dtype), x.requires_grad_(), (angles.cos(), angles.sin()), grad


def _stock(norm: nn.LayerNorm, x: torch.Tensor, positions) -> torch.Tensor:
    x = nn.LayerNorm.forward(norm, x).transpose(1, 2)
    if positions is not None:
        x = torch.cat([x[:, :, :L], apply_rotary_emb(x[:, :, L:], positions)], 2)
    return x.transpose(1, 2)


def _both(norm, x, positions, grad):
    results = []
    for run in (lambda: norm(x, positions, L), lambda: _stock(norm, x, positions)):
        out = run()
        results.append((out.detach(), torch.autograd.grad(out, x, grad)[0]))
    return results


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("heads_at_once", [1, 2, 5])
def test_outputs_and_gradients_are_those_of_diffusers(monkeypatch, heads_at_once, rotated):
    monkeypatch.setattr(norm_rotate, "CHUNK_BYTES", 4 * B * N * WIDTH * heads_at_once)
    norm, x, positions, grad = _case(torch.float32)
    for ours, stock in zip(*_both(norm, x, positions if rotated else None, grad)):
        torch.testing.assert_close(ours, stock, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_they_are_no_further_from_the_truth(dtype):
    norm, x, positions, grad = _case(dtype)
    ours, stock = _both(norm, x, positions, grad)
    wide = x.detach().float().requires_grad_()
    true = _both(norm.float(), wide, positions, grad.float())[1]
    for found, theirs, exact in zip(ours, stock, true):
        off = [torch.linalg.vector_norm(each.float() - exact) / torch.linalg.vector_norm(exact) for each in (found, theirs)]
        assert found.dtype == dtype and off[0] < 1.1 * off[1] < 0.02


@pytest.mark.parametrize("rotated", [True, False])
def test_without_gradient_it_is_the_same(rotated):
    norm, x, positions, _ = _case(torch.float32)
    with torch.no_grad():
        found = norm(x, positions if rotated else None, L)
    assert torch.equal(found, norm(x, positions if rotated else None, L)) and not found.requires_grad


def test_gradients_may_lie_in_any_order():
    norm, x, positions, grad = _case(torch.float32)
    strewn = grad.transpose(-1, -2).contiguous().transpose(-1, -2)  # as the unfused attention's backward gives them
    results = [torch.autograd.grad(norm(x, positions, L), x, each)[0] for each in (grad, strewn)]
    assert torch.equal(*results)


@pytest.mark.parametrize("num_tokens, width", [(12, 16), (3, 16), (6, 8)])
def test_positions_of_another_size_are_refused(num_tokens, width):
    """torch's operators would say so; a kernel would read what lies beside them."""
    with pytest.raises(ValueError, match=r"positions are .* for 6 video tokens of width 16"):
        RotatingNorm(16).requires_grad_(False)(torch.randn(1, 8, 2, 16), (torch.ones(num_tokens, width), torch.zeros(num_tokens, width)), 2)


def test_a_norm_to_be_trained_is_refused():
    norm, x, positions, _ = _case(torch.float32)
    norm.requires_grad_()
    with pytest.raises(RuntimeError, match="norms of queries and keys require a gradient.*: freeze the model"):
        norm(x, positions, L)
    with torch.no_grad():
        norm(x, positions, L)


@pytest.mark.parametrize("rotated, heads_at_once", [(True, 8), (True, 3), (False, 8)])
def test_what_the_operators_take_inside_is_what_a_trace_counts(rotated, heads_at_once, monkeypatch):
    from bench.card.gauge import profiled_peak

    monkeypatch.setattr(norm_rotate, "CHUNK_BYTES", heads_at_once * 4 * 280 * 64)
    norm = RotatingNorm(64).requires_grad_(False)
    x, grad = torch.randn(2, 1, 300, 8, 64)
    cos, sin = torch.randn(2, 280, 64) if rotated else (None, None)
    args = x, norm.weight, norm.bias, cos, sin, 20, 1e-6
    for op, given in ((torch.ops.eraser.norm_rotate.default, args), (torch.ops.eraser.norm_rotate_backward.default, (grad, *args))):
        counted = sum(scratch_bytes(op, given, None, "cpu")) + x.nbytes
        assert profiled_peak(lambda: op(*given)) == pytest.approx(counted, rel=0.02)
        assert not sum(scratch_bytes(op, given, None, "cuda"))


@pytest.mark.parametrize("kernels, said", [
    (SimpleNamespace(), "do not work here, .*takes longer: AttributeError"),
    (SimpleNamespace(norm_rotate=lambda x, *_: x, norm_rotate_backward=lambda grad, *_: grad), "are off by .*takes longer")])
def test_kernels_that_are_broken_or_wrong_are_not_used(monkeypatch, kernels, said):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setitem(sys.modules, "trainer.backbones.kernels", kernels)
    monkeypatch.setattr("trainer.backbones.kernels", kernels, raising=False)
    with pytest.warns(UserWarning, match=said):
        assert norm_rotate.working_kernels.__wrapped__(torch.device("cpu")) is None


has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@has_triton
def test_the_kernels_interpreted_compute_what_torch_does():
    code = ("import torch; from trainer.backbones import kernels, norm_rotate; "
            "print(norm_rotate._difference(kernels, torch.device('cpu')))")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 1e-6


@has_triton
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_the_kernels_compile_for_every_kind_of_card(capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.backbones import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"ROTATED": True, "WIDTH": 64, "ROWS": kernels.ROWS}
    types = dict.fromkeys(("x", "weight", "bias", "grad", "out"), "*bf16") | {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    for kernel in (kernels._forward, kernels._backward):
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = ASTSource(kernel, signature, constants, aligned)
        made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": kernels.NUM_WARPS})
        assert made.asm["cubin"] and made.metadata.shared == 0  # rows stay in registers


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernels_on_a_card_are_nearer_to_the_truth(dtype):
    if norm_rotate.working_kernels(torch.device("cuda", 0)) is None:
        pytest.skip("Triton does not work here")
    norm, x, positions, grad = _case(dtype)
    norm, x, grad = norm.cuda(), x.detach().cuda().requires_grad_(), grad.cuda()
    ours, stock = _both(norm, x, positions, grad)
    true = _both(norm.double(), x.detach().double().requires_grad_(), positions, grad.double())[1]
    for found, theirs, exact in zip(ours, stock, true):
        off = [torch.linalg.vector_norm(each - exact) / torch.linalg.vector_norm(exact) for each in (found, theirs)]
        assert off[0] < max(1.1 * off[1], 2e-7)
