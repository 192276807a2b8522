"""Run a feed-forward over chunks of tokens: the same result from a smaller working set.

A feed-forward of width 4 D makes the largest tensors of a block, and backward three of them at once. Its tokens do not see
each other, so both passes go chunk by chunk. Forward keeps the input only, and backward computes each chunk's hidden layer anew, which a
checkpointed block would do anyway: there it costs no product. A block that keeps all else computes half a feed-forward more.
It takes a quarter to a third of the block's peak (predicted).

Shapes: B batch, N tokens, D width.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from memory.handle import Handle
from memory.patching import replace_forward, require_modules
from memory.saving import keep

TOKENS = 1  # the dimension of those of all samples


def chunk_feed_forwards(modules: Sequence[nn.Module], num_chunks: int) -> Handle:
    """Run each of `modules`, which map (B, N, D) to (B, N, D') token by token, in `num_chunks` chunks of all B N tokens.

    Apply it before strategies around the blocks. Raises ValueError for no modules, fewer than two chunks, or
    trainable parameters inside (backward gives gradients to the input only); RuntimeError if applied already, and in
    forward if dropout (a module's) is active or, where a graph is recorded, autocast.
    """
    modules = require_modules(modules, "feed-forward chunks")
    if num_chunks < 2:
        raise ValueError(f"num_chunks is {num_chunks}; at least 2")
    for module in modules:
        trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(f"{trainable[0]} is trainable; a feed-forward in chunks must be frozen")
    handle = Handle()
    for module in modules:
        wrap = functools.partial(_chunked_forward, module, num_chunks)
        handle._undos.append(replace_forward(module, "feed-forward chunks", wrap))
    return handle


def _chunked_forward(module: nn.Module, num_chunks: int, inner):
    original = copy.copy(module)  # shares parameters and submodules, and keeps the forward that is being replaced
    for name, hooks in vars(module).items():
        if "_hooks" in name and isinstance(hooks, dict):  # they are called around all chunks, not around each as well
            setattr(original, name, type(hooks)())

    def forward(hidden):
        if any(m.training and m.p > 0 for m in module.modules() if isinstance(m, _DropoutNd)):
            raise RuntimeError("a feed-forward in chunks cannot replay dropout; call eval() on the frozen model")
        original.training = module.training
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return _run_chunks(original, hidden, num_chunks)
        if torch.is_autocast_enabled(hidden.device.type):  # backward, which computes anew, runs outside of it
            raise RuntimeError("a feed-forward in chunks cannot compute as under autocast again; cast the frozen model instead (dtype)")
        parameters = dict(module.named_parameters())
        # Weights are saved tensors, too: under block offload, backward must find them again through autograd, because the
        # parameters point to the host by then.
        hidden, kept = keep(hidden, hidden, *parameters.values())
        return _Chunked.apply(hidden, kept, original, num_chunks, parameters)

    return forward


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """x (B, N, D) as (1, B N, D), of which chunks are contiguous: of others a linear layer adds its bias in a pass of its own."""
    return x.reshape(1, -1, x.shape[-1])


def _run_chunks(run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, num_chunks: int) -> torch.Tensor:
    output, start = None, 0
    for chunk in _tokens(hidden).chunk(num_chunks, TOKENS):
        result = run(chunk)
        if output is None:
            output = result.new_empty(*hidden.shape[:2], result.shape[-1])  # (B, N, D')
        _tokens(output).narrow(TOKENS, start, chunk.shape[TOKENS]).copy_(result)
        start += chunk.shape[TOKENS]
    return output


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, kept, module, num_chunks, parameters):
        ctx.kept, ctx.module, ctx.num_chunks, ctx.names = kept, module, num_chunks, list(parameters)

        def run(chunk):
            with _Linears() as linears:
                result = module(chunk)
            ctx.last = next((name for name, parameter in parameters.items() if linears.end_in(parameter, result)), None)
            return result

        return _run_chunks(run, hidden, num_chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden, *weights = ctx.kept.saved_tensors
        weights = dict(zip(ctx.names, weights, strict=True))
        grad_hidden = hidden.new_empty(hidden.shape)
        chunks = (_tokens(tensor).chunk(ctx.num_chunks, TOKENS) for tensor in (hidden, grad_output, grad_hidden))
        for chunk, grad_result, grad_chunk in zip(*chunks, strict=True):
            with torch.enable_grad(), _Linears(skipped=weights.get(ctx.last)):
                chunk = chunk.detach().requires_grad_()
                result = torch.func.functional_call(ctx.module, weights, (chunk,))
            grad_chunk.copy_(torch.autograd.grad(result, chunk, grad_result)[0])
        return grad_hidden, *[None] * 4


class _Linears(TorchFunctionMode):
    """Sees the linear layers that run inside. Of the one with the weight `skipped` no more is computed than its gradient needs."""

    def __init__(self, *, skipped: torch.Tensor | None = None):
        super().__init__()
        self._skipped, self._weights, self._result = skipped, [], None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        if args[1] is self._skipped:
            return _Uncomputed.apply(*args[:2])
        self._weights.append(args[1])
        self._result = func(*args, **(kwargs or {}))
        return self._result

    def end_in(self, weight: torch.Tensor, result: torch.Tensor) -> bool:
        """Whether `result` is what the layer with this weight gave, which ran once."""
        return result is self._result and self._weights[-1] is weight and all(w is not weight for w in self._weights[:-1])


class _Uncomputed(torch.autograd.Function):
    """A linear layer's result (..., D') with zeros for values, where nothing but backward follows."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.new_zeros(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight, None
