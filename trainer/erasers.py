"""Concept erasers: small adapters around every block's attention, on one frozen backbone.

    h, e = attn1(h, e, ...);  h = h + adapter(h)

With the erasers on, the backbone is the student; with them off, it is the teacher.
Source: T2VUnlearning (section 3), Receler. Legend: B batch, N video tokens, D width, R rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory.offload import place
from memory.saving import current_notes
from trainer.errors import UsageError

LEAVES = ("down.weight", "down.bias", "up.weight", "up.bias")
"""The parameters of one eraser, in order."""


class _CastingLinear(nn.Module):
    """Weights stay in fp32; they are cast to the activations' dtype for the product, so that a 16-bit backbone keeps
    16-bit activations (the weights are far smaller than the activations, so this is the cheaper side to cast).

    They follow the activations to their device, too: what offloads a model's layers may not know of erasers put in later. It is no
    `nn.Linear`, or what casts or quantizes the linear layers of a model would take away most of an eraser's small weights.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        drawn = nn.Linear(in_features, out_features, dtype=torch.float32)  # torch's default may be another
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x), self.bias.to(x))


class AdapterEraser(nn.Module):
    """down (D to R), exact GELU, up (R to D). `up` starts at zero, so a new eraser changes nothing.

    Both are called as modules: accelerate and diffusers bring the weights of what they offload by hooks around each layer.
    """

    switchable = False  # whether `Erasers` say when it is on; a deep copy, which none know, is always on

    def __init__(self, dim: int, rank: int):
        super().__init__()
        if rank < 1:
            raise UsageError(f"--rank {rank}: an eraser needs rank 1 or more; 128 is the published choice")
        self.down = _CastingLinear(dim, rank)
        self.up = _CastingLinear(rank, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"switchable": False}

    def inner(self, h: Tensor) -> Tensor:
        """h (B, N, D) to what GELU lets through (B, N, R), in h's dtype."""
        return F.gelu(self.down(h))

    def forward(self, h: Tensor) -> Tensor:
        """h (B, N, D) to the eraser's output o (B, N, D), in h's dtype."""
        return self.up(self.inner(h))


class _Localised(torch.autograd.Function):
    """Pass the eraser's output o (B, N, D) through, and add `localisation` to the objective.

    The term comes from inside a block, so that the block can be recomputed in backward and nothing outside of it is needed. All
    of it happens in backward, in two kernels over o and no copy of it: only then the mask is asked for.
    """

    @staticmethod
    def forward(ctx, o: Tensor, localisation: "Localisation", index: int, num_blocks: int) -> Tensor:
        ctx.save_for_backward(o)
        ctx.localisation, ctx.index, ctx.num_blocks = localisation, index, num_blocks
        return o.view_as(o)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        o, = ctx.saved_tensors
        ctx.localisation.see(ctx.index, o)
        slope = ctx.localisation.slope(ctx.num_blocks * o.numel())
        # In float32 inside of the kernel, whatever the dtypes of o and the gradient.
        return torch.addcmul(gradient, o, slope, out=torch.empty_like(gradient)), None, None, None


def in_backward() -> bool:
    """Whether autograd is at work on this thread: a forward hook that runs now belongs to a recomputation."""
    return torch._C._current_graph_task_id() != -1


class Localisation:
    """L_loc of one pass: `weight * mean over blocks of mean((o_l * (1 - M))²)`. Source: T2VUnlearning.

    mask: (B, N) in 0..1, 1 where the concept is; or what gives it, asked for in backward only. Backward leaves every block's
    unweighted term in `terms`.
    """

    def __init__(self, mask: Tensor | Callable[[], Tensor], weight: float | Tensor):
        self.mask, self.weight = mask, weight
        self.terms: dict[int, Tensor] = {}
        self._slope: Tensor | None = None

    @cached_property
    def outside(self) -> Tensor:
        """1 - M (B, N)."""
        return 1 - (self.mask() if callable(self.mask) else self.mask)

    def slope(self, numel: int) -> Tensor:
        """(B, N, 1), which times o_l is the gradient of the weighted loss. `numel`: of the outputs of all blocks together."""
        if self._slope is None:
            self._slope = (self.outside.square() * (2 * self.weight / numel)).unsqueeze(-1)
        return self._slope

    def see(self, index: int, o: Tensor) -> None:
        """Note the term of the block of that number, from its eraser's output o (B, N, D). Raises ValueError for a mask of another size."""
        if self.outside.shape != o.shape[:2]:  # some would be broadcast
            raise ValueError(f"the mask is {tuple(self.outside.shape)}, and the erasers' outputs are of {tuple(o.shape[:2])} samples and video tokens")
        norms = torch.linalg.vector_norm(o, dim=-1, dtype=torch.float32)
        self.terms[index] = torch.linalg.vector_norm(norms * self.outside).square() / o.numel()

    def mean(self) -> Tensor:
        """The unweighted loss, after backward. Raises RuntimeError before that."""
        if not self.terms:
            raise RuntimeError("a localisation gets its terms in backward(): run the student's forward pass and backward() inside "
                               "`with erasers.switched(True), erasers.localised(localisation):`, and only then ask for localisation.mean()")
        return torch.stack([self.terms[index] for index in sorted(self.terms)]).mean()


class _Mode(NamedTuple):
    """What a pass does with the erasers."""

    enabled: bool = True
    localisation: Localisation | None = None


def width_of(attention: nn.Module) -> int:
    """D. The shape of its weights would not say: in 4 bits they are packed."""
    return attention.to_v.in_features


class Erasers:
    """The erasers of one transformer: injected on construction, taken out again by `undo()`.

    Each is registered as `attn1.adapter`, so that the transformer's own names stay as they are and the erasers'
    names are those of the released checkpoints.
    """

    def __init__(self, blocks: Sequence[nn.Module], rank: int, *, seed: int = 0):
        if not len(blocks):
            raise UsageError("no transformer blocks to put erasers into")
        if any(hasattr(block.attn1, "adapter") for block in blocks):
            raise UsageError("this transformer has erasers already; undo() the first ones; where nothing is left to call that of, as in a copy, "
                             "load the transformer again")
        self.rank, self._mode = rank, _Mode()
        self.attentions = [block.attn1 for block in blocks]
        self.width = width_of(self.attentions[0])
        self.adapters: list[AdapterEraser] = []
        self._seen: dict[int, tuple[bool, bool]] = {}
        device = self.attentions[0].to_v.weight.device
        if device.type == "meta":  # accelerate's offloading keeps the weights elsewhere between passes
            device = torch.device("cpu")
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):  # a caller's default may be another
            torch.default_generator.manual_seed(seed)  # the host's; torch.manual_seed would seed every card's, too, for good
            for attention in self.attentions:
                self.adapters.append(AdapterEraser(width_of(attention), rank))
            for adapter in self.adapters:  # all, before one is attached: there may be no room
                place(adapter, device)
        self._handles = []
        # torch.compile looks at a module's class before it uses a graph again, and not at its hooks: without a class of their own,
        # attentions that were compiled without erasers would go on without them.
        self._classes = [type(attention) for attention in self.attentions]
        marked = {kind: type(kind.__name__, (kind,), {}) for kind in self._classes}
        for index, (attention, adapter) in enumerate(zip(self.attentions, self.adapters)):
            attention.adapter, attention.__class__, adapter.switchable = adapter, marked[type(attention)], True
            self._handles.append(attention.register_forward_hook(self._hook(index)))

    @property
    def enabled(self) -> bool:
        """Whether what runs now is the student."""
        return self._mode.enabled

    def _hook(self, index: int):
        def add_eraser(attention: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            # In a deep copy of the model, which has its own, they are always on. Nothing is asked here that differs from block to block, unless
            # there are gradients: torch.compile makes one graph for all blocks then. It would not notice which of two objects one is.
            if not getattr(attention.adapter, "switchable", False):
                mode = _Mode()
            else:
                mode = self._mode_of(index) if torch.is_grad_enabled() else self._mode
            if not mode.enabled:
                return output
            h, e = output
            o = attention.adapter(h)
            if (loc := mode.localisation) is not None and torch.is_grad_enabled():
                o = _Localised.apply(o, loc, index, len(self.adapters))
            return h + o, e

        return add_eraser

    def _mode_of(self, index: int) -> _Mode:
        """The mode of this pass; of the forward pass that is recomputed, in backward."""
        notes = current_notes()
        if notes is not None:  # checkpointed by the memory plan: several passes may wait for their backward
            return notes.setdefault((id(self), index), self._mode)
        now = self.enabled, self.enabled and self._mode.localisation is not None
        if not in_backward():
            self._seen[index] = now
        elif (then := self._seen.get(index, now)) != now:  # nothing is seen of a forward without gradients: reentrant checkpointing
            of = int(then[0] == now[0])
            what, how, states = (("eraser", "switched", ("off", "on")), ("localisation", "localised", ("left out", "added")))[of]
            raise RuntimeError(f"block {index} is recomputed in backward with its {what} {states[now[of]]}, but its forward ran with the {what} "
                               f"{states[then[of]]}: run backward() inside the same `with erasers.{how}(...)`")
        return self._mode

    def switched(self, on: bool) -> AbstractContextManager[None]:
        """Erasers on (student) or off (teacher) inside the block, as before after it."""
        return self._in(self._mode._replace(enabled=on))

    def localised(self, localisation: Localisation) -> AbstractContextManager[None]:
        """Add `localisation` to the objective of what runs inside.

        Backward runs inside, too, unless the memory plan does the checkpointing.
        """
        return self._in(self._mode._replace(localisation=localisation))

    @contextmanager
    def _in(self, mode: _Mode) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(`{block}.down.weight`, parameter) in order of blocks."""
        # As `adapter.named_parameters()` gives them, in a fifth of the time: they are looked at three times a step.
        return [(f"{i}.{layer}.{n}", p) for i, adapter in enumerate(self.adapters)
                for layer, linear in adapter._modules.items() for n, p in linear._parameters.items()]

    def zero_grad(self) -> None:
        """Forget all gradients, also of parameters that an optimizer does not have."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """fp32 copies on the host, named `{block}.down.weight` and so on."""
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy into the existing parameters; the optimizer keeps its objects. Raises UsageError on a mismatch."""
        ours = dict(self.named_parameters())
        if ours.keys() != state.keys() or any(ours[n].shape != state[n].shape for n in ours):
            raise UsageError(f"these eraser weights are not {len(self.adapters)} blocks of width {self.width} "
                             f"and rank {self.rank}")
        for name, parameter in ours.items():
            parameter.copy_(state[name])

    def undo(self) -> None:
        """Take the erasers out: the transformer is as it was before."""
        for handle in self._handles:
            handle.remove()
        for attention, kind in zip(self.attentions, self._classes):
            del attention.adapter
            attention.__class__ = kind
        self._handles, self.attentions = [], []
