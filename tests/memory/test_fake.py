"""Our fake tensors are torch's: every operator's outputs, asked once and again."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memory.fake import FakeMode

CASES = {
    "add": lambda x, w: x + 1,
    "add half": lambda x, w: x + 0.5,
    "add an integer tensor": lambda x, w: x + torch.ones(6, dtype=torch.int64),
    "true divide of integers": lambda x, w: torch.ones(4, 6, dtype=torch.int64) / 2,
    "product": lambda x, w: x @ w,
    "batched product of a transpose": lambda x, w: torch.matmul(x.mT, x.unsqueeze(0).expand(3, 4, 6)),
    "linear": lambda x, w: F.linear(x, w, w[0]),
    "view": lambda x, w: x.view(24),
    "slice with an offset": lambda x, w: x[1:, 2:5],
    "copy of a slice": lambda x, w: x[1:, 2:5].clone(memory_format=torch.contiguous_format),
    "view of a slice's storage": lambda x, w: x[1:].reshape(-1),
    "split": lambda x, w: x.split(2, dim=1),
    "unbind": lambda x, w: x.unbind(-1),
    "cast": lambda x, w: x.to(torch.float64),
    "cast to what it is": lambda x, w: x.to(x.dtype),
    "layer norm": lambda x, w: F.layer_norm(x, (6,)),
    "statistics": lambda x, w: torch.native_layer_norm(x, (6,), None, None, 1e-5),
    "attention": lambda x, w: F.scaled_dot_product_attention(*[x.expand(1, 2, 4, 6)] * 3),
    "comparison": lambda x, w: x > 0,
    "index": lambda x, w: x[:, torch.tensor([0, 2])],
    "in place": lambda x, w: x.mul_(2),
    "in place with another": lambda x, w: x.copy_(w[:4]),
    "transposed in place": lambda x, w: w.clone().t_(),
    "into": lambda x, w: torch.add(x, x, out=torch.empty(4, 6, dtype=x.dtype)),
    "several at once": lambda x, w: torch._foreach_add([x, w], 1.0),
    "norms": lambda x, w: torch._foreach_norm([x, w]),
    "made": lambda x, w: torch.zeros(3, 5),
    "made like": lambda x, w: torch.empty_like(x.t()),
    "random": lambda x, w: torch.randn_like(x),
    "complex": lambda x, w: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).float()).conj() * 1j),
    "a number": lambda x, w: x.size(0) * 1.5,
    "an empty one": lambda x, w: x[:0] * 2,
    "operator of another library": lambda x, w: torch.ops.test_fake.outer(x[0], w[0]),
    "operator of another library without a tag": lambda x, w: torch.ops.test_fake.untagged(x[0]),
}
_untagged_calls = []
_library = torch.library.Library("test_fake", "DEF")
_library.define("outer(Tensor x, Tensor y) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("outer", lambda x, y: x.new_empty(x.shape[0], y.shape[0]), "Meta")
_library.define("untagged(Tensor x) -> Tensor")
_library.impl("untagged", lambda x: _untagged_calls.append(1) or x.new_empty(x.shape), "Meta")


def _outputs(mode, case, dtype=torch.float32):
    """What there is to know of a case's outputs."""
    with mode:
        x, w = torch.empty(4, 6, dtype=dtype), torch.empty(6, 6, dtype=dtype)
        found = []
        for value in torch.utils._pytree.tree_leaves(case(x, w)):
            if not isinstance(value, torch.Tensor):
                found.append(value)
                continue
            storage = value.untyped_storage()
            shared = [storage._cdata == other.untyped_storage()._cdata for other in (x, w)]
            found.append((type(value), value.shape, value.stride(), value.storage_offset(), value.dtype, value.device,
                          storage.nbytes(), shared, value.is_contiguous(), value.is_conj(), value is x, _hidden(value)))
        return found


def _hidden(value):
    """All else that torch keeps of a fake tensor."""
    return {name: attribute for name, attribute in vars(value).items() if name != "fake_mode"}


@pytest.mark.parametrize("name", CASES)
def test_every_answer_is_torchs_the_first_time_and_the_second(name):
    for dtype in (torch.float32, torch.bfloat16) if name != "complex" else (torch.float32,):
        wanted = _outputs(FakeTensorMode(), CASES[name], dtype)
        for _ in range(3):
            assert _outputs(FakeMode(), CASES[name], dtype) == wanted


def test_operators_that_do_not_promise_it_are_asked_every_time():
    with FakeMode():
        for _ in range(3):
            before = len(_untagged_calls)
            torch.ops.test_fake.untagged(torch.empty(7))
            assert len(_untagged_calls) == before + 1


def test_what_decides_an_answer_is_told_apart():
    with FakeMode():
        x = torch.empty(4, dtype=torch.int64)
        assert [(x * 1).dtype, (x * 1.0).dtype, (x * True).dtype] == [torch.int64, torch.float32, torch.int64]
        assert torch.ones(2).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.ones(2).dtype == torch.float64 and (x * 1.0).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_cannot_be_is_refused_every_time():
    with FakeMode():
        x, y = torch.empty(4, 6), torch.empty(5, 6)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                x @ y
            with pytest.raises(RuntimeError):
                x.add_(y)
            with pytest.raises(RuntimeError):
                x.view(5)


def test_constants_and_real_tensors_are_left_to_torch():
    real = torch.arange(4.0)
    with FakeMode(allow_non_fake_inputs=True):
        constant = torch.tensor(3.0)
        assert constant.item() == 3.0 and (constant + 1).item() == 4.0
        for _ in range(2):
            assert type(torch.empty(4) * real) is FakeTensor
    with FakeMode(), pytest.raises(Exception, match="allow_non_fake_inputs"):
        torch.empty(4) * real


def test_gradients_flow():
    with FakeMode():
        w = torch.empty(6, 6, requires_grad=True)
        for _ in range(2):
            (torch.empty(4, 6) @ w).relu().sum().backward()
        assert w.grad.shape == (6, 6) and type(w.grad) is FakeTensor
