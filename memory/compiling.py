"""Compile blocks: their element-wise work is fused, and everything else about them stays as it is.

A block's own forward is compiled, innermost, so that every strategy goes on around it: compiled code finds its weights where the
parameters point, and what it keeps for backward passes through the same hooks. Blocks are alike and share what was compiled
for the first. Left as they are, between pieces of compiled code:

* fused attention: compiled code uses memory again as soon as it can, so what a block keeps of its attention (memory.checkpointing)
  would be overwritten before backward, without a word;
* submodules with hooks, which may do anything: the hooks run as always, the submodule's own forward is compiled by itself;
* what strategies put in the place of a submodule's forward;
* what blocks call `as_is`: a checkpointed block is recomputed until all is saved again, and compiled code saves as it ends.

Results differ by rounding: what is fused is rounded once. No trace sees into compiled code, so memory and time are predicted for
blocks that are not compiled; what the allocator may reserve beyond that is `memory.assess.compiled_fragmentation`.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from memory.handle import Handle
from memory.patching import replace_forward, require_modules
from memory.plan import PlanError

STRATEGY = "compilation"
NUM_VARIANTS = 64
"""Compiled versions of the same code: for the first block and the others, with and without gradient, for every batch size. Beyond
torch's default of 8, further ones would silently not be compiled."""


def compile_blocks(blocks: Sequence[nn.Module], *, device: torch.device, backend: str = "inductor") -> Handle:
    """Compile the forward of `blocks`, before any other strategy is put around it. It happens when a block first runs.

    What Dynamo is told of attention and of strategies it is told for the rest of the process.
    Raises PlanError where nothing can be compiled for `device`; ValueError for no blocks; RuntimeError if applied already.
    """
    blocks = require_modules(blocks, STRATEGY)
    _require_compiler(device)
    import torch._dynamo  # seconds, for those who compile only

    torch._dynamo.disallow_in_graph(F.scaled_dot_product_attention)
    torch._dynamo.trace_rules.add("memory")
    warnings.filterwarnings("ignore", message="Dynamo does not know how to trace the builtin `torch._C._nn.scaled_dot_product")
    compiled = functools.partial(torch.compile, dynamic=False, backend=backend)
    handle, config = Handle(), torch._dynamo.config
    handle._undos.append(torch._dynamo.reset)  # compiled code holds on to what it was compiled for
    handle._undos.append(functools.partial(setattr, config, "recompile_limit", config.recompile_limit))
    config.recompile_limit = NUM_VARIANTS
    try:
        for block in blocks:
            for module in block.modules():
                if module is not block and (module._forward_pre_hooks or module._forward_hooks):
                    handle._undos.append(_compile_inside_hooks(module, compiled))
            handle._undos.append(replace_forward(block, STRATEGY, compiled))
    except BaseException:
        handle.undo()
        raise
    return handle


def _compile_inside_hooks(module: nn.Module, compiled):
    """Compile the forward of `module` and nothing that is called around it; returns the undo function."""
    undo = replace_forward(module, STRATEGY, lambda inner: torch.compiler.disable(compiled(inner)))
    module._compiled_call_impl = torch.compiler.disable(module._call_impl)

    def undo_both() -> None:
        undo()
        del module._compiled_call_impl

    return undo_both


def _require_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise PlanError("compile needs Triton for this card, which is not there; leave it out, or install the triton of this torch")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as e:
        raise PlanError("compile needs a C++ compiler on the CPU, and none was found; leave it out, or install g++") from e


def as_is(function: Callable, *args: Any) -> Any:
    """For compiled code to call: what `function` gives for `args`, run as if nothing were compiled."""
    return _disabled(function)(*args)


_disabled = functools.cache(torch.compiler.disable)


def uncompiled() -> AbstractContextManager:
    """Within: compiled blocks run as if they were not, so that hooks on modules inside of them are called."""
    return torch.compiler.set_stance("force_eager")
