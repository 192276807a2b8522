"""A step's record: how its numbers come to the host, and what they say, live or read back from metrics.jsonl.

`record["blocks"]` has a list over blocks of each of BLOCK_NORMS: erasers' gradients, last updates and weights, and of the step's
first student pass, whose prompts show the concept, the eraser's output and the residual stream that it is added to (root of
the sum of squares over the batch).
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from torch import Tensor

from trainer.erasers import LEAVES
from trainer.findings import Finding, finding

BLOCK_NORMS = ("gradient", "update", "weight", "eraser", "residual")
NUM_TIMED, SLOW = 10, 3.0  # of so many steps the median time, over what was predicted; what others published differs by a third at most
LARGEST_ERASER = 10.0  # of the residual stream that its output is added to; the bundled model's reach 1


class Pending:
    """A step's numbers on their way to the host."""

    def __init__(self, step: int, terms: list[str], copy: tuple[Tensor, Any], more: dict[str, Any]):
        self.step, self.terms, self.more = step, terms, more
        self.values, self.event = copy

    def read(self, num_blocks: int) -> tuple[dict[str, Any], bool]:
        """The record, and whether the step was applied. Waits only if the device is more than one step behind."""
        if self.event is not None:
            self.event.synchronize()
        values = self.values.tolist()
        head, rest = values[:len(self.terms) + 3], iter(values[len(self.terms) + 3:])
        scale, left = next(rest), next(rest)
        leaves = [[[next(rest) for _ in LEAVES] for _ in range(num_blocks)] for _ in range(3)]
        norms = [[math.hypot(*leaf) for leaf in kind] for kind in leaves]
        norms += [[next(rest) for _ in range(num_blocks)] for _ in range(2)]
        record = {"step": self.step, **dict(zip(self.terms, head)), "gradient_norm": head[-3],
                  **self.more, "prediction_norms": {"teacher": head[-2], "student": head[-1]},
                  "loss_scale": scale, "blocks": dict(zip(BLOCK_NORMS, norms))}
        bias_only = [i for i, (_, _, weight, bias) in enumerate(leaves[0]) if weight == 0 < bias]
        if bias_only:
            record["bias_only"] = bias_only
        if left:
            record["gradient_left"] = left
        return record, all(map(math.isfinite, head))


def non_finite(record: Mapping[str, Any], **evidence: Any) -> Finding:
    """The finding that a record by itself gives: of predictions, loss and gradients the first that is not finite."""
    predictions, gradients = record.get("prediction_norms", {}), record["blocks"]["gradient"]
    block = None
    if not all(map(math.isfinite, predictions.values())):
        code = "non-finite-activation"
    elif not math.isfinite(record["loss"]):
        code = "non-finite-loss"
    else:
        code = "non-finite-gradient"
        block = max((i for i, norm in enumerate(gradients) if not math.isfinite(norm)), default=None)  # backward meets the last one first
    return finding(code, "training", block=block, step=record["step"] + 1, loss=record["loss"], gradient_norm=record["gradient_norm"], **evidence)


class Judge:
    """What records say, live or read back from metrics.jsonl: trouble that is finite. Show it records in order."""

    def __init__(self, expected_seconds: float | None = None):
        self.expected_seconds = expected_seconds
        """What a step was predicted to take, if that is known."""
        self._moved = False
        self._seconds: deque[float] = deque(maxlen=NUM_TIMED)

    def see(self, record: Mapping[str, Any]) -> list[Finding]:
        """Warnings about one step. Nothing here is about the very first update, when `up` is still zero."""
        blocks, found = record["blocks"], []
        gradient, update = max(blocks["gradient"]), max(blocks["update"])
        phase = dict(severity="warning", step=record["step"] + 1)  # as the progress line counts
        if record["loss"] == 0:
            found.append(finding("nothing-to-learn", "training", **phase, loss=0.0))
        elif gradient == 0:
            found.append(finding("zero-gradient", "training", **phase, gradient_norm=0.0,
                                 num_blocks=len(blocks["gradient"])))
        else:
            found += [finding("zero-gradient", "training", block=i, **phase, loss=record["loss"])
                      for i, norm in enumerate(blocks["gradient"]) if norm == 0]
        if left := record.get("gradient_left"):
            found.append(finding("gradients-not-zeroed", "training", **phase, left_in_last_bias=left))
        found += [finding("dead-gelu", "training", block=i, **phase) for i in record.get("bias_only", ())]
        if gradient > 0 and update == 0 and not record.get("skipped"):
            found.append(finding("weights-never-move", "training", **phase, gradient_norm=gradient, lr=record["lr"]))
        if self._moved and max(blocks["eraser"]) == 0:
            found.append(finding("no-op-adapter", "training", **phase, eraser_output_norm=0.0))
        away = [(i, eraser / residual) for i, (eraser, residual) in enumerate(zip(blocks["eraser"], blocks["residual"]))
                if eraser > LARGEST_ERASER * residual > 0]
        if away:
            found.append(finding("eraser-diverged", "training", block=away[0][0], **phase, eraser_over_residual=max(share for _, share in away),
                                 num_blocks=len(away)))
        self._moved = self._moved or update > 0
        return [*found, *self._slow(record, phase)]

    def _slow(self, record: Mapping[str, Any], where: Mapping[str, Any]) -> Iterator[Finding]:
        """Whether steps take far longer than was predicted."""
        if "seconds" in record:
            self._seconds.append(record["seconds"])
        if not self.expected_seconds or len(self._seconds) < NUM_TIMED or (seconds := median(self._seconds)) <= SLOW * self.expected_seconds:
            return
        phases = record.get("phase_seconds") or {}
        yield finding("slow-steps", "training", **where, seconds=seconds, predicted_seconds=self.expected_seconds,
                      longest_phase=max(phases, key=phases.get, default=None))
