"""Fake tensors at twice the speed of torch's, for traces of thousands of operators that are alike.

`FakeTensorMode` takes 0.1 ms an operator, most of it for the key under which it remembers what metadata follow from what. A
training step asks the same few hundred questions over and over, and a shorter key does for tensors that are neither
symbolic, constant, sparse nor complex. All else, and every question asked for the first time, goes to torch, and what torch
answers is what is remembered.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tag
from torch._C import DispatchKey
from torch._library.utils import is_builtin
from torch._ops import OpOverload
from torch._prims_common import compute_required_storage_length
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves

_VIEW, _IN_PLACE, _FRESH = "view", "in place", "fresh"
_UNKNOWN = object()


class _Like(NamedTuple):
    """What is remembered of a tensor that begins its storage and fills it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Foreign(Exception):
    """A value that torch has to look at."""


class FakeMode(FakeTensorMode):
    """`FakeTensorMode` with a memory of its own: same arguments, same tensors."""

    _kinds: dict[OpOverload, str | None] = {}
    _answers: dict[tuple, Any] = {}

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._attributes: dict[torch.device, dict[str, Any]] = {}
        """Of a fake tensor, by device: all that tell it from a meta tensor, and the same for each."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in memory.simulate

    def __torch_dispatch__(self, func: OpOverload, types: Sequence[type], args: Sequence = (), kwargs: dict | None = None) -> Any:
        return self.dispatch(func, types, args, kwargs)

    def dispatch(self, func: OpOverload, types: Sequence[type], args: Sequence = (), kwargs: dict | None = None) -> Any:
        """What every operator passes through."""
        kwargs = kwargs or {}
        kind = self._kinds.get(func, _UNKNOWN)
        if kind is _UNKNOWN:
            kind = self._kinds[func] = _kind(func)
        if kind is None or self.in_kernel_invocation or self.shape_env is not None:
            return super().dispatch(func, types, args, kwargs)
        try:
            if kind is _VIEW:  # made in C++, faster than any memory
                device = _described(args[0]).device
                with in_kernel_invocation_manager(self):
                    views = func(*args, **kwargs)
                return _each(views, lambda view: self._fake(view, device))
            key = (func, torch.get_default_dtype(), *map(_described, args), *kwargs, *map(_described, kwargs.values()))
        except _Foreign:
            return super().dispatch(func, types, args, kwargs)
        answer = self._answers.get(key)
        if answer is None or answer is _UNKNOWN:
            outputs = super().dispatch(func, types, args, kwargs)
            if answer is None:
                self._answers[key] = _remembered(outputs, (args, kwargs)) if kind is _FRESH else _IN_PLACE
            return outputs
        return args[0] if answer is _IN_PLACE else _each(answer, self._made)

    def _made(self, like: _Like) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device="meta")
        return self._fake(meta, like.device)

    def _fake(self, meta: torch.Tensor, device: torch.device) -> FakeTensor:
        """A fake tensor as FakeTensor's own constructor makes it, in a third of the time."""
        attributes = self._attributes.get(device)
        if attributes is None:
            fake = FakeTensor(self, meta, device)
            self._attributes[device] = dict(vars(fake))
            return fake
        fake = torch.Tensor._make_subclass(FakeTensor, meta, meta.requires_grad, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
        vars(fake).update(attributes)
        return fake


def _kind(func: OpOverload) -> str | None:
    """Whether an operator's outputs are views, its own first input, or fresh; None where their metadata may not follow from the inputs'."""
    hidden = {Tag.inplace_view, Tag.dynamic_output_shape, Tag.data_dependent_output} & set(func.tags)
    returns, arguments = func._schema.returns, func._schema.arguments
    is_ours = Tag.pt2_compliant_tag in func.tags and not is_builtin(func)  # by the tag its outputs are what metadata say
    if not (func.namespace == "aten" or is_ours) or hidden or not returns:
        return None
    if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):  # made of other operators
        return None
    if func.is_view or func is torch.ops.aten._unsafe_view.default:  # a view, whatever its schema says
        return _VIEW
    if all(value.alias_info is None for value in returns):
        return _FRESH
    return _IN_PLACE if len(returns) == 1 and func._schema.name.endswith("_") and arguments[0].alias_info else None


def _described(value: Any) -> Any:
    """What of an argument determines the metadata of an operator's outputs. Raises _Foreign."""
    if type(value) is FakeTensor:
        if value.constant is not None or value.dtype.is_complex or value.layout is not torch.strided:
            raise _Foreign
        return _Like(value.shape, value.stride(), value.dtype, value.fake_device)
    if isinstance(value, torch.Tensor):
        raise _Foreign
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value  # 1, 1.0 and True are equal


def _remembered(outputs: Any, inputs: Any) -> Any:
    """What the outputs can be made from next time; _UNKNOWN if metadata do not describe them completely."""
    taken = {tensor.untyped_storage()._cdata for tensor in tree_leaves(inputs) if isinstance(tensor, torch.Tensor)}

    def like(output: Any) -> _Like:
        if type(output) is not FakeTensor:
            raise _Foreign
        storage, num_elements = output.untyped_storage(), compute_required_storage_length(output.shape, output.stride(), 0)
        if storage._cdata in taken or output.storage_offset() or storage.nbytes() != num_elements * output.element_size():
            raise _Foreign
        return _described(output)

    try:
        return _each(outputs, like)
    except _Foreign:
        return _UNKNOWN


def _each(values: Any, function: Callable[[Any], Any]) -> Any:
    """The function's value for one value or for every one of several; None stays None."""
    if isinstance(values, (list, tuple)) and not isinstance(values, _Like):
        return (list if isinstance(values, list) else tuple)(_each(value, function) for value in values)
    return None if values is None else function(values)
