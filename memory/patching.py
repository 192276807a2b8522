"""Replace a module's forward, and take the replacement back.

The replacement is an instance attribute: no wrapper module, so `state_dict` keys, `named_modules` and the
Parameter objects stay what they were. A deep copy is refused meanwhile: it would run the original's.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class _NotCopied:
    def __deepcopy__(self, memo: dict) -> None:
        raise RuntimeError("a copy would run the original, since memory strategies are applied to it; copy the model before, or undo() them first")


def replace_forward(module: nn.Module, strategy: str, wrap: Callable[[Callable], Callable]) -> Callable[[], None]:
    """Put `wrap(forward)` in the place of `module.forward` and return the function that undoes it.

    Raises RuntimeError if `strategy` is on this module already; the undo function raises it
    if another strategy was put on top in the meantime and is still there.
    """
    _require_unapplied(module, strategy)
    inner = module.forward
    had_own = "forward" in module.__dict__
    forward = functools.wraps(inner)(wrap(inner))
    forward.strategy, forward.inner = strategy, inner
    module.forward, module.not_copied = forward, _NotCopied()

    def undo() -> None:
        if module.__dict__.get("forward") is not forward:
            raise RuntimeError(
                f"{strategy} is not the last strategy applied to this {type(module).__name__} "
                f"(applied: {applied_strategies(module)}); undo in the reverse order"
            )
        if had_own:
            module.forward = inner
        else:
            del module.forward
        if not applied_strategies(module):
            del module.not_copied

    return undo


def _require_unapplied(module: nn.Module, strategy: str) -> None:
    if strategy in applied_strategies(module):
        raise RuntimeError(f"{strategy} is applied to this {type(module).__name__} already; undo() it first")


def applied_strategies(module: nn.Module) -> list[str]:
    """The strategies on `module`, the one applied last first."""
    names = []
    forward: Any = module.__dict__.get("forward")
    while forward is not None:
        if "strategy" in getattr(forward, "__dict__", {}):
            names.append(forward.strategy)
        forward = getattr(forward, "inner", None)
    return names


def require_modules(modules: Sequence[nn.Module], strategy: str) -> list[nn.Module]:
    """`modules` as a list; ValueError if there are none or if one is listed twice, RuntimeError if `strategy` is on one of them already."""
    modules = list(modules)
    if not modules:
        raise ValueError(f"{strategy} matched nothing: the sequence of modules is empty")
    if len({id(module) for module in modules}) != len(modules):
        raise ValueError(f"{strategy}: a module is listed twice")
    for module in modules:
        _require_unapplied(module, strategy)
    return modules


def held_outside(model: nn.Module, blocks: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> str | None:
    """The name by which a module outside of the blocks holds one of the blocks' parameters, too; None: none does."""
    inside = {id(module) for block in blocks for module in block.modules()}
    wanted = {id(parameter) for parameter in parameters}
    return next((f"{name}.{leaf}" for name, module in model.named_modules() if id(module) not in inside
                 for leaf, parameter in module._parameters.items() if id(parameter) in wanted), None)
