"""Run a step on fake tensors and record what lives when: a memory timeline without a card and without weights.

A `Recorder` sees every operator below autograd and notes the birth and the death of every storage. Around it, fake `cpu`
tensors (fake `cuda` tensors cannot be differentiated without a card) make a step of a model with billions of
parameters a matter of seconds. Nothing is fitted: the recorded program is the program that runs, as long as
nothing in it depends on the device. What a tracer cannot see is a named term:

* what kernels allocate inside: FlashAttention-2's backward accumulates dQ in float32, sums over tokens keep partial
  sums (`memory.work`);
* cuBLAS' workspaces and the CUDA context, which are the card's (`memory.cards`).

Every figure is *predicted*. Sizes are the bytes that tensors ask for; rounding is the allocator's (`memory.allocator`).

Fake tensors say nothing about where they will be, so host memory is declared: `adopt(..., place="pinned")` for the
buffers that streaming and activation offload hand out. All other storages are on the device.
"""

import contextlib
import functools
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from memory.applied import AppliedPlan
from memory.records import Mark, Record, settled
from memory.timeline import CATEGORIES, PLACES, Trace, Visit
from memory.walks import Walks
from memory.work import Work, copied_bytes, scratch_bytes, work_of


class Recorder(TorchDispatchMode):
    """Records births and deaths of storages while it is active: `with FakeMode(), recording() as recorder`.

    Declare what lives already with `adopt` or `adopt_model`, watch the blocks, run the step inside `phase(...)`
    contexts, and call `trace()` after leaving. `device` ("cuda" or "cpu") says whose attention kernels to reckon with.
    Works on real tensors too.
    """

    def __init__(self, device: str):
        super().__init__()
        self._device = device
        self._records: list[Record] = []
        self._events: list[int] = []
        self._work: list[Work] = []
        self._copies: dict[int, tuple[int, int, int]] = {}  # number of a copy's work -> (to record, from record, bytes)
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # storage's C++ address -> (record, its weak reference)
        self._phase = "other"  # outside of any
        self._sum: tuple[int, int] | None = None  # records of what torch's C++ sums up and of its first summand, until something else happens
        self._product: int | None = None  # record of what the operator before has reshaped, as a matrix product's result is
        self._marks: list[Mark] = []
        self._num_blocks = 0
        self.hooks: list = []
        """On the model and its blocks; `recording` removes them."""
        self._mark(None)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and torch's guard against that takes as long as what it guards

    # ---- what the caller declares --------------------------------------------------------------------------------

    def adopt(
        self, tensors: Iterable[torch.Tensor], category: str, *, place: str = "device", block: int | None = None
    ) -> None:
        """Declare tensors that live before the step, or settle the category and place of tensors born in it.

        The first declaration holds: all host buffers can be declared again after the step, for those that it made.
        """
        if category not in CATEGORIES or place not in PLACES:
            raise ValueError(f"{category!r} at {place!r}: categories are {CATEGORIES}, places {PLACES}")
        for tensor in tensors:
            record = self._records[self._see(tensor, standing=True)]
            if record.category is None:
                record.category, record.place, record.block = category, place, block

    def adopt_model(self, model: nn.Module, blocks: Sequence[nn.Module] = (), applied: AppliedPlan | None = None) -> None:
        """Declare all of `model`: frozen parameters and buffers as weights, trainable ones as adapters.

        `applied` is the handle of `memory.plan.apply_plan`: its masters are pinned host memory, its ring transfer
        buffers. Gradients of the trainable parameters are recognised when backward makes them.
        """
        if applied is not None:
            self.adopt(applied.host_buffers, "weights", place="pinned")
            self.adopt(applied.device_buffers, "transfer buffers")
        owners = {id(tensor): index for index, block in enumerate(blocks) for tensor in block.parameters()}
        for tensor in (*model.parameters(), *model.buffers()):
            trainable = tensor.requires_grad
            self.adopt([tensor], "adapters" if trainable else "weights", block=None if trainable else owners.get(id(tensor)))
            if trainable:
                self.hooks.append(tensor.register_post_accumulate_grad_hook(self._settle_gradient))

    def watch(self, blocks: Sequence[nn.Module], *, together: bool = False) -> None:
        """Mark the visits of `blocks`, which run in this order, forward and backward.

        `together`: several passes run in lockstep (memory.lockstep), one walk in parts.
        """
        self._num_blocks = len(blocks)
        self.hooks += Walks(blocks, self._mark, together=together).hooks

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens within; of nested names the inner one holds."""
        outer = self._phase
        self._phase = name
        self._mark(None)
        try:
            yield
        finally:
            self._phase = outer
            self._mark(None)

    def trace(self) -> Trace:
        """What was recorded. Call it once, after leaving the recorder.

        Storages that the step made and left behind (optimizer state, host buffers) count as standing: they are there
        in every later step.
        """
        survivors = {index for index, _ in self._live.values()}
        self._mark(None)  # the end
        return settled(self._records, self._events, self._work, self._marks, survivors=survivors, copies=self._copies, num_blocks=self._num_blocks)

    # ---- what happens --------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three calls are this question
        if func.namespace != "aten":
            for argument in args:  # of tables that were there before, torch's operators make a view first
                if isinstance(argument, torch.Tensor):
                    self._see(argument, standing=True)
        copies = self._take(copied_bytes(func, args))
        outputs = func(*args, **(kwargs or {}))
        fresh = not _aliases(func)
        self._sum = None
        if isinstance(outputs, torch.Tensor):
            self._see(outputs, standing=not fresh)
        elif isinstance(outputs, (tuple, list)):
            for output in outputs:
                if isinstance(output, torch.Tensor):
                    self._see(output, standing=not fresh)
        if func is torch.ops.aten.add.Tensor and (_is_accumulation() and not args[0]._is_view() or self._adds_bias(*args)):
            self._sum = self._find(outputs), self._find(args[0])
        self._product = self._find(outputs) if func is torch.ops.aten._unsafe_view.default else None
        if func is torch.ops.aten.native_layer_norm.default and self._device == "cuda":
            for statistic in outputs[1:]:  # a card's are in float32, whatever the input is
                self._records[self._find(statistic)].num_bytes = 4 * statistic.numel()
        self._give_back(self._take(scratch_bytes(func, args, outputs, self._device)))
        self._give_back(copies)
        work = work_of(func, args, outputs)
        if work is not None:
            if func is torch.ops.aten.copy_.default:
                ends = (self._see(args[0], standing=True), self._see(args[1], standing=True))
                self._copies[len(self._work)] = (*ends, args[1].nbytes)
            self._work.append(work)
        return outputs

    def _find(self, tensor: torch.Tensor) -> int | None:
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[0]

    def _see(self, tensor: torch.Tensor, *, standing: bool) -> int:
        """The record of a tensor's storage; a new one if it was not known. A view of an unknown one was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._live.get(key)
        if entry is not None:
            return entry[0]
        index = len(self._records)
        self._records.append(Record(num_bytes=storage.nbytes(), born=self._phase, standing=standing))
        if not standing:
            self._events.append(index)

        def died(_, key=key, index=index):
            del self._live[key]
            self._records[index].died = self._phase
            self._events.append(~index)
            self._sum_in_place(index)

        self._live[key] = (index, weakref.ref(storage, died))
        return index

    def _adds_bias(self, x: torch.Tensor, bias: Any) -> bool:
        """Whether a linear layer adds its bias, as it does in a step of its own where its input is not contiguous."""
        if self._product is None or self._find(x) != self._product or not isinstance(bias, torch.Tensor) or bias.dim() != 1:
            return False
        frame = _caller()
        return frame is None or frame.f_code.co_name != "__torch_dispatch__"  # under another mode a real one adds as a fake one does

    def _sum_in_place(self, index: int) -> None:
        """Let a sum take the memory of storage `index`, which has just died, if it is the first of the two.

        Autograd adds in place to what nothing else refers to, and a linear layer its bias, except to fake tensors: then both live when the
        sum is born.
        A view refers to its base, so that nothing is added in place to what a linear layer's backward has reshaped.
        """
        (total, first), self._sum = self._sum or (None, None), None
        if first != index or self._events[-2] != total:
            return
        record, summand = self._records[total], self._records[index]
        if record.num_bytes == summand.num_bytes and not summand.standing:
            record.in_place = True
            self._events[-2:] = reversed(self._events[-2:])

    def _take(self, sizes: Sequence[int]) -> range:
        """What a kernel takes inside, one buffer after the other."""
        first = len(self._records)
        self._records += [Record(num_bytes=size, category="working set", born=self._phase, standing=False, died=self._phase)
                          for size in sizes]
        taken = range(first, len(self._records))
        self._events += taken
        return taken

    def _give_back(self, taken: range) -> None:
        """The last one first."""
        self._events += [~index for index in reversed(taken)]

    def _settle_gradient(self, parameter: torch.Tensor) -> None:
        self._records[self._see(parameter.grad, standing=False)].category = "gradients"

    def _mark(self, visit: Visit | None, records_graph: bool = False) -> None:
        self._marks.append(Mark(event=len(self._events), work=len(self._work), phase=self._phase, visit=visit,
                                records_graph=records_graph))


@contextlib.contextmanager
def recording(*, device: str = "cuda") -> Iterator[Recorder]:
    """A recorder with the garbage collector out of the way, which would make deaths depend on its timing."""
    enabled, recorder = gc.isenabled(), Recorder(device)
    gc.disable()
    try:
        with recorder:
            yield recorder
    finally:
        for hook in recorder.hooks:
            hook.remove()
        if enabled:
            gc.enable()


def _is_accumulation() -> bool:
    """Whether autograd itself is adding two gradients: no line of Python is between its engine and this operator."""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = _caller()
    return frame is None or frame.f_code is torch.autograd.graph._engine_run_backward.__code__


def _caller() -> FrameType | None:
    """For what `__torch_dispatch__` calls: the frame from which its operator was called."""
    frame = sys._getframe(3)  # past this function, who asks, and `__torch_dispatch__`
    while frame is not None and frame.f_code.co_filename.endswith(("torch/_compile.py", "torch/_dynamo/eval_frame.py", "torch/_ops.py")):
        frame = frame.f_back  # what torch wraps around a dispatch mode
    return frame


@functools.cache
def _aliases(func) -> bool:
    """Whether an operator's outputs are its inputs or views of them, by its schema."""
    return any(ret.alias_info is not None for ret in func._schema.returns)
