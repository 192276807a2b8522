"""What is looked at before and after a projection is trained."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.findings import Bill, Finding, finding
from trainer.projection_problem import Problem


def examine(problems: Mapping[str, Problem]) -> Bill:
    """Before training: finite layers that were really loaded, and finite inputs."""
    found: list[Finding] = []
    for name, problem in problems.items():
        weight = problem.layer.weight
        if not torch.isfinite(weight).all():
            found.append(finding("non-finite-weight", "weights", module=f"{name}.weight",
                                 num_non_finite=int((~torch.isfinite(weight)).sum())))
        elif weight.std() == 0:
            found.append(finding("wiped-weights", "weights", module=f"{name}.weight", value=weight.flatten()[0].item()))
        for what, rows in (("forget", problem.forget), ("preserve", problem.preserve)):
            if not torch.isfinite(rows).all():
                found.append(finding("non-finite-activation", "embeddings", module=name, inputs=what))
    count = {what: len(getattr(next(iter(problems.values())), what)) for what in ("forget", "preserve")}
    return Bill(findings=tuple(found), checked=(
        f"weights of {', '.join(problems)}: finite, not constant",
        f"their inputs: finite, {count['forget']} of what is forgotten, {count['preserve']} of what is kept"))


def unsound(code: str, **evidence: Any) -> Finding:
    """A loss or gradient that is not finite. What is trained is float32 and its inputs are finite: other fixes than where an eraser is trained."""
    return replace(finding(code, "training", **evidence), cause="a step, or a term of the loss, is too large for float32",
                   fix="a lower --lr, --alpha or --lambda-forget; where those are ordinary, the model's weights may be damaged: copy it again")


def conclude(bill: Bill, problems: Mapping[str, Problem], updates: Mapping[str, Tensor], before: Mapping[str, Tensor],
             num_steps: int) -> Bill:
    """After training: updates that are not zero, and layers that are what they were (`before`: copies of their weights)."""
    found = [replace(finding("no-op-adapter", "adapters", module=name, norm=0.0),
                     cause="no step lowered the loss, and what was kept is the start: steps overshoot, or an update costs more than forgetting gains",
                     fix="--lr 0.01, the default, if it is another; else a higher --lambda-forget, or a lower --lambda-weight")
             for name, update in updates.items() if not update.any()]
    changed = {name: (problem.layer.weight - before[name]).abs().max().item() for name, problem in problems.items()
               if not torch.equal(problem.layer.weight, before[name])}
    found += [finding("frozen-weights-changed", "weights", module=f"{name}.weight", largest_change=change) for name, change in changed.items()]
    return Bill(findings=(*bill.findings, *(f for f in found if f not in bill.findings)), checked=(
        *bill.checked, f"loss and gradient: finite in each of {num_steps} steps",
        "updates: " + ", ".join(f"‖s B A‖ {update.norm().item():.3g} beside ‖W‖ {before[name].norm().item():.3g} in {name}"
                                for name, update in updates.items()),
        "frozen weights: compared bit by bit"))
