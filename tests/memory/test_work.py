"""What operators compute, against torch's own count."""

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from memory.work import _FLOPS, flash_backward_scratch_bytes, work_of

aten = torch.ops.aten


class Compared(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            assert work_of(func, args, outputs).flops == flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=outputs), func
            self.seen.add(func)
        return outputs


def test_operations_are_as_many_as_torch_counts():
    def empty(*shape, **options):
        return torch.empty(*shape, device="meta", **options)

    with Compared() as compared:
        x, weight, bias = empty(7, 5), empty(5, 3), empty(3)
        torch.mm(x, weight), torch.addmm(bias, x, weight)
        batch = empty(2, 7, 5), empty(2, 5, 3)
        torch.bmm(*batch), torch.baddbmm(empty(2, 7, 3), *batch)
        for trained in ((True, True), (True, False), (False, True)):
            video, kernel = (empty(*shape, requires_grad=grad) for shape, grad in zip(((2, 4, 6, 9, 8), (10, 4, 3, 3, 3)), trained))
            F.conv3d(video, kernel, padding=1).sum().backward()
        query, *other = (empty(2, 3, rows, 16, dtype=torch.bfloat16, requires_grad=True) for rows in (40, 24, 24))
        for name, more in (("flash", ()), ("efficient", (None, True)), ("cudnn", (None, True))):
            getattr(aten, f"_scaled_dot_product_{name}_attention")(query, *other, *more)[0].sum().backward()
    of_our_own = {aten.linear.default, *(func for func in _FLOPS if "for_cpu" in func.name())}
    assert compared.seen == set(_FLOPS) - of_our_own
    assert work_of(aten.linear.default, (empty(2, 7, 5), empty(3, 5)), empty(2, 7, 3)).flops == 2 * 2 * 7 * 5 * 3


def test_every_tensor_is_moved_once():
    x, weight = torch.empty(7, 5), torch.empty(5, 3)
    assert work_of(aten.mm.default, (x, weight), x @ weight) == ("matmul32", 2 * 7 * 5 * 3, 4 * (35 + 15 + 21))
    assert work_of(aten.cat.default, ([x, x],), torch.cat([x, x])) == ("memory", 0, 4 * (2 * 35 + 70))
    assert work_of(aten.unbind.int, (x,), x.unbind()) is work_of(aten._unsafe_view.default, (x, [35]), x.view(35)) is None


def test_rows_and_width_of_flash_attentions_backward_are_rounded_up():
    assert flash_backward_scratch_bytes((2, 3, 129, 65)) == (2 * 3 * 256 * 4, 2 * 3 * 256 * 96 * 4)
