"""Several passes over the same blocks, block by block together: each block is fetched once for all of them.

The passes of a step (teacher, anchor, student, …) all walk over the same frozen blocks. One after the other, each has
its blocks streamed anew. In lockstep a block runs for every pass before the next block is fetched, and a backward over all
of them comes back in the same way, since autograd runs the newest nodes first: streamed weights cross the link once forward
and once back. That costs what keeping the passes side by side costs: their hidden states, and what the blocks of every pass
that records a graph keep. The same schedule, over batches, is FlexGen's (arXiv:2303.06865).

A model's own forward is left as it is: it runs up to its first block, which is where the pass waits, and once more from
its last block on.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from memory.saving import returning, will_return


@dataclass(frozen=True)
class Pass:
    """One pass over the blocks."""

    call: Callable[[], Any]
    """Runs the model once and returns what the pass is for. It is called twice, so it must not change anything."""
    within: Callable[[], AbstractContextManager]
    """The state in which it runs: gradient mode, switches. Entered anew for every block."""

    def __call__(self) -> Any:
        """The pass on its own."""
        with self.within():
            return self.call()


class _Reached(Exception):
    """A pass has come to its first block."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments, self.returns = arguments, will_return()


class _Gate(nn.Module):
    """Stands where the blocks were. Shut, it stops a pass and takes its arguments; open, it gives what the blocks returned."""

    def __init__(self, signature: inspect.Signature, outputs: Any = None):
        super().__init__()
        self._signature, self._outputs = signature, outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._outputs is None:
            arguments = self._signature.bind(*args, **kwargs).arguments
            for parameter in self._signature.parameters.values():
                if parameter.kind == parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(parameter.name, {})
            raise _Reached(arguments)
        return self._outputs


class Lockstep:
    """Runs passes over `blocks` of `model` together."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], boundary_names: Sequence[str]):
        """`boundary_names`: the arguments of a block's forward that the block before it returns, as a tuple if they are several.

        All that the model may do with a block's other arguments is to give every block the same; what a block returns has to go into
        the next one as it is. Raises ValueError if the blocks are not all that one ModuleList of the model holds, in this order, or take
        arguments without names.
        """
        self._blocks, self._boundary_names = list(blocks), tuple(boundary_names)
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == self._blocks]
        if not lists:
            raise ValueError("lockstep matched nothing: no ModuleList of the model holds just these blocks in this order")
        self._list, self._signature = lists[0], inspect.signature(self._blocks[0].forward)
        for parameter in self._signature.parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise ValueError(f"lockstep gives a block's arguments by name, and {parameter} has none")

    def __call__(self, passes: Sequence[Pass]) -> list[Any]:
        """What each pass returns. A backward over those that record a graph should be one for all."""
        reached = [self._first_block(each) for each in passes]
        waiting = [each.arguments for each in reached]
        with returning(any(each.returns for each in reached)):
            for block in self._blocks:
                for number, each in enumerate(passes):
                    with each.within():
                        outputs = block(**waiting[number])
                    outputs = outputs if len(self._boundary_names) > 1 else (outputs,)
                    waiting[number].update(zip(self._boundary_names, outputs, strict=True))
        return [self._rest(each, waiting) for each in passes]

    def _first_block(self, each: Pass) -> _Reached:
        with self._gated(_Gate(self._signature)):
            try:
                each()
            except _Reached as reached:
                return reached.with_traceback(None)  # its frames hold tensors
        raise RuntimeError("a pass in lockstep never reached the blocks")

    def _rest(self, each: Pass, waiting: list[dict[str, Any]]) -> Any:
        arguments = waiting.pop(0)
        outputs = tuple(arguments[name] for name in self._boundary_names)
        with self._gated(_Gate(self._signature, outputs if len(outputs) > 1 else outputs[0])):
            return each()

    @contextmanager
    def _gated(self, gate: _Gate) -> Iterator[None]:
        blocks, self._list._modules = self._list._modules, {"0": gate}
        try:
            yield
        finally:
            self._list._modules = blocks
