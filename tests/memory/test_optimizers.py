from types import SimpleNamespace
from unittest.mock import Mock

import bitsandbytes.cextension
import pytest
import torch

from memory.optimizers import create_state, make_optimizer, predict_state_bytes, require_usable, reset_state
from memory.plan import PlanError

KINDS = ["adamw", "adamw8bit", "paged-adamw8bit"]
SHAPES = [(128, 96), (128,), (96, 128), (96,), (4096,), (4095,), (5000,)]


def make_params():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def train(params, optimizer, num_steps=20):
    for _ in range(num_steps):
        loss = sum(param.square().sum() for param in params)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def _state_bytes(optimizer):
    """What the state holds; tensors that parameters share count once."""
    held = {value.untyped_storage()._cdata: value.nbytes for state in optimizer.state.values() for value in state.values()
            if isinstance(value, torch.Tensor)}
    return sum(held.values())


@pytest.mark.parametrize("kind", KINDS)
def test_state_bytes_are_predicted_exactly(kind):
    params = make_params()
    optimizer = make_optimizer(params, kind=kind, lr=1e-3)
    assert _state_bytes(optimizer) == 0
    train(params, optimizer, num_steps=1)
    assert _state_bytes(optimizer) == predict_state_bytes([param.numel() for param in params], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_state_made_ahead_is_that_of_a_first_step(kind):
    lazy, ahead = make_params(), make_params()
    first, second = (make_optimizer(params, kind=kind, lr=1e-3, weight_decay=0.1) for params in (lazy, ahead))
    create_state(second)
    assert _state_bytes(second) == predict_state_bytes([param.numel() for param in ahead], kind)
    assert all(param.grad is None for param in ahead) and all(map(torch.equal, lazy, ahead))
    assert train(lazy, first) == train(ahead, second) and all(map(torch.equal, lazy, ahead))
    held = [value.data_ptr() for state in second.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    reset_state(second)
    assert held == [value.data_ptr() for state in second.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    again, params = make_optimizer(lazy, kind=kind, lr=1e-3, weight_decay=0.1), lazy
    train(params, again), train(ahead, second)
    assert all(map(torch.equal, params, ahead))


def test_state_is_made_with_one_gradient_at_a_time(monkeypatch):
    params = make_params()
    optimizer, num_gradients = make_optimizer(params, kind="adamw", lr=1e-3), []
    step = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda: (num_gradients.append(sum(p.grad is not None for p in params)), step()))
    create_state(optimizer)
    assert num_gradients == [1] * len(params)


def test_where_state_cannot_be_made_the_optimizer_is_as_it_was(monkeypatch):
    params = make_params()
    optimizer = make_optimizer(params, kind="adamw", lr=1e-3, weight_decay=0.1)
    monkeypatch.setattr(optimizer, "step", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        create_state(optimizer)
    assert optimizer.param_groups[0]["lr"] == 1e-3 and all(param.grad is None for param in params)


def test_bytes_a_parameter():
    numel = 2**20
    assert predict_state_bytes([numel], "adamw") == 8 * numel + 4
    assert predict_state_bytes([numel], "adamw8bit") == 2.03125 * numel + 2048
    assert predict_state_bytes([4096], "adamw8bit") == 2.03125 * 4096 + 2048  # the smallest in 8 bits
    # Biases are too small for 8 bits.
    assert predict_state_bytes([1920], "adamw8bit") == 8 * 1920


@pytest.mark.parametrize("kind", KINDS)
def test_trains(kind):
    params = make_params()
    optimizer = make_optimizer(params, kind=kind, lr=1e-2)
    before = sum(param.square().sum() for param in params).item()
    assert train(params, optimizer) < 0.8 * before
    assert all(param.dtype == torch.float32 for param in params)


def test_the_same_settings_reach_every_kind():
    for kind in KINDS:
        optimizer = make_optimizer(make_params(), kind=kind, lr=0.5, weight_decay=0.25)
        group = optimizer.param_groups[0]
        settings = (group["lr"], tuple(group["betas"]), group["eps"], group["weight_decay"])
        assert settings == (0.5, (0.9, 0.999), 1e-8, 0.25)


def test_adamw_is_fused():
    assert make_optimizer(make_params(), kind="adamw", lr=1e-3).param_groups[0]["fused"] is True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_the_reason(kind, dtype):
    with pytest.raises(ValueError, match="0/0 = NaN"):
        make_optimizer([torch.nn.Parameter(torch.ones(3, dtype=dtype))], kind=kind, lr=1e-3)


def test_the_reason_is_true():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    param.grad = torch.zeros_like(param)
    torch.optim.AdamW([param], lr=1e-3).step()
    assert param.isnan().all()


def test_refusals():
    with pytest.raises(ValueError, match="inject the adapters"):
        make_optimizer([], kind="adamw", lr=1e-3)
    with pytest.raises(ValueError, match="one of adamw, adamw8bit, paged-adamw8bit"):
        make_optimizer(make_params(), kind="sgd", lr=1e-3)
    with pytest.raises(ValueError, match="one of adamw"):
        predict_state_bytes([1], "sgd")


@pytest.mark.parametrize(("variable", "said", "fix"), [(None, "No binary at x.so\nRun this", "install one that has"), (None, None, "install one that has"),
                                                       ("BNB_CUDA_VERSION", "no", "unset BNB_CUDA_VERSION")])
def test_a_library_that_does_not_load_is_said_before_the_first_step(monkeypatch, variable, said, fix):
    """bitsandbytes itself says it in the middle of a step, in twenty lines."""
    monkeypatch.delenv("BNB_CUDA_VERSION", raising=False)
    if variable:
        monkeypatch.setenv(variable, "117")
    lib = SimpleNamespace(compiled_with_cuda=False) if said is None else SimpleNamespace(compiled_with_cuda=False, error_msg=said)
    monkeypatch.setattr(bitsandbytes.cextension, "lib", lib)
    why = "it is built for the CPU alone" if said is None else said.splitlines()[0]
    with pytest.raises(PlanError) as e:
        require_usable("adamw8bit", torch.device("cuda"))
    assert str(e.value) == (f"optimizer is 'adamw8bit'; bitsandbytes has no library that works on this card ({why}): {fix}, or take 'adamw', "
                            "which needs none")
    require_usable("adamw", torch.device("cuda"))
    make_optimizer(make_params(), kind="adamw8bit", lr=1e-3)  # on the CPU torch's operators do


@pytest.mark.parametrize("lib", [SimpleNamespace(compiled_with_cuda=True), SimpleNamespace()])
def test_a_library_that_loads_is_usable(monkeypatch, lib):
    monkeypatch.setattr(bitsandbytes.cextension, "lib", lib)
    require_usable("paged-adamw8bit", torch.device("cuda"))


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_saving_and_loading(kind):
    straight, stopped = make_params(), make_params()
    train(straight, make_optimizer(straight, kind=kind, lr=1e-2), num_steps=4)
    first = make_optimizer(stopped, kind=kind, lr=1e-2)
    train(stopped, first, num_steps=2)
    second = make_optimizer(stopped, kind=kind, lr=1e-2)
    second.load_state_dict(first.state_dict())
    train(stopped, second, num_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))
