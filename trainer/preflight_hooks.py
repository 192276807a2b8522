"""What hooks see of the pre-flight's step: which blocks and erasers ran, in which phase, how, and with what output. They judge nothing."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.erasers import in_backward
from trainer.inspection import Subject


class Watch:
    """What was seen, by (phase and) block. Whoever runs the step says which `phase` it is: "teacher", "student", or "" for neither."""

    def __init__(self, subject: Subject):
        self.subject, self.erasers = subject, subject.assembly.erasers
        self.spread: dict[int, Tensor] = {}  # teacher: largest range over tokens of any channel of the attention output
        self.residual: list[tuple[int, Tensor]] = []  # teacher, in float16: (block, largest |output| of it)
        self.output: dict[int, Tensor] = {}  # student: largest |output| of the eraser
        self.alive: dict[int, Tensor] = {}  # student: largest |GELU output| of the eraser
        self.calls: Counter[tuple[str, int]] = Counter()
        self.attention_calls: Counter[tuple[str, int]] = Counter()  # begun
        self.returned: Counter[tuple[str, int]] = Counter()  # of those, without an error
        self.switch: dict[tuple[str, int], bool] = {}  # whether the erasers were on when attention began
        self.used: dict[int, list[int]] = {}  # identities of the parameters that the eraser computed with
        self.detached: list[int] = []  # student: erasers whose output no gradient can reach
        self.no_grad_blocks: list[int] = []  # student: blocks that ran under no_grad
        self.phase, self.grad_outside = "", True  # whether the student's forward pass began with gradients
        self.half = subject.assembly.dtype == torch.float16  # the student computes in float16: the model's own dtype, or an autocast's

    def _phase(self) -> str:
        return "recompute" if self.phase == "student" and in_backward() else self.phase

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = [self.subject.assembly.transformer.register_forward_pre_hook(self._enter)]
        for index, (block, adapter) in enumerate(zip(self.subject.assembly.blocks, self.erasers.adapters)):
            attention = block.attn1  # of the model that runs: erasers that were taken out know none
            handles += [attention.register_forward_pre_hook(self._before_attention(index)),
                        attention.register_forward_hook(self._after_attention(index)),
                        adapter.register_forward_pre_hook(self._before_adapter(index)),
                        adapter.register_forward_hook(self._after_adapter(index))]
        if self.subject.assembly.dtype == torch.float16:
            handles += [block.register_forward_hook(self._after_block(index)) for index, block in enumerate(self.subject.assembly.blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if self.phase == "student":
            self.grad_outside, device = torch.is_grad_enabled(), self.subject.assembly.device.type
            self.half |= torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16

    def _after_block(self, index: int):
        def after(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            if self.phase == "teacher":
                self.residual += [(index, torch.linalg.vector_norm(tensor.detach(), math.inf)) for tensor in output]

        return after

    def _before_attention(self, index: int):
        def before(module: nn.Module, args: tuple) -> None:
            phase = self._phase()
            self.attention_calls[phase, index] += 1
            self.switch[phase, index] = self.erasers.enabled
            if phase == "student" and not torch.is_grad_enabled():
                self.no_grad_blocks.append(index)

        return before

    def _after_attention(self, index: int):
        def after(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            self.returned[self._phase(), index] += 1
            if self.phase == "teacher" and output[0].shape[1] > 1:
                low, high = torch.aminmax(output[0].detach(), dim=1)  # (B, D) each
                self.spread[index] = (high - low).max().float()

        return after

    def _before_adapter(self, index: int):
        def before(adapter: nn.Module, args: tuple[Tensor]) -> None:
            self.calls[self._phase(), index] += 1
            self.used[index] = [id(p) for p in adapter.parameters()]
            if self._phase() == "student":
                with torch.no_grad():
                    self.alive[index] = adapter.inner(args[0]).abs().max().float()

        return before

    def _after_adapter(self, index: int):
        def after(adapter: nn.Module, args: tuple, output: Tensor) -> None:
            if self._phase() == "student":
                self.output[index] = output.detach().abs().max()
                if torch.is_grad_enabled() and not output.requires_grad:
                    self.detached.append(index)

        return after
